"""Which parameters are hidden matrices: what Muon is for."""

from torch import nn

ENDS = ("embed", "adaLN", "final")  # what reads in, modulates and reads out


def muon_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of linear layers and convolutions that are learnt, those at the ends and all tables aside (Jordan et al., "Muon")."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = {f"{name}.weight": layer.weight for name, layer in model.named_modules() if isinstance(layer, layers)}
    return {name: p for name, p in found.items() if p.requires_grad and not any(word in name for word in ENDS)}
