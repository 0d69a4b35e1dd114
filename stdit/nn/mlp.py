"""The feed-forward branch."""

from torch import Tensor, nn


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), GELU in its tanh form as in DiT."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
