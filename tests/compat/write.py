"""The script that wrote the folders next to this file with version 0.1.0: checkpoints, exported models and a latent cache.

It ran once, on commit 6f3ba47, and documents how the files were made; it does not run with later versions.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tools"))

BASE = """
name: base
seed: 3
data: {source: latents, root: cache, num_frames: 17, height: 64, width: 64, workers: 0}
vae: {name: vae}
model: {size: S/2, depth: 2, hidden_size: 8, num_heads: 1}
objective: {name: flow}
train: {steps: 3, decay_steps: 10, batch_size: 2, optimizer: adamw, lr: 1.0e-3, ema_decay: 0.9, checkpoint_every: 3, log_every: 1,
        preview_every: 100, samples: 0, sample_steps: 2, precision: fp32}
"""
MIXED = 'objective.shares={"shared":0.4,"prefix":0.3,"region":0.1,"ends":0.2}'
RUNS = {
    "stack": ["model.time_entry=attention_rotary_3d", "model.qk_norm=true", "objective.scheme=mixed", MIXED, "objective.mixed_from=1",
              "objective.known_shift=2.0", "objective.known_noise=0.1", "model.conditions=[fps,seconds]", "model.positions=interpolate"],
    "causal": ["model.time_entry=rotary_3d", "model.causal=true", "model.window=2", "model.sink=1", "objective.scheme=teacher",
               "train.optimizer=muon"],
    "masked": ["model.trunk=masked", "model.depth=3", "model.decode_depth=1", "objective.mask_ratio=0.3", "model.learned_places=true",
               "model.place_bias=true"],
    "joint": ["model.trunk=joint", "model.single_depth=1", "text.encoder=words", "model.num_classes=0"],
    "uvit": ["model.trunk=long_skip", "model.depth=3", "model.conditioning=in_context", "model.learned_places=true", "model.time_mlp=false",
             "model.gelu=none", "model.output_conv=true", "objective.name=ddpm", "objective.betas=scaled_linear"],
    "u_shape": ["model.trunk=u_shape", "model.depth=3", "model.conditioning=time_attention"],
    "latte": ["model.axes=[spatial,temporal]", "model.time_entry=stream", "text.encoder=words", "model.conditioning=adaln_single",
              "model.caption_axes=[spatial]", "model.num_classes=0"],
}  # fmt: skip
KEEP = ("stack", "causal", "masked", "joint")  # runs whose checkpoints are kept


def main() -> None:
    from stdit import STDiT, STDiTPipeline
    from stdit.recipes import train
    from stdit.vae.tiny import TinyVAE

    os.chdir(HERE)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = TinyVAE(4, [4, 4], [1, 1], [4, 4, 4], [1, 1, 1])
    vae.half().save_pretrained("vae")
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(4, 4, 5, 8, 8, generator=generator).half()
    Path("cache").mkdir()
    save_file({"latents": clips, "restarts": clips + 0.25}, "cache/latents-00000.safetensors")
    from stdit import load_vae

    shard = {
        "file": "latents-00000.safetensors", "count": 4, "labels": [0, 1, 2, 1],
        "captions": ["a red circle", "a blue square", "", "a red square"],
    }  # fmt: skip
    head = {
        "vae": "vae", "vae_fingerprint": load_vae("vae").fingerprint(), "num_classes": 3, "class_names": ["left", "right", "up"],
        "num_frames": 17, "height": 64, "width": 64, "fps": None, "shards": [shard],
    }  # fmt: skip
    Path("cache/cache.json").write_text(json.dumps(head, indent=1) + "\n")
    Path("base.yaml").write_text(BASE)
    expected, losses = {}, {}
    for name, overrides in RUNS.items():
        assert train.run(["base.yaml", f"name={name}", "text.cache=captions", *overrides]) == 0
        pipe = STDiTPipeline.from_pretrained(f"models/{name}")
        options = (
            {"captions": "a red circle"} if pipe.transformer.config.caption_channels else {"class_labels": ["right"]}
        )
        made = pipe(**options, num_inference_steps=2, seed=4, progress=False, precision="fp32")
        expected[f"{name}.clip"] = made[..., ::4, ::8, ::8].contiguous()
        if name == "causal":
            known = torch.linspace(-1, 1, 3 * 5 * 64 * 64).view(1, 3, 5, 64, 64)
            expected["causal.stream"] = torch.cat(
                list(pipe.stream(known, 12, "up", num_inference_steps=2, precision="fp32")), 2
            )[..., ::4, ::8, ::8].contiguous()
        model = STDiT.from_pretrained(f"models/{name}")
        torch.manual_seed(1)
        x = torch.randn(2, 4, 3 if name == "causal" else 5, 8, 8)
        told = {"captions": torch.randn(2, 3, 64), "caption_mask": torch.tensor([[True, True, False], [True] * 3])}
        with torch.no_grad():
            frames = 1 if name == "causal" else x.shape[2]
            y = model(
                x[:, :, :frames],
                torch.rand(2, frames) * 999,
                **(told if model.config.caption_channels else {"class_labels": torch.tensor([0, 1])}),
            )
        expected[f"{name}.forward"] = y.contiguous()
        if name in KEEP:  # the losses after a resume
            shutil.copytree(f"checkpoints/{name}", f"kept/{name}")
            shutil.copytree(f"models/{name}", f"exported/{name}")
            assert train.run(["base.yaml", f"name={name}", "text.cache=captions", *overrides, "train.steps=6"]) == 0
            rows = Path(f"output/{name}/training_metrics.csv").read_text().splitlines()[1:]
            losses[name] = [float(row.split(",")[1]) for row in rows]
            shutil.rmtree(f"models/{name}")
            shutil.move(f"exported/{name}", f"models/{name}")
    shutil.rmtree("checkpoints")
    shutil.rmtree("output")
    shutil.rmtree("captions")
    shutil.rmtree("exported")
    shutil.move("kept", "checkpoints")
    for folder in Path("models").iterdir():  # every pipeline has the same VAE, so it is stored once
        shutil.rmtree(folder / "vae")
    save_file(expected, "expected.safetensors")
    Path("expected.json").write_text(json.dumps({"losses": losses, "runs": RUNS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
