"""DFIR-DETR: top-k attention, up-sampling that keeps the norm, and refinement in the frequency domain."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.backbones.dynamic_aggregation import DualPathShuffle, FrequencyRefinement, shuffle_channels
from saccade.claims.framework import Paper, at_least, claim, equal, relative_difference, rounding
from saccade.claims.framework.oracles import dense_attention, random_inputs
from saccade.measure import count_flops
from saccade.mixers import FourierFilter
from saccade.ops import top_k_attention, upsample_nearest

PAPER = Paper(
    title="DFIR-DETR: Frequency Domain Enhancement and Dynamic Feature Aggregation for Cross-Scene Small Object "
    "Detection",
    arxiv="2512.07078",
    published="2025-12-08",
    summary="Three parts of RT-DETR are replaced to keep small objects: attention in the backbone keeps for each query "
    "the keys with the highest scores, up-sampling in the pyramid keeps the map's norm, and a block that works on the "
    "spectrum refines the features with a global receptive field.",
    home=(
        "saccade.ops.top_k_attention",
        "saccade.mixers.TopKAttention",
        "saccade.mixers.FourierFilter",
        "saccade.ops.upsample_nearest",
        "saccade.backbones.DynamicAggregation",
        "saccade.backbones.FrequencyRefinement",
    ),
    missing=("the detector around these parts, RT-DETR with a backbone of ResNet-18's size",),
    differences=(
        "No official code was found, so there is no replay. The formulas of the aggregation, and what the other parts "
        "do, are published; the share of kept keys and how it follows the input, the gated unit, the exponent of the "
        "up-sampling, the dual path and the filter are proposals of ours, and arguments.",
        "The stated O(N K) holds for what comes after the choice: the scores of all pairs are formed to choose from.",
    ),
)

LAYER = "the layer's definition"
DETECTOR = "NEU-DET, VisDrone, and the detector"


@claim(
    "complexity",
    {"choosing": 256**2 * 48, "values of k keys": 256 * 32 * 48, "values of all keys": 256**2 * 48},
    source="complexity of the attention",
)
def cost_of_top_k_attention() -> dict[str, float]:
    """Averaging the values takes N K C multiply-adds instead of N^2 C; the scores to choose from take N^2 C all the
    same. Counted with N = 256, K = 32 and C = 48 channels; the products of queries and kept keys cost as much as the
    averaging, so that twice the keys add it once."""
    query, key, value = torch.randn(3, 1, 3, 256, 16)

    def count(keys: int) -> float:
        return count_flops(top_k_attention, query, key, value, keys).total / 2

    averaging = {keys: count(keys) - count(keys // 2) for keys in (32, 256)}
    choosing = count(32) - 2 * averaging[32]
    return {"choosing": choosing, "values of k keys": averaging[32], "values of all keys": averaging[256]}


@claim("equivalence", {"K = N": 0.0, "K = 1": 0.0}, rounding, source=LAYER)
def all_keys_and_one_key() -> dict[str, float]:
    """With K = N it is dense softmax attention, and with K = 1 it copies the value of the best key."""
    query, key, value = random_inputs(6, 5)
    best = (query.flatten(2, 3) @ key.flatten(2, 3).mT).argmax(-1)
    copied = value.flatten(2, 3).gather(2, best.unsqueeze(-1).expand(-1, -1, -1, 8)).view_as(value)
    return {
        "K = N": relative_difference(top_k_attention(query, key, value, 30), dense_attention(query, key, value)),
        "K = 1": relative_difference(top_k_attention(query, key, value, 1), copied),
    }


@claim("property", 0, source="gradient of the choice")
def gradients_reach_kept_keys_alone() -> int:
    """The gradient of an output by the keys is non-zero on the kept ones alone: the number of pairs where it is not
    so, of 30 queries that keep 4 keys."""
    query, key, value = random_inputs(6, 5, grad=True)
    out = top_k_attention(query, key, value, 4).flatten(2, 3)
    scores = query.flatten(2, 3) @ key.flatten(2, 3).mT
    kept = scores >= scores.topk(4).values[..., -1:]
    wrong = 0
    for row in range(30):
        (grad,) = torch.autograd.grad(out[:, :, row].square().sum(), key, retain_graph=True)
        wrong += int(((grad.abs().sum(-1) > 0).flatten(2) != kept[:, :, row]).sum())
    return wrong


@claim(
    "property",
    {
        "L1, plain": 4.0,
        "L2, plain": 2.0,
        "L1, kept": 1.0,
        "L2, kept": 1.0,
        "L2, 3 levels": 8.0,
        "L2, 3 levels kept": 1.0,
    },
    equal("float64", within=1e-12),
    source="up-sampling of the pyramid",
)
def upsampling_multiplies_the_norm() -> dict[str, float]:
    """Nearest neighbours of twice the size quadruple a map's L1 norm and double its L2 norm, 8-fold after three levels
    of a pyramid; the factors 1/4 and 1/2 keep them."""
    x = torch.randn(2, 5, 6, 4, dtype=torch.float64)

    def gain(p: float, norm: float | None, levels: int = 1) -> float:
        y = x
        for _ in range(levels):
            y = upsample_nearest(y, 2, norm=norm)
        return (y.norm(p) / x.norm(p)).item()

    return {
        "L1, plain": gain(1, None),
        "L2, plain": gain(2, None),
        "L1, kept": gain(1, 1),
        "L2, kept": gain(2, 2),
        "L2, 3 levels": gain(2, None, 3),
        "L2, 3 levels kept": gain(2, 2, 3),
    }


@claim("equivalence", {"W = 0": 0.0, "W = c": 0.0, "shifts": 0.0, "steps": 0.0}, rounding, source=LAYER)
def filters_of_the_spectrum() -> dict[str, float]:
    """With W = 0 the Fourier block is the identity, with W = c it is (1 + c) x; any W commutes with circular shifts;
    and several steps, x + irfft(W rfft(x)) one after the other, are one."""
    x = torch.randn(2, 7, 9, 4, dtype=torch.float64)
    layer, zero, constant = _filter(2), _filter(1), _filter(1)
    nn.init.zeros_(zero.weight)
    nn.init.constant_(constant.weight, 0.7)
    stepped: Tensor = x
    for step in range(2):
        one = _filter(1)
        one.weight.data = layer.weight.data[step : step + 1]
        gain = one.gain((7, 9)) - 1
        stepped = stepped + torch.fft.irfft2(gain * torch.fft.rfft2(stepped, dim=(1, 2)), s=(7, 9), dim=(1, 2))
    return {
        "W = 0": relative_difference(zero(x), x),
        "W = c": relative_difference(constant(x), 1.7 * x),
        "shifts": relative_difference(layer(x.roll((2, 5), (1, 2))), layer(x).roll((2, 5), (1, 2))),
        "steps": relative_difference(layer(x), stepped),
    }


@claim("property", 0, source="receptive field of the block")
def one_refinement_sees_the_whole_map() -> int:
    """The gradient of every output of the Fourier block, and of the layer around it, by the input is non-zero on every
    token: the number of pairs of 7 x 9 tokens where it is not."""
    around = FrequencyRefinement(8).double().eval()
    nn.init.normal_(around.mixer.weight)  # type: ignore[arg-type]
    unseen = 0
    for layer in (_filter(1, 8), around):
        x = torch.randn(1, 7, 9, 8, dtype=torch.float64, requires_grad=True)
        outputs = layer(x).square().sum(-1).flatten()
        reached = [torch.autograd.grad(out, x, retain_graph=True)[0].abs().sum(-1) > 0 for out in outputs]
        unseen += int((~torch.stack(reached)).sum())
    return unseen


@claim(
    "property",
    {"high-pass": "kept or raised", "smoothing": "lowered"},
    at_least(1.0, "each ratio is above 1 if the share moved as stated"),
    source="high-frequency components are preserved",
)
def a_high_pass_residual_keeps_fine_detail() -> dict[str, float]:
    """The share of a photo's energy above a quarter of a cycle a pixel: with three steps of the Fourier block whose
    gains rise with frequency over the photo's own, and the photo's own over that after three 3 x 3 smoothings."""
    from skimage.data import camera

    photo = torch.tensor(camera(), dtype=torch.float64)[None, ::4, ::4, None] / 255
    layer = _filter(3)
    layer.weight.data[:] = torch.linspace(0, 0.5, layer.weight.shape[1]).view(1, -1, 1)
    smooth = photo.squeeze(-1)
    for _ in range(3):
        smooth = F.avg_pool2d(smooth, 3, 1, padding=1)
    own = _share_of_detail(photo.squeeze(-1))
    return {
        "high-pass": _share_of_detail(layer(photo.expand(-1, -1, -1, 4))[..., 0]) / own,
        "smoothing": own / _share_of_detail(smooth),
    }


@claim("property", {"order restored": True, "first half seen": 4, "second half seen": 4}, source=LAYER)
def shuffling_mixes_the_two_paths() -> dict[str, int | bool]:
    """The shuffle is a permutation, undone by a shuffle of C / 2 groups. After it the next 1 x 1 convolution of two
    groups, blind without it to the other path, sees as many channels of each: counted for one of its outputs."""
    number = torch.arange(16)
    shuffled = shuffle_channels(number, 2)
    group = shuffled[:8]
    path = DualPathShuffle(8, 16).double().eval()
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    restored = shuffle_channels(path(x), 8)[..., :8]
    return {
        "order restored": bool(
            (shuffle_channels(shuffled, 8) == number).all() and torch.equal(restored, path.first(x))
        ),
        "first half seen": int((group < 8).sum()),
        "second half seen": int((group >= 8).sum()),
    }


@claim("params", 11.7, source="abstract", needs="the detector, which saccade does not have yet")
def the_detector_is_small() -> None:
    """The detector has 11.7 million parameters."""


@claim(
    "flops",
    {"version 1": 41.2, "a later version": 47.2},
    source="abstracts of two versions",
    needs="the detector, which saccade does not have yet",
)
def the_detector_is_cheap() -> None:
    """The detector takes so many GFLOPs for an image."""


@claim("accuracy", {"NEU-DET": 92.9, "VisDrone": 51.6}, source="abstract; mAP50", needs=DETECTOR)
def the_detector_is_accurate() -> None:
    """mAP50 of the detector."""


def _filter(steps: int, dim: int = 4) -> FourierFilter:
    """A filter with random gains and no projection."""
    layer = FourierFilter(dim, steps=steps, out_proj=False).double()
    nn.init.normal_(layer.weight)
    return layer


def _share_of_detail(images: Tensor) -> float:
    """The share of the energy, without the mean, at frequencies of 1/4 cycle a pixel and more along either axis."""
    power = torch.fft.fft2(images - images.mean((-2, -1), keepdim=True)).abs().square()
    rows, columns = (torch.fft.fftfreq(length).abs() for length in images.shape[-2:])
    fine = (rows[:, None] >= 0.25) | (columns >= 0.25)
    return (power[..., fine].sum() / power.sum()).item()
