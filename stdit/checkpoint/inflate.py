"""Inflate an image model to a video model: copy its weights, add temporal blocks, and report what is preserved."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stdit.checkpoint.config import PARTS, InitFrom
from stdit.checkpoint.files import check_tensors
from stdit.model.stdit import STDiT
from stdit.nn.embedders import LearnedPosEmbed

__all__ = ["PARTS", "Inflation", "InitFrom", "inflate", "inflated_arguments", "plan_blocks"]

# Arguments that the weights decide and a config cannot set: the timestep convention, and an epsilon.
_FROM_WEIGHTS = ("timestep_scale", "timestep_reversed", "timestep_offset", "frequency_shift", "norm2_eps")
# Arguments that decide which parameters there are, or what they mean; the video model must have the image model's.
_SIZES = ("hidden_size", "num_heads")
_MUST_AGREE = (
    *_SIZES, "mlp_ratio", "qk_norm", "conditioning", "trunk", "num_decoder_blocks", "num_single_blocks", "learned_pos_embed",
    "relative_position_bias", "timestep_mlp", "output_conv", "activation",
)  # fmt: skip
_CLASS_TABLE = "y_embedder.embedding_table.weight"


class Inflation(NamedTuple):
    """The result of `inflate`.

    sources: for each block, the index of the image model's block it started from (None: new). keeps: a sentence on
    what is preserved of the image model's output.
    """

    sources: list[int | None]
    keeps: str


def plan_blocks(image: STDiT, axes: Sequence[str], init_from: InitFrom) -> list[int | None]:
    """For each block of the video model, the image model's block it starts from (None: inserted).

    Raises ValueError where the image model's blocks do not fill whole cycles of `axes`.
    """
    depth, image_axes, axes = image.config.depth, list(image.config.axes), list(axes)
    if "temporal" in image_axes:
        if image_axes != axes or init_from.temporal == "insert":
            raise ValueError(
                f"init_from: the weights in {init_from.path!r} have temporal blocks already (axes {image_axes}); use "
                f"model.axes={image_axes} and init_from.temporal=convert to continue from them.".replace("'", "")
            )
        return list(range(depth))
    if init_from.temporal == "convert" or "temporal" not in axes:
        return list(range(depth))
    if all(axis == "temporal" for axis in axes):
        raise ValueError(
            f"model.axes={axes} leaves no block for the image model's weights; use [spatial, temporal], or "
            "init_from.temporal=convert."
        )
    sources: list[int | None] = []
    used = 0
    while used < depth or len(sources) % len(axes):  # whole cycles, so that all image blocks get their new ones
        inserted = axes[len(sources) % len(axes)] == "temporal"
        if not inserted and used == depth:
            raise ValueError(
                f"init_from: {depth} blocks do not fill whole cycles of model.axes={axes}; use a cycle in which the number of "
                f"blocks that are not temporal divides {depth}, such as [spatial, temporal]."
            )
        sources.append(None if inserted else used)
        used += not inserted
    return sources


def inflated_arguments(
    image: STDiT, chosen: Mapping[str, Any], depth: int | None, init_from: InitFrom
) -> dict[str, Any]:
    """Constructor arguments that the image model decides: its timestep convention, its epsilon, and the depth.

    chosen: the arguments that the config chooses; depth: the depth it gives, if any. Position encoding and causality
    stay as chosen. Raises ValueError where a choice does not fit the weights.
    """
    _check_agreement(image, chosen, init_from)
    _check_position_encoding(image, chosen, init_from)
    sources = plan_blocks(image, chosen["axes"], init_from)
    if depth is not None and depth != len(sources):
        raise ValueError(
            f"model.depth={depth} but init_from makes {len(sources)} blocks of {image.config.depth}; leave model.depth out."
        )
    if None in sources and image.config.trunk != "stack":
        raise ValueError(
            f"init_from.temporal=insert needs model.trunk=stack, but the weights of init_from.path={init_from.path!r} have "
            f"trunk={image.config.trunk}, which connects blocks by their position; use init_from.temporal=convert, or "
            "model.axes=[joint]."
        )
    return {**{key: image.config[key] for key in _FROM_WEIGHTS}, "depth": len(sources), "block_sources": sources}


def _check_agreement(image: STDiT, chosen: Mapping[str, Any], init_from: InitFrom) -> None:
    """Raise ValueError for the first argument in which the config and the weights must agree but do not."""
    defaults = {name: p.default for name, p in inspect.signature(STDiT.__init__).parameters.items()}
    pairs: dict[str, tuple[Any, Any]] = {
        key: (chosen.get(key, defaults[key]), image.config[key]) for key in _MUST_AGREE
    }
    if tuple(chosen["patch_size"])[1:] != image.patch_size[1:]:  # patches may get more frames
        pairs["patch_size"] = (list(chosen["patch_size"]), list(image.patch_size))
    for key, kind in (("micro_conditions", list), ("extra_conditions", dict)):
        if theirs := kind(image.config[key] or ()):  # a model without any may get some
            pairs[key] = (kind(chosen.get(key) or ()), theirs)
    for key, (ours, theirs) in pairs.items():
        if ours != theirs:
            here, there = _plain(ours), _plain(theirs)
            raise ValueError(
                f"model.{key}={here} but the weights of init_from.path={init_from.path!r} have {there}; {_remedy(key, ours, theirs)}."
            )


def _remedy(key: str, ours: Any, theirs: Any) -> str:
    if key in (*_SIZES, "patch_size"):
        return f"set model.size or model.{key} to match"
    if key == "extra_conditions" and ours.get("actions") != theirs.get(
        "actions"
    ):  # the data say which actions there are
        known = {"actions" in ours, "actions" in theirs}
        return (
            "train on clips with the same actions"
            if known == {True}
            else f"set model.actions={_plain('actions' in theirs)}"
        )
    return f"set model.{key}={_plain(theirs)}"


def _plain(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def _check_position_encoding(image: STDiT, chosen: Mapping[str, Any], init_from: InitFrom) -> None:
    """Raise ValueError if the weights need another position encoding than the config has.

    On one frame the encodings differ in two ways only: Latte's table is not zero there, and rope_3d rotates queries and
    keys by rows and columns.
    """
    theirs, ours = image.config.position_encoding, chosen.get("position_encoding", "sincos")
    problem = f"model.position_encoding={ours} but the weights of init_from.path={init_from.path!r} have {theirs}"
    if theirs == "latte" != ours and set(image.config.axes) != {"spatial"}:
        causal = " and model.causal=false (a causal model needs rope)" if chosen.get("causal") else ""
        raise ValueError(f"{problem}, whose table the weights need; set model.position_encoding=latte{causal}.")
    if _rotates_in_space(theirs) and not _rotates_in_space(ours):
        raise ValueError(f"{problem}, which rotates spatial attention; set model.position_encoding=rope_3d.")


def _rotates_in_space(position_encoding: str) -> bool:
    return position_encoding.endswith("rope_3d")


@torch.no_grad()
def inflate(image: STDiT, video: STDiT, init_from: InitFrom) -> Inflation:
    """Copy the image model's weights into a fresh video model.

    With inserted temporal blocks and a temporal patch of 1 the video model's output on T frames is the image model's
    output on each; with a larger patch this holds for still clips. Raises ValueError, before anything is written, for
    parts that do not fit and are not named in `restart`.
    """
    sources = list(video.config.block_sources or range(video.config.depth))
    weights = image.state_dict()
    check_tensors(weights, init_from.path or "the image model")
    if image.config.caption_channels and not video.config.caption_channels:
        raise ValueError(
            f"init_from: the weights take captions (caption_channels={image.config.caption_channels}), but this run has "
            "none; set text.encoder to the one that they were trained with."
        )
    state = dict(video.state_dict())
    new = {
        key: value for key, value in weights.items()
        if not key.startswith("blocks.") and key.split(".")[0] not in init_from.restart
    }  # fmt: skip
    for i, source in enumerate(sources):
        if source is None:
            new |= _identity_block(video, state, i)
        else:
            prefix = f"blocks.{source}."
            new |= {f"blocks.{i}.{k.removeprefix(prefix)}": v for k, v in weights.items() if k.startswith(prefix)}
    _convert_class_table(image, video, init_from, new)
    _convert_patches(image, video, init_from, new)
    _resize_pos_embeds(image, video, state, new)
    _check_fit(state, new, sources)
    video.load_state_dict({**state, **new})
    return Inflation(sources, _describe_preserved(image, video, init_from, sources))


def _identity_block(video: STDiT, state: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    """Weights that make an inserted block the identity.

    With adaLN-Zero a new block is the identity already. Other conditionings have no gate, or share one whose weights
    come from the image model, so the last layer of each branch is zero instead (never both: nothing would get a
    gradient).
    """
    if video.config.conditioning == "adaln_zero":
        return {}
    last = [f"blocks.{i}.{layer}.{kind}" for layer in ("attn.proj", "cross_attn.proj", "mlp.fc2") for kind in ("weight", "bias")]  # fmt: skip
    return {key: torch.zeros_like(state[key]) for key in last if key in state}


def _check_fit(state: Mapping[str, Tensor], new: Mapping[str, Tensor], sources: Sequence[int | None]) -> None:
    """Raise ValueError for weights that the video model lacks or has in another shape, and for missing ones."""
    wrong = {
        key: f"{key} {tuple(value.shape)} here {tuple(state[key].shape) if key in state else 'absent'}"
        for key, value in new.items() if key not in state or state[key].shape != value.shape
    }  # fmt: skip
    copied = {f"blocks.{i}" for i, source in enumerate(sources) if source is not None}
    wrong |= {
        key: f"{key} is missing from the weights"
        for key in state
        # A cross-attention to captions may be new: it starts at zero.
        if key not in new and ".cross_attn." not in key and ".".join(key.split(".")[:2]) in copied
    }
    if wrong:
        parts = sorted({key.split(".")[0] for key in wrong} & set(PARTS))
        remedy = "set model.size to that of the weights"
        if parts:
            remedy = f"add init_from.restart={parts}".replace("'", "")
        elif any("relative_position_bias" in key for key in wrong):
            remedy = "train at the height and width that these weights were trained at"
        raise ValueError(f"init_from: the weights do not fit: {'; '.join(list(wrong.values())[:3])}; {remedy}.")


def _convert_class_table(image: STDiT, video: STDiT, init_from: InitFrom, new: dict[str, Tensor]) -> None:
    """Keep the class table, replace it, or fold its null class into a bias."""
    if "y_embedder" in init_from.restart:
        return
    if image.y_embedder is None:
        if video.y_embedder is not None:  # zero, so that a class has no effect until it is learned
            new[_CLASS_TABLE] = torch.zeros_like(video.y_embedder.embedding_table.weight)
    elif video.y_embedder is None:  # unconditional: the null vector is added to the bias of the timestep embedding
        if video.conditioning.by_tokens or not video.config.timestep_mlp:
            raise ValueError(
                f"init_from: the null class of the weights cannot be folded into the timestep's bias with conditioning="
                f"{video.config.conditioning} and timestep_mlp={str(video.config.timestep_mlp).lower()}; use "
                f"model.num_classes={image.num_classes}, or init_from.restart=[y_embedder] to go without it."
            )
        null = new.pop(_CLASS_TABLE)[-1]
        if "t_embedder.mlp.2.bias" in new:
            new["t_embedder.mlp.2.bias"] = new["t_embedder.mlp.2.bias"] + null
    elif init_from.classes == "replace":
        table = video.y_embedder.embedding_table.weight.detach().clone()
        table[-1] = new[_CLASS_TABLE][-1]
        new[_CLASS_TABLE] = table
    elif video.num_classes != image.num_classes:
        raise ValueError(
            f"init_from: the weights have {image.num_classes} classes, the data has {video.num_classes}; "
            f"add init_from.classes=replace, or set model.num_classes={image.num_classes}."
        )


def _convert_patches(image: STDiT, video: STDiT, init_from: InitFrom, new: dict[str, Tensor]) -> None:
    """Spread image kernels over a temporal patch; every frame of the patch gets the image model's head."""
    frames = video.patch_size[0]
    if frames == image.patch_size[0]:
        return
    if image.patch_size[0] != 1:
        raise ValueError(
            f"init_from: the weights have a temporal patch of {image.patch_size[0]}, which cannot become one of {frames}; set "
            f"model.patch_size={list(image.patch_size)}."
        )
    _, height, width = image.patch_size
    if "x_embedder.proj.weight" in new:
        kernel = new["x_embedder.proj.weight"].unflatten(1, (image.in_channels, 1, height, width))
        frame = {"first": 0, "centre": frames // 2}.get(init_from.patch)
        share = torch.full((frames,), 1 / frames) if frame is None else torch.eye(frames)[frame]
        new["x_embedder.proj.weight"] = (kernel * share[None, None, :, None, None]).flatten(1)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if key in new:
            new[key] = new[key].repeat(frames, *[1] * (new[key].ndim - 1))


def _resize_pos_embeds(image: STDiT, video: STDiT, state: Mapping[str, Tensor], new: dict[str, Tensor]) -> None:
    """Learned position embeddings of the video model's grid, as the image model computes them for that grid."""
    for name, module in video.named_modules():
        if not isinstance(module, LearnedPosEmbed) or f"{name}.patches" not in new:
            continue
        new[f"{name}.patches"] = image.get_submodule(name)(*module.grid)
        if (key := f"{name}.prefix") in new and key in state:  # (timestep, label); one of the models may have no label
            common = min(len(new[key]), len(state[key]))
            new[key] = torch.cat([new[key][:common], state[key][common:]])


def _describe_preserved(image: STDiT, video: STDiT, init_from: InitFrom, sources: Sequence[int | None]) -> str:
    """Describe, in a sentence, what the video model computes at the start of training."""
    inserted = sum(source is None for source in sources)
    preserved = _preserved(image, video, init_from, sources)
    fresh = list(init_from.restart)
    if init_from.classes == "replace" and video.y_embedder is not None and image.y_embedder is not None:
        fresh.append("all classes except the null class (so what is preserved holds without a label)")
    if video.y_embedder is not None and image.y_embedder is None:
        fresh.append("classes, initialised to zero")
    if video.config.caption_channels and not image.config.caption_channels:
        fresh.append("captions")
    ending = f" New: {', '.join(fresh)}." if fresh else ""
    return f"{inserted} of {len(sources)} blocks are new; preserved of the image model: {preserved}.{ending}"


def _preserved(image: STDiT, video: STDiT, init_from: InitFrom, sources: Sequence[int | None]) -> str:
    axes = [video.config.axes[i % len(video.config.axes)] for i in range(len(sources))]
    copied = {axis for axis, source in zip(axes, sources, strict=True) if source is not None}
    encoding, image_encoding = video.config.position_encoding, image.config.position_encoding
    latte_differs = encoding == "latte" and (image_encoding != "latte" or None in sources) and set(axes) != {"spatial"}
    if init_from.restart:
        return "the weights of the blocks; the output depends on the new parts"
    if _rotates_in_space(encoding) != _rotates_in_space(image_encoding):
        return (
            f"the weights of every copied block; position_encoding={encoding} also rotates spatial attention, so no frame's "
            "output is preserved"
        )
    if latte_differs:
        return (
            "the weights of every copied block; position_encoding=latte adds its table to all tokens, so no frame's output "
            "is preserved"
        )
    if video.conditioning.by_tokens and _condition_names(video) != _condition_names(image):
        return "the weights of every copied block; other conditions are other tokens, so no frame's output is preserved"
    if list(video.config.axes) == list(image.config.axes) and image.patch_size == video.patch_size:
        keys = ("position_encoding", "causal", "window", "sink")
        changed = [f"{key}={video.config[key]}" for key in keys if video.config[key] != image.config[key]]
        if changed and copied != {"spatial"}:
            return f"the output on one frame; on several frames attention over time differs ({', '.join(changed)})"
        return "the whole output, since it is the same model"
    if "temporal" in copied:
        return "the weights of every block; blocks converted from spatial to temporal compute something else"
    if "joint" in copied:
        attended = "earlier frames too" if video.config.causal else "all frames at once"
        return f"the output on one frame; on several frames the blocks attend to {attended}"
    if video.patch_size[0] > 1:
        return "the output on every frame of a still clip"
    return "the output on every frame"


def _condition_names(model: STDiT) -> set[str]:
    return set(model.conditioners)
