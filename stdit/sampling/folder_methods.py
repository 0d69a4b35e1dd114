"""The methods of a pipeline that load, save and publish its folder, or share its parts with another pipeline."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import huggingface_hub
import torch

from stdit.files import write_text
from stdit.hashes import check_weights, write_weights_manifest
from stdit.hub import check_connection, check_reachable, is_folder, resolve_source, with_client_options
from stdit.legacy import renamed_section
from stdit.sampling.model_folder import check_folder
from stdit.vae import VideoVAE

# The file by which diffusers finds the class, which it runs only if it is told to trust the folder.
PIPELINE_FILE = '''"""The pipeline of this folder, for diffusers. Needs `pip install stdit`.

    DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)

The same without this file, of which nothing but stdit is run:

    stdit.STDiTPipeline.from_pretrained(FOLDER)
"""

from stdit import STDiTPipeline

__all__ = ["STDiTPipeline"]
'''


class FolderMethods:
    """Overrides of methods of `DiffusionPipeline`, which follows it in the pipeline's base classes."""

    config: Any
    components: Any
    transformer: Any
    video_vae: VideoVAE
    register_to_config: Any
    _upload_folder: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a folder written by training, or a hub id; ValueError in one line if it holds no model.

        kwargs: those of diffusers' pipelines, and subfolder.
        """
        parent: Any = super()
        source, of_name = resolve_source(str(pretrained_model_name_or_path), "model")
        options = with_client_options(of_name, kwargs)
        try:
            check_reachable(source, "model_index.json", options)
            subfolder = options.pop("subfolder", "")
            if not Path(source).is_dir():
                if subfolder:  # which diffusers' download does not know
                    files = [f"{subfolder}/*.json", f"{subfolder}/*.safetensors"]
                    source = huggingface_hub.snapshot_download(source, allow_patterns=files, **options)
                else:
                    source = parent.download(source, use_safetensors=True, variant=kwargs.get("variant"), **options)
            source = str(Path(source) / subfolder)
            kwargs.pop("subfolder", None)
            check_folder(Path(source))
            check_weights(Path(source))
            # The VAE is loaded in float32, where its fingerprint can be compared, and converted afterwards.
            dtypes = kwargs.pop("dtype", kwargs.pop("torch_dtype", None)) or torch.float32
            dtypes = dict(dtypes) if isinstance(dtypes, dict) else {"default": dtypes}
            vae_dtype = dtypes.get("vae", dtypes.get("default", torch.float32))
            dtypes["vae"] = torch.float32
            pipe = parent.from_pretrained(source, use_safetensors=True, dtype=dtypes, **kwargs)
            if "vae" not in kwargs:
                torch.nn.Module.to(pipe.vae, vae_dtype)  # diffusers' own `to` warns of every conversion
            return pipe
        except (OSError, TypeError, AttributeError, KeyError) as error:  # the latter of a scheduler's config
            raise ValueError(f"{source!r} cannot be loaded: {' '.join(str(error).split())[:200]}") from error

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Self:
        """Make a pipeline that shares the parts of another, in their data types. kwargs: parts or settings in their place."""
        if not isinstance(pipeline, FolderMethods):
            raise ValueError(
                f"from_pipe is given a {type(pipeline).__name__}, which has not the parts of a {cls.__name__}; give one of these."
            )
        modules, settings = cls._get_signature_keys(cls)  # type: ignore[attr-defined]
        found = {name: part for name, part in pipeline.components.items() if name in modules}
        found |= {name: pipeline.config[name] for name in settings if name in pipeline.config}
        fingerprint = found.pop("vae_fingerprint", None)  # of the weights in float32, which these may not be any more
        if unknown := sorted(set(kwargs) - {*modules, *settings}):
            raise TypeError(f"{unknown[0]!r} is no part of {cls.__name__}; it has {', '.join([*modules, *settings])}.")
        made: Any = cls(**{**found, **kwargs})
        if "vae" not in kwargs:
            made.register_to_config(vae_fingerprint=fingerprint)
        if source := pipeline.config.get("_name_or_path"):
            made.register_to_config(_name_or_path=source)
        for name in ("_encoder", "_trained_scheduler", "_tile"):
            if getattr(made, name) is None and not (name == "_encoder" and "text_encoder" in kwargs):
                setattr(made, name, getattr(pipeline, name, None))
        made.scheduler = made.scheduler  # which compares one of kwargs with that of training
        return made

    def save_pretrained(self, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as diffusers does, with MANIFEST.json: the hashes of the weights, which loading compares.

        pipeline.py lets diffusers load the folder by itself. push_to_hub: as `push_to_hub`, to `repo_id` or under the
        folder's name; the arguments of that follow.
        """
        parts = (self.transformer, getattr(self, "guide", None))
        if adapters := dict.fromkeys(name for part in parts for name in getattr(part, "peft_config", {})):
            raise ValueError(
                f"the pipeline has LoRA adapters ({', '.join(adapters)}), which are no part of a saved one; call unload_lora_weights "
                "first, after fuse_lora to keep them in the weights."
            )
        repo = {name: kwargs.pop(name) for name in [*_PUSHED, "repo_id"] if name in kwargs}
        if self.config.vae_fingerprint and self.video_vae.dtype != torch.float32:  # the saved weights are rounded ones
            self.register_to_config(vae_fingerprint=self.video_vae.fingerprint())
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        write_weights_manifest(Path(save_directory))
        write_text(Path(save_directory) / "pipeline.py", PIPELINE_FILE)
        if push_to_hub:
            self.push_to_hub(repo.pop("repo_id", Path(save_directory).name), **repo)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        samples: int | str | Sequence[str] = 4,
        run: str | Path | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> str:
        """Push the pipeline with a model card: sample clips, training data and settings, licence, and the code that loads it.

        repo_id: "owner/name", or a path to a folder (./mine), which is written without network. license: such as
        "apache-2.0"; the card says where there is none. samples: so many clips are sampled for the card, or one for each of
        these labels or captions (or of one); 0: none. run: the folder output/NAME of the training; by default the one beside
        models/NAME, if the pipeline comes from there. kwargs: those of `save_pretrained`. A card that the repository
        already has is kept.
        """
        from stdit.sampling.card import card_contents, write_card  # imported on use, since it needs av and omegaconf

        contents = card_contents(self, samples, run)  # before anything is written
        if is_folder(str(repo_id)):
            folder = Path(repo_id).expanduser()
            if folder.is_dir() and any(folder.iterdir()):
                raise ValueError(f"{str(folder)!r} is not empty; nothing is overwritten, choose another folder.")
            self.save_pretrained(folder, **kwargs)
            write_card(self, folder, contents, repo_id=folder.name, license=license)
            return str(folder)
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        # HfHubHTTPError is of the client's errors, of which a broken connection is another one.
        broken: tuple[Any, ...] = (OSError, HFValidationError, *HfHubHTTPError.__bases__)
        try:
            check_connection()  # before clips are sampled
            with tempfile.TemporaryDirectory() as tmp:
                self.save_pretrained(tmp, **kwargs)
                write_card(self, Path(tmp), contents, repo_id=str(repo_id), license=license)
                found = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
                if huggingface_hub.file_exists(found, "README.md", token=token):
                    (Path(tmp) / "README.md").unlink()
                return self._upload_folder(tmp, found, token=token, commit_message=commit_message, create_pr=create_pr)
        except broken as error:
            raise ValueError(f"{repo_id!r} cannot be pushed: {' '.join(str(error).split())[:200]}") from error

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Load the config as diffusers does, with old names in a model_index.json of version 0.1.0 converted."""
        config = super().load_config(*args, **kwargs)  # type: ignore[misc]
        if isinstance(config, tuple):
            return (renamed_section("pipeline", config[0]), *config[1:])
        return renamed_section("pipeline", config)


_PUSHED = ("license", "samples", "run", "commit_message", "private", "token", "create_pr")
