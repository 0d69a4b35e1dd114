"""Runs whose model is sharded over processes (gloo on CPUs)."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_files import largest_difference, losses, state
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

from stdit import hashes
from stdit.config import Config, load_typed
from stdit.hashes import describe_files
from stdit.model.stdit import STDiT
from stdit.recipes import export, train
from stdit.recipes.build import check_context
from stdit.recipes.models import find_checkpoint, pipeline_of
from stdit.training import shard_files, shards
from stdit.training.config import ParallelConfig
from stdit.training.parallel import effective, group_of_one, make_mesh, parallelize
from stdit.training.shard_files import ShardedTensors
from stdit.training.state import damage, list_checkpoints, read_checkpoint, shared_check
from stdit.vae import load_vae

CONFIG = """
name: t
data: {source: shapes, num_frames: 5, height: 32, width: 32, num_shapes: 40, workers: 0}
model: {size: S/2, depth: 2, hidden_size: 32, num_heads: 2, patch_size: [1, 2, 2]}
train: {steps: 6, decay_steps: 20, batch_size: 4, optimizer: muon, lr: 1.0e-3, ema_decay: 0.9, checkpoint_every: 3,
        log_every: 2, preview_every: 4, samples: 2, sample_steps: 2, precision: fp32,
        holdout: 0.2, guide_step: 3, average_lengths: [0.05, 0.1]}
"""
SHARDED = "train.parallel.shard=fsdp"


CONTEXT = "train.parallel.context=2"
THIRTEEN = ["data.num_frames=13", "train.steps=4", "train.samples=0", "model.num_heads=2"]
HALF = ["train.precision=bf16", "train.samples=0", "train.steps=4"]
# In a step six clips of 8 tokens or four of 12, which two processes can share.
SIZES = ["data.sizes=[[5,32,32],[9,32,32]]", "train.tokens=48", "train.steps=4", "train.samples=0"]
# Every way in which two processes share the work of a run, by the name of its run.
TWO = {
    "two": [SHARDED],
    "copies": ["train.samples=0"],  # data parallel
    "parts": [
        SHARDED,
        "train.micro_batch=1",
        "train.parallel.reshard=false",
        "train.samples=0",
        "train.preview_every=100",
    ],
    "frames": [CONTEXT, *THIRTEEN],
    # It also checkpoints, in recomputed blocks of a sharded model whose tokens are exchanged.
    "sharded frames": [CONTEXT, SHARDED, "model.gradient_checkpointing=selective", *THIRTEEN],
    "halves": [SHARDED, *HALF],
    "gathered halves": [SHARDED, "train.parallel.gather_bf16=true", *HALF],
    "ring": [CONTEXT, SHARDED, "train.parallel.ring=2", *THIRTEEN],
    "buckets": [SHARDED, *SIZES],
    # In the host's memory, where gradients of micro-batches are summed.
    "host": [
        SHARDED,
        "train.parallel.offload=true",
        "train.micro_batch=1",
        "train.samples=0",
        "train.preview_every=100",
    ],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which runs of one process, and of two that share its work, were made."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "t.yaml").write_text(CONFIG)
    before = os.getcwd()
    os.chdir(folder)
    assert train.run(["t.yaml", "name=one"]) == 0
    assert train.run(["t.yaml", "name=thirteen", *THIRTEEN]) == 0
    assert train.run(["t.yaml", "name=sizes", *SIZES]) == 0
    runs = [["t.yaml", f"name={name}", *settings] for name, settings in TWO.items()]
    script = str(Path(__file__).with_name("several_runs.py"))
    done = run_command([*LAUNCHER, "--nproc-per-node", "2", "--standalone", script, json.dumps(runs)])
    assert done.returncode == 0 and "offload=true has no effect" not in done.stderr
    yield folder
    os.chdir(before)


LAUNCHER = [sys.executable, "-m", "torch.distributed.run"]


def command_of(processes: int, *overrides: str) -> list[str]:
    launcher = [*LAUNCHER, "--nproc-per-node", str(processes), "--standalone"]
    return [*launcher, "-m", "stdit", "train", "t.yaml", *overrides]


def launch(processes: int, *overrides: str) -> subprocess.CompletedProcess:
    return run_command(command_of(processes, *overrides))


def run_command(command: list[str]) -> subprocess.CompletedProcess:
    # A process crashed once in pybind11's table of instances, for no reason that was found: a crash says where Python was.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    if done.returncode:
        print(done.stderr[-20_000:])
    return done


def test_a_sharded_run_has_the_losses_and_the_weights_of_one_process(home):
    assert losses("two") == pytest.approx(losses("one"), rel=1e-6)
    assert largest_difference(state("one", 6), state("two", 6)) < 1e-3


def test_processes_with_a_copy_of_the_model_each_have_the_losses_and_the_weights_of_one(home):
    assert losses("copies") == pytest.approx(losses("one"), rel=1e-6)
    assert largest_difference(state("one", 6), state("copies", 6)) < 1e-3


def test_a_sharded_run_whose_gradients_add_up_and_whose_weights_stay_gathered_is_that_of_one_process(home):
    assert losses("parts") == pytest.approx(losses("one"), rel=1e-6)
    assert largest_difference(state("one", 6), state("parts", 6)) < 1e-3


def test_two_processes_in_the_hosts_memory_have_the_losses_and_the_weights_of_one_without(home):
    assert losses("host") == pytest.approx(losses("one"), rel=1e-6)
    assert largest_difference(state("one", 6), state("host", 6)) < 1e-3


def test_buckets_whose_clips_two_processes_can_share_have_the_losses_of_one(home):
    assert losses("buckets") == pytest.approx(losses("sizes"), rel=1e-6)


def test_two_processes_have_the_held_out_loss_the_guide_and_the_averages_of_one(home):
    held_out = losses("one", "held_out_loss")
    assert len(held_out) == 1 and losses("two", "held_out_loss") == pytest.approx(held_out, rel=1e-5)
    assert losses("copies", "held_out_loss") == pytest.approx(held_out, rel=1e-6)
    for file in ("models/{}/guide/diffusion_pytorch_model.safetensors", "checkpoints/{}/averages/step-6.safetensors"):
        one, two = (load_file(file.format(name)) for name in ("one", "two"))
        assert largest_difference(one, two) < 2e-3  # the averages are kept in 16 bits


def test_processes_share_out_the_previews_of_one(home):
    one, two = (np.asarray(Image.open(f"output/{name}/samples/step-0000004.png"), float) for name in ("one", "two"))
    assert one.shape == two.shape and abs(one - two).mean() < 0.5 and one.std() > 10
    clips = [
        sorted(path.name for path in Path(f"output/{name}/samples/step-0000004").iterdir()) for name in ("one", "two")
    ]
    assert clips[0] == clips[1] and len(clips[0]) == 2


@pytest.mark.parametrize("name", ["frames", "sharded frames", "ring"])
def test_processes_that_share_the_frames_of_clips_have_the_losses_of_one(home, name):
    assert losses(name) == pytest.approx(losses("thirteen"), rel=1e-6)
    assert largest_difference(state("thirteen", 4), state(name, 4)) < 1e-3


def test_every_process_writes_its_rows_and_no_pickle_is_written(home):
    folder = Path("checkpoints/two/step-6")
    assert damage(folder) is None
    names = {file.name for file in folder.iterdir()}
    assert names == {"info.json", "MANIFEST.json"} | {
        f"{group}-0000{i}-of-00002.safetensors"
        for group in ("model", "ema", "optimizer_0", "optimizer_1", "average_0", "average_1", "guide")
        for i in (1, 2)
    }
    sizes = [sum(file.stat().st_size for file in folder.glob(f"model-0000{i}-*")) for i in (1, 2)]
    assert 0.8 < sizes[0] / sizes[1] < 1.25


def test_a_sharded_run_exports_the_model_of_one_process(home):
    one, two = (load_file(f"models/{name}/transformer/diffusion_pytorch_model.safetensors") for name in ("one", "two"))
    assert largest_difference(one, two) < 1e-3
    assert Path("output/two/samples/step-0000004.png").is_file()
    shutil.move("models/two", "exported")
    assert export.main(["two"]) == 0
    again = load_file("models/two/transformer/diffusion_pytorch_model.safetensors")
    assert all(
        torch.equal(load_file("exported/transformer/diffusion_pytorch_model.safetensors")[k], again[k]) for k in again
    )


def test_a_model_and_its_guide_are_gathered_from_shards_a_tensor_at_a_time(home, monkeypatch):
    read, most, real = [], [0], ShardedTensors.rows

    def counted(self, *given):
        found = real(self, *given)
        read.append((StorageWeakRef(found.untyped_storage()), found.nbytes))
        most[0] = max(most[0], sum(size for storage, size in read if not storage.expired()))
        return found

    monkeypatch.setattr(ShardedTensors, "rows", counted)
    pipe = pipeline_of(find_checkpoint(Path("checkpoints/two/step-6")))
    sizes = [value.nbytes for value in pipe.transformer.state_dict().values()]
    assert most[0] <= 2 * max(sizes) < sum(sizes) / 3  # beside the two models
    assert sum(size for _, size in read) == 2 * sum(sizes)  # each weight once
    monkeypatch.undo()
    saved = state("two", 6)
    for group, model in (("ema", pipe.transformer), ("guide", pipe.guide)):
        assert all(torch.equal(value, saved[f"{group}/{name}"]) for name, value in model.named_parameters())


def test_one_process_goes_on_from_the_shards_of_two(home):
    shutil.copytree("checkpoints/two/step-3", "checkpoints/alone/step-3")
    assert train.run(["t.yaml", "name=alone"]) == 0
    assert largest_difference(state("two", 6), state("alone", 6)) < 1e-3


def test_a_damaged_shard_is_found_and_two_processes_go_on_from_the_checkpoint_before_to_equal_bits(home):
    shutil.copytree("checkpoints/two", "checkpoints/damaged")
    shard = Path("checkpoints/damaged/step-6/ema-00002-of-00002.safetensors")
    shard.write_bytes(shard.read_bytes()[:-8] + b"\0" * 8)
    assert "ema-00002-of-00002.safetensors does not match its hash" in str(damage(shard.parent))
    shard.unlink()
    assert "ema-00002-of-00002.safetensors is missing" in str(damage(shard.parent))
    assert damage(Path("checkpoints")) == "MANIFEST.json is missing: copied in part?"
    done = launch(2, "name=damaged", SHARDED, "train.samples=0")
    assert done.returncode == 0 and "resumed from checkpoints/damaged/step-3" in done.stdout
    assert largest_difference(state("two", 6), state("damaged", 6)) == 0


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(one, marks=pytest.mark.slow) for one in ("SIGUSR1", "SIGKILL"))]
)
def test_a_signal_to_the_launcher_and_its_death_save_the_shards_of_all(home, name):
    folder = Path(f"checkpoints/stopped-{name}")
    process = subprocess.Popen(
        command_of(2, f"name={folder.name}", SHARDED, "train.steps=100000", "train.preview_every=100000", "train.decay_steps=null"),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGUSR1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list_checkpoints(folder) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(getattr(signal, name))
    said = "".join(process.communicate(timeout=60))  # until the output of all is closed
    newest = list_checkpoints(folder)[0]
    assert damage(newest) is None and not list(newest.parent.glob(".tmp*"))
    assert len(losses(folder.name)) == int(newest.name.removeprefix("step-"))
    assert "and saved; run the same command again" in said and ("the launcher of this process is gone" in said) == (
        name == "SIGKILL"
    )


@pytest.mark.parametrize("fresh", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_node_without_the_folder_of_checkpoints_says_so_before_step_1(home, tmp_path, fresh):
    shutil.copy("t.yaml", tmp_path)
    name = "fresh" if fresh else "apart"
    if not fresh:
        shutil.copytree("checkpoints/two", "checkpoints/apart")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1",
             "--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "stdit", "train", "t.yaml", f"name={name}", *[SHARDED] * fresh],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank, folder in enumerate((home, tmp_path))
    ]  # fmt: skip
    said = "".join(node.communicate(timeout=60)[1] for node in nodes)
    assert all(node.returncode for node in nodes), said
    told = "process 1 does not see checkpoints/fresh" if fresh else "process 1 has checkpoint None, but process 0 has"
    assert told in said and "a folder that they share" in said
    assert not fresh or not list((home / "checkpoints/fresh").iterdir())


def test_some_rows_of_shards_are_read_without_the_others(tmp_path):
    whole = torch.arange(30.0).reshape(10, 3)
    for i, first in enumerate((0, 4, 8)):
        metadata = {"rows": f'{{"w": {first}}}'}
        save_file(
            {"w": whole[first : first + 4].contiguous()}, tmp_path / f"model-0000{i + 1}-of-00003.safetensors", metadata
        )
    found = ShardedTensors(sorted(tmp_path.iterdir()))
    assert torch.equal(found["w"], whole) and len(found) == 1
    for first in range(11):
        for end in range(first, 11):
            assert torch.equal(found.rows("w", first, end), whole[first:end])


def test_only_the_files_that_have_the_rows_are_opened(tmp_path, monkeypatch):
    for i in range(3):
        save_file(
            {"w": torch.ones(4, 3)}, tmp_path / f"model-0000{i + 1}-of-00003.safetensors", {"rows": f'{{"w": {4 * i}}}'}
        )
    found, opened = ShardedTensors(sorted(tmp_path.iterdir())), []
    real = shard_files.safe_open
    monkeypatch.setattr(
        shard_files, "safe_open", lambda file, **how: opened.append(file.name[9:11]) or real(file, **how)
    )
    assert found.shape_of("w") == (12, 3) and opened == []
    found.rows("w", 4, 8)
    assert opened == ["02"]


@pytest.mark.parametrize("harmed", ["model-00001-of-00002", "model-00002-of-00002", "ema-00001-of-00002", "info"])
def test_each_file_of_a_checkpoint_is_hashed_by_one_process_and_all_learn_of_its_damage(tmp_path, monkeypatch, harmed):
    folder = tmp_path / "step-1"
    folder.mkdir()
    for name in ("model-00001-of-00002", "model-00002-of-00002", "ema-00001-of-00002"):
        save_file({"w": torch.ones(4)}, folder / f"{name}.safetensors")
    (folder / "info.json").write_text('{"step": 1}')
    (folder / "MANIFEST.json").write_text(json.dumps(describe_files(folder, sorted(folder.iterdir()))))
    hashed = []
    monkeypatch.setattr(
        hashes, "file_sha256", lambda file, real=hashes.file_sha256: hashed.append(file.name) or real(file)
    )
    assert [damage(folder, (part, 3)) for part in range(3)] == [None] * 3
    assert len(hashed) == len(set(hashed)) == 4
    file = next(folder.glob(f"{harmed}.*"))
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    reasons = [damage(folder, (part, 3)) for part in range(3)]
    assert sum(reason is not None for reason in reasons) == 1
    monkeypatch.setattr("stdit.training.state.gather_object", lambda own: reasons)
    for process in range(3):
        assert f"{file.name} does not match its hash" in shared_check(process, 3)(folder)


def test_one_process_is_told_that_there_is_nothing_to_share(home):
    with pytest.warns(UserWarning, match="no effect with one process; start several"):
        assert effective(ParallelConfig(shard="fsdp"), "cpu", 1) == ParallelConfig()


def test_processes_that_cannot_be_divided_so_are_refused(home):
    with pytest.raises(ValueError, match="replicas=4 does not divide 6 processes; use one of 1, 2, 3, 6"):
        make_mesh(ParallelConfig(shard="fsdp", replicas=4), "cpu", 6)
    for frames, near in ((13, None), (17, "13 or 29"), (21, "13 or 29"), (5, "13"), (25, "13 or 29")):
        config = load_typed(
            Config, "t.yaml", ["train.parallel.context=4", f"data.num_frames={frames}", "model.num_heads=4"]
        )
        if near is None:
            check_context(config, load_vae("tiny"), 4)
        else:
            with pytest.raises(
                ValueError, match=f"{frames} frames .* are {frames // 4 + 1} latent frames, .*; use {near} frames"
            ):
                check_context(config, load_vae("tiny"), 4)
    with pytest.raises(ValueError, match="context=2 does not divide 3 process"):
        check_context(load_typed(Config, "t.yaml", ["train.parallel.context=2"]), load_vae("tiny"), 3)
    with pytest.raises(ValueError, match="ring=3 does not divide train.parallel.context=4; use one of 1, 2, 4"):
        ParallelConfig(context=4, ring=3)
    causal = [
        "train.parallel.context=2",
        "train.parallel.ring=2",
        "model.causal=true",
        "model.position_encoding=rope_3d",
    ]
    with pytest.raises(ValueError, match="ring=2 does not go with causal=true"):
        check_context(load_typed(Config, "t.yaml", causal), load_vae("tiny"), 2)
    three = ["train.parallel.context=2", "model.num_heads=3", "model.hidden_size=24", "model.axes=[joint]"]
    with pytest.raises(ValueError, match="3 heads cannot be shared by 2 processes; use train.parallel.ring=2"):
        check_context(load_typed(Config, "t.yaml", three), load_vae("tiny"), 2)
    with pytest.raises(ValueError, match="no effect without train.parallel.shard=fsdp"):
        ParallelConfig(replicas=2)


def test_a_unet_is_neither_compiled_nor_spread_over_processes(home, capsys):
    assert train.run(["t.yaml", "name=refused", SHARDED, "model.network=unet"]) == 1
    assert "neither compiled nor spread over processes" in capsys.readouterr().err


def test_a_sharded_run_in_bfloat16_takes_float32_timesteps_and_has_the_losses_of_one_process(home):
    assert train.run(["t.yaml", "name=half", *HALF]) == 0
    assert losses("halves") == pytest.approx(losses("half"), rel=2e-3)


def test_a_sharded_run_that_gathers_weights_in_bfloat16_keeps_and_steps_those_of_float32(home):
    assert losses("gathered halves") == pytest.approx(losses("halves"), rel=2e-3)
    assert {value.dtype for value in state("gathered halves", 4).values()} == {torch.float32}


@pytest.mark.parametrize(("gather", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_gathered_weights_have_the_precision_that_is_asked_for_and_their_gradients_float32(gather, dtype):
    config = ParallelConfig(shard="fsdp", gather_bf16=gather)
    model = STDiT(depth=1, hidden_size=16, num_heads=2, in_channels=4, num_classes=2, sample_size=(2, 4, 4))
    found = set()
    model.blocks[0].register_forward_pre_hook(lambda block, _: found.update(p.dtype for p in block.parameters()))
    with group_of_one("cpu"), torch.autocast("cpu", torch.bfloat16):
        parallelize(model, config, make_mesh(config, "cpu", 1))
        model(torch.randn(2, 4, 2, 4, 4), torch.tensor([10.0, 900.0]), torch.tensor([0, 1])).square().mean().backward()
    assert found == {dtype}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_blocks_of_a_sharded_model_compile_as_one_graph_with_the_gradients_of_one_process():
    script = Path(__file__).with_name("compiled_shards_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(script.parents[2]), *sys.path]),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(line.split(": ") for line in done.stdout.splitlines())
    assert float(found["output"]) < 1e-5 and float(found["gradients"]) < 1e-5
    assert found["graphs"] == "1"  # of four blocks, in spite of the hooks around each


def test_shared_frames_are_not_compiled(home, capsys):
    assert train.run(["t.yaml", "name=refused", "train.compile=true", "train.parallel.context=2"]) == 1
    assert "train.compile=true is not there for shared frames" in capsys.readouterr().err


@pytest.fixture
def alone(monkeypatch):
    """Collective calls of `shards` in a process that has no others."""
    monkeypatch.setattr(shards.dist, "barrier", lambda: None)
    monkeypatch.setattr(shards, "gather_object", lambda found: found)


@pytest.fixture
def held(monkeypatch):
    """Writing a file of shards waits for an event -> the event, and the steps whose writing has begun."""
    go, begun = threading.Event(), []

    def waits(tensors, file, **how):
        begun.append(int(file.parent.name.split("-")[1]))
        assert go.wait(20)
        save_file(tensors, file, **how)

    monkeypatch.setattr(shards, "save_file", waits)
    yield go, begun
    go.set()


def test_training_goes_on_while_a_checkpoint_is_written_and_what_it_changes_meanwhile_is_not_in_it(
    tmp_path, alone, held
):
    go, _ = held
    writer, weight = shards.ShardWriter(tmp_path, 0, 1, keep=2, timeout=5), torch.ones(2)
    writer.write(1, {"model": {"w": weight}}, {})  # would never return if it wrote the file itself
    weight.add_(1)  # a further step
    assert list_checkpoints(tmp_path) == []
    go.set()
    writer.finish()
    [path] = list_checkpoints(tmp_path)
    assert damage(path) is None and read_checkpoint(path).tensors["model"]["w"].tolist() == [1, 1]


def test_a_checkpoint_waits_for_the_one_before_so_that_at_most_one_is_being_written(tmp_path, alone, held):
    go, begun = held
    writer = shards.ShardWriter(tmp_path, 0, 1, keep=2, timeout=5)

    def save(step):
        writer.write(step, {"model": {"w": torch.full((2,), float(step))}}, {})

    save(1)
    second = threading.Thread(target=save, args=(2,))
    second.start()
    second.join(0.3)
    assert second.is_alive() and begun == [1]
    go.set()
    second.join()
    assert (tmp_path / "step-1").is_dir()  # complete before the second was begun
    writer.finish()
    assert begun == [1, 2] and [path.name for path in list_checkpoints(tmp_path)] == ["step-2", "step-1"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SafetensorError("No space left on device"), "No space left .* earlier checkpoints are untouched"),
        (RuntimeError("a bug"), "^a bug$"),
        (AssertionError(), "^AssertionError$"),
    ],
)
def test_whatever_a_thread_that_writes_shards_raises_the_processes_agree_on(tmp_path, monkeypatch, alone, error, said):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(shards, "save_file", fails)
    asked = []
    monkeypatch.setattr(shards, "gather_object", lambda found: asked.append(found) or found)
    writer = shards.ShardWriter(tmp_path, 0, 1, keep=2, timeout=5)
    writer.write(1, {"model": {"w": torch.ones(2)}}, {})
    with pytest.raises(ValueError, match=said):
        writer.finish()
    assert asked[-1] != [None]


def test_an_error_of_one_process_is_raised_in_all(home):
    script = (
        "import sys, torch; from accelerate import PartialState; from pathlib import Path\n"
        "from stdit.training.shards import ShardWriter\n"
        "state = PartialState(cpu=True); writer = ShardWriter(Path('checkpoints/bad'), state.process_index, 2, 2, timeout=5)\n"
        "value = torch.tensor([float('nan') if state.process_index else 1.0])\n"
        "try: writer.write(1, {'model': {'w': value}}, {})\n"
        "except ValueError as error: print('refused', error)\n"
    )
    Path("bad.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "bad.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (
        done.stdout.count("the state after step 1 has a number that is not finite in model/w; nothing was written") == 2
    )


@pytest.mark.slow
def test_torchrun_starts_a_run_again_whose_process_died_and_it_resumes(home):
    settings = (SHARDED, "train.steps=60", "train.decay_steps=null", "train.samples=0", "train.preview_every=1000")
    assert launch(2, "name=calm", *settings).returncode == 0
    command = command_of(2, "name=restarted", *settings)
    command[command.index("--standalone") : command.index("--standalone")] = ["--max-restarts", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    while not list_checkpoints(Path("checkpoints/restarted")):
        assert process.poll() is None
        time.sleep(0.05)
    workers = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()]  # fmt: skip
    os.kill(workers[-1], signal.SIGKILL)
    said = "".join(process.communicate(timeout=90))
    assert process.returncode == 0 and "resumed from checkpoints/restarted" in said
    assert largest_difference(state("calm", 60), state("restarted", 60)) == 0


@pytest.mark.slow
def test_four_processes_in_two_replicas_have_the_losses_of_one(home):
    assert launch(4, "name=four", SHARDED, "train.parallel.replicas=2", "train.samples=0").returncode == 0
    assert losses("four") == pytest.approx(losses("one"), rel=1e-6)
    assert largest_difference(state("one", 6), state("four", 6)) < 1e-3


@pytest.mark.slow
def test_weights_after_60_steps_are_those_of_one_process_with_two_and_with_four(home):
    # Not each tensor by itself: the bias of keys has no gradient but rounding, which AdamW makes steps of.
    settings = ("train.steps=60", "train.decay_steps=null", "train.samples=0", "train.preview_every=1000", "train.optimizer=adamw")  # fmt: skip
    assert train.run(["t.yaml", "name=long1", *settings]) == 0
    one = {key: value for key, value in state("long1", 60).items() if key.startswith("model/")}
    largest = max(float(value.abs().max()) for value in one.values())
    for count in (2, 4):
        assert launch(count, f"name=long{count}", SHARDED, *settings).returncode == 0
        other = state(f"long{count}", 60)
        found = (
            max(float((other[key].reshape(value.shape) - value).abs().max()) for key, value in one.items()) / largest
        )
        print(f"{count} processes: weights after 60 steps differ by {found:.2g} of the largest")
        assert found < 1e-3 and losses(f"long{count}") == pytest.approx(losses("long1"), rel=1e-4)


KILLS = int(os.environ.get("STDIT_KILLS", "50"))


@pytest.mark.slow
def test_a_sharded_run_that_is_killed_again_and_again_ends_with_the_weights_of_an_undisturbed_one(home):
    settings = (SHARDED, "train.steps=1000", "train.checkpoint_every=2", "train.decay_steps=null", "train.samples=0",
                "train.preview_every=1000", "train.holdout=0", "train.average_lengths=[]")  # fmt: skip
    rng, folder = random.Random(0), Path("checkpoints/killed")

    def newest() -> Path | None:
        return next(iter(list_checkpoints(folder)), None)

    for number in range(KILLS):
        process = subprocess.Popen(
            command_of(2, "name=killed", *settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        before, deadline = newest(), time.monotonic() + 300
        while newest() == before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5 * rng.random())
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        for pid in rng.sample([process.pid, *map(int, workers)], k=1 + len(workers)):  # in any order
            os.kill(pid, signal.SIGKILL)
        process.wait()
        assert damage(newest()) is None  # of an older one, the removal may be unfinished
        print(f"kill {number + 1} after {newest().name}", flush=True)
    end = int(newest().name.removeprefix("step-")) + 10
    for name in ("killed", "whole"):
        assert launch(2, f"name={name}", *settings, f"train.steps={end}").returncode == 0
    print(f"{KILLS} kills up to step {end}")
    assert largest_difference(state("whole", end), state("killed", end)) == 0
