"""Which parameters Muon optimises: the hidden weight matrices."""

from torch import nn

# Parts of names of layers that read in, modulate and read out; the Muon recipe leaves these to AdamW.
EXCLUDED = ("embed", "adaLN", "final")


def muon_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every trainable weight of a Linear or Conv layer but embeddings, modulation and the head (Jordan et al., "Muon")."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = {f"{name}.weight": layer.weight for name, layer in model.named_modules() if isinstance(layer, layers)}
    return {name: p for name, p in found.items() if p.requires_grad and not any(word in name for word in EXCLUDED)}
