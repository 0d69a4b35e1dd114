"""A pipeline call as one value: stdit's arguments, and those of diffusers' pipelines."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from stdit.conditions import Caption, Conditioner, Label
from stdit.ranges import whole_number
from stdit.sampling.callbacks import TENSOR_INPUTS, Callback
from stdit.sampling.inputs import refusal, split
from stdit.sampling.options import SamplingOptions
from stdit.sampling.output import OutputType
from stdit.variants import pick

# diffusers' name -> stdit's
RENAMED = {
    "prompt": "captions", "negative_prompt": "negative_captions",
    "prompt_embeds": "captions", "negative_prompt_embeds": "negative_captions",
}  # fmt: skip
# Arguments of diffusers' LattePipeline and WanPipeline that this one does not take, and what serves in their place.
ELSEWHERE = {
    "video_length": "num_frames",
    "num_images_per_prompt": "num_videos_per_prompt",
    "timesteps": "num_inference_steps and solver",
    "eta": "solver='ddim' or solver='ddpm'",
    "guidance_scale_2": "guidance_scale, since there is one transformer",
    "attention_kwargs": "pipe.set_adapters, for the scale of a LoRA",
    "max_sequence_length": "the length of the text encoder",
    "clean_caption": "prompt, which is encoded as it is",
    "mask_feature": "prompt, whose padding is always masked",
    "enable_temporal_attentions": "num_frames=1, for an image",
    "decode_chunk_size": "tile, which bounds the memory of decoding",
}


@dataclass(frozen=True)
class Call:
    """What a pipeline is asked for.

    given: conditions by keyword, also negative ones. latents: the noise to start from, (B, C, T, h, w). callback: called
    after every step with the tensors `callback_inputs`. output_type: None: a plain tensor of pixels.
    """

    options: SamplingOptions
    given: dict[str, Any]
    num_videos_per_prompt: int = 1
    latents: Tensor | None = None
    callback: Callback | None = None
    callback_inputs: tuple[str, ...] = ("latents",)
    output_type: OutputType | None = None
    return_dict: bool = True

    def refuse(self, what: str, *names: str) -> None:
        """Raise ValueError if the call has one of these arguments, which `what` does not take."""
        default = Call(self.options, self.given)
        for name in names:
            value = getattr(self, name)
            if value is not getattr(default, name) and (isinstance(value, Tensor) or value != getattr(default, name)):
                shown = "callback_on_step_end" if name == "callback" else name
                raise ValueError(f"{what} takes no {shown}; leave it out.")

    def noise(self, shape: tuple[int, ...]) -> Tensor | None:
        """The noise to start from, of clips whose latents have a shape (B, C, T, h, w); None: to be drawn.

        ValueError if it has another shape, or numbers that are not finite.
        """
        if self.latents is None:
            return None
        if tuple(self.latents.shape) != shape:
            raise ValueError(
                f"latents are {tuple(self.latents.shape)}; this call needs {shape}, (clips, channels, frames, h, w)."
            )
        if not torch.isfinite(self.latents).all():
            raise ValueError("latents have numbers that are not finite; give normal noise, torch.randn(...).")
        return self.latents.float()


def read_call(arguments: Mapping[str, Any], conditioners: Mapping[str, Conditioner]) -> Call:
    """Read the keywords of a call to a model with these conditions.

    Raises ValueError for two names of one argument, a text for a model that takes none, or values that cannot be; TypeError
    for an unknown argument.
    """
    left = dict(arguments)
    for name in ELSEWHERE:
        if left.pop(name, None) is not None:
            raise TypeError(f"{name} is an argument of other pipelines of diffusers; here it is {ELSEWHERE[name]}.")
    _rename_texts(left, conditioners)
    options = left.pop("options", None)
    generator = left.pop("generator", None)
    if generator is not None:
        if left.get("seed") is not None or (options is not None and options.seed != 0):
            raise ValueError("generator and seed both decide the noise; give one of them.")
        left["seed"] = _seeds(generator)
    callback = left.pop("callback_on_step_end", None)
    inputs = left.pop("callback_on_step_end_tensor_inputs", None) or ("latents",)
    official = isinstance(callback, PipelineCallback | MultiPipelineCallbacks)
    inputs = callback.tensor_inputs if official else inputs
    _check_inputs(inputs, has_text=official or Caption.name in conditioners)  # official ones may need only the scale
    output_type, return_dict = left.pop("output_type", None), left.pop("return_dict", None)
    if output_type is None and return_dict is not None:
        output_type = "pil"
    if output_type is not None:
        pick(dict.fromkeys(get_args(OutputType)), output_type, "output_type")
    count = left.pop("num_videos_per_prompt", None)
    count = 1 if count is None else whole_number("num_videos_per_prompt", count)
    latents = left.pop("latents", None)
    if latents is not None and not isinstance(latents, Tensor):
        raise ValueError(f"latents is a {type(latents).__name__}; give a tensor (clips, channels, frames, h, w).")
    options, given = split(options, left)
    return Call(
        options, given, num_videos_per_prompt=count, latents=latents, callback=callback, callback_inputs=tuple(inputs),
        output_type=output_type, return_dict=return_dict is not False,
    )  # fmt: skip


def _rename_texts(left: dict[str, Any], conditioners: Mapping[str, Conditioner]) -> None:
    """Give the texts of a call stdit's names; ValueError for a model that takes none."""
    for theirs, ours in RENAMED.items():
        text, mask = left.pop(theirs, None), None
        if theirs.endswith("_embeds"):
            mask = left.pop(theirs.replace("_embeds", "_attention_mask"), None)
        if text is None and mask is None:
            continue
        if mask is not None:
            text = _masked(theirs, text, mask)
        if left.get(ours) is not None:
            raise ValueError(
                f"{theirs} and {ours} (or {theirs.removesuffix('_embeds')}) are the same; give one of them."
            )
        if Caption.name not in conditioners:
            raise ValueError(refusal(theirs, text, conditioners))
        _check_texts(theirs, text)
        left[ours] = text
    for name in ("captions", "negative_captions"):
        if Caption.name in conditioners and left.get(name) is not None:
            _check_texts(name, left[name])
    only_text = Label.name not in conditioners and Caption.name in conditioners
    if only_text and left.get("captions") is None and _is_text(left.get("class_labels")):
        left["captions"] = left.pop("class_labels")  # the first argument of diffusers' pipelines is the prompt


def _masked(name: str, tokens: Any, mask: Any) -> Tensor:
    """Tokens (B, L, C) with zeros where their mask (B, L) is false or 0, which makes them padding."""
    what = name.replace("_embeds", "_attention_mask")
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        raise ValueError(f"{what} belongs to {name}, a tensor (B, L, C); give both, or neither.")
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape[:2]:
        shown = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{what} is {shown}; give a tensor {tuple(tokens.shape[:2])}, true for tokens of the text.")
    if not mask.bool().any(-1).all():
        raise ValueError(f"{what} leaves no token of a text; its end token belongs to it.")
    return tokens.masked_fill(~mask.bool()[..., None].to(tokens.device), 0)


def _check_texts(name: str, given: Any) -> None:
    """Raise ValueError unless a value is a text, a list of texts or a tensor."""
    texts = (
        isinstance(given, Collection) and not isinstance(given, Tensor) and all(isinstance(one, str) for one in given)
    )
    if not texts and not isinstance(given, Tensor):
        kinds = {type(one).__name__ for one in given} if isinstance(given, list | tuple) else set()
        shown = f"a list of {', '.join(sorted(kinds))}" if kinds else f"a {type(given).__name__}"
        raise ValueError(f"{name} is {shown}; give a text, a list of texts, or a tensor (B, L, C) of their tokens.")


def _seeds(generator: Any) -> int | list[int]:
    """The seed that each generator was made with; none of them is used up."""
    given = generator if isinstance(generator, list | tuple) else [generator]
    for one in given:
        if not isinstance(one, torch.Generator):
            raise ValueError(
                f"generator is a {type(one).__name__}; give a torch.Generator, or a list of them, or a number as seed=."
            )
    seeds = [one.initial_seed() for one in given]
    return seeds if given is generator else seeds[0]


def _is_text(given: Any) -> bool:
    return isinstance(given, str) or (
        isinstance(given, Sequence) and bool(given) and all(isinstance(one, str) for one in given)
    )


def _check_inputs(names: Sequence[str], *, has_text: bool) -> None:
    for name in names:
        if name not in TENSOR_INPUTS or (name != "latents" and not has_text):
            known = ", ".join(TENSOR_INPUTS if has_text else TENSOR_INPUTS[:1])
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {name!r}; a callback of this model can have {known}."
            )
