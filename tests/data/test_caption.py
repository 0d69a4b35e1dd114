"""Captions by a vision-language model, with a tiny random one of transformers."""

import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (it is in stdit[transformers])")

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from stdit.data.captioner import Captioner
from stdit.data.manifest import read_manifest
from stdit.data.video_write import write_video
from stdit.recipes import caption

WORDS = ["<pad>", "<end>", "<unk>", "<image>", "user", "assistant", "describe", *(f"word{i}" for i in range(20))]
CHAT = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llava of a few thousand random weights, with a processor that needs no torchvision."""
    where = tmp_path_factory.mktemp("vlm")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", additional_special_tokens=["<image>"]
    )  # fmt: skip
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.LlavaProcessor(
        pictures, words, patch_size=8, vision_feature_select_strategy="default", chat_template=CHAT, num_additional_image_tokens=1
    )  # fmt: skip
    processor.save_pretrained(where)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    text = {"model_type": "llama", "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    torch.manual_seed(3)
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision}, text_config=text, image_token_id=3, eos_token_id=1, pad_token_id=0
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.5 * torch.randn_like(value))
    model.save_pretrained(where)
    return where


@pytest.fixture
def manifest(tmp_path):
    rows = []
    for i in range(3):
        write_video(tmp_path / f"{i}.mp4", np.full((5, 16, 16, 3), 20 + 100 * i, np.uint8), fps=8)
        rows.append({"path": f"{i}.mp4", "caption": "mine" if i == 1 else "", "start": i})
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "clips.jsonl"


def run(manifest, folder, *more):
    return caption.main([str(manifest), "--model", str(folder), "--frames", "2", "--max-tokens", "6", *more])


def rows_of(manifest):
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def test_missing_captions_are_those_of_the_model_and_nothing_else_changes(manifest, folder, capsys):
    before = rows_of(manifest)
    assert run(manifest, folder) == 0
    assert "2 captions written, 1 were there" in capsys.readouterr().out
    after = rows_of(manifest)
    frames = [np.full((16, 16, 3), 20, np.uint8)] * 2
    captioner = Captioner(folder)
    assert after[0]["caption"] == captioner(frames, max_tokens=6) != ""
    assert after[1] == before[1]
    assert [{**row, "caption": ""} for row in after] == [{**row, "caption": ""} for row in before]
    assert (
        captioner([np.full((16, 16, 3), 20, np.uint8)], "describe", 6) != after[0]["caption"]
    )  # it depends on what it gets
    assert run(manifest, folder) == 0
    assert "all 3 clips have a caption" in capsys.readouterr().out
    assert sorted(path.name for path in manifest.parent.iterdir() if not path.name.startswith(".")) == ["0.mp4", "1.mp4", "2.mp4", "clips.jsonl"]  # fmt: skip


def test_a_call_that_was_stopped_goes_on_after_what_it_had_written(manifest, folder, monkeypatch):
    answer = Captioner.__call__
    asked = []

    def counted(self, *arguments):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(self, *arguments)

    monkeypatch.setattr(Captioner, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        run(manifest, folder)
    first = rows_of(manifest)
    assert [bool(row["caption"]) for row in first] == [True, True, False]
    # as if it had been killed: the journal has the caption, the manifest not yet, and a line was cut
    manifest.write_text(
        "".join(json.dumps({**row, "caption": row["caption"] * (i == 1)}) + "\n" for i, row in enumerate(first))
    )
    with open(manifest.with_name("clips.captions.jsonl"), "a") as stream:
        stream.write('{"path": "cut')
    assert run(manifest, folder) == 0
    assert len(asked) == 3
    assert rows_of(manifest)[0] == first[0] and all(row["caption"] for row in rows_of(manifest))


def test_columns_of_other_names_and_csv_stay_as_they_are(tmp_path, manifest, folder):
    table = tmp_path / "clips.csv"
    table.write_text('video,text,note\n0.mp4,,"a, b"\n1.mp4,mine,c\n')
    assert run(table, folder) == 0
    assert table.read_text().splitlines()[0] == "video,text,note"
    rows = read_manifest(table).rows
    assert rows[0].caption and rows[1].caption == "mine" and rows[0].columns["note"] == "a, b"


def test_clips_that_cannot_be_read_are_named_and_the_others_written(manifest, folder, capsys):
    (manifest.parent / "0.mp4").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="no caption: .*0.mp4"):
        assert run(manifest, folder) == 0
    assert "1 captions written, 1 were there; 1 clips cannot be read" in capsys.readouterr().out
    assert [bool(row["caption"]) for row in rows_of(manifest)] == [False, True, True]


def changed(folder, copy, **entries):
    """A copy of a model's folder with other entries in one of its JSON files, or without a file."""
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    for name, change in entries.items():
        file = copy / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return copy


def test_models_that_bring_code_or_answer_nothing_are_refused(tmp_path, folder):
    evil = tmp_path / "ran"
    code = {"auto_map": {"AutoConfig": "evil.Config"}}
    for i, name in enumerate(("config", "tokenizer_config", "processor_config")):
        copy = changed(folder, tmp_path / f"code{i}", **{name: code})
        (copy / "evil.py").write_text(f"open({str(evil)!r}, 'w')\nclass Config: pass")
        with pytest.raises(ValueError, match="comes with code of its own"):
            Captioner(copy)
    assert not evil.exists()
    with pytest.raises(ValueError, match="is no folder"):
        Captioner("owner/model")
    silent = changed(folder, tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        Captioner(silent)
    pickled = changed(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        Captioner(pickled)
    other = tmp_path / "clip"
    transformers.CLIPTextConfig(hidden_size=8, num_hidden_layers=1).save_pretrained(other)
    with pytest.raises(ValueError, match="answers no questions about pictures"):
        Captioner(other)


def test_what_is_no_manifest_is_refused_before_a_model_is_loaded(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("stdit.recipes.caption.Captioner", None)
    for name in (tmp_path, tmp_path / "clips.parquet"):
        with pytest.raises(ValueError, match="no manifest with room for captions"):
            run(name, folder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'stdit\[transformers\]'"):
        Captioner(folder)
