"""Build the parts of a training run from its config: model, captions, order of clips, accelerator."""

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from stdit.checkpoint.inflate import inflate, inflated_arguments
from stdit.conditions import ActionSpace, conditioners_of
from stdit.config import Config
from stdit.data.actions import check_flip
from stdit.data.base import Captions
from stdit.data.datasets import CachedLatents, Dataset
from stdit.data.holdout import split
from stdit.data.identity import hash_of
from stdit.data.samplers import NO_BUCKET, ClipSize
from stdit.data.workers import num_workers
from stdit.diffusion.objective import Objective
from stdit.files import printable
from stdit.model.config import model_arguments
from stdit.model.lora import base_fingerprint
from stdit.model.stdit import STDiT
from stdit.model.unet import UNet
from stdit.nn.checkpointing import CHECKPOINTING
from stdit.nn.context_parallel import check_ring, check_shared_attention
from stdit.precision import Precision, resolve
from stdit.ranges import exact
from stdit.recipes.models import default_device, load_start
from stdit.recipes.order import measure
from stdit.recipes.starts import check_teacher
from stdit.text import CaptionCache, load_text_encoder
from stdit.training.compiled import LONG_RUN, compiler_error
from stdit.training.fit import Teacher
from stdit.training.held_out import TOGETHER, HeldOutDraws
from stdit.training.parallel import backend_of
from stdit.training.rendezvous import FRESH
from stdit.vae import VAEGeometry, VideoVAE
from stdit.warn import warn_user


def build_accelerator(
    precision: Precision, unused_parameters: bool = False, *, timeout: float = 1800.0, offload: bool = False
) -> Accelerator:
    """Make the `Accelerator` of this process.

    unused_parameters: whether a step may leave some parameters without a gradient, which DDP must know. timeout: seconds
    after which a process that the others wait for ends the run. offload: whether shards wait in the host's memory.
    """
    device = default_device()
    backend = backend_of(torch.device(device).type, offload=offload)
    AcceleratorState._reset_state()  # which an earlier run in this process may have set to another precision
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # otherwise two processes on CPUs are two separate runs
        mixed_precision={"bf16": "bf16", "fp32": "no"}[resolve(precision, device)],
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=unused_parameters),
            InitProcessGroupKwargs(
                init_method=FRESH,
                timeout=timedelta(seconds=timeout),
                **({} if backend is None else {"backend": backend}),
            ),
        ],
    )


def build_captions(
    config: Config, dataset: Dataset, device: torch.device | str, *, share: tuple[int, int] = (0, 1)
) -> CaptionCache | None:
    """Encode the captions of the data into a cache on disk; None without a text encoder.

    share: the number of this process and of all, which divide the captions; each returns when all are encoded. ValueError if
    no clip has a caption.
    """
    if config.text.encoder is None:
        return None
    texts = Captions(dataset)
    if not any(texts):
        raise ValueError(
            f"text.encoder={config.text.encoder} but no clip of {config.data.root!r} has a caption; put a.txt next to "
            "a.mp4, or give a manifest with a column 'caption' (and cache latents again), or leave text.encoder out."
        )
    encoder = load_text_encoder(config.text.encoder, device)
    cache = CaptionCache(Path(config.text.cache), encoder)
    cache.add(encoder, texts, progress=not share[0], share=share)
    return cache


def build_model(
    config: Config, vae: VideoVAE, dataset: Dataset, objective: Objective, caption_channels: int | None = None
) -> STDiT | UNet:
    """Build the network of a config. ValueError if its classes do not fit the data; num_classes=0 means no labels."""
    classes = _count_classes(config, dataset)
    image = load_start(config.init_from.path) if config.init_from.path else None
    names = _class_names(classes, dataset, image)
    given: dict[str, Any] = {
        "in_channels": vae.channels, "num_classes": classes, "learn_sigma": objective.learns_sigma, "class_names": names,
        "caption_channels": caption_channels,
    }  # fmt: skip
    actions = action_arguments(config, vae, dataset)
    if config.model.network == "unet":
        if actions:
            raise ValueError("model.actions=true needs model.network=transformer; set it, or actions=false.")
        if config.objective.flow_map:
            raise ValueError("objective.flow_map=true needs model.network=transformer; set it, or flow_map=false.")
        shape = vae.latent_shape(config.data.num_frames, config.data.height, config.data.width)
        return UNet(**given, sample_size=shape, channels=config.model.unet_channels, layers=config.model.unet_layers)
    arguments = model_arguments(config.model)
    arguments["extra_conditions"] = {**arguments["extra_conditions"], **actions}
    given |= {"flow_map": config.objective.flow_map, "distilled_guidance": config.objective.distilled_guidance}
    if image is not None:
        if image.config.flow_map and not config.objective.flow_map:
            raise ValueError(
                f"init_from.path={config.init_from.path!r} is a flow map, which learns where its steps end; set objective.flow_map="
                "true, or start from the model that was its teacher."
            )
        arguments |= inflated_arguments(image, arguments, config.model.depth, config.init_from)
    if config.objective.distilled_scales:  # after the comparison with the teacher, which has no such condition
        scales = {"scales": dict(config.objective.distilled_scales)}
        arguments["extra_conditions"] = {**arguments["extra_conditions"], "guidance": scales}
    shape = vae.latent_shape(config.data.num_frames, config.data.height, config.data.width, arguments["patch_size"])
    model = STDiT(**{**arguments, **given, "sample_size": shape})
    _check_learns_cfg(config, model)
    if image is not None:
        print(f"from {config.init_from.path}: {inflate(image, model, config.init_from).keeps}")
    if config.model.gradient_checkpointing:
        model.enable_gradient_checkpointing(CHECKPOINTING[config.model.gradient_checkpointing])
    return model


def _class_names(classes: int, dataset: Dataset, start: STDiT | None) -> list[str] | None:
    """The names of a model's classes: the data's, or those of the model that it starts from if these go on from them."""
    names = dataset.class_names
    if classes == dataset.num_classes:
        return names
    known = None if start is None else start.config.class_names
    if names and known and len(known) == classes and list(known[: len(names)]) == list(names):
        return list(known)
    return None


def _count_classes(config: Config, dataset: Dataset) -> int:
    """The number of classes of a run's model, 0 without labels; ValueError if they do not fit the data."""
    classes = dataset.num_classes if config.model.num_classes is None else config.model.num_classes
    if dataset.num_classes > classes > 0:
        raise ValueError(
            f"model.num_classes={classes} is too few: the data has labels up to {dataset.num_classes - 1}. "
            f"Use model.num_classes={dataset.num_classes}, or null."
        )
    if classes and not dataset.num_classes:
        raise ValueError(
            f"model.num_classes={classes} but the data has no labels; use model.num_classes=0, folders by class or a manifest with labels."
        )
    return classes


def check_same_conditions(config: Config, teacher: STDiT, dataset: Dataset) -> None:
    """Raise ValueError for conditions or classes of a flow map that the model it learns from does not have."""
    classes = _count_classes(config, dataset)
    captions = None if config.text.encoder is None else 1  # their channels are known after they are encoded
    chosen = {**model_arguments(config.model), "num_classes": classes, "caption_channels": captions}
    names = [*conditioners_of(chosen), *(["actions"] if config.model.actions else [])]
    problem = (
        f"a flow map learns what init_from.path={config.init_from.path!r} makes under its conditions, and that model"
    )
    remedies = {
        "label": "set model.num_classes=0", "micro": "set model.micro_conditions=[]", "caption": "set text.encoder=null",
        "actions": "set model.actions=false",
    }  # fmt: skip
    for name in names:
        if name not in teacher.conditioners:
            remedy = remedies.get(name, f"leave model.extra_conditions.{name} out")
            raise ValueError(f"{problem} takes no {name!r}; {remedy}.")
    if "label" not in names:
        return
    count, known = teacher.num_classes, teacher.config.class_names or ()
    others = [
        (ours not in known, number, printable(str(theirs)), printable(str(ours)))
        for number, (theirs, ours) in enumerate(zip(known, dataset.class_names or (), strict=False))
        if theirs != ours
    ]
    if others:
        new_word, number, theirs, ours = min(others)
        if not new_word:
            raise ValueError(
                f"{problem} calls class {number} {theirs!r}, but the data calls it {ours!r}; number the classes as it does (stdit info "
                f"{config.init_from.path} --labels), or go without labels (model.num_classes=0)."
            )
        warn_user(
            f"class {number} is {ours!r} in the data, and {theirs!r} in the model of init_from.path={config.init_from.path!r}, which a "
            "flow map learns from; they must mean the same."
        )
    if classes != count:
        remedy = (
            f"set model.num_classes={count}" if dataset.num_classes <= count else "leave out clips of further classes"
        )
        raise ValueError(
            f"{problem} has {count} classes, but this run {classes}; {remedy}, or go without labels (model.num_classes=0)."
        )


def compiles_blocks(config: Config, accelerator: Accelerator) -> bool | Literal["auto"]:
    """Whether the blocks of a run are compiled; "auto" remains where that gains time and works here, and says so."""
    train, model = config.train, config.model
    if train.compile != "auto":
        return train.compile
    without = model.network == "unet" or model.gradient_checkpointing == "selective" or train.parallel.context > 1
    if train.steps < LONG_RUN or without:
        return False
    if error := compiler_error(accelerator.device):
        accelerator.print(f"blocks are not compiled, which would be faster, since no compiler works here: {error}")
        return False
    accelerator.print("blocks are compiled in the first steps, which takes half a minute or more")
    return "auto"


def _check_learns_cfg(config: Config, model: STDiT) -> None:
    """Raise ValueError for classifier-free guidance that is to be learnt where there is no condition to lead away from."""
    objective = config.objective
    one = objective.distilled_guidance != 1 and objective.distilled_guider == "cfg"
    if (one or "cfg" in objective.distilled_scales) and not any(
        one.guided for one in conditioners_of(model.config).values()
    ):
        key = f"distilled_guidance={exact(objective.distilled_guidance)}" if one else "distilled_scales.cfg"
        raise ValueError(
            f"objective.{key}: classifier-free guidance leads away from the output without label, caption or actions, and this "
            "model has none of them; set it to 1, or let it learn the guider auto."
        )


def action_arguments(config: Config, vae: VideoVAE, dataset: Dataset) -> dict[str, Any]:
    """The condition on actions, by name, whose space is that of the data; empty without `model.actions`."""
    if not config.model.actions:
        return {}
    space: ActionSpace | None = getattr(dataset, "action_space", None)
    if space is None:
        raise ValueError(
            "model.actions=true but the clips have no actions; record some (stdit record), or give a manifest with a column "
            "'actions', one for every frame."
        )
    check_flip(config.data.flip, dataset)
    for one in getattr(dataset, "datasets", [dataset]):
        if isinstance(one, CachedLatents) and one.info.get("flip"):
            raise ValueError(
                f"the latents in {str(one.root)!r} were made with data.flip=true, which mirrors the clips but not their actions; "
                "cache them again with data.flip=false."
            )
    if config.data.fps is not None and getattr(dataset, "decodes", True):
        raise ValueError(
            f"data.fps={config.data.fps:g} takes some of the frames or repeats them, but actions belong to single ones; set "
            "data.fps=null."
        )
    return {"actions": {"stride": vae.stride[0], **space.plain}}


def build_teacher(config: Config, vae: VideoVAE, device: torch.device) -> Teacher | None:
    """The model of `init_from.path` from which a flow map learns; None for other runs, and from a flow map.

    Where the guider `auto` is learnt also its guide. ValueError if it has none, or the model was trained with another
    objective or VAE.
    """
    if not config.objective.flow_map or config.init_from.path is None:
        return None
    model = load_start(config.init_from.path)
    check_teacher(config, model, vae)
    by_guide = config.objective.distilled_guider == "auto" or "auto" in config.objective.distilled_scales
    if model.config.flow_map:
        if by_guide or config.objective.distilled_scales:
            raise ValueError(
                f"guidance cannot be learnt: init_from.path={config.init_from.path!r} is a flow map itself, which "
                "learns on without a teacher; use objective.distilled_guider=cfg without distilled_scales."
            )
        return None
    folder = Path(config.init_from.path)
    folder = folder.parent if folder.name == "transformer" else folder
    guide = None
    if config.objective.distilled_guider != "cfg" and config.objective.distilled_guidance == 1:
        # No error, since runs of earlier versions resume.
        warn_user(
            f"objective.distilled_guider={config.objective.distilled_guider} has no effect with objective.distilled_guidance=1, at which no "
            "guidance is learnt; set distilled_guidance above 1, or distilled_guider=cfg."
        )
    if by_guide:
        if not (folder / "guide" / "config.json").is_file():
            raise ValueError(
                f"the guider auto is to be learnt, but init_from.path={config.init_from.path!r} has no folder guide; use cfg "
                "(objective.distilled_scales.auto=1 leaves auto out), or a model that was trained with train.guide_step."
            )
        guide = STDiT.from_pretrained(folder, subfolder="guide")
    for part in filter(None, (model, guide)):
        part.requires_grad_(False).eval().to(device)
    return Teacher(model, guide)


def teacher_fingerprint(teacher: Teacher | None) -> str | None:
    """A hash of the weights of a teacher and of its guide; None without a teacher."""
    return None if teacher is None else hash_of([base_fingerprint(part) for part in filter(None, teacher)])


def check_batch(config: Config, processes: int) -> None:
    """Raise ValueError unless `train.batch_size` is a whole number of micro-batches on every process."""
    train = config.train
    if config.data.sizes:
        return
    micro = train.micro_batch or -(-train.batch_size // processes)
    if train.batch_size % (micro * processes):
        raise ValueError(
            f"train.batch_size={train.batch_size} is not a multiple of {processes} process(es) times "
            f"train.micro_batch={micro}; use {max(1, round(train.batch_size / (micro * processes))) * micro * processes}."
        )


def check_context(config: Config, vae: VideoVAE, processes: int) -> None:
    """Raise ValueError for processes, clips or packs that `train.parallel.context` does not go with."""
    context = config.train.parallel.context
    if context == 1:
        return
    if processes % context:
        raise ValueError(
            f"train.parallel.context={context} does not divide {processes} process(es); start a multiple of {context} (torchrun "
            f"--nproc-per-node {context} -m stdit train ...), or use another context."
        )
    if config.data.packing:
        raise ValueError("data.packing=true does not go with train.parallel.context; use batches of one size.")
    ring = config.train.parallel.ring
    if config.init_from.path:  # the model's shape may be that of its file: `enable_context_parallel` checks it
        check_ring(ring, causal=config.model.causal)
    else:
        in_16_bits = resolve(config.train.precision, vae.device) == "bf16"
        device = vae.device.type
        check_shared_attention(model_arguments(config.model), context, ring, device=device, in_16_bits=in_16_bits)
    for frames, _, _ in config.data.sizes or [[config.data.num_frames, 0, 0]]:
        check_frames(frames, vae, context)


def check_frames(frames: int, vae: VAEGeometry, context: int) -> None:
    """Raise ValueError for clips whose latent frames `context` processes cannot share, with the nearest that they can."""
    latents = vae.latent_frames(frames)
    if latents % context == 0:
        return
    step = vae.temporal_granularity or vae.stride[0]
    fits = [vae.pixel_frames(n * context) for n in range(1, 2 + latents // context)]
    near = [str(number) for number in fits if (number - 1) % step == 0][-2:]
    instead = f"use {' or '.join(near)} frames, or " if near else ""
    raise ValueError(
        f"{frames} frames (data.num_frames, data.sizes) are {latents} latent frames, which train.parallel.context={context} "
        f"processes cannot share; {instead}use a context that divides {latents}."
    )


def split_holdout(config: Config, dataset: Dataset) -> tuple[Dataset, HeldOutDraws | None]:
    """The clips to train on, and what the held-out loss is measured on: None without a hold-out."""
    train = config.train
    if not train.holdout and not train.holdout_values:
        return dataset, None
    kept, held = split(dataset, train.holdout, train.holdout_column, train.holdout_values)
    sizes: dict[int, ClipSize | None] = dict.fromkeys(range(len(held)))
    if config.data.sizes:
        candidates = [ClipSize(*size) for size in config.data.sizes]
        buckets = measure(held, candidates, config.seed)[1]
        sizes = {index: candidates[bucket] for index, bucket in enumerate(buckets.tolist()) if bucket != NO_BUCKET}
        if not sizes:
            raise ValueError(
                f"none of the {len(held)} held-out clips is long enough for any of data.sizes; hold out more, or add a size "
                "with fewer frames."
            )
    decodes = num_workers(config.data.workers, held.decodes, 1) > 0
    together = min(TOGETHER, train.micro_batch or TOGETHER)
    draws = HeldOutDraws(
        held, sizes, config.seed, together=together, decoder_process=decodes, timeout=config.data.timeout
    )
    return kept, draws


def check_cache(dataset: Dataset, vae: VideoVAE) -> None:
    """Raise ValueError if cached latents were made with a different VAE."""
    for one in getattr(dataset, "datasets", [dataset]):
        if not isinstance(one, CachedLatents) or vae.has_fingerprint(one.info["vae_fingerprint"]):
            continue
        raise ValueError(
            f"the latents in {str(one.root)!r} were made with VAE {one.info['vae']!r}, whose weights differ from vae.name={vae.name!r}; use that VAE, or cache the latents again."
        )
