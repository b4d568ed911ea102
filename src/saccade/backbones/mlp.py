"""MLPs, token by token: (B, *space, C) to the same."""

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["Mlp", "init_linear"]


class Mlp(nn.Module):
    """Two linear layers with an activation between them.

    Args:
        dim: C, channels.
        hidden: channels between the layers.
        act: makes the activation.
        drop: dropout after both layers.
        bias: give both layers a bias.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        act: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return out


def init_linear(layer: nn.Module) -> None:
    """Truncated normal weights of standard deviation 0.02 and biases of 0 for linear layers; others stay."""
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
