import json
import os
import threading
import time
import tracemalloc
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import fill

from stdit.conditions import Caption
from stdit.data.base import Captions
from stdit.files import claimed
from stdit.model.stdit import STDiT
from stdit.recipes import train
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.text import CaptionCache, HashedWordEncoder, load_text_encoder
from stdit.vae import TinyVAE

TEXTS = ["a red circle moves left", "a blue square", "", "a red square moves up and up"]


def test_equal_words_differ_by_their_position_only():
    encoder = HashedWordEncoder()
    tokens, mask = encoder.encode(["red circle", "Circle, red!"])
    assert mask.tolist() == [[True] * 3, [True] * 3]
    swapped = tokens[0, [1, 0]] - tokens[1, :2]
    torch.testing.assert_close(
        swapped, torch.stack([swapped[0], -swapped[0]]), atol=1e-5, rtol=1e-5
    )  # only positions differ
    assert not torch.allclose(tokens[0, 0], tokens[1, 1])


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A function that writes a tiny encoder of random weights with a tokenizer of words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    def make(kind: str) -> str:
        folder = tmp_path_factory.mktemp(kind)
        words = sorted({word for text in TEXTS for word in text.split()})
        vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(folder)
        torch.manual_seed(0)
        if kind == "clip":
            config = transformers.CLIPTextConfig(
                vocab_size=32, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=77, eos_token_id=1, pad_token_id=0, bos_token_id=1,
            )  # fmt: skip
            model = transformers.CLIPTextModel(config)
        else:
            shape = {"vocab_size": 32, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
            names = {"t5": ("T5Config", "T5EncoderModel"), "umt5": ("UMT5Config", "UMT5EncoderModel")}[kind]
            model = getattr(transformers, names[1])(getattr(transformers, names[0])(**shape))
        model.save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.parametrize("kind", ["t5", "umt5", "clip"])
def test_padding_does_not_change_the_tokens_of_a_pretrained_encoder(pretrained, kind):
    encoder = load_text_encoder(pretrained(kind))
    assert encoder.channels == 24
    together, alone = encoder.encode(TEXTS), encoder.encode(TEXTS[1:2])
    length = int(alone.mask.sum())
    assert length == 4
    assert together.mask.sum(1).tolist() == [6, 4, 1, 8]
    torch.testing.assert_close(together.tokens[1, :length], alone.tokens[0], atol=1e-5, rtol=1e-5)
    assert load_text_encoder(pretrained(kind)).fingerprint() == encoder.fingerprint()


def test_cached_captions_equal_encoded_ones_and_none_is_read_twice(tmp_path, monkeypatch):
    encoder = HashedWordEncoder()
    monkeypatch.setattr(CaptionCache, "SHARD", 3)
    cache = CaptionCache(tmp_path, encoder)
    cache.add(encoder, TEXTS[:2], progress=False)
    cache.add(encoder, TEXTS * 2, progress=False)
    asked = []
    encode = HashedWordEncoder.encode
    monkeypatch.setattr(HashedWordEncoder, "encode", lambda self, texts: asked.extend(texts) or encode(self, texts))
    again = CaptionCache(tmp_path, encoder)
    monkeypatch.setattr(HashedWordEncoder, "lengths", None)  # of a million captions that are there, minutes
    again.add(encoder, TEXTS)
    assert not asked and len(again) == 4
    fresh, kept = encode(encoder, TEXTS), again(TEXTS)
    assert torch.equal(kept.mask, fresh.mask)
    torch.testing.assert_close(kept.tokens, fresh.tokens, atol=2e-3, rtol=2e-3)  # half precision
    with pytest.raises(ValueError, match="was never encoded"):
        again(["a green cat"])


def test_a_copy_in_another_process_is_sent_no_captions_and_finds_them_all(tmp_path, monkeypatch):
    encoder, texts = HashedWordEncoder(), [f"word{i} and more" for i in range(50)]
    monkeypatch.setattr(CaptionCache, "SHARD", 8)
    cache = CaptionCache(tmp_path, encoder)
    cache.add(encoder, texts, progress=False)
    sent = ForkingPickler.dumps(cache)
    assert len(sent) < 1000
    copy = ForkingPickler.loads(sent)
    assert torch.equal(copy(texts).tokens, cache(texts).tokens)
    assert len(cache) == 51 and torch.equal(copy(texts[::-1]).tokens, cache(texts[::-1]).tokens)  # sorted, and not yet
    assert cache._index.missing(["word7 and more", "word7"]) == ["word7"]


@pytest.fixture
def captions(tmp_path, monkeypatch):
    """A cache of captions in shards of eight, and these captions."""
    monkeypatch.setattr(CaptionCache, "SHARD", 8)
    cache, texts = CaptionCache(tmp_path, HashedWordEncoder()), ["", *(f"word{i} and more" for i in range(50))]
    cache.add(HashedWordEncoder(), texts, progress=False)
    return cache, texts


def reopened(cache: CaptionCache) -> CaptionCache:
    """The cache as another process opens it."""
    return ForkingPickler.loads(ForkingPickler.dumps(cache))


def empty_lists(cache: CaptionCache) -> None:
    """Make the lists of texts of all shards unreadable."""
    for file in cache.folder.glob("captions-*.json"):
        file.write_text("[")


def test_another_process_finds_captions_in_a_table_without_their_texts(captions):
    cache, texts = captions
    wanted = cache(texts)
    empty_lists(cache)
    other = reopened(cache)
    assert torch.equal(other(texts).tokens, wanted.tokens) and len(other) == len(texts)
    with pytest.raises(ValueError, match="was never encoded"):
        other(["a green cat"])


def test_a_cache_without_a_table_is_read_and_gets_one(captions):
    cache, texts = captions
    (cache.folder / "captions.table").unlink()
    again = reopened(cache)
    assert torch.equal(again(texts).tokens, cache(texts).tokens)
    again.add(HashedWordEncoder(), texts, progress=False)
    empty_lists(cache)
    assert torch.equal(reopened(cache)(texts).tokens, cache(texts).tokens)


def test_captions_that_the_table_lacks_are_found_and_added_to_it(captions):
    cache, texts = captions
    table, more = cache.folder / "captions.table", [f"further {i}" for i in range(20)]
    before = table.read_bytes()
    cache.add(HashedWordEncoder(), more, progress=False)
    table.unlink()  # which is mapped
    table.write_bytes(before)  # as of a process that was killed before it stored the table
    again = reopened(cache)
    assert torch.equal(again([*texts, *more]).tokens, cache([*texts, *more]).tokens)
    again.add(HashedWordEncoder(), texts, progress=False)
    empty_lists(cache)
    assert torch.equal(reopened(cache)([*more, *texts]).tokens, cache([*more, *texts]).tokens)


def test_a_damaged_table_changes_no_captions_and_is_replaced(captions):
    cache, texts = captions
    table, wanted = cache.folder / "captions.table", cache(texts).tokens
    whole = table.read_bytes()
    damaged = [whole[:length] for length in (0, 7, 100, len(whole) - 1)]
    damaged += [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(0, len(whole), 23)]
    for data in damaged:
        table.unlink()
        table.write_bytes(data)
        assert torch.equal(reopened(cache)(texts).tokens, wanted)
    reopened(cache).add(HashedWordEncoder(), texts, progress=False)
    empty_lists(cache)
    assert torch.equal(reopened(cache)(texts).tokens, wanted)


def test_captions_of_a_shard_that_is_gone_are_encoded_again_although_the_table_has_them(captions):
    cache, texts = captions
    wanted = cache(texts).tokens
    min(cache.folder.glob("captions-*.safetensors")).unlink()
    again = reopened(cache)
    assert len(again) < len(texts)
    again.add(HashedWordEncoder(), texts, progress=False)
    assert torch.equal(again(texts).tokens, wanted) and torch.equal(reopened(cache)(texts).tokens, wanted)


def test_captions_are_found_where_no_table_can_be_written(captions):
    cache, texts = captions
    table = cache.folder / "captions.table"
    table.unlink()
    table.mkdir()
    again = reopened(cache)
    again.add(HashedWordEncoder(), texts, progress=False)
    assert torch.equal(again(texts).tokens, cache(texts).tokens) and not any(table.iterdir())


def test_captions_that_are_there_are_looked_up_in_blocks_and_not_held_in_memory(tmp_path, monkeypatch):
    encoder, texts = HashedWordEncoder(), [f"word{i} {'x' * 20_000}" for i in range(200)]
    monkeypatch.setattr("stdit.text._BLOCK", 8)
    cache = CaptionCache(tmp_path, encoder)
    cache.add(encoder, texts, progress=False)
    # Each text is made when it is read, as those of an index are.
    read = Captions(SimpleNamespace(captions=lambda: ("".join([text[:99], text[99:]]) for text in texts)))
    tracemalloc.start()
    cache.add(encoder, read, progress=False)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1e6 < sum(map(len, texts)) and list(read) == list(read) == texts


def test_captions_of_a_damaged_shard_are_named_and_those_of_a_lost_one_are_encoded_again(tmp_path, monkeypatch):
    encoder = HashedWordEncoder()
    monkeypatch.setattr(CaptionCache, "SHARD", 2)
    cache = CaptionCache(tmp_path, encoder)
    cache.add(encoder, TEXTS, progress=False)
    wanted = cache(TEXTS)
    first, second = sorted(cache.folder.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{first.name} cannot be read .*remove it") as error:
        CaptionCache(tmp_path, encoder)(TEXTS)
    assert "\n" not in str(error.value)
    first.unlink()
    second.with_suffix(".json").write_text("[")
    again = CaptionCache(tmp_path, encoder)
    again.add(encoder, TEXTS, progress=False)
    assert torch.equal(again(TEXTS).tokens, wanted.tokens)


def test_a_caption_that_is_no_text_ends_in_an_error_and_not_in_waiting(tmp_path):
    with pytest.raises(ValueError, match="surrogates"):
        CaptionCache(tmp_path, HashedWordEncoder()).add(HashedWordEncoder(), ["task \ud800"], progress=False)


def test_loader_processes_read_captions_and_the_one_that_trains_reads_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {
        "name": "t",
        "data": {"source": "shapes", "num_frames": 5, "height": 32, "width": 32, "num_shapes": 8},
        "model": {"size": "S/2", "depth": 1, "hidden_size": 16, "num_heads": 2, "conditioning": "adaln_single"},
        "text": {"encoder": "words"},
        "train": {"steps": 3, "batch_size": 4, "samples": 0, "precision": "fp32", "label_dropout": 0.3},
    }
    Path("t.yaml").write_text(json.dumps(settings))
    assert train.run(["t.yaml", "data.workers=0"]) == 0
    read, here = CaptionCache.read, os.getpid()

    def watched(self, text):
        assert not text or os.getpid() != here, f"the process that trains reads {text!r}"
        return read(self, text)

    watched.__name__ = "read"  # by which a bound method is sent to another process
    monkeypatch.setattr(CaptionCache, "read", watched)
    assert train.run(["t.yaml", "data.workers=1", "name=other"]) == 0
    rows = [Path(f"output/{name}/training_metrics.csv").read_text().splitlines() for name in ("t", "other")]
    assert [row.split(",")[:2] for row in rows[0]] == [row.split(",")[:2] for row in rows[1]]


def test_processes_divide_the_captions_and_each_returns_when_all_are_there(tmp_path, monkeypatch):
    encoder, asked = HashedWordEncoder(), []
    encode = HashedWordEncoder.encode
    texts = [f"word{i}" for i in range(20)]

    def slowly(self, some):
        asked.append((threading.get_ident(), list(some)))
        time.sleep(0.02)
        return encode(self, some)

    monkeypatch.setattr(HashedWordEncoder, "encode", slowly)
    monkeypatch.setattr(CaptionCache, "SHARD", 2)
    monkeypatch.setattr("stdit.text._PATIENCE", 0.01)
    caches = [CaptionCache(tmp_path, encoder) for _ in range(2)]
    jobs = [threading.Thread(target=one.add, args=(encoder, texts, False, (i, 2))) for i, one in enumerate(caches)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    done = [text for _, some in asked for text in some]
    assert sorted(done) == sorted(["", *texts])  # each once
    assert len({who for who, _ in asked}) == 2
    for one in caches:
        assert torch.equal(one(texts).tokens, caches[0](texts).tokens)


def test_captions_that_a_process_died_over_are_encoded_by_another(tmp_path, monkeypatch):
    encoder, cache = HashedWordEncoder(), CaptionCache(tmp_path, HashedWordEncoder())
    monkeypatch.setattr("stdit.text._PATIENCE", 0.01)
    held = cache._file(["", *TEXTS[:2]])
    held.parent.mkdir(parents=True)
    with claimed([held]):
        job = threading.Thread(target=cache.add, args=(encoder, TEXTS[:2], False))
        job.start()
        job.join(0.1)
        assert job.is_alive() and not len(cache)
    job.join()
    assert len(cache) == 3

    class Broken(HashedWordEncoder):
        def encode(self, texts):
            raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        cache.add(Broken(), ["more"], progress=False)


def test_a_shard_without_an_index_is_ignored(tmp_path):
    encoder = HashedWordEncoder()
    cache = CaptionCache(tmp_path, encoder)
    cache.add(encoder, TEXTS, progress=False)
    next(cache.folder.glob("*.json")).unlink()
    assert len(CaptionCache(tmp_path, encoder)) == 0


def test_the_null_caption_is_padded_to_the_length_of_the_captions():
    conditioner = Caption(64)
    conditioner.tokenize = HashedWordEncoder().encode
    value, null = conditioner.pair(TEXTS[:2], 2)
    assert value.tokens.shape == null.tokens.shape and null.mask.sum(2).tolist() == [[1], [1]]


@pytest.mark.parametrize(
    ("name", "message"), [("no/such/folder/here", "cannot be loaded"), ("/nowhere", "is not a folder")]
)
def test_a_missing_encoder_is_refused_in_one_line(name, message):
    with pytest.raises(ValueError, match=message):
        load_text_encoder(name)


def test_an_encoder_of_another_kind_is_refused(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="is a 'bert'; stdit takes t5"):
        load_text_encoder(str(tmp_path))


@pytest.fixture
def pipe():
    model = fill(
        STDiT(
            2, 32, 4, in_channels=16, num_classes=3, caption_channels=64, learn_sigma=False, conditioning="adaln_single"
        )
    )
    vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
    return STDiTPipeline(model.eval(), vae, STDiTScheduler(), 5, 16, 16, text_encoder="words")


def test_a_pipeline_accepts_captions_labels_or_both(pipe, tmp_path):
    how = {"num_inference_steps": 2, "progress": False, "guidance_scale": 3.0}
    one, two = pipe(captions=["a red circle", "a blue square"], **how)
    assert not torch.allclose(one, two)
    alone = pipe(captions="a red circle", **how)
    torch.testing.assert_close(alone[0], one, atol=1e-5, rtol=1e-5)  # its neighbour's longer caption changes nothing
    assert not torch.allclose(pipe([1], captions="a red circle", **how), alone)
    silent = pipe(num_videos=1, **how)
    assert torch.equal(silent, pipe(captions="", **how))
    pipe.save_pretrained(tmp_path)
    assert torch.equal(STDiTPipeline.from_pretrained(tmp_path)(captions="a red circle", **how), alone)
    clip = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    assert pipe.extend(clip, after=4, captions="a red circle", **how).shape[2] == 9


def test_captions_that_do_not_fit_the_call_are_refused(pipe, tiny_model):
    with pytest.raises(ValueError, match="2 class_labels for 3 clips"):
        pipe([0, 1], captions=["a", "b", "c"])
    with pytest.raises(ValueError, match="3 captions for 2 clips"):
        pipe.animate(torch.zeros(2, 3, 16, 16), captions=["a", "b", "c"])
    other = STDiTPipeline(
        tiny_model(in_channels=16, learn_sigma=False), fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8))), STDiTScheduler(), 1, 16, 16
    )  # fmt: skip
    with pytest.raises(ValueError, match="trained without captions"):
        other(captions="a red circle")
    pipe.transformer.register_to_config(caption_channels=32)
    with pytest.raises(ValueError, match="tokens of 64 channels, the model takes 32"):
        pipe(captions="a red circle")
