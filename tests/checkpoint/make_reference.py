"""Run the original codes with random weights and save their outputs, so that the tests do not need their code.

    python tests/checkpoint/make_reference.py DIT_CLONE SIT_CLONE LATTE_CLONE
    python tests/checkpoint/make_reference.py DIT_CLONE SIT_CLONE LATTE_CLONE --full      compares XL/2, and saves nothing
    python tests/checkpoint/make_reference.py --wirings UVIT_CLONE MDT_CLONE

Needs clones of facebookresearch/DiT, willisma/SiT, Vchitect/Latte, baofff/U-ViT and sail-sg/MDT, and `pip install --no-deps timm`. Writes
reference/*.safetensors next to this file: weights in float32, inputs and outputs of small models.
"""

import importlib
import json
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file

from stdit.checkpoint.convert import to_stdit
from stdit.checkpoint.files import Weights

HERE = Path(__file__).parent / "reference"
SIZE = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 2, "in_channels": 4}


class Missing(MetaPathFinder, Loader):
    """Replaces modules that the originals import but do not use here."""

    def find_spec(self, name, path, target=None):
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return MagicMock(__path__=[])

    def exec_module(self, module):
        pass


def original(clone: str, module: str):
    """Import a module of an original repository."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("models", "diffusion", "transport", "libs")]:
        del sys.modules[name]
    sys.path[:] = [clone, *(p for p in sys.path if p != clone)]
    missing = Missing()
    sys.meta_path.append(missing)  # last, so that it is used only for modules that nothing else finds
    try:
        return importlib.import_module(module)
    finally:
        sys.meta_path.remove(missing)


def fill(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights everywhere except in fixed tables, also where the initialisation is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if not name.endswith(("pos_embed", "temp_embed")):
            value.data.copy_(
                torch.randn(value.shape, generator=generator) * (0.5 if value.ndim == 1 else value.shape[-1] ** -0.5)
            )
    return model.eval()


def image_case(model, seed: int, times: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    x = torch.randn(len(times), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return {
            "x": x,
            "t": times,
            "y": labels,
            "out": model(x, times, labels),
            **clock(model, times.is_floating_point()),
        }


def clock(model, unit: bool) -> dict[str, torch.Tensor]:
    """The timestep embedding at every timestep (for SiT, at 1001 times from 0 to 1)."""
    times = torch.linspace(0, 1, 1001) if unit else torch.arange(1000)
    with torch.no_grad():
        return {"clock": times, "clock_out": model.t_embedder(times)}


def save(name: str, weights: dict, case: dict) -> None:
    tensors = {f"weights.{k}": v.contiguous() for k, v in weights.items()} | {
        k: v.contiguous() for k, v in case.items()
    }
    HERE.mkdir(exist_ok=True)
    save_file(tensors, HERE / f"{name}.safetensors")


def networks(dit: str, sit: str, latte: str) -> None:
    labels = torch.tensor([0, 4, 5, 2, 5, 1])  # 5 is null
    model = fill(original(dit, "models").DiT(input_size=8, num_classes=5, **SIZE), 1)
    save("dit", model.state_dict(), image_case(model, 2, torch.tensor([0, 1, 500, 998, 999, 37]), labels))
    model = fill(original(sit, "models").SiT(input_size=8, num_classes=5, **SIZE), 3)
    save("sit", model.state_dict(), image_case(model, 4, torch.tensor([0.0, 1.0, 0.5, 0.123, 0.999, 0.37]), labels))
    for name, extras, seed in (("latte", 2, 5), ("latte_unconditional", 1, 6)):
        model = original(f"{latte}/models", "latte").Latte(
            input_size=8, num_classes=5, num_frames=5, extras=extras, **SIZE
        )
        model, times = fill(model, seed), torch.tensor([0, 500, 999])
        x = torch.randn(3, 5, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            out = model(x, times, y=labels[:3] if extras == 2 else None)
        save(name, model.state_dict(), {"x": x, "t": times, "y": labels[:3], "out": out, **clock(model, False)})


def wirings(uvit: str, mdt: str) -> None:
    """Record U-ViT with and without labels, and MDT v2 with all patches and with some hidden from its encoder."""
    times, labels = torch.tensor([0, 1, 500, 998, 999, 37]), torch.tensor([0, 4, 5, 2, 5, 1])
    size = {"patch_size": 2, "depth": 4, "num_heads": 4}
    for name, classes, seed in (("uvit", 6, 11), ("uvit_unconditional", -1, 12)):
        model = fill(original(uvit, "libs.uvit").UViT(8, in_chans=4, embed_dim=32, num_classes=classes, **size), seed)
        model.pos_embed.data.normal_(generator=torch.Generator().manual_seed(seed))
        x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            out = model(x, times, labels if classes > 0 else None)
        save(name, model.state_dict(), {"x": x, "t": times, "y": labels, "out": out})
    model = original(mdt, "masked_diffusion.models").MDTv2(
        8, 2, 4, 32, depth=6, num_heads=4, num_classes=5, mask_ratio=0.3, decode_layer=2
    )
    model = fill(model, 13)
    case = image_case(model, 14, times, labels)
    kept = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:9] for i in range(6)])

    def hide(tokens, ratio):
        hidden = torch.stack([torch.tensor([i for i in range(16) if i not in row.tolist()]) for row in kept])
        restore = torch.cat([kept, hidden], 1).argsort(1)
        mask = (torch.arange(16) >= 9).float().expand(6, -1).gather(1, restore)
        return tokens.gather(1, kept[..., None].expand(-1, -1, 32)), mask, restore, kept

    model.random_masking = hide
    with torch.no_grad():
        masked = model(case["x"], times, labels, enable_mask=True)
    save("mdt", model.state_dict(), {**case, "kept": kept, "masked": masked})


def full_size(dit: str, sit: str, latte: str) -> None:
    """Compare the outputs of XL/2 at 256 px with random weights with those of the original."""
    size, labels = {**SIZE, "depth": 28, "hidden_size": 1152, "num_heads": 16}, torch.tensor([3, 1000])
    made = {
        "dit": lambda: original(dit, "models").DiT(input_size=32, num_classes=1000, **size),
        "sit": lambda: original(sit, "models").SiT(input_size=32, num_classes=1000, **size),
        "latte": lambda: original(f"{latte}/models", "latte").Latte(
            input_size=32, num_classes=1000, num_frames=4, extras=2, **size
        ),
    }
    for name, make in made.items():
        model = fill(make(), 1)
        times = torch.tensor([0.0, 0.73]) if name == "sit" else torch.tensor([0, 999])
        x = torch.randn(2, 4, 4, 32, 32) if name == "latte" else torch.randn(2, 4, 32, 32)
        with torch.no_grad():
            theirs = model(x, times, y=labels)
            weights = dict(model.state_dict())
            del model
            ours = to_stdit(Weights(weights, {}, name), name).model
            if name == "latte":
                out = ours(x.transpose(1, 2), times.float(), labels).transpose(1, 2)
            elif name == "sit":
                out = -ours(x[:, :, None], 1000 * (1 - times), labels)[:, :, 0]
            else:
                out = ours(x[:, :, None], times.float(), labels)[:, :, 0]
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(out.double(), theirs.double(), strict=True)]
        print(f"{name}: XL/2, relative error {max(errors):.1e}", flush=True)


def diffusion(dit: str) -> None:
    """Record the results of `GaussianDiffusion` for a fixed output of the network."""
    module = original(dit, "diffusion")
    respace = importlib.import_module("diffusion.respace")
    spaced = {spec: sorted(respace.space_timesteps(1000, spec)) for spec in ("25", "250", "ddim50", "ddim25", "7")}
    HERE.mkdir(exist_ok=True)
    (HERE / "timesteps.json").write_text(json.dumps(spaced) + "\n")

    generator = torch.Generator().manual_seed(7)
    t = torch.tensor([0, 1, 2, 250, 500, 998, 999])
    start, noise, x, extra = (torch.randn(len(t), 2, 3, 3, generator=generator) for _ in range(4))
    start = (0.5 * start).clamp(-1, 1)
    out = torch.cat([noise + 0.1 * extra, extra.clamp(-1, 1)], dim=1)
    full = module.create_diffusion("")
    mean, variance, _ = full.q_posterior_mean_variance(start, x, t)
    case = {
        "t": t, "start": start, "noise": noise, "x": x, "out": out, "q_sample": full.q_sample(start, t, noise),
        "posterior_mean": mean, "posterior_variance": variance,
    }  # fmt: skip
    terms = full.training_losses(lambda x_t, t: out, start, t, noise=noise)
    case |= {"mse": terms["mse"], "vb": terms["vb"], "loss": terms["loss"]}
    case["bound"] = full._vb_terms_bpd(
        lambda x_t, t: out, start, full.q_sample(start, t, noise), t, clip_denoised=False
    )["output"]
    for spec in ("", "25", "ddim50"):
        some = module.create_diffusion(spec)
        index = torch.tensor([0, 1, 5, 12, some.num_timesteps - 2, some.num_timesteps - 1])
        n = len(index)
        torch.manual_seed(8)
        step = some.p_sample(lambda x_t, t, n=n: out[:n], x[:n], index, clip_denoised=False)
        torch.manual_seed(8)
        drawn = torch.randn_like(x[:n])
        plain = some.ddim_sample(lambda x_t, t, n=n: out[:n], x[:n], index, clip_denoised=False)
        key = spec or "1000"
        kept = torch.tensor(some.timestep_map)
        case |= {
            f"{key}.index": index, f"{key}.kept": kept, f"{key}.drawn": drawn,
            f"{key}.ancestral": step["sample"], f"{key}.ddim": plain["sample"],
        }  # fmt: skip
    save("diffusion", {}, {k: v.float() if v.is_floating_point() else v for k, v in case.items()})


if __name__ == "__main__":
    if "--wirings" in sys.argv:
        wirings(*sys.argv[2:4])
        sys.exit()
    if "--full" in sys.argv:
        full_size(*sys.argv[1:4])
        sys.exit()
    networks(*sys.argv[1:4])
    diffusion(sys.argv[1])
    print(*sorted(f"{path.name} {path.stat().st_size / 1000:.0f} kB" for path in HERE.iterdir()), sep="\n")
