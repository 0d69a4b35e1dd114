"""The methods of a pipeline for LoRA adapters, those of diffusers' pipelines, over files that are checked first."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from torch import Tensor

from stdit.hub import LORA_FILE, check_reachable, resolve_source, with_client_options
from stdit.model.lora import check_adapter_name
from stdit.weights import safetensors_shapes

_COMPONENTS = ("transformer", "guide")


class LoraMethods(LoraBaseMixin):
    """LoRA adapters of a pipeline's transformer.

    An adapter is also put into the guide, if there is one: it stands for a weaker model of the same clips, so guidance away
    from a guide without the adapter would exaggerate the adapter. `set_adapters`, `unload_lora_weights`, `enable_lora`,
    `disable_lora`, `delete_adapters`, `get_active_adapters` and `get_list_adapters` are diffusers'.
    """

    _lora_loadable_modules = list(_COMPONENTS)
    transformer: Any
    guide: Any

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Any],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load an adapter: a safetensors file, a folder with one, a hub id, or a state dict, in diffusers' format.

        weight_name: of the file in the folder or repository. Raises ValueError, in one line and before anything is changed,
        for a file that is no LoRA of this model.
        """
        _require_peft()
        self._refuse_fused("load_lora_weights")
        check_adapter_name(adapter_name)
        if not hasattr(self.transformer, "load_lora_adapter"):
            raise ValueError(
                f"this model is a {type(self.transformer).__name__}, for which stdit has no LoRAs; leave it out."
            )
        source = pretrained_model_name_or_path_or_dict
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(source, Mapping):  # written to a file, so that one check serves all
                file = Path(folder) / "state_dict.safetensors"
                if other := next((name for name, value in source.items() if not isinstance(value, Tensor)), None):
                    raise ValueError(
                        f"{other} of the LoRA is a {type(source[other]).__name__}; give a dict of tensors."
                    )
                save_file({name: value.detach().cpu().contiguous() for name, value in source.items()}, file)
            else:
                file = _lora_file(str(source), weight_name, kwargs)
            of_pipeline = any(name.startswith("transformer.") for name in safetensors_shapes(file))
            for component in _COMPONENTS:
                if (model := getattr(self, component, None)) is not None:
                    model.load_lora_adapter(
                        str(file.parent), weight_name=file.name, prefix="transformer" if of_pipeline else None,
                        adapter_name=adapter_name, hotswap=hotswap, _pipeline=self,
                    )  # fmt: skip

    @classmethod
    def save_lora_weights(
        cls, save_directory: str | Path, transformer_lora_layers: Mapping[str, Any], *, weight_name: str = LORA_FILE,
        transformer_lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Save the layers of an adapter (`peft.get_peft_model_state_dict`) in diffusers' format.

        transformer_lora_adapter_metadata: its `LoraConfig` as a dict, which keeps its alpha.
        """
        cls._save_lora_weights(
            save_directory=str(save_directory),
            lora_layers={"transformer": dict(transformer_lora_layers)},
            lora_metadata={"transformer": dict(transformer_lora_adapter_metadata or {})},
            is_main_process=True,
            weight_name=weight_name,
            save_function=None,
            safe_serialization=True,
        )

    def fuse_lora(
        self, components: Sequence[str] = _COMPONENTS, lora_scale: float = 1.0, safe_fusing: bool = False, **kwargs: Any
    ) -> None:
        """Add the active adapters, or those of `adapter_names`, to the weights, times `lora_scale`."""
        self._refuse_fused("fuse_lora")
        asked, layers = kwargs.get("adapter_names"), _tuner_layers(self, components)
        self._scales_before_fusing = tuple((layer.scaling, dict(layer.scaling)) for layer in layers)
        for layer in layers:
            for name in layer.active_adapters if asked is None else asked:
                if name in layer.scaling:
                    layer.scaling[name] *= lora_scale
        try:
            super().fuse_lora(components=list(components), safe_fusing=safe_fusing, **kwargs)
        except BaseException:
            self.unfuse_lora()
            raise

    def unfuse_lora(self, components: Sequence[str] = _COMPONENTS, **kwargs: Any) -> None:
        """Take fused adapters out of the weights again, which then differ from before by rounding; they are active as before."""
        super().unfuse_lora(components=list(components), **kwargs)
        if not self.fused_loras:
            for scales, former in self._scales_before_fusing:
                scales.update(former)
            self._scales_before_fusing = ()

    def unload_lora_weights(self) -> None:
        """Take all adapters out of the pipeline; what fused ones have added to the weights stays there."""
        super().unload_lora_weights()
        self._merged_adapters: set[str] = set()
        self._scales_before_fusing = ()

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Make adapters the active ones, each times its weight."""
        self._refuse_fused("set_adapters")
        super().set_adapters(adapter_names, adapter_weights)

    def disable_lora(self) -> None:
        """Leave out all adapters until `enable_lora`."""
        self._refuse_fused("disable_lora")
        super().disable_lora()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Take some adapters out of the pipeline."""
        self._refuse_fused("delete_adapters")
        super().delete_adapters(adapter_names)

    def _refuse_fused(self, method: str) -> None:
        """Raise ValueError if adapters are fused, which peft would take out of the weights in this method."""
        if self.fused_loras:
            raise ValueError(
                f"{method}: {', '.join(sorted(self.fused_loras))} is fused; call unfuse_lora first, or unload_lora_weights to keep it in "
                "the weights for good."
            )


def _tuner_layers(pipe: Any, components: Sequence[str]) -> list[Any]:
    """The layers of some components of a pipeline that have adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # imported on use, since peft is an extra

    models = [model for name in components if (model := getattr(pipe, name, None)) is not None]
    return [layer for model in models for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ValueError("LoRA adapters need the package peft; install stdit[peft].") from error


def _lora_file(source: str, weight_name: str | None, options: Mapping[str, Any]) -> Path:
    """The file of an adapter: that of a path, in a folder, or of a repository of the hub."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        folder = path / options["subfolder"] if options.get("subfolder") else path
        found = [folder / weight_name] if weight_name else [folder / LORA_FILE, *sorted(folder.glob("*.safetensors"))]
        for file in found:
            if file.is_file():
                return file
        raise ValueError(f"{str(folder)!r} has no {found[0].name}; give the file of the LoRA, or weight_name=.")
    repo, of_name = resolve_source(source, "LoRA")
    of_id = with_client_options(of_name, options)
    try:
        check_reachable(repo, weight_name or LORA_FILE, of_id)
        return Path(hf_hub_download(repo, weight_name or LORA_FILE, **of_id))
    except OSError as error:
        raise ValueError(f"LoRA {source!r} cannot be fetched: {' '.join(str(error).split())[:160]}") from error
