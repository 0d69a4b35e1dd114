"""Data on the hub (hf://) are read as from a folder: listed, by byte range, and refused in one line that says what to do."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import Hub, environment
from media import write_barcodes
from store_server import serving

from stdit.data.blocks import BLOCK
from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.identity import content_of

pytest.importorskip("fsspec", reason="needs pip install 'stdit[stores]'")

# huggingface_hub reads the address of the hub when it is imported.
CHILD = """
import json, sys
import numpy as np
from stdit.data.blocks import BLOCK, RemoteFile
from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.identity import content_of

def dataset(root):
    return build_dataset(DataConfig(root=root, num_frames=5, height=32, width=32))

def said(root):
    try:
        dataset(root)
    except ValueError as error:
        return str(error)

data = dataset("hf://datasets/me/set")
found = {
    "records": [data.record(i) for i in range(len(data))],
    "classes": data.class_names,
    "contents": [content_of(row.path) for row in data.rows],
    "pixels": data.load(1, np.random.default_rng(0))["pixels"].tolist(),
    "refused": [said(f"hf://datasets/{name}/set") for name in ("401", "403", "404")] + [said("hf://datasets/me/set/none")],
}
with RemoteFile("hf://datasets/me/set/large.bin") as file:
    file.seek(2 * BLOCK + 5)
    found["part"] = file.read(3).hex()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The clips in a folder, what a process finds of them on the hub, and its requests."""
    root = tmp_path_factory.mktemp("hub")
    for i in range(4):
        (folder := root / f"me/set/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        write_barcodes(folder / f"{i}.mp4", 8 + i)
        (folder / f"{i}.txt").write_text(f"clip {i}")
    (root / "me/set/large.bin").write_bytes(np.random.default_rng(0).bytes(4 * BLOCK))
    with serving(root, Hub) as server:
        settings = {
            **os.environ,
            **environment(server),
            "STDIT_CACHE": str(root / "cache"),
            "STDIT_STORE_TIMEOUT": "20",
        }
        child = subprocess.run([sys.executable, "-c", CHILD], env=settings, capture_output=True, text=True, timeout=120)
        assert child.returncode == 0, child.stderr
        return root / "me/set", json.loads(child.stdout), server.requests


def test_clips_on_the_hub_are_those_of_a_folder(answers):
    folder, found, _ = answers
    here = build_dataset(DataConfig(root=str(folder), num_frames=5, height=32, width=32))
    assert found["records"] == [here.record(i) for i in range(4)] and found["classes"] == here.class_names == ["a", "b"]
    assert found["contents"] == [content_of(row.path) for row in here.rows]
    assert found["pixels"] == here.load(1, np.random.default_rng(0))["pixels"].tolist()


def test_files_on_the_hub_are_listed_at_once_and_read_by_their_bytes(answers):
    folder, found, requests = answers
    assert found["part"] == (folder / "large.bin").read_bytes()[2 * BLOCK + 5 :][:3].hex()
    parts = [part for _, key, part in requests if key.endswith("large.bin")]
    assert parts == [f"bytes={2 * BLOCK}-{3 * BLOCK - 1}"]
    assert all(part is not None for _, key, part in requests if Path(key).suffix in (".mp4", ".txt"))
    assert len([1 for _, key, _ in requests if "/me/set/tree/main" in key]) <= 4


def test_what_the_hub_refuses_is_said_in_one_line_with_a_remedy(answers):
    _, found, _ = answers
    expected = (
        r"hf://datasets/401/set: the store answers 401, no credentials .*log in .*hf auth login, or HF_TOKEN",
        r"hf://datasets/403/set: the store answers 403, no permission; .*log in",
        r"data.root='hf://datasets/404/set' has no files in its store; check the name, or put videos there",
        r"data.root='hf://datasets/me/set/none' has no files in its store; check the name",
    )
    for said, pattern in zip(found["refused"], expected, strict=True):
        assert "\n" not in said and re.search(pattern, said), said


def test_the_hub_is_not_asked_where_that_is_switched_off():
    with pytest.raises(ValueError, match="hf:// URLs cannot be read while HF_HUB_OFFLINE is set; unset it"):
        build_dataset(DataConfig(root="hf://datasets/me/set", num_frames=5, height=32, width=32))
