"""The model section of a config, and DiT's sizes: "XL/2" is depth 28, hidden size 1152, 16 heads, 2 x 2 patches."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from stdit.nn.config import Axis
from stdit.ranges import check_ranges
from stdit.variants import nearest, pick

# depth, hidden size, heads
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

_RANGES = {
    "unet_channels": "[1, inf)", "unet_layers": "[1, inf)", "patch_size": "[1, inf)", "depth": "[1, inf)",
    "hidden_size": "[1, inf)", "num_heads": "[1, inf)", "mlp_ratio": "(0, inf)", "num_classes": "[0, inf)", "label_std": "[0, inf)",
    "window": "[2, inf)", "sink": "[0, inf)", "num_decoder_blocks": "[0, inf)", "num_single_blocks": "[0, inf)",
}  # fmt: skip


@dataclass
class ModelConfig:
    """Choices of a model; its channels, classes and latent size come from the VAE and the data.

    `size` gives depth, hidden_size, num_heads and the spatial patch; each may be overridden. The depth of a size counts
    all blocks, and `axes` is cycled over them.
    """

    network: Literal["transformer", "unet"] = "transformer"  # unet: diffusers' U-Net, for comparison
    unet_channels: list[int] = field(default_factory=lambda: [64, 128])  # network=unet: channels of each resolution
    unet_layers: int = 1  # network=unet: residual layers per resolution
    size: str = "S/2"  # S, B, L or XL (depth, width and heads), a slash, and the spatial patch
    axes: list[str] = field(default_factory=lambda: ["joint"])  # attention axis of each block, cycled over the depth
    patch_size: list[int] | None = None  # [frames, rows, columns] in latents; null: from size
    depth: int | None = None  # number of blocks; null: from size
    hidden_size: int | None = None  # width; null: from size
    num_heads: int | None = None  # attention heads; null: from size
    mlp_ratio: float = 4.0  # width of the MLP's hidden layer, in multiples of hidden_size
    qk_norm: bool = False  # RMS norm of queries and keys
    num_classes: int | None = None  # number of labels; null: as many as the data has; 0: no labels
    label_std: float = (
        0.02  # standard deviation of label embeddings at first: DiT's; with 0.5, short runs learn labels sooner
    )
    position_encoding: Literal["sincos", "rope", "rope_3d", "sincos+rope_3d", "latte"] = "sincos"  # see the values
    causal: bool = False  # frames attend to themselves and earlier frames; needs rope or rope_3d
    window: int | None = None  # causal: latent frames that a frame attends to, including itself; null: all
    sink: int = 0  # causal: first latent frames that later frames attend to beyond the window
    pos_scaling: Literal["none", "interpolate"] = "none"  # positions at sizes that were not trained
    micro_conditions: list[str] = field(default_factory=list)  # numbers to condition on, of fps, seconds, height, width
    conditioning: str = "adaln_zero"  # how labels and noise levels enter: a row of nn/conditioning.py
    caption_channels: int | None = None  # set by the text encoder; leave it out
    caption_axes: list[str] = field(default_factory=list)  # blocks that attend to captions; empty: all
    trunk: str = "stack"  # how blocks are connected: a row of model/trunks
    learned_pos_embed: bool = False  # spatial position embedding is learned, initialised with sin-cos
    timestep_mlp: bool = True  # false: the timestep embedding is the sinusoid without an MLP (U-ViT)
    output_conv: bool = False  # a 3 x 3 convolution over every frame at the end (U-ViT)
    activation: Literal["gelu_tanh", "gelu", "relu2"] = "gelu_tanh"  # of MLPs: DiT, U-ViT, or squared ReLU
    relative_position_bias: bool = False  # learned bias per spatial distance in every attention (MDT)
    num_decoder_blocks: int = 4  # trunk=masked: blocks at the end that see all patches
    num_single_blocks: int = 0  # trunk=dual_stream: last blocks, in which text and video share weights (FLUX)
    gradient_checkpointing: bool | Literal["selective"] = False  # compute activations again in the backward pass
    actions: bool = False  # condition on the actions of the data, one for each frame
    extra_conditions: dict[str, Any] = field(default_factory=dict)  # more conditions: name -> its arguments

    def __post_init__(self) -> None:
        check_ranges("model", self, _RANGES)
        if self.patch_size is not None and len(self.patch_size) != 3:
            raise ValueError(
                f"model.patch_size={self.patch_size} is not [frames, rows, columns]; use [1, 2, 2] or null."
            )
        size_arguments(self.size)
        for name in ("axes", "caption_axes"):
            for axis in getattr(self, name):
                pick(dict.fromkeys(get_args(Axis)), axis, f"axis in model.{name}")
        if not self.axes:
            raise ValueError("model.axes is empty; give at least one of joint, spatial, temporal.")
        if self.micro_conditions or self.extra_conditions:
            from stdit.conditions import Micro, check_extra_conditions  # on use: reading a config imports no torch

            Micro(self.micro_conditions)
            check_extra_conditions(self.extra_conditions, "model.extra_conditions")


def size_arguments(name: str) -> dict:
    """Arguments of STDiT for a size such as "XL/2"; ValueError with the nearest name for an unknown one."""
    letters, _, patch = name.partition("/")
    if letters not in SIZES or not patch.isdecimal() or int(patch) == 0:
        names = [f"{size}/{p}" for size in SIZES for p in (2, 4, 8)]
        hint = nearest(name, names, cutoff=0.3)
        raise ValueError(f"Unknown model size {name!r}.{hint} Use one of {', '.join(SIZES)}, a slash and the patch.")
    depth, hidden_size, num_heads = SIZES[letters]
    return {
        "depth": depth,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "patch_size": (1, int(patch), int(patch)),
    }


# Fields of ModelConfig that `model_arguments` does not copy: they choose the network, or are handled separately.
_APART = {
    "actions", "network", "unet_channels", "unet_layers", "size", "num_classes", "gradient_checkpointing", "depth", "hidden_size",
    "num_heads", "patch_size",
}  # fmt: skip


def model_arguments(config: ModelConfig) -> dict[str, Any]:
    """Constructor arguments of STDiT from a config: those of its size, overridden by the other keys."""
    arguments = size_arguments(config.size)
    for key in ("depth", "hidden_size", "num_heads"):
        if getattr(config, key) is not None:
            arguments[key] = getattr(config, key)
    if config.patch_size is not None:
        arguments["patch_size"] = tuple(config.patch_size)
    return arguments | {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _APART}
