"""Files, names and texts of strangers: bounded before they are read, kept inside, printed harmlessly; errors are one line."""

import csv
import gzip
import importlib
import json
import os
import shutil
import struct
import time
import zipfile

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from stdit import files
from stdit.checkpoint.files import read_weights
from stdit.data.idx import read_idx
from stdit.files import atomic_write, check_name, check_writable, inside, printable, read_json
from stdit.model.stdit import STDiT
from stdit.recipes import entry
from stdit.recipes.cli import COMMANDS
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.text import load_text_encoder
from stdit.vae.tiny import TinyVAE
from stdit.weights import LARGEST_HEADER, safetensors_shapes


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "m"
    model = STDiT(depth=2, hidden_size=32, num_heads=2, num_classes=2, class_names=["a", "b"], sample_size=(2, 4, 4))
    vae = TinyVAE(16, [8, 8], [1, 1], [8, 8, 8], [1, 1, 1])
    STDiTPipeline(model, vae, STDiTScheduler(), num_frames=5, height=32, width=32).save_pretrained(folder)
    return folder


def changed(folder, where, tmp_path, **changes):
    """A copy of a model folder with other values in one of its JSON files."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / where).read_text())
    (copy / where).write_text(json.dumps(config | changes))
    return copy


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": 10**9}, "depth must be"),
        ({"depth": 9000}, "asks for"),
        ({"depth": "2"}, "describes no model"),
        ({"depth": None}, "describes no model"),
        ({"hidden_size": 10**6}, "asks for"),
        ({"num_classes": 10**9, "class_names": None}, "asks for"),
        ({"patch_size": [1, 10**9, 10**9]}, "describes no model"),
        ({"mlp_ratio": 1e9}, "asks for"),
        ({"class_names": [1, 2]}, "not a name"),
    ],
)
def test_a_model_larger_than_its_weights_is_refused_before_memory_is_taken(model_folder, tmp_path, changes, said):
    folder, began = changed(model_folder, "transformer/config.json", tmp_path, **changes), time.perf_counter()
    for load in (lambda: STDiTPipeline.from_pretrained(folder), lambda: STDiT.from_pretrained(folder)):
        with pytest.raises(ValueError, match=said) as error:
            load()
        assert "\n" not in str(error.value)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("vae/config.json", {"encoder_blocks": [1, 10**7]}),
        ("vae/config.json", {"encoder_widths": [10**6, 10**6]}),
        ("vae/config.json", {"channels": "x"}),
        ("scheduler/scheduler_config.json", {"shift": float("nan")}),
        ("scheduler/scheduler_config.json", {"shift": "x"}),
        ("model_index.json", {"vae": 7}),
        ("model_index.json", {"transformer": ["diffusers", "UNet2DModel"]}),
        ("model_index.json", {"scheduler": ["os", "system"]}),
        ("model_index.json", {"num_frames": "many"}),
        ("model_index.json", {"fps": float("nan")}),
        ("model_index.json", {"objective": "evil"}),
    ],
)
def test_parts_of_a_model_folder_that_are_none_are_refused_in_one_line(model_folder, tmp_path, where, changes):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (many messages)
        STDiTPipeline.from_pretrained(changed(model_folder, where, tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_a_whole_model_folder_loads_and_draws_no_random_number_for_its_check(model_folder):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with torch.random.fork_rng():
        STDiTPipeline.from_pretrained(model_folder)
    assert torch.equal(torch.rand(1), expected)


def header(length: int, entries: dict, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", length or len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        header(LARGEST_HEADER + 1, {}),
        header(0, {"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}),
        header(0, {"a": 7}),
        header(0, {"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 0]}}),
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
)
def test_a_safetensors_header_is_bounded_by_the_file(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    for read in (safetensors_shapes, read_weights):
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            read(path)


def test_a_torch_file_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    whole, packed, spread = (tmp_path / f"{name}.pt" for name in ("whole", "packed", "spread"))
    torch.save({"a": torch.zeros(1000)}, whole)
    assert read_weights(whole).tensors["a"].shape == (1000,)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, spread)
    for path in (packed, spread):
        with pytest.raises(ValueError, match=r"unpack to more|spread to"):
            read_weights(path)


def test_an_idx_file_takes_the_memory_that_its_header_and_its_size_allow(tmp_path):
    values = np.arange(64, dtype=np.uint8).reshape(4, 4, 4)
    head = struct.pack(">HBBIII", 0, 8, 3, 4, 4, 4)
    plain, packed = tmp_path / "a-images-idx3-ubyte", tmp_path / "b-images-idx3-ubyte.gz"
    plain.write_bytes(head + values.tobytes())
    packed.write_bytes(gzip.compress(head + values.tobytes()))
    assert (read_idx(plain) == values).all()
    assert (read_idx(packed) == values).all()
    packed.write_bytes(gzip.compress(head + bytes(10**7)))
    with pytest.raises(ValueError, match="it has more than 64 values"):
        read_idx(packed)
    packed.write_bytes(gzip.compress(struct.pack(">HBBIII", 0, 8, 3, 10**6, 100, 100)))
    with pytest.raises(ValueError, match="gunzip"):
        read_idx(packed)
    os.truncate(plain, 1 << 33)
    with pytest.raises(ValueError, match="cut short or damaged"):
        read_idx(plain)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="no file"):
        read_idx(tmp_path / "fifo")


def test_a_lora_of_another_model_or_with_odd_numbers_is_refused(tiny_model, tmp_path):
    pytest.importorskip("peft")
    good = {
        "blocks.0.attn.qkv.lora_A.weight": torch.zeros(4, 32),
        "blocks.0.attn.qkv.lora_B.weight": torch.zeros(96, 4),
    }
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(good, path)
    tiny_model().load_lora_adapter(tmp_path)
    for change in (
        {"blocks.9.attn.qkv.lora_A.weight": torch.zeros(4, 32)},
        {"blocks.0.attn.qkv.lora_A.weight": torch.zeros(4, 7)},
        {"blocks.0.attn.qkv.lora_A.weight": torch.zeros(1000, 32)},
        {"blocks.0.attn.qkv.lora_A.weight": torch.full((4, 32), float("nan"))},
    ):
        save_file(good | change, path)
        with pytest.raises(ValueError, match=r"another model|not finite"):
            tiny_model().load_lora_adapter(tmp_path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no LoRA"):
        tiny_model().load_lora_adapter(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_text_encoder_with_code_of_its_own_is_refused_without_a_question(tmp_path, file):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (tmp_path / file).write_text(json.dumps({"model_type": "t5", "auto_map": {"AutoConfig": "evil.E"}}))
    with pytest.raises(ValueError, match="code of its own"):
        load_text_encoder(str(tmp_path))


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "/a", ".a", "a\0b", "a\nb", "a\\b", "x" * 300])
def test_a_name_that_becomes_a_path_is_one_visible_part_of_it(name):
    with pytest.raises(ValueError, match="is not a folder name"):
        check_name(name)
    assert check_name("run-1 ü") == "run-1 ü"


def test_a_listed_file_stays_inside_its_folder(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    (tmp_path / "root" / "loop").symlink_to("loop")
    assert inside(tmp_path / "root", "a/b.mp4", "list") == (tmp_path / "root/a/b.mp4").resolve()
    for name in ("../x", "/etc/passwd", "link/x", "a/../../x", "a\0b"):
        with pytest.raises(ValueError, match=r"leads outside|is not a path"):
            inside(tmp_path / "root", name, "list")


def test_texts_of_strangers_do_nothing_to_a_terminal():
    assert printable("Größe 東京 🙂") == "Größe 東京 🙂"
    odd = "\x1b]0;x\x07\x9b31m\u202e\u2028\n\ud800"
    assert printable(odd).isascii()
    assert printable(odd).isprintable()


def test_a_json_file_is_bounded_in_depth_and_size(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    assert read_json(path) == {}
    for text in ("[" * 100_000, "{", "[]", '{"a": NaN}', "\udcff"):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match="download it again"):
            read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    monkeypatch.setattr(files, "LARGEST_JSON", 7)
    with pytest.raises(ValueError, match="download it again"):
        read_json(path)


def fail(path, make):
    with atomic_write(path) as tmp:
        make(tmp)
        raise SafetensorError("I/O error")


def test_a_writer_that_meets_a_full_disk_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    with atomic_write(tmp_path / "folder") as tmp:
        tmp.mkdir()
        (tmp / "a").write_text("x")
    assert (tmp_path / "folder" / "a").read_text() == "x"
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    for make in (lambda path: path.mkdir(), lambda path: path.write_text("half")):
        with pytest.raises(OSError, match="No space left"):
            fail(tmp_path / "new", make)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_output_is_tried_before_work_up_to_the_longest_name(tmp_path):
    check_writable(tmp_path / "new" / ("x" * 251 + ".mp4"))
    assert list((tmp_path / "new").iterdir()) == []
    with atomic_write(tmp_path / ("x" * 251 + ".mp4")) as tmp:
        assert tmp.suffix == ".mp4"
        tmp.write_text("x")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / ("x" * 256), tmp_path / "file" / "a"):
        with pytest.raises(OSError, match=r"name too long|exists|directory"):
            check_writable(path)


def symlink_loop(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    return (tmp_path / "loop").resolve(strict=False)


def nested(depth=0):
    return nested(depth + 1)


CAUSES = {
    "memory": lambda path: bytearray(1 << 60),
    "memory of a tensor": lambda path: torch.empty(1 << 58),
    "memory of a device": lambda path: exec(
        "raise torch.OutOfMemoryError('CUDA out of memory.\\nmore')", {"torch": torch}
    ),
    "recursion": lambda path: nested(),
    "JSON": lambda path: json.loads("["),
    "zip": lambda path: zipfile.ZipFile(__file__),
    "csv": lambda path: next(csv.reader(["a" * 200_000])),
    "safetensors": lambda path: save_file({"a": torch.zeros(1)}, path / "none" / "a"),
    "a message of several lines": lambda path: int("1\x1b[31m\n2"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_what_a_file_or_the_memory_causes_is_one_line_without_control_characters(cause, tmp_path, capsys):
    assert entry.run(lambda argv: CAUSES[cause](tmp_path)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert len(line) < 2100


def test_a_loop_of_links_is_one_line(tmp_path, capsys):
    def main(argv):
        raise RuntimeError(f"Symlink loop from {str(tmp_path)!r}")

    assert entry.run(main) == 1
    assert "Symlink loop" in capsys.readouterr().err


def test_every_command_ends_so_also_when_it_is_called_from_python():
    for name in COMMANDS:
        recipe = importlib.import_module(f"stdit.recipes.{name.replace('-', '_')}")
        assert hasattr(recipe.main, "__wrapped__"), f"{name} lacks @command"


def test_what_is_written_can_be_read_by_whom_the_umask_lets(tmp_path):
    with atomic_write(tmp_path / "folder") as folder:
        folder.mkdir()
        save_file({"x": torch.zeros(2)}, folder / "weights.safetensors")
    with atomic_write(tmp_path / "plain.txt") as path:
        path.write_text("x")
    (tmp_path / "usual").touch()
    modes = {
        path.stat().st_mode
        for path in (tmp_path / "folder/weights.safetensors", tmp_path / "plain.txt", tmp_path / "usual")
    }
    assert len(modes) == 1
