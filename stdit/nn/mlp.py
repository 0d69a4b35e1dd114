"""The feed-forward branch."""

from torch import Tensor, nn


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), GELU in its tanh form as in DiT, or exact as in U-ViT."""

    def __init__(self, dim: int, hidden: int, gelu: str = "tanh"):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="none" if gelu == "exact" else gelu)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
