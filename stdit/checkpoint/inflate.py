"""An image model becomes a video model: what stays exactly, what is new, and where each weight came from."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stdit.checkpoint.files import check_tensors
from stdit.model.stdit import STDiT

PARTS = ("x_embedder", "t_embedder", "y_embedder", "final_layer")


@dataclass
class InitFrom:
    """Weights to start from: a folder that `STDiT.from_pretrained` loads, and how they become this model.

    temporal: "insert" new blocks wherever `model.axes` has a temporal one (they start as the identity), or "convert" the
    image model's own blocks in place. patch: which frame of a temporal patch an image kernel looks at. classes: keep the
    class table, or replace it (its null row stays). restart: parts to start afresh (x_embedder, final_layer, ...).
    """

    path: str | None = None  # folder that STDiT.from_pretrained loads; null: start from random weights
    temporal: Literal["insert", "convert"] = "insert"  # insert new temporal blocks, or convert old ones
    patch: Literal["first", "centre", "mean"] = "mean"  # frame of a temporal patch that an image kernel looks at
    classes: Literal["keep", "replace"] = "keep"  # keep the class table, or replace all but its null row
    restart: list[str] = field(default_factory=list)  # parts that start afresh, such as x_embedder, final_layer

    def __post_init__(self) -> None:
        unknown = [part for part in self.restart if part not in PARTS]
        if unknown:
            raise ValueError(
                f"init_from.restart={self.restart}: {unknown[0]!r} is no part. Choose from: {', '.join(PARTS)}."
            )


class Inflation(NamedTuple):
    """`sources`: the image model's block behind each block (None: new); `keeps`: a sentence on what is preserved."""

    sources: list[int | None]
    keeps: str


def plan_blocks(image: STDiT, axes: list[str], how: InitFrom) -> list[int | None]:
    """Which block of the image model each block of the video model starts as (None: inserted)."""
    depth = image.config.depth
    if "temporal" in image.config.axes:
        if list(image.config.axes) != list(axes) or how.temporal == "insert":
            raise ValueError(
                f"init_from: the weights in {how.path!r} have temporal blocks already (axes {list(image.config.axes)}); use "
                f"model.axes={list(image.config.axes)} and init_from.temporal=convert to go on from them.".replace(
                    "'", ""
                )
            )
        return list(range(depth))
    if how.temporal == "convert" or "temporal" not in axes:
        return list(range(depth))
    if all(axis == "temporal" for axis in axes):
        raise ValueError(
            f"model.axes={axes} leaves no block for the image model's weights; use [spatial, temporal], or init_from.temporal=convert."
        )
    sources: list[int | None] = []
    taken = 0
    while taken < depth or len(sources) % len(axes):  # whole cycles, so that every image block has its new ones
        new = axes[len(sources) % len(axes)] == "temporal"
        if not new and taken == depth:
            raise ValueError(
                f"init_from: {depth} blocks do not fill whole cycles of model.axes={axes}; use a cycle whose number of "
                f"other than temporal blocks divides {depth}, such as [spatial, temporal]."
            )
        sources.append(None if new else taken)
        taken += not new
    return sources


def inflated_arguments(image: STDiT, chosen: dict, depth: int | None, how: InitFrom) -> dict:
    """What the image model adds to the chosen arguments of the video model: its clock, and the depth after inserting.

    depth: the one asked for outright, if any. Raises ValueError where the choice and the weights differ.
    """
    config = image.config
    decided = {key: (chosen[key], config[key]) for key in ("hidden_size", "num_heads", "mlp_ratio", "qk_norm")}
    decided["patch_size"] = (tuple(chosen["patch_size"])[1:], image.patch_size[1:])
    for key, (ours, theirs) in decided.items():
        if ours != theirs:
            raise ValueError(
                f"model.{key}={ours} but the weights of init_from.path={how.path!r} have {theirs}; set model.size or model.{key} to that."
            )
    axes = list(chosen["axes"])
    sources = plan_blocks(image, axes, how)
    if depth is not None and depth != len(sources):
        raise ValueError(
            f"model.depth={depth} but init_from makes {len(sources)} blocks of {config.depth}; leave model.depth out."
        )
    clock = ("timestep_scale", "timestep_reversed", "frequency_shift", "norm2_eps", "position_encoding")
    return {**{key: config[key] for key in clock}, "depth": len(sources), "block_sources": sources}


@torch.no_grad()
def inflate(image: STDiT, video: STDiT, how: InitFrom) -> Inflation:
    """Give a fresh video model the image model's weights.

    With inserted temporal blocks and a temporal patch of 1 the video model's output on T frames is the image model's on
    each; with a larger patch that holds for still clips. Raises ValueError, before anything is written, for parts that do
    not fit and are not named in `restart`.
    """
    sources = list(video.config.block_sources or range(video.config.depth))
    weights = image.state_dict()
    check_tensors(weights, how.path or "the image model")
    state = dict(video.state_dict())
    new: dict[str, Tensor] = {}
    for i, source in enumerate(sources):
        if source is not None:
            prefix = f"blocks.{source}."
            new |= {f"blocks.{i}.{k.removeprefix(prefix)}": v for k, v in weights.items() if k.startswith(prefix)}
    for part in PARTS:
        if part not in how.restart:
            new |= {key: value for key, value in weights.items() if key.startswith(part)}
    _classes(image, video, how, weights, new)
    _patches(image, video, how, new)
    wrong = [
        f"{key} {tuple(value.shape)} here {tuple(state[key].shape) if key in state else 'absent'}"
        for key, value in new.items() if key not in state or state[key].shape != value.shape
    ]  # fmt: skip
    if wrong:
        parts = sorted({key.split(".")[0] for key in (line.split(" ")[0] for line in wrong)} & set(PARTS))
        remedy = (
            f"add init_from.restart={parts}".replace("'", "") if parts else "choose the model.size these weights have"
        )
        raise ValueError(f"init_from: the weights do not fit: {'; '.join(wrong[:3])}; {remedy}.")
    video.load_state_dict({**state, **new})
    return Inflation(sources, _keeps(image, video, how, sources))


def _classes(image: STDiT, video: STDiT, how: InitFrom, weights: dict, new: dict) -> None:
    """Keep, replace, or fold the class table."""
    key = "y_embedder.embedding_table.weight"
    if "y_embedder" in how.restart:
        new.pop(key, None)
    elif image.y_embedder is None:
        if video.y_embedder is not None:  # a class says nothing until it is learnt
            new[key] = torch.zeros_like(video.y_embedder.embedding_table.weight)
    elif video.y_embedder is None:  # unconditional: the null vector moves into the bias it was always added to
        null = new.pop(key)[-1]
        if "t_embedder.mlp.2.bias" in new:
            new["t_embedder.mlp.2.bias"] = new["t_embedder.mlp.2.bias"] + null
    elif how.classes == "replace":
        table = video.y_embedder.embedding_table.weight.detach().clone()
        table[-1] = weights[key][-1]
        new[key] = table
    elif video.num_classes != image.num_classes:
        raise ValueError(
            f"init_from: the weights know {image.num_classes} classes, the data has {video.num_classes}; "
            "add init_from.classes=replace, or model.num_classes with as many."
        )


def _patches(image: STDiT, video: STDiT, how: InitFrom, new: dict) -> None:
    """Spread image kernels over a temporal patch; every frame of it gets the image's head."""
    frames = video.patch_size[0]
    if frames == image.patch_size[0]:
        return
    if image.patch_size[0] != 1:
        raise ValueError(
            f"init_from: the weights have a temporal patch of {image.patch_size[0]}, only 1 can be inflated."
        )
    _, ph, pw = image.patch_size
    if "x_embedder.proj.weight" in new:
        kernel = new["x_embedder.proj.weight"].unflatten(1, (image.in_channels, 1, ph, pw))
        place = {"first": 0, "centre": frames // 2}.get(how.patch)
        share = torch.full((frames,), 1 / frames) if place is None else torch.eye(frames)[place]
        new["x_embedder.proj.weight"] = (kernel * share[None, None, :, None, None]).flatten(1)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if key in new:
            new[key] = new[key].repeat(frames, *[1] * (new[key].ndim - 1))


def _keeps(image: STDiT, video: STDiT, how: InitFrom, sources: list) -> str:
    """What the video model computes at the start, as a sentence."""
    cycle = [video.config.axes[i % len(video.config.axes)] for i in range(len(sources))]
    inserted = [source is None for source in sources]
    fresh = list(how.restart)
    if how.classes == "replace" and video.y_embedder is not None and image.y_embedder is not None:
        fresh.append("classes but for the null class (what is kept holds without a label)")
    if video.y_embedder is not None and image.y_embedder is None:
        fresh.append("classes, all zero")
    if how.restart:
        what = "the blocks' weights are the image model's, what is new decides the output"
    elif list(video.config.axes) == list(image.config.axes) and image.patch_size == video.patch_size:
        what = "everything, it is the same model"
    elif any(axis != "spatial" and not new for axis, new in zip(cycle, inserted, strict=True)):
        joint = all(axis != "temporal" or new for axis, new in zip(cycle, inserted, strict=True))
        what = (
            "on one frame as the image model; on several its blocks see all frames at once"
            if joint else "every block's weights; blocks that turned from space to time compute something else"
        )  # fmt: skip
    elif video.patch_size[0] > 1:
        what = "on still clips every frame as the image model"
    else:
        what = "on every frame as the image model"
    ending = f" New: {', '.join(fresh)}." if fresh else ""
    return f"{sum(inserted)} of {len(sources)} blocks are new; kept: {what}.{ending}"
