"""Plan a run before it starts: tokens, parameters, memory, speed and days on a GPU, and the largest sizes that fit.

stdit plan configs/video.yaml --gpu H100 --count 8
stdit plan configs/video.yaml --count 64 --shard fsdp --context 8 --bandwidth 400
stdit plan configs/video.yaml model.size=B/2 --gpu 4090 --utilisation 0.35 --refuse
"""

import argparse
from collections.abc import Callable, Sequence

from stdit.checkpoint.inflate import inflated_arguments
from stdit.config import Config, load_typed
from stdit.diffusion.objective import build_objective
from stdit.model.config import model_arguments
from stdit.model.cost import Cost, Memory, Shape, forward_cost, frame_growth, over_processes, training_memory
from stdit.model.stdit import STDiT
from stdit.precision import native_bf16, resolve
from stdit.recipes.build import check_batch
from stdit.recipes.entry import command, command_parser
from stdit.text import load_text_encoder
from stdit.training.throughput import GPUS
from stdit.vae import VAEGeometry, load_vae
from stdit.variants import pick

GIB = 2**30
# Stride and latent channels of the VAEs that configs name by hub id, so that planning needs no download.
HUB_VAES = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers/vae": ((4, 8, 8), 16),
    "stabilityai/sd-vae-ft-ema": ((1, 8, 8), 4),
}
CHECKPOINTING_NAMES: dict[bool | str, str] = {False: "without", "selective": "with selective", True: "with full"}
RESERVED = 1.5 * GIB  # of the CUDA context, kernels' workspaces and fragmentation
LAUNCH_SECONDS = 0.01  # of a training step of a small model on a GPU: some thousand kernels of a few microseconds


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
        image = STDiT.from_pretrained(config.init_from.path)
        chosen |= inflated_arguments(image, chosen, config.model.depth, config.init_from)
    learns = build_objective(config.objective).learns_sigma
    words = load_text_encoder(config.text.encoder).channels if config.text.encoder else None
    data = config.data
    return {
        **chosen, "in_channels": vae.channels, "num_classes": config.model.num_classes or 0, "learn_sigma": learns,
        "caption_channels": words,
        "sample_size": vae.latent_shape(data.num_frames, data.height, data.width, chosen["patch_size"]),
    }  # fmt: skip


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
    if not 0 < args.utilisation <= 1 or args.count < 1:
        raise ValueError(
            f"--utilisation must be > 0 and <= 1, got {args.utilisation}, and --count must be >= 1, got {args.count}."
        )
    for name, value in (("--tflops", args.tflops), ("--memory", args.memory)):
        if value is not None and not 0 < value < 1e6:
            raise ValueError(f"{name} must be > 0 and < 1e6 (Tflops or GiB), got {value}.")


def speed_line(args: argparse.Namespace, config: Config, flops: float, peak: float) -> str:
    """A line with steps and clips per second, and days.

    flops: multiply-adds of the forward pass of one clip. peak: Tflops of one device.
    """
    train = config.train
    # A backward pass costs two forwards, checkpointing one more, unless it keeps what is dear.
    passes = 4 if config.model.gradient_checkpointing is True else 3
    seconds = 2 * passes * flops * train.batch_size / (peak * 1e12 * args.utilisation * args.count)
    if seconds < LAUNCH_SECONDS:
        return (
            f"speed         this model is too small for {args.gpu}: launching its operations takes longer than computing them; "
            f"expect at most some {1 / LAUNCH_SECONDS:.0f} steps/s, and {train.steps:,} steps in minutes"
        )
    hours = train.steps * seconds / 3600
    whole = f"{hours / 24:.1f} days" if hours > 48 else f"{hours:.1f} hours"
    return (
        f"speed         {1 / seconds:.2f} steps/s, {train.batch_size / seconds:.0f} clips/s on {args.count} x {args.gpu} at {args.utilisation:.0%} of {peak:.0f} Tflops; "
        f"{train.steps:,} steps in {whole} (without the VAE: cache latents)"
    )


def scale_lines(
    args: argparse.Namespace, config: Config, cost: Cost, arguments: dict, *, sharded: bool, context: int, micro: int
) -> list[str]:
    """Lines with what devices send each other in a step, the size of checkpoints, and the cost of longer clips."""
    dim, lines = arguments["hidden_size"], []
    if args.count > 1:
        # FSDP2: weights for each pass, and gradients in float32; DDP: gradients, summed and sent back.
        each = 2 if config.train.parallel.gather_bf16 else 4
        sent = cost.parameters * (2 * each + 4 if sharded else 2 * 4)
        passes = 4 if config.model.gradient_checkpointing else 3  # tokens that are exchanged are not kept
        frames = passes * arguments["depth"] * 4 * 2 * micro * cost.tokens * dim / context if context > 1 else 0.0
        total = sent + frames
        seconds = total / (args.bandwidth * 1e9)
        lines.append(
            f"sent          {total / 1e9:,.2f} GB per device and step ({sent / 1e9:,.2f} of weights and gradients"
            + (f", {frames / 1e9:,.2f} of tokens" if frames else "")
            + f"): {seconds:.3f} s at {args.bandwidth:g} GB/s, beside the computation"
        )
    saved = cost.parameters * 4 * (3 if config.train.optimizer == "muon" else 4)
    lines.append(
        f"checkpoints   {saved * config.train.keep_checkpoints / 1e9:,.1f} GB on disk (the newest {config.train.keep_checkpoints})"
    )
    grid = tuple(n // p for n, p in zip(arguments["sample_size"], arguments["patch_size"], strict=True))
    base = frame_growth(dim, grid)
    for times in (2, 4, 8):
        longer = frame_growth(dim, (grid[0] * times, grid[1], grid[2]))
        costs = ", ".join(f"{name} {longer[name] / base[name]:.1f}" for name in base)
        lines.append(f"{times} x frames   {costs} times the operations")
    return lines


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; with --refuse the exit code is 1 if the run does not fit."""
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
    parser.add_argument("--bandwidth", type=float, default=50.0, metavar="GB/S", help="between devices, of each")
    parser.add_argument("--refuse", action="store_true", help="exit with 1 if the run does not fit")
    args = parser.parse_intermixed_args(argv)
    check_arguments(args)
    config = load_typed(Config, args.config, args.overrides)
    sharded = (args.shard or config.train.parallel.shard) == "fsdp" and args.count > 1
    context = args.context or config.train.parallel.context
    replicas = config.train.parallel.replicas if sharded else 1
    shards = args.count // replicas if sharded else 1
    if args.count % replicas:
        raise ValueError(
            f"train.parallel.replicas={replicas} does not divide --count {args.count}; use a number that does."
        )
    if args.count % context:
        raise ValueError(f"--context {context} does not divide --count {args.count}; use a number that does.")
    check_batch(config, args.count // context)
    vae = find_vae(config.vae.name)
    arguments = arguments_of(config, vae)
    data, train, patch = config.data, config.train, arguments["patch_size"]
    latent = vae.latent_shape(data.num_frames, data.height, data.width, patch)
    micro = train.micro_batch or -(-train.batch_size // (args.count // context))
    on_cpu = args.gpu == "cpu"
    described = on_cpu or (args.tflops and args.memory)  # such a device needs no row in GPUS
    peak, gib = (0.0, 0.0) if described else pick({**GPUS, "cpu": (0.0, 0.0)}, args.gpu, "GPU")
    peak, room = args.tflops or peak, (args.memory or gib) * GIB
    bf16 = resolve(train.precision, "cpu") == "bf16" if on_cpu else train.precision != "fp32"

    def memory(shape: Shape, clips: int, checkpointing: bool | str = config.model.gradient_checkpointing) -> Memory:
        fused = not (on_cpu and native_bf16() and bf16)
        found = training_memory(
            arguments, shape, clips, optimizer=train.optimizer, bf16=bf16, checkpointing=checkpointing, fused=fused,
            copies=len(train.average_lengths) + (train.guide_step is not None),
        )  # fmt: skip
        return over_processes(found, shards=shards, context=context, depth=arguments["depth"])

    cost = forward_cost(arguments, latent)
    # DDP holds gradients twice.
    other = (4 * cost.parameters if args.count > 1 and not sharded else 0) + (0 if on_cpu else RESERVED)

    print(
        f"{config.name}: {data.num_frames} frames of {data.height} x {data.width} -> latents {list(latent)}, {cost.tokens:,} tokens per clip"
    )
    uncounted = "" if arguments["num_classes"] else " (and one row per class of the data)"
    print(f"parameters    {cost.parameters:,}{uncounted}")
    print(
        f"forward       {cost.total / 1e9:,.1f} Gflops per clip: "
        + ", ".join(f"{kind} {value / cost.total:.0%}" for kind, value in cost.flops.items())
    )
    table = {checkpointing: memory(latent, micro, checkpointing) for checkpointing in CHECKPOINTING_NAMES}
    found = table[config.model.gradient_checkpointing]
    print(f"memory        micro-batch of {micro}, {'bf16' if bf16 else 'fp32'}, {train.optimizer}, on one device, GiB:")
    for part in ("weights", "gradients", "optimizer", "ema"):
        print(f"  {part:<12}{getattr(found, part) / GIB:>8.2f}")
    for checkpointing, value in table.items():
        mark = "  <- as configured" if checkpointing == config.model.gradient_checkpointing else ""
        saved = (value.activations + value.recomputed) / GIB
        print(f"  activations {saved:>8.2f}  {CHECKPOINTING_NAMES[checkpointing]} checkpointing{mark}")
    # On a CPU, saving a checkpoint copies its largest file in memory.
    saving = found.persistent + found.optimizer if on_cpu else 0.0
    need = max(found.peak + other, saving)
    print(f"  reserved    {other / GIB:>8.2f}  by the device's libraries, and by several devices")
    print(f"  peak        {need / GIB:>8.2f}" + (f"  of {room / GIB:.0f} on {args.gpu}" if room else ""))
    if peak:
        print(speed_line(args, config, cost.total, peak))
    for line in scale_lines(args, config, cost, arguments, sharded=sharded, context=context, micro=micro):
        print(line)
    if not room:
        return 0
    clips = largest(lambda n: memory(latent, n), room - other)
    grown = patch[0] * largest(lambda n: memory((n * patch[0], *latent[1:]), 1), room - other)
    frames = vae.pixel_frames(grown) if grown else 0
    print(f"largest       micro-batch {clips} at {data.num_frames} frames; {frames} frames at micro-batch 1")
    if need > room:
        print(
            f"does not fit: the run needs {need / GIB:.1f} GiB, the device has {room / GIB:.0f} GiB. Lower train.micro_batch, or set model.gradient_checkpointing to selective or true."
        )
        return 1 if args.refuse else 0
    return 0
