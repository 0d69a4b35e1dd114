"""What diffusers must be told of our classes before its caches find them, and the card of a model."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from stdit.nn.blocks import STDiTBlock


def register_blocks() -> None:
    """Let FirstBlockCache and MagCache see our blocks. The registry is private: without it they refuse, nothing else breaks."""
    try:
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    except ImportError:
        return
    metadata = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
    TransformerBlockRegistry.register(STDiTBlock, metadata)


def model_card(config: dict, parameters: int) -> ModelCard:
    """What a person who finds the folder needs: what it is, how it is loaded, how its axes run."""
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


def is_folder(repo_id: str) -> bool:
    """Whether a place to push to is on this machine: an existing folder, or a path written as one."""
    return repo_id.startswith(("/", "./", "../", "~")) or Path(repo_id).is_dir()
