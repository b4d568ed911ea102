"""Hard decisions that can be trained: Gumbel noise (Jang et al., 2016, arXiv:1611.01144; Maddison et al., 2016,
arXiv:1611.00712) and the straight-through gradient (Bengio et al., 2013, arXiv:1308.3432)."""

from torch import Tensor

__all__ = ["gumbel", "straight_through"]


def gumbel(uniform: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Turn numbers drawn evenly from 0 to 1 into Gumbel noise, -log(-log(u)).

    Args:
        uniform: of any shape, such as `torch.rand(shape, generator=generator)`.
        eps: added inside both logarithms, so that the noise is finite at 0 and at 1.
    """
    return -(-(uniform + eps).log() + eps).log()


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Take the value of `hard`, to rounding, and the gradient of `soft`.

    >>> import torch
    >>> soft = torch.tensor([0.3, 0.8], requires_grad=True)
    >>> gate = straight_through((soft > 0.5).float(), soft)
    >>> gate.tolist(), torch.autograd.grad(gate.sum(), soft)[0].tolist()
    ([0.0, 1.0], [1.0, 1.0])
    """
    return hard.detach() + (soft - soft.detach())
