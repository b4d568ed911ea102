"""deformable_attention_3d: sums over pixels and bins one by one, the volume, pieces, limits, gradients, errors."""

import sys
from itertools import product
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import deformable_attention_3d, deformable_attention_3d_weights, depth_scores

SHAPES = [(5, 6), (3, 3), (1, 4)]
MODULE = sys.modules["saccade.ops.deformable_attention_3d"]


def make_inputs(shapes=SHAPES, *, heads=2, depth_heads=2, queries=5, num_points=3, width=3, bins=4, reach=1.6):
    pixels = sum(map(prod, shapes))
    places = 2, heads, queries, len(shapes), num_points
    value = torch.randn(2, heads, pixels, width, dtype=torch.float64)
    depth = torch.randn(2, depth_heads, pixels, bins, dtype=torch.float64).softmax(-1)
    points = reach * torch.rand(*places, 3, dtype=torch.float64) - (reach - 1) / 2
    inputs = value, depth, points, torch.randn(*places, dtype=torch.float64)
    return [x.requires_grad_() for x in inputs]


def attend(value, depth, points, weights, shapes=SHAPES, **options):
    return deformable_attention_3d(value, depth, shapes, points, weights, **options)


def hat(place, cell):
    return max(0.0, 1 - abs(place - cell))


def sum_one_by_one(value, depth, points, weights):
    """Every pixel and bin of every level, by its trilinear weight."""
    out = torch.zeros_like(points[:, :, :, 0, 0, :1]).expand(-1, -1, -1, value.shape[-1]).clone()
    depth = depth.expand(-1, value.shape[1], -1, -1)
    for b, m, q, level, p in product(*map(range, weights.shape)):
        (height, width), bins = SHAPES[level], depth.shape[-1]
        first = sum(map(prod, SHAPES[:level]))
        x, y, z = (points[b, m, q, level, p] * torch.tensor([width, height, bins]) - 0.5).tolist()
        for row, column, d in product(range(height), range(width), range(bins)):
            s = first + row * width + column
            share = hat(x, column) * hat(y, row) * hat(z, d) * weights[b, m, q, level, p]
            out[b, m, q] += share * value[b, m, s] * depth[b, m, s, d]
    return out


@pytest.mark.parametrize("depth_heads", [1, 2])
@pytest.mark.parametrize("impl", ["auto", "sampled", "reference"])
def test_the_volume_is_interpolated_trilinearly(impl, depth_heads):
    inputs = [x.detach() for x in make_inputs(depth_heads=depth_heads, queries=2, num_points=2)]
    assert_close(attend(*inputs, impl=impl), sum_one_by_one(*inputs))


@pytest.mark.parametrize("most", [2**18, 40, 1], ids="pieces of {}".format)
@pytest.mark.parametrize("depth_heads", [1, 2])
def test_sampled_equals_reference_in_value_and_gradient(depth_heads, most, monkeypatch):
    monkeypatch.setattr(MODULE, "MOST_POINTS", most)
    inputs = make_inputs(depth_heads=depth_heads)
    fast, slow = (attend(*inputs, impl=impl) for impl in ("sampled", "reference"))
    assert_close(fast, slow)
    upstream = torch.randn_like(slow)
    assert_close(*(torch.autograd.grad(out, inputs, upstream) for out in (fast, slow)))


@given(seed=st.integers(0, 2**32 - 1), reach=st.floats(0.5, 8), bins=st.integers(1, 5))
def test_the_matrix_of_pixels_makes_the_output(seed, reach, bins):
    torch.manual_seed(seed)
    value, depth, points, weights = (x.detach() for x in make_inputs(reach=reach, bins=bins))
    matrix = deformable_attention_3d_weights(depth, SHAPES, points, weights.softmax(-1))
    assert (matrix >= 0).all()
    assert (matrix.sum(-1) <= len(SHAPES) + 1e-9).all()
    assert_close(matrix @ value, attend(value, depth, points, weights.softmax(-1)))


def test_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(attend, make_inputs(queries=2, num_points=2, heads=1, depth_heads=1))


def test_in_float32_it_is_close_and_in_bfloat16_it_returns_bfloat16():
    inputs = [x.detach() for x in make_inputs()]
    exact = attend(*inputs)
    assert_close(attend(*(x.float() for x in inputs)), exact.float(), atol=1e-5, rtol=1e-5)
    value, depth, points, weights = inputs
    rough = attend(value.bfloat16(), depth.bfloat16(), points.float(), weights.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert_close(rough.double(), exact, atol=0.05, rtol=0.05)


def test_a_point_far_outside_reads_nothing():
    value, depth, points, weights = make_inputs()
    for axis, far in product(range(3), (-1e30, 1e30, -0.6, 1.6)):
        moved = points.detach().clone()
        moved[..., axis] = far
        out = attend(value, depth, moved.requires_grad_(), weights)
        assert (out == 0).all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (value, depth, moved, weights)))


def test_depth_scores_are_those_of_the_corners_in_their_order():
    depth = torch.rand(1, 1, 12, 5, dtype=torch.float64)  # 3 x 4 pixels
    point = torch.tensor([(1.25 + 0.5) / 4, (0.75 + 0.5) / 3, (2.3 + 0.5) / 5], dtype=torch.float64)
    scores = depth_scores(depth, [(3, 4)], point.view(1, 1, 1, 1, 1, 3)).flatten()
    corners = depth.view(3, 4, 5)[[0, 0, 1, 1], [1, 2, 2, 1]]  # left-top, right-top, right-bottom, left-bottom
    assert_close(scores, 0.7 * corners[:, 2] + 0.3 * corners[:, 3])
    outside = depth_scores(depth, [(3, 4)], torch.tensor([1.0, 1.0, 0.5]).view(1, 1, 1, 1, 1, 3).double()).flatten()
    assert (outside[1:] == 0).all()
    assert outside[0] > 0


def test_one_bin_is_two_dimensional_sampling():
    value, _, points, weights = (x.detach() for x in make_inputs([(5, 6)]))
    depth = torch.ones(2, 1, 30, 1, dtype=torch.float64)
    points[..., 2] = 0.5
    image = value.mT.unflatten(-1, (5, 6)).flatten(0, 1)
    plain = F.grid_sample(image, 2 * points[:, :, :, 0, :, :2].flatten(0, 1) - 1, align_corners=False)
    expected = (plain.unflatten(0, (2, 2)) * weights[:, :, None, :, 0]).sum(-1).mT
    assert_close(attend(value, depth, points, weights, [(5, 6)]), expected)


@pytest.mark.parametrize("most", [2**18, pytest.param(40, marks=pytest.mark.slow)])
def test_compiled_whole_and_exported_it_gives_the_same(most, monkeypatch):
    monkeypatch.setattr(MODULE, "MOST_POINTS", most)
    inputs = make_inputs()
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected, out = attend(*inputs), compiled(*inputs)
    assert_close(out, expected)
    upstream = torch.randn_like(expected)
    assert_close(*(torch.autograd.grad(each, inputs, upstream) for each in (out, expected)))

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return attend(*inputs)

    plain = tuple(x.detach() for x in inputs)
    assert_close(torch.export.export(Module(), plain).module()(*plain), expected)


def test_without_queries_or_images_there_is_nothing():
    for impl in ("sampled", "reference"):
        assert attend(*make_inputs(queries=0), impl=impl).shape == (2, 2, 0, 3)
        assert attend(*(x[:0] for x in make_inputs()), impl=impl).shape == (0, 2, 5, 3)


def test_errors_say_what_to_do():
    value, depth, points, weights = make_inputs()
    with pytest.raises(InputError, match=r"value is \(2, 1, 43, 3\): .* \(B, heads, S, E\) = \(2, 2, 43, E\)"):
        attend(value[:, :1], depth, points, weights)
    with pytest.raises(InputError, match=r"depth is \(2, 2, 42, 4\): levels of 5 x 6, 3 x 3, 1 x 4 pixels take"):
        attend(value, depth[:, :, 1:], points, weights)
    with pytest.raises(InputError, match=r"points is \(2, 2, 5, 2, 3, 3\) for 3 levels"):
        attend(value, depth, points[:, :, :, :2], weights)
    with pytest.raises(InputError, match="of at least one point"):
        attend(*make_inputs(num_points=0))
    with pytest.raises(InputError, match=r"weights is \(2, 2, 5, 3, 2\): give one a point, \(2, 2, 5, 3, 3\)"):
        attend(value, depth, points, weights[..., :2])
    with pytest.raises(InputError, match="impl is 'tiled'"):
        attend(value, depth, points, weights, impl="tiled")
