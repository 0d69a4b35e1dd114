"""The models of a race: ours and those of DiT, Latte and diffusers, of one size, with their own training loss and sampler."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel, LatteTransformer3DModel
from torch import Tensor, nn

from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.model.stdit import STDiT
from stdit.recipes.peer_sources import import_source
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.training.step import LatentBatch, diffusion_losses

CLASSES, CHANNELS, GUIDANCE = 1000, 4, 4.0


class RaceSize(NamedTuple):
    """What every model of a race has in common.

    frames: of a clip, 0 for images, which are not clips of one frame to others. size: height and width of the latents.
    batch: clips of a training step. samples, steps: clips that are sampled at once, with guidance, and solver steps.
    """

    frames: int
    size: int
    depth: int
    hidden_size: int
    num_heads: int
    batch: int
    samples: int
    steps: int


class Contestant(NamedTuple):
    """A model of a race. blocks: what is compiled. loss: that of a training step. sample: latents, on the model's device."""

    name: str
    model: Any
    blocks: Sequence[nn.Module]
    loss: Callable[[], Tensor]
    sample: Callable[[], Tensor]


def ours(race: RaceSize, sources: Path, device: torch.device) -> Contestant:
    """stdit with DiT's objective and its ancestral sampler, by the pipeline."""
    latent = (race.frames or 1, race.size, race.size)
    with device:
        model = STDiT(
            race.depth, race.hidden_size, race.num_heads, in_channels=CHANNELS, num_classes=CLASSES, sample_size=latent,
            axes=["spatial", "temporal"] if race.frames else ["spatial"],
        )  # fmt: skip
    objective, steps = build_objective(ObjectiveConfig(name="ddpm")), count()
    x, y = torch.randn(race.batch, CHANNELS, *latent, device=device), _labels(race.batch, device)

    def loss() -> Tensor:
        step = next(steps)
        keys = [(0, step, slot) for slot in range(race.batch)]
        return diffusion_losses(model, objective, [LatentBatch(x)], {"label": y[:, None]}, keys=keys).clips.mean()

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4, norm_num_groups=8, latent_channels=CHANNELS,
    )  # fmt: skip
    pipe = STDiTPipeline(
        model, vae.to(device), STDiTScheduler("ddpm"), objective="ddpm", num_frames=race.frames or 1, height=8 * race.size,
        width=8 * race.size,
    )  # fmt: skip
    how: dict[str, Any] = {
        "num_inference_steps": race.steps,
        "guidance_scale": GUIDANCE,
        "precision": "fp32",
        "progress": False,
    }

    def sample() -> Tensor:
        return pipe(list(range(race.samples)), output_type="latent", batch_size=race.samples, **how).frames

    return Contestant("stdit", model, list(model.blocks), loss=loss, sample=sample)


def dit(race: RaceSize, sources: Path, device: torch.device) -> Contestant:
    """DiT, by its own diffusion code."""
    models, diffusion = import_source(sources, "DiT", ["models", "diffusion"])
    model = models.DiT(
        input_size=race.size, depth=race.depth, hidden_size=race.hidden_size, num_heads=race.num_heads, num_classes=CLASSES
    )  # fmt: skip
    return _original("DiT", model.to(device), diffusion, race)


def latte(race: RaceSize, sources: Path, device: torch.device) -> Contestant:
    """Latte with labels, by its own diffusion code."""
    [module] = import_source(sources, "Latte/models", ["latte"])
    [diffusion] = import_source(sources, "Latte", ["diffusion"])
    model = module.Latte(
        input_size=race.size, depth=race.depth, hidden_size=race.hidden_size, num_heads=race.num_heads,
        num_frames=race.frames, num_classes=CLASSES, extras=2,
    )  # fmt: skip
    return _original("Latte", model.to(device), diffusion, race)


def _original(name: str, model: Any, diffusion: ModuleType, race: RaceSize) -> Contestant:
    """A model whose diffusion is that of DiT's repository, which Latte's has, too."""
    device = next(model.parameters()).device
    frames = [race.frames] if race.frames else []
    whole, spaced = diffusion.create_diffusion(""), diffusion.create_diffusion(str(race.steps))
    x, y = torch.randn(race.batch, *frames, CHANNELS, race.size, race.size, device=device), _labels(race.batch, device)
    labels = torch.cat([_labels(race.samples, device), torch.full((race.samples,), CLASSES, device=device)])

    def loss() -> Tensor:
        t = torch.randint(whole.num_timesteps, (race.batch,), device=device)
        return whole.training_losses(model, x, t, {"y": y})["loss"].mean()

    def sample() -> Tensor:
        noise = torch.randn(race.samples, *frames, CHANNELS, race.size, race.size, device=device).repeat(
            2, *[1] * (3 + len(frames))
        )
        found = spaced.p_sample_loop(
            model.forward_with_cfg, noise.shape, noise, clip_denoised=False, device=device,
            model_kwargs={"y": labels, "cfg_scale": GUIDANCE}, progress=False,
        )  # fmt: skip
        return found.chunk(2)[0]

    return Contestant(name, model, list(model.blocks), loss=loss, sample=sample)


def diffusers_dit(race: RaceSize, sources: Path, device: torch.device) -> Contestant:
    """DiT as diffusers has it, which has no training code: the squared error of the noise."""
    with device:
        model: Any = DiTTransformer2DModel(
            num_attention_heads=race.num_heads, attention_head_dim=race.hidden_size // race.num_heads, in_channels=CHANNELS,
            out_channels=2 * CHANNELS, num_layers=race.depth, sample_size=race.size, num_embeds_ada_norm=CLASSES,
        )  # fmt: skip

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, t, class_labels=y).sample[:, :CHANNELS]

    shape = (CHANNELS, race.size, race.size)
    return _diffusers(model, list(model.transformer_blocks), predict, race=race, shape=shape)


def diffusers_latte(race: RaceSize, sources: Path, device: torch.device) -> Contestant:
    """Latte as diffusers has it, without attention to captions; it has no training code, either, and no labels."""
    with device:
        model: Any = LatteTransformer3DModel(
            num_attention_heads=race.num_heads, attention_head_dim=race.hidden_size // race.num_heads, in_channels=CHANNELS,
            out_channels=2 * CHANNELS, num_layers=race.depth // 2, attention_bias=True, sample_size=race.size, patch_size=2,
            activation_fn="gelu-approximate", num_embeds_ada_norm=CLASSES, norm_type="ada_norm_single",
            norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=8, video_length=race.frames,
        )  # fmt: skip

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = torch.zeros(len(x), 1, 8, device=x.device)  # its blocks do not attend to them
        return model(x, t, encoder_hidden_states=tokens).sample[:, :CHANNELS]

    blocks = [*model.transformer_blocks, *model.temporal_transformer_blocks]
    shape = (CHANNELS, race.frames, race.size, race.size)
    return _diffusers(model, blocks, predict, race=race, shape=shape)


def _diffusers(
    model: Any, blocks: Sequence[nn.Module], predict: Callable[..., Tensor], *, race: RaceSize, shape: tuple[int, ...]
) -> Contestant:
    """A model of diffusers with its DDPM scheduler. predict: the noise, from (x, t, labels)."""
    device = next(model.parameters()).device
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    x, y = torch.randn(race.batch, *shape, device=device), _labels(race.batch, device)
    labels = torch.cat([_labels(race.samples, device), torch.full((race.samples,), CLASSES, device=device)])

    def loss() -> Tensor:
        noise, t = torch.randn_like(x), torch.randint(1000, (race.batch,), device=device)
        return nn.functional.mse_loss(predict(scheduler.add_noise(x, noise, t), t, y).float(), noise)

    @torch.no_grad()
    def sample() -> Tensor:
        scheduler.set_timesteps(race.steps, device=device)
        found = torch.randn(race.samples, *shape, device=device)
        for t in scheduler.timesteps:
            conditional, null = predict(torch.cat([found, found]), t.expand(2 * race.samples), labels).chunk(2)
            guided = null + GUIDANCE * (conditional - null)
            found = scheduler.step(guided.float(), t, found).prev_sample
        return found

    return Contestant("diffusers", model, blocks, loss=loss, sample=sample)


def _labels(number: int, device: torch.device) -> Tensor:
    return torch.arange(number, device=device) % CLASSES


IMAGES = {"stdit": ours, "DiT": dit, "diffusers": diffusers_dit}
CLIPS = {"stdit": ours, "Latte": latte, "diffusers": diffusers_latte}


def contestants(race: RaceSize, sources: Path, device: torch.device) -> Iterator[Contestant]:
    """The models of a race, each made when it is asked for."""
    for make in (CLIPS if race.frames else IMAGES).values():
        torch.manual_seed(0)
        yield make(race, sources, device)
