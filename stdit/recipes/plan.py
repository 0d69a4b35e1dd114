"""Plan a run before it starts: tokens, parameters, memory, speed and days on a GPU, and the largest sizes that fit.

stdit plan configs/video.yaml --gpu H100 --count 8
stdit plan configs/video.yaml --count 64 --shard fsdp --context 8 --bandwidth 400
stdit plan configs/video.yaml model.size=B/2 --gpu 4090 --utilisation 0.35 --refuse
stdit plan configs/video.yaml --gpu 4090 --fit 24GB     (the settings with which the run fits)
"""

import argparse
import math
from collections.abc import Callable, Sequence

import torch

from stdit.checkpoint.inflate import inflated_arguments
from stdit.config import Config, load_typed
from stdit.diffusion.objective import build_objective
from stdit.model.config import model_arguments
from stdit.model.cost import Cost, Memory, forward_cost, frame_growth
from stdit.model.stdit import STDiT
from stdit.nn.context_parallel import check_shared_attention
from stdit.nn.low_rank import adapted_layers
from stdit.precision import native_bf16, resolve
from stdit.recipes.build import check_batch, check_frames
from stdit.recipes.entry import check_least, command, command_parser
from stdit.recipes.models import load_start
from stdit.recipes.planned import (
    CHECKPOINTING_NAMES,
    GIB,
    LAUNCH_SECONDS,
    Choice,
    PlannedRun,
    find_fit,
    parse_memory,
    smallest,
)  # fmt: skip
from stdit.recipes.planned_steps import KnownData, data_lines, known_data, step_kinds, usable_clips
from stdit.text import load_text_encoder
from stdit.training.throughput import GPUS
from stdit.vae import VAEGeometry, load_vae
from stdit.variants import pick
from stdit.warn import warn_user

# Stride and latent channels of the VAEs that configs name by hub id, so that planning needs no download.
HUB_VAES = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers/vae": ((4, 8, 8), 16),
    "stabilityai/sd-vae-ft-ema": ((1, 8, 8), 4),
}

# Parts of the memory that are printed where they belong to its peak.
_FURTHER_PARTS = {
    "recomputed": "of a block, by checkpointing",
    "working": "temporary tensors, and blocks that are gathered or copied",
    "whole model": "from which previews and the samples at the end are made",
    "copy": "of the largest file of a checkpoint",
}


def find_vae(name: str) -> VAEGeometry:
    """The shapes of a VAE's latents: from `HUB_VAES` if the name is listed there, otherwise from the loaded VAE."""
    if name in HUB_VAES:
        stride, channels = HUB_VAES[name]
        return VAEGeometry(name, stride, channels)
    return load_vae(name)


def arguments_of(config: Config, vae: VAEGeometry) -> dict:
    """The model's arguments. Without `model.num_classes` it has no classes, since only the data has their number."""
    chosen = model_arguments(config.model)
    if config.init_from.path:
        image = load_start(config.init_from.path)
        if config.train.lora.rank is not None:
            return {key: value for key, value in image.config.items() if not key.startswith("_")}
        chosen |= inflated_arguments(image, chosen, config.model.depth, config.init_from)
    learns = build_objective(config.objective).learns_sigma
    words = load_text_encoder(config.text.encoder).channels if config.text.encoder else None
    data = config.data
    return {
        **chosen, "in_channels": vae.channels, "num_classes": config.model.num_classes or 0, "learn_sigma": learns,
        "caption_channels": words,
        "sample_size": vae.latent_shape(data.num_frames, data.height, data.width, chosen["patch_size"]),
    }  # fmt: skip


def adapted_parameters(config: Config, arguments: dict) -> int | None:
    """The parameters of the LoRA that a config trains; None if it trains a whole model."""
    lora = config.train.lora
    if lora.rank is None:
        return None
    with torch.device("meta"):
        layers = adapted_layers(STDiT(**arguments), lora.rank, lora.layers)
    return sum(lora.rank * (layer.in_features + layer.out_features) for layer in layers.values())


def largest(at: Callable[[int], Memory], room: float) -> int:
    """The largest number (of clips, or of temporal patches) whose step fits into `room` bytes."""
    one, two = at(1), at(2)
    if one.peak > room:
        return 0
    slopes = {part: getattr(two, part) - getattr(one, part) for part in ("activations", "recomputed", "working")}
    short_lived = slopes["recomputed"] + slopes["working"]
    # The peak is at the end of the forward pass (activations) or of the backward pass (gradients).
    by_activations = (room - one.persistent - one.activations - one.recomputed - one.working) / (
        slopes["activations"] + short_lived
    )
    by_gradients = (room - one.persistent - one.gradients - one.recomputed - one.working) / short_lived
    most = 1 + int(min(by_activations, by_gradients))
    if at(most).peak <= room:
        return most
    low = 1  # not linear on CPUs, where short attention stores its matrix and long attention does not: bisect
    while most - low > 1:
        middle = (low + most) // 2
        low, most = (middle, most) if at(middle).peak <= room else (low, middle)
    return low


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers out of range."""
    check_least(args, "count")
    if args.clips is not None:
        check_least(args, "clips")
    if not 0 < args.utilisation <= 1:
        raise ValueError(f"--utilisation must be > 0 and <= 1, got {args.utilisation}.")
    for name, value in (("--context", args.context), ("--ring", args.ring)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}; 1 shares no frames.")
    for name, value in (
        ("--tflops", args.tflops), ("--memory", args.memory), ("--bandwidth", args.bandwidth),
        ("--host-bandwidth", args.host_bandwidth),
    ):  # fmt: skip
        if value is not None and not 0 < value < 1e6:
            raise ValueError(f"{name} must be > 0 and < 1e6 (Tflops, GiB or GB/s), got {value}.")


def with_flags(args: argparse.Namespace) -> list[str]:
    """The overrides of a command line, with those that its flags stand for, so that the config is checked as training does."""
    flags = {"shard": args.shard, "context": args.context, "ring": args.ring}
    return [*args.overrides, *(f"train.parallel.{key}={value}" for key, value in flags.items() if value is not None)]


def speed_line(args: argparse.Namespace, run: PlannedRun, choice: Choice) -> str:
    """A line with steps and clips per second, and days."""
    train = run.config.train
    seconds = run.computation(choice)
    if seconds < LAUNCH_SECONDS:
        return (
            f"speed         this model is too small for {args.gpu}: launching its operations takes longer than computing them; "
            f"expect at most some {1 / LAUNCH_SECONDS:.0f} steps/s, and {train.steps:,} steps in minutes"
        )
    slower = seconds + run.travel(choice)
    beside = (
        "" if slower < 1.05 * seconds else f", {_whole(train.steps * slower)} if none of what is sent travels beside it"
    )
    return (
        f"speed         {1 / seconds:.2f} steps/s, {run.clips_of_steps / seconds:.0f} clips/s on {args.count} x {args.gpu} at {args.utilisation:.0%} of {run.peak:.0f} Tflops; "
        f"{train.steps:,} steps in {_whole(train.steps * seconds)}{beside} (without the VAE: cache latents)"
    )


def _whole(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours / 24:.1f} days" if hours > 48 else f"{hours:.1f} hours"


def latents_line(run: PlannedRun, clips: int) -> str:
    """A line with the disk that cached latents take: of every clip, and of each of its latent frames encoded alone."""
    dtype, posterior = run.config.data.cache_dtype, run.config.data.cache_posterior
    kinds = [(math.prod(kind.latent), 1 if kind.known is None else kind.known) for kind in run.kinds]
    mean = sum(size * count for size, count in kinds) / sum(count for _, count in kinds)
    one = 2 * run.arguments["in_channels"] * mean * {"float16": 2, "float32": 4}[dtype]
    one *= 2 if posterior == "moments" else 1
    return f"latents       {one / 1e3:,.0f} kB a clip in {dtype} if they are cached, {one * clips / 1e9:,.1f} GB on disk for {clips:,} clips"


def scale_lines(run: PlannedRun, choice: Choice, cost: Cost, *, clips: int) -> list[str]:
    """Lines with what devices send each other in a step, the disk that a run takes, and the cost of longer clips."""
    train, arguments, lines = run.config.train, run.arguments, []
    sent = run.traffic(choice)
    if choice.offload:
        lines.append(
            f"host          {run.on_host(choice) / GIB:.1f} GiB of its memory for each device while a checkpoint is written; {sent.host / 1e9:,.2f} GB per device and step: "
            f"{sent.host / (run.host_bandwidth * 1e9):.3f} s at {run.host_bandwidth:g} GB/s, beside the optimizer's work on the host"
        )
    if run.count > 1:
        total = sent.weights + sent.tokens
        lines.append(
            f"sent          {total / 1e9:,.2f} GB per device and step ({sent.weights / 1e9:,.2f} of weights and gradients"
            + (f", {sent.tokens / 1e9:,.2f} of tokens" if sent.tokens else "")
            + f"): {total / (run.bandwidth * 1e9):.3f} s at {run.bandwidth:g} GB/s, beside the computation"
        )
    saved = 2 * 4 * run.trained + run.moments(choice)  # weights, their average, moments
    lines.append(
        f"checkpoints   {saved * train.keep_checkpoints / 1e9:,.1f} GB on disk (the newest {train.keep_checkpoints})"
    )
    lines.append(latents_line(run, clips))
    grid = tuple(n // p for n, p in zip(arguments["sample_size"], arguments["patch_size"], strict=True))
    base = frame_growth(arguments["hidden_size"], grid)
    for times in (2, 4, 8):
        longer = frame_growth(arguments["hidden_size"], (grid[0] * times, grid[1], grid[2]))
        costs = ", ".join(f"{name} {longer[name] / base[name]:.1f}" for name in base)
        lines.append(f"{times} x frames   {costs} times the operations")
    return lines


def fit_lines(args: argparse.Namespace, run: PlannedRun, current: Choice, room: float) -> tuple[list[str], bool]:
    """Lines with the settings that make a run fit into `room` bytes, and whether there are any."""
    given = {"path": args.config, "overrides": with_flags(args)}
    needs = run.need(current, run.memory(current))
    found = find_fit(run, current, room, **given)
    device = "one device" if run.count == 1 else f"each of {run.count} devices"
    lines = [f"fit           {room / GIB:g} GiB on {device}; as configured it takes {needs / GIB:.2f} GiB"]
    if found is None:
        least = smallest(run, current, **given)
        memory = run.memory(least)
        parts = {"weights": memory.weights, "optimizer": memory.optimizer, "averages": memory.ema, "activations": memory.activations + memory.recomputed}  # fmt: skip
        return [
            *lines,
            f"nothing fits: the least is {run.need(least, memory) / GIB:.2f} GiB, with {' '.join(run.overrides(least)) or 'the settings as they are'}",
            "              of it "
            + ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items())
            + "; use a smaller model.size, fewer or smaller frames"
            + (", or more devices (--count)" if memory.persistent > memory.activations else ""),
        ], False
    if found == current:
        return [*lines, "              it fits as configured, and no other setting takes less time"], True
    if needs <= room:
        lines.append("              it fits as configured; this takes less time:")
    memory = run.memory(found)
    lines.append(f"  {' '.join(run.overrides(found))}")
    slower = f", {run.seconds(found) / run.seconds(current) - 1:+.0%} time for a step" if run.peak else ""
    lines.append(f"              peak {run.need(found, memory) / GIB:.2f} of {room / GIB:g} GiB{slower}")
    if found.coarse and not current.coarse:
        lines.append(
            "              moments of 8 bits change the steps a little, and need bitsandbytes: pip install 'stdit[bitsandbytes]'"
        )
    if found.offload and not current.offload:
        sent = run.traffic(found).host
        lines.append(
            f"              {run.on_host(found) / GIB:.1f} GiB of the host's memory for each device, with a checkpoint's copy; {sent / 1e9:.1f} GB a step "
            f"travel, counted at {run.host_bandwidth:g} GB/s (--host-bandwidth)"
        )
    if found.gather_bf16 and not current.gather_bf16:
        lines.append(
            "              gathers in bfloat16 leave norms without float32 weights, which changes the steps a little"
        )
    return lines, True


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; with --refuse or --fit the exit code is 1 if the run does not fit."""
    parser = command_parser("plan", __doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpu", default="H100", help=f"{', '.join(GPUS)}, or cpu")
    parser.add_argument("--count", type=int, default=1, help="number of devices")
    parser.add_argument("--utilisation", type=float, default=0.4, help="fraction of the peak that training reaches")
    parser.add_argument("--tflops", type=float, help="peak of a device that is not listed")
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of a device that is not listed")
    parser.add_argument("--shard", choices=("none", "fsdp"), help="default: train.parallel.shard of the config")
    parser.add_argument("--context", type=int, help="devices that share a clip's frames; default: that of the config")
    parser.add_argument("--ring", type=int, help="of these, devices around which keys and values travel; likewise")
    parser.add_argument("--bandwidth", type=float, default=50.0, metavar="GB/S", help="between devices, of each")
    parser.add_argument(
        "--host-bandwidth", type=float, default=25.0, metavar="GB/S", help="between a device and the host"
    )
    parser.add_argument(
        "--clips", type=int, help="of the data, whose latents may be cached (default: those of its index, or a million)"
    )
    parser.add_argument("--fit", metavar="GB", help="propose what makes the run fit, such as 24GB, with the least time")
    parser.add_argument("--refuse", action="store_true", help="exit with 1 if the run does not fit")
    args = parser.parse_intermixed_args(argv)
    check_arguments(args)
    wanted = None if args.fit is None else parse_memory(args.fit)
    config = load_typed(Config, args.config, with_flags(args))
    vae = find_vae(config.vae.name)
    known = known_data(config)
    run, choice = planned(args, config, arguments_of(config, vae), vae, known=known)
    size, latent = run.kinds[0].size, run.latent
    on_cpu = run.on_cpu
    described = on_cpu or (args.tflops and args.memory)  # such a device needs no row in GPUS
    room = (args.memory or (0.0 if described else GPUS[args.gpu][1])) * GIB
    cost = forward_cost(run.arguments, latent)

    print(
        f"{config.name}: {size.frames} frames of {size.height} x {size.width} -> latents {list(latent)}, {cost.tokens:,} tokens per clip"
        + f"; of {len(config.data.sizes)} sizes the one with the most tokens in a step" * (len(run.kinds) > 1)
    )
    print("".join(f"{line}\n" for line in data_lines(config, known, run.kinds)), end="")
    uncounted = "" if run.arguments["num_classes"] else " (and one row per class of the data)"
    print(f"parameters    {cost.parameters:,}{uncounted}")
    if run.adapted is not None:
        print(f"LoRA          {run.adapted:,} more, of which alone gradients, moments and an average are kept")
    print(
        f"forward       {cost.total / 1e9:,.1f} Gflops per clip: "
        + ", ".join(f"{kind} {value / cost.total:.0%}" for kind, value in cost.flops.items())
    )
    table = {kind: run.memory(choice._replace(checkpointing=kind)) for kind in CHECKPOINTING_NAMES}
    found = table[choice.checkpointing]
    print(
        f"memory        micro-batch of {choice.micro}, {'bf16' if run.bf16 else 'fp32'}, {run.optimizer(choice)}, on one device, GiB:"
    )
    time, fullest = max(run.times(choice, found).items(), key=lambda one: sum(one[1].values()))
    for part in ("weights", "gradients", "optimizer", "ema"):
        print(f"  {part:<12}{getattr(found, part) / GIB:>8.2f}")
    for kind, value in table.items():
        mark = "  <- as configured" if kind == choice.checkpointing else ""
        saved = (value.activations + value.recomputed) / GIB
        print(f"  activations {saved:>8.2f}  {CHECKPOINTING_NAMES[kind]} checkpointing{mark}")
    for part, what in _FURTHER_PARTS.items():
        if part in fullest:
            print(f"  {part:<12}{fullest[part] / GIB:>8.2f}  {what}")
    need = run.need(choice, found)
    print(f"  reserved    {run.other(choice) / GIB:>8.2f}  by the device's libraries, and by several devices")
    of = f"  of {room / GIB:.0f} on {args.gpu}" if room else ""
    print(f"  peak        {need / GIB:>8.2f}{of}, {time}: {' + '.join(fullest)}")
    if run.peak:
        print(speed_line(args, run, choice))
    clips = args.clips or 1_000_000
    if known is not None and args.clips is None:
        clips = len(known.dataset) - sum(usable_clips(config, known, run.kinds)[:2])
    for line in scale_lines(run, choice, cost, clips=clips):
        print(line)
    if wanted is not None:
        lines, fits = fit_lines(args, run, choice, wanted)
        print("\n".join(lines))
        return 0 if fits else 1
    if not room:
        return 0
    patch = run.arguments["patch_size"]
    left = run.left_for_step(choice, room)
    clips = largest(lambda n: run.memory(choice._replace(micro=n)), left)
    one = choice._replace(micro=1)
    grown = patch[0] * largest(lambda n: run.memory(one, (n * patch[0], *latent[1:])), left)
    frames = vae.pixel_frames(grown) if grown else 0
    print(f"largest       micro-batch {clips} at {size.frames} frames; {frames} frames at micro-batch 1")
    if need > room:
        remedy = (
            "Set train.samples=0 and train.preview_every above train.steps"
            if "whole model" in fullest
            else "Lower train.micro_batch, or set model.gradient_checkpointing to selective or true"
        )
        print(
            f"does not fit: the run needs {need / GIB:.1f} GiB, the device has {room / GIB:.0f} GiB. {remedy}; --fit {room / GIB:.0f}GB "
            "proposes what fits."
        )
        return 1 if args.refuse else 0
    return 0


def planned(
    args: argparse.Namespace, config: Config, arguments: dict, vae: VAEGeometry, *, known: KnownData | None = None
) -> tuple[PlannedRun, Choice]:
    """The run of a command line, and its settings; ValueError for devices that cannot be divided so. known: the data."""
    data, train = config.data, config.train
    on_cpu, context, ring = args.gpu == "cpu", train.parallel.context, train.parallel.ring
    offload = train.parallel.offload and not on_cpu
    sharded = train.parallel.shard == "fsdp" and (args.count > 1 or offload)
    replicas = train.parallel.replicas if sharded else 1
    if args.count % replicas:
        raise ValueError(
            f"train.parallel.replicas={replicas} does not divide --count {args.count}; use a number that does."
        )
    if args.count % context:
        raise ValueError(f"--context {context} does not divide --count {args.count}; use a number that does.")
    check_batch(config, args.count // context)
    described = on_cpu or (args.tflops and args.memory)
    peak = 0.0 if described else pick({**GPUS, "cpu": (0.0, 0.0)}, args.gpu, "GPU")[0]
    bf16 = resolve(train.precision, "cpu") == "bf16" if on_cpu else train.precision != "fp32"
    if context > 1:
        check_shared_attention(arguments, context, ring, device="cpu" if on_cpu else "cuda", in_16_bits=bf16)
        for frames in dict.fromkeys(size[0] for size in data.sizes or [[data.num_frames]]):
            try:
                check_frames(frames, vae, context)
            except ValueError as error:  # the sums hold for the clips that it proposes, about
                warn_user(f"training refuses these settings: {error}")
    patch, groups = arguments["patch_size"], args.count // context
    kinds = tuple(step_kinds(config, vae, patch=patch, processes=groups, dataset=known and known.trained))
    run = PlannedRun(
        config, arguments, kinds[0].latent, args.count, clips=kinds[0].clips, kinds=kinds,
        bf16=bf16, fused=not (on_cpu and native_bf16() and bf16), on_cpu=on_cpu, peak=args.tflops or peak,
        utilisation=args.utilisation, bandwidth=args.bandwidth, host_bandwidth=args.host_bandwidth,
        adapted=adapted_parameters(config, arguments),
    )  # fmt: skip
    # Without the settings that have no effect on these devices.
    return run, run.configured._replace(sharded=sharded, offload=offload)
