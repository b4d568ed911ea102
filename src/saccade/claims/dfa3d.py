"""DFA3D: queries in space sample images lifted by a distribution over depth, without forming the lifted volume."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.claims.framework import Case, Paper, at_least, at_most, claim, equal, play, relative_difference, rounding
from saccade.errors import InputError
from saccade.measure import measure_peak_memory
from saccade.ops import deformable_attention_3d, depth_scores

PAPER = Paper(
    title="DFA3D: 3D Deformable Attention For 2D-to-3D Feature Lifting",
    arxiv="2307.12972",
    published="2023-07-24",
    summary="Image features are lifted to space by an outer product with a distribution over depth, and queries sample "
    "the volume by deformable attention. It need not exist: sampling it is sampling the image, each pixel weighted by "
    "its own depth distribution at the point's depth.",
    home=("saccade.ops.deformable_attention_3d", "saccade.mixers.DeformableLifting"),
    missing=("the detectors around it, and the head that predicts the depth distribution",),
    differences=(
        "The recorded case evaluates the arithmetic of the official CUDA kernels, which nobody ran for it.",
        "The official one-stage backward pass loses the gradient of column and row, and treats that of the depth score "
        "apart; the two-stage one keeps both. Ours are the exact gradients.",
        "The option use_empty is from a description that leaves open where the empty vector is added: we add it to "
        "what is read from a camera, before the projection.",
    ),
)

KERNEL = "the kernel's definition"
SHAPES = [(5, 6), (3, 3)]


@claim("equivalence", "equal to 1e-15", rounding, source="the efficient form; checked by the authors' unit test")
def weighted_pixels_equal_the_sampled_volume() -> dict[str, float]:
    """Bilinear sampling of pixels that are weighted by interpolated depth scores equals trilinear sampling of the
    explicit volume, in value and in every gradient, for points inside and outside."""
    inputs = _random_inputs()
    fast, slow = (_attend(*inputs, impl=impl) for impl in ("sampled", "reference"))
    upstream = torch.randn_like(slow)
    grads = zip(*(torch.autograd.grad(out, inputs, upstream) for out in (fast, slow)))
    errors = {"output": relative_difference(fast, slow)}
    names = ("value", "depth", "points", "weights")
    return errors | {name: relative_difference(*pair) for name, pair in zip(names, grads)}


@claim(
    "complexity",
    {"volume": 32 * 112 * 4, "8 times the bins": 0},
    equal("bytes are exact; what the points need is small beside the volume", relative=0.02),
    source="memory of the two forms",
)
def the_volume_is_never_formed() -> dict[str, float]:
    """Sampling the volume of C = 32 channels and D = 112 bins holds C D numbers for every pixel and head, and sampling
    weighted pixels nothing that grows with D: bytes for each pixel of two maps of 40 x 60, read by 20 queries."""
    shapes = [(40, 60)]

    def peak(bins: int, impl: str) -> int:
        inputs = _random_inputs(heads=1, queries=20, width=32, bins=bins, shapes=shapes, dtype=torch.float32)
        with torch.no_grad():
            return measure_peak_memory(lambda: _attend(*inputs, shapes=shapes, impl=impl)).bytes

    return {"volume": peak(112, "reference") / 4800, "8 times the bins": peak(112, "sampled") - peak(14, "sampled")}


@claim(
    "complexity",
    3584 / 144,
    at_least(20, "the volume has a gradient of its own size, and points take some memory on the other side"),
    source="memory of the two forms; C D against C + D with C = 32, D = 112",
)
def training_takes_a_fraction_of_the_memory() -> float:
    """A pixel and head take C D = 3584 numbers as a volume and C + D = 144 as its two factors, 25 times fewer: so many
    times less is the peak of a forward and backward pass, 100 queries of 8 points on two maps of 40 x 60."""
    shapes = [(40, 60)]
    inputs = _random_inputs(heads=1, queries=100, points=8, width=32, bins=112, shapes=shapes, dtype=torch.float32)

    def peak(impl: str) -> int:
        return measure_peak_memory(
            lambda: torch.autograd.grad(_attend(*inputs, shapes=shapes, impl=impl).sum(), inputs)
        ).bytes

    return peak("reference") / peak("sampled")


@claim(
    "complexity",
    4.0,
    at_most(4.0, "four scores a point, in numbers of 4 bytes"),
    source="memory of the efficient form, beside its factors",
)
def a_point_keeps_four_numbers() -> float:
    """Sampling with a gradient holds at most four numbers more for each point, its depth scores, besides inputs and
    outputs: what each of 524 288 points adds to the peak of the forward pass, over as many."""
    peaks = []
    for queries in (2**14, 2**15):
        inputs = _random_inputs(heads=2, queries=queries, points=8, width=2, shapes=[(5, 6)], dtype=torch.float32)
        outputs = 2 * 2 * queries * 2 * 4
        peaks.append(measure_peak_memory(partial(_attend, *inputs, shapes=[(5, 6)])).bytes - outputs)
    return (peaks[1] - peaks[0]) / 2**19 / 4


@claim("equivalence", "equal", rounding, source=KERNEL)
def one_bin_is_plain_deformable_attention() -> float:
    """With D = 1, Pd = 1 and z at the middle of the bin it is multi-scale deformable attention in two dimensions."""
    value, depth, points, weights = (x.detach() for x in _random_inputs(bins=1))
    points = torch.cat([points[..., :2], torch.full_like(points[..., 2:], 0.5)], -1)
    total = torch.zeros_like(value[:, :, :5])
    for level, maps in enumerate(value.split([h * w for h, w in SHAPES], 2)):
        image = maps.mT.unflatten(-1, SHAPES[level]).flatten(0, 1)
        sampled = F.grid_sample(image, 2 * points[:, :, :, level, :, :2].flatten(0, 1) - 1, align_corners=False)
        total += (sampled.unflatten(0, value.shape[:2]) * weights[:, :, None, :, level]).sum(-1).mT
    return relative_difference(_attend(value, torch.ones_like(depth), points, weights), total)


@claim("property", {"seen at the right depth": 60, "seen a bin or more away": 0}, source="hard depth")
def hard_depth_answers_at_its_depth_alone() -> dict[str, int]:
    """Where a pixel's distribution has all in one bin, a point in that bin reads the pixel, and a point one bin away or
    more reads nothing: 10 x 6 pixels, each read at all of 8 depths."""
    value = torch.ones(1, 1, 60, 1).double()
    own = torch.arange(60) % 8
    depth = F.one_hot(own, 8).double().view(1, 1, 60, 8)
    place = torch.stack(torch.meshgrid((torch.arange(10) + 0.5) / 10, (torch.arange(6) + 0.5) / 6, indexing="ij"), -1)
    rows, columns = place.flatten(0, 1)[:, None].expand(-1, 8, -1).unbind(-1)  # (60, 8)
    points = torch.stack([columns, rows, ((torch.arange(8) + 0.5) / 8).expand(60, -1)], -1)
    points = points.double().view(1, 1, 480, 1, 1, 3)
    read = _attend(value, depth, points, points.new_ones(1, 1, 480, 1, 1), [(10, 6)])
    seen = (read.view(60, 8) > 0.5) == F.one_hot(own, 8).bool()
    right = seen.gather(1, own[:, None])
    return {"seen at the right depth": int(right.sum()), "seen a bin or more away": int((~seen).sum() - (~right).sum())}


@claim(
    "property",
    {"2-D": 0.0, "3-D": "different"},
    source="depth ambiguity",
    holds=equal("in two dimensions the two queries sample the same places; 0.1 is far from rounding", within=0.0),
)
def queries_on_a_ray_are_told_apart() -> dict[str, float | str]:
    """Two queries on one ray of the camera, at different depths and with the same offsets, get the same from 2-D
    deformable attention (D = 1), and different results from DFA3D: the relative difference."""
    value, depth, points, weights = (x.detach() for x in _random_inputs())
    farther = points + torch.tensor([0.0, 0.0, 0.3])
    flat = [torch.cat([p[..., :2], torch.full_like(p[..., 2:], 0.5)], -1) for p in (points, farther)]
    one_bin = torch.ones_like(depth[..., :1])
    plain = relative_difference(_attend(value, one_bin, flat[0], weights), _attend(value, one_bin, flat[1], weights))
    lifted = relative_difference(_attend(value, depth, farther, weights), _attend(value, depth, points, weights))
    return {"2-D": plain, "3-D": "different" if lifted > 0.1 else f"differ by {lifted:.3g}"}


@claim("property", True, source=KERNEL)
def gradients_are_exact() -> bool:
    """The gradients by value, depth distribution, all three coordinates and weights are those of finite differences."""
    return torch.autograd.gradcheck(_attend, _random_inputs())


@claim(
    "property",
    "sharper, and more at the true depth",
    at_least(2.0, "each distribution is several times as sharp as the next"),
    source="an experiment of ours on scikit-image's stereo pair",
)
def the_true_depth_is_read_more() -> dict[str, float]:
    """On a photo whose disparity is known, what points at the true one of 16 depths read, over what points four bins
    away on the same ray read: how many times larger it is with a standard deviation of 1 bin than with 2, with 2 than
    with 4, and with 4 than with a uniform distribution."""
    spreads = (1.0, 2.0, 4.0, None)
    ratios = [_read_ratio(spread) for spread in spreads]
    names = ("1 over 2", "2 over 4", "4 over uniform")
    return {name: sharp / soft for name, sharp, soft in zip(names, ratios, ratios[1:])}


@claim(
    "property",
    1.0,
    equal("float64", within=1e-10),
    source="an experiment of ours on scikit-image's stereo pair",
)
def a_uniform_distribution_is_blind_to_depth() -> float:
    """On the same photo with a uniform distribution, points at the true and at the wrong depth read the same: ratio."""
    return _read_ratio(None)


@claim(
    "accuracy",
    {"mean gain": 1.41, "largest, with depth of high quality": 15.1},
    source="abstract; points of mAP on nuScenes",
    needs="nuScenes, and the detectors, which saccade does not have yet",
)
def detectors_get_better() -> None:
    """Methods that lift by DFA3D instead of other ways gain mAP."""


def replay(case: Case) -> dict[str, Tensor]:
    """3-D deformable attention as a function, of one stage or two: heads stand after the pixels there."""
    if "3D deformable attention" not in case.cls and "3DDeformableAttn" not in case.cls:
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: only the attention function can be replayed")

    def forward(_: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        value, depth, points, weights = (
            inputs[name].transpose(1, 2)
            for name in ("value", "value_dpt_dist", "sampling_locations", "attention_weights")
        )
        rows = inputs["spatial_shapes_3D"].tolist()
        shapes, bins = [(h, w) for h, w, _ in rows], {d for *_, d in rows}
        starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
        if bins != {depth.shape[-1]} or inputs["level_start_index"].tolist() != starts:
            raise InputError(
                f"levels of {rows} start at {inputs['level_start_index'].tolist()} with {depth.shape[-1]} bins: levels "
                f"stand one after the other, at {starts}, and share the bins"
            )
        outputs = {
            "y": deformable_attention_3d(value, depth, shapes, points, weights).transpose(1, 2).flatten(2),
            "depth_score": depth_scores(depth, shapes, points).transpose(1, 2),
        }
        return {name: output for name, output in outputs.items() if f"out.{name}" in case.expected}

    return play(case, forward)


def _random_inputs(
    heads: int = 2,
    queries: int = 5,
    points: int = 3,
    width: int = 3,
    bins: int = 4,
    shapes: list[tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, depth, points, of which about a third is outside, and weights, for two images."""
    pixels = sum(h * w for h, w in shapes)
    places = 2, heads, queries, len(shapes), points
    value = torch.randn(2, heads, pixels, width, dtype=dtype)
    depth = torch.randn(2, heads, pixels, bins, dtype=dtype).softmax(-1)
    weights = torch.randn(*places, dtype=dtype).flatten(3).softmax(-1).view(places)
    inputs = value, depth, 1.3 * torch.rand(*places, 3, dtype=dtype) - 0.15, weights
    value, depth, locations, weights = (x.requires_grad_() for x in inputs)
    return value, depth, locations, weights


def _attend(
    value: Tensor,
    depth: Tensor,
    points: Tensor,
    weights: Tensor,
    shapes: list[tuple[int, int]] = SHAPES,
    impl: str = "auto",
) -> Tensor:
    return deformable_attention_3d(value, depth, shapes, points, weights, impl=impl)


def _read_ratio(spread: float | None) -> float:
    """What 200 pixels of the motorcycle photo read at their own depth over what they read four bins away, with depth
    distributions of a normal form in 16 bins, or uniform ones."""
    from skimage.data import stereo_motorcycle

    photo, _, disparity = (torch.tensor(x)[::4, ::4].double() for x in stereo_motorcycle())
    height, width = disparity.shape
    known = disparity.isfinite()
    low, high = disparity[known].min(), disparity[known].max()
    own = (((disparity - low) / (high - low)).nan_to_num(0, 0, 0) * 16).long().clamp(0, 15).flatten()
    away = torch.arange(16) - own[:, None]
    depth = torch.zeros(len(own), 16).double() if spread is None else -((away / spread) ** 2) / 2
    chosen = known.flatten().nonzero().squeeze(1)
    chosen = chosen[torch.randperm(len(chosen))[:200]]
    read = []
    for bin_ in (own[chosen], (own[chosen] + 4) % 16):
        columns, rows = (chosen % width + 0.5) / width, (chosen // width + 0.5) / height
        points = torch.stack([columns, rows, (bin_ + 0.5) / 16], -1).double().view(1, 1, 200, 1, 1, 3)
        weights = points.new_ones(1, 1, 200, 1, 1)
        value, bins = photo.flatten(0, 1)[None, None], depth.softmax(-1)[None, None]
        read.append(_attend(value, bins, points, weights, [(height, width)]).norm(dim=-1).mean().item())
    return read[0] / read[1]
