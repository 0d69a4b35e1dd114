"""The MLP of a transformer block."""

from torch import Tensor, nn


class Mlp(nn.Module):
    """Two linear layers with GELU between them, in its tanh form (DiT) or exact (U-ViT)."""

    def __init__(self, dim: int, hidden: int, gelu: str = "tanh"):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="none" if gelu == "exact" else gelu)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Compute fc2(gelu(fc1(x))) over the last dimension."""
        return self.fc2(self.act(self.fc1(x)))
