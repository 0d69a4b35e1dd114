"""diffusers' loading, adapters and hub methods, made strict and free of pickle, and registration for its caches."""

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from stdit.files import read_json
from stdit.hashes import check_weights
from stdit.hub import LORA_FILE, is_folder
from stdit.legacy import renamed_parameter, renamed_section
from stdit.model.lora import check_adapter_name, check_lora, lora_prefix
from stdit.nn.low_rank import lora_names
from stdit.weights import check_fits


def register_cacheable_blocks(classes: Iterable[type]) -> None:
    """Register block classes with diffusers, so that FirstBlockCache and MagCache know which outputs they return.

    The registry is private to diffusers. If it is missing, only these caches fail.
    """
    try:
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    except ImportError:
        return
    for kind in classes:
        has_text = "encoder_hidden_states" in inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
        metadata = TransformerBlockMetadata(
            return_hidden_states_index=0, return_encoder_hidden_states_index=1 if has_text else None
        )
        TransformerBlockRegistry.register(kind, metadata)


def model_card(config: dict, parameters: int) -> ModelCard:
    """Model card with the model's size, attention axes and classes, and the code that loads it."""
    names = config.get("class_names")
    classes = f"{config['num_classes']} classes" if config["num_classes"] else "no classes"
    listed = f"\n\nClasses: {', '.join(names[:50])}{' ...' if len(names) > 50 else ''}." if names else ""
    data = ModelCardData(library_name="stdit", tags=["video-generation", "diffusion-transformer", "stdit"])
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# A video diffusion transformer\n\n"
        f"{parameters / 1e6:.1f} million parameters: {config['depth']} blocks, {config['hidden_size']} wide, patches of "
        f"{list(config['patch_size'])}, attention along {', '.join(config['axes'])}, {config['in_channels']} latent channels, "
        f"{classes}, made for latents of {list(config['sample_size'])}.{listed}\n\n"
        "```python\nfrom stdit import STDiT\n\nmodel = STDiT.from_pretrained(FOLDER)\n```\n"
    )


class HubMixin:
    """Overrides of methods of diffusers' mixins, which follow it in the model's base classes."""

    config: Any
    supports: Any
    load_config: Any
    num_parameters: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a model from safetensors and config.json, or from the transformer of a pipeline's folder.

        Raises ValueError if weights are missing or unexpected: a model is never loaded in part.
        """
        if (Path(pretrained_model_name_or_path) / "model_index.json").is_file():
            kwargs.setdefault("subfolder", "transformer")
            check_weights(Path(pretrained_model_name_or_path), within=f"{kwargs['subfolder']}/")
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        if read_json(folder / "config.json"):  # bounded, as diffusers' reading is not
            check_fits(folder, lambda: cls.from_config(cls.load_config(folder)))
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        loaded: Any = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        model, info = loaded
        missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        meta = [name for name, value in model.named_parameters() if value.is_meta]
        if missing or unexpected or meta:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not fit its config: missing {missing or meta or 'nothing'}, "
                f"unexpected {unexpected or 'nothing'}. Use the config.json that was saved with these weights."
            )
        return loaded if wants_info else model

    def __getattr__(self, name: str) -> Any:
        """Look up submodules first, since diffusers would return the config entry of the same name (`trunk`)."""
        modules = self.__dict__.get("_modules", {})
        return modules[name] if name in modules else super().__getattr__(name)  # type: ignore[misc]

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a model from a config, which may have the names of stdit 0.1.0."""
        if isinstance(config, Mapping):
            config = renamed_section("model", config)
        return super().from_config(config, return_unused_kwargs, **kwargs)  # type: ignore[misc]

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, Any]) -> Any:
        """Rename weights of stdit 0.1.0 in place; diffusers calls this hook when it loads."""
        for name in list(state_dict):
            state_dict[renamed_parameter(name)] = state_dict.pop(name)
        return super()._fix_state_dict_keys_on_load(state_dict)  # type: ignore[misc]

    def enable_cache(self, config: Any) -> None:
        """Enable one of diffusers' caches; ValueError for one that skips blocks if the trunk does not support it."""
        skips_blocks = type(config).__name__ in ("FirstBlockCacheConfig", "MagCacheConfig")
        if skips_blocks and "block_caching" not in self.supports:
            raise ValueError(
                f"{type(config).__name__} skips blocks, which trunk={self.config.trunk!r} does not support; use "
                "PyramidAttentionBroadcastConfig, or a model of trunk='stack'."
            )
        super().enable_cache(config)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does; ValueError for a model that carries LoRAs, whose folder could not be loaded."""
        if names := lora_names(self):  # type: ignore[arg-type]
            raise ValueError(
                f"the model carries the LoRA {names[0]!r}; add it to the weights with merge_lora, or take it off with remove_lora "
                "(stdit.nn.low_rank), and save again."
            )
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def load_lora_adapter(
        self, pretrained_model_name_or_path_or_dict: Any, prefix: str | None = None, **kwargs: Any
    ) -> Any:
        """Load a LoRA adapter of this model with peft, by default from pytorch_lora_weights.safetensors only.

        prefix: of the names that count; None: "transformer" if the names in the file have it.

        Raises ValueError for a file that is no LoRA of this model, has larger ranks than its layers, or numbers that are
        not finite.
        """
        check_adapter_name(kwargs.get("adapter_name"))
        kwargs.setdefault("weight_name", LORA_FILE)
        kwargs["use_safetensors"] = True
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, Mapping) and Path(source).exists():
            file = Path(source) / kwargs["weight_name"] if Path(source).is_dir() else Path(source)
            prefix = lora_prefix(file) if prefix is None else prefix
            check_lora(self, Path(source), kwargs["weight_name"], prefix)  # type: ignore[arg-type]
        return super().load_lora_adapter(source, prefix=prefix, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Push the model with a model card; a path to a folder (./mine) is written locally, without network."""
        card = model_card(dict(self.config), self.num_parameters())
        if not is_folder(str(repo_id)):
            url = super().push_to_hub(repo_id, **kwargs)  # type: ignore[misc]
            card.push_to_hub(repo_id, token=kwargs.get("token"), create_pr=kwargs.get("create_pr"))
            return url
        folder = Path(repo_id).expanduser()
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{str(folder)!r} is not empty; nothing is overwritten, choose another folder.")
        self.save_pretrained(folder)
        card.save(folder / "README.md")
        return str(folder)
