"""A learned filter in the frequency domain (as in DFIR-DETR's refinement, 2025, arXiv:2512.07078)."""

import torch
from torch import Tensor, nn

from saccade import taps
from saccade.mixers.mixer import Mixer, probe
from saccade.ops.check import check_positive

__all__ = ["FourierFilter"]


class FourierFilter(Mixer):
    """Learned gains by frequency, added to the map step by step (as in DFIR-DETR, 2025, arXiv:2512.07078).

    Each step is x + irfft(weight(|f|) rfft(x)); gains depend on the radius of the frequency alone, so that the filter
    is isotropic, real, and the same for maps of any size. It wraps around at the borders. All steps together are one
    product, of prod(1 + weight), with the spectrum. The token matrix is the mean over channels, without `proj`.

    Args:
        dim: C, channels of a token.
        steps: how often the filter is applied, each time with gains of its own.
        num_bands: gains from frequency 0 to the highest; between them they are interpolated linearly. They start at 0,
            where the filter is the identity.
        out_proj: end with a linear projection, which mixes the channels.
    """

    def __init__(self, dim: int, *, steps: int = 1, num_bands: int = 8, out_proj: bool = True) -> None:
        super().__init__(dim)
        check_positive(steps=steps, num_bands=num_bands)
        self.weight = nn.Parameter(torch.zeros(steps, num_bands, dim))
        self.proj = nn.Linear(dim, dim) if out_proj else nn.Identity()

    def mix(self, x: Tensor) -> Tensor:
        gain = self.gain(tuple(x.shape[1:-1]))
        taps.record(self, "attention", lambda: _token_matrix(x, gain))
        out: Tensor = self.proj(_filter(x, gain))
        return out

    def gain(self, space: tuple[int, ...]) -> Tensor:
        """The factor of every frequency, prod(1 + weight): (*space, C) with half the last axis, as rfft has it."""
        bands = self.weight.shape[1]
        dtype = torch.promote_types(self.weight.dtype, torch.float32)  # there are no Fourier transforms of bfloat16
        place = _radius(space, dtype, self.weight.device) * (bands - 1)
        low = place.floor().long().clamp(max=max(bands - 2, 0))
        high = (low + 1).clamp(max=bands - 1)
        share = (place - low).unsqueeze(-1)
        weight = self.weight.to(dtype)
        return (1 + (1 - share) * weight[:, low] + share * weight[:, high]).prod(0)


def _radius(space: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """|f| of every frequency that rfft keeps, from 0 to 1 at the corner, half a cycle a token along every axis."""
    last = len(space) - 1
    along = [
        (torch.fft.rfftfreq if axis == last else torch.fft.fftfreq)(length, dtype=dtype, device=device)
        for axis, length in enumerate(space)
    ]
    squares = torch.meshgrid(*(frequency.square() for frequency in along), indexing="ij")
    return (torch.stack(squares).sum(0) * 4 / len(space)).sqrt()


def _filter(x: Tensor, gain: Tensor) -> Tensor:
    """Multiply the spectrum of x (B, *space, C) by real gains (*frequencies, C or 1)."""
    if not x.numel():  # MKL refuses an empty batch
        return x
    axes, space = tuple(range(1, x.ndim - 1)), x.shape[1:-1]
    spectrum = torch.fft.rfftn(x.to(gain.dtype), dim=axes)
    return torch.fft.irfftn(spectrum * gain, s=space, dim=axes).to(x.dtype)  # s: the last axis may be odd


def _token_matrix(x: Tensor, gain: Tensor) -> Tensor:
    mean = gain.mean(-1, keepdim=True)
    return probe(lambda tokens: _filter(tokens, mean), tuple(x.shape[1:-1]), x[..., :1]).expand(len(x), -1, -1, -1)
