"""Chooses the parameters that Muon optimises: the hidden weight matrices."""

from torch import nn

# Name parts of embeddings, modulation and the final layer, which the Muon recipe leaves to AdamW.
EXCLUDED = ("embed", "adaLN", "final")


def muon_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable weights of Linear and Conv layers, except embeddings, modulation and final layer.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks".
    """
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    names = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, layers)}
    found = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name in names and p.requires_grad}
    return {name: p for name, p in found.items() if not any(word in name for word in EXCLUDED)}
