"""DeformableLifting: cameras one by one, as its formulas have it; starting offsets; taps; errors."""

import math

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import DeformableLifting
from saccade.ops import deformable_attention_3d, depth_scores

DIM, HEADS, POINTS, ANCHORS, BINS, CAMERAS, QUERIES = 12, 3, 4, 2, 5, 3, 7
SHAPES = [(5, 6), (3, 3)]


def make_module(**options):
    module = DeformableLifting(DIM, HEADS, num_levels=2, num_points=POINTS, **options).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.eval()


def make_inputs():
    query = torch.randn(2, QUERIES, DIM, dtype=torch.float64)
    images = torch.randn(2, CAMERAS, 39, DIM, dtype=torch.float64)
    depth = torch.randn(2, CAMERAS, 39, BINS, dtype=torch.float64).softmax(-1)
    anchors = torch.rand(2, CAMERAS, QUERIES, ANCHORS, 3, dtype=torch.float64)
    visible = torch.rand(2, CAMERAS, QUERIES) > 0.6
    visible[0, :, 0], visible[0, :, 1] = False, True
    return query, images, depth, SHAPES, anchors, visible


def read_one_by_one(module, query, images, depth, shapes, anchors, visible):
    """A query, a camera and a point at a time."""
    out = query.clone()
    for image in range(2):
        for row in range(QUERIES):
            seen = visible[image, :, row].nonzero().flatten().tolist()
            own = query[image, row]
            across = module.sampling_offsets(own).view(HEADS, 2, POINTS, 2)
            along = module.sampling_offsets_depth(own).view(HEADS, 2, POINTS)
            weights = module.attention_weights(own).view(HEADS, -1).softmax(-1).view(HEADS, 2, POINTS)
            total = torch.zeros(DIM, dtype=torch.float64)
            for camera in seen:
                points = torch.empty(HEADS, 2, POINTS, 3, dtype=torch.float64)
                for head in range(HEADS):
                    for level, (height, width) in enumerate(shapes):
                        for point in range(POINTS):
                            u, v, d = anchors[image, camera, row, point % ANCHORS]
                            x, y = across[head, level, point]
                            moved = u + x / width, v + y / height, d + along[head, level, point] / BINS
                            points[head, level, point] = torch.stack(moved)
                points = points[None, :, None]
                value = module.value_proj(images[image, camera]).view(39, HEADS, -1).transpose(0, 1)[None]
                bins = depth[image, camera][None, None]
                read = deformable_attention_3d(value, bins, shapes, points, weights[None, :, None], impl="reference")
                total += read.flatten()
                if module.empty_query is not None:
                    met = (weights * depth_scores(bins, shapes, points)[0, :, 0].mean(-1)).sum((1, 2))
                    total += (1 - met).mean() * module.empty_query
            out[image, row] += module.output_proj(total / max(1, len(seen)))
    return out


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("use_empty", [False, True])
def test_cameras_that_see_a_query_are_averaged(use_empty, impl):
    module, inputs = make_module(use_empty=use_empty, impl=impl), make_inputs()
    assert_close(module(*inputs), read_one_by_one(module, *inputs))


def test_without_a_mask_all_cameras_see_and_without_cameras_nothing_is_read():
    module, inputs = make_module(), make_inputs()
    everything = torch.ones(2, CAMERAS, QUERIES, dtype=torch.bool)
    assert_close(module(*inputs[:-1]), module(*inputs[:-1], everything))
    assert_close(module(*inputs[:-1], ~everything), inputs[0] + module.output_proj.bias)


def test_every_parameter_and_input_gets_a_gradient():
    module, (query, images, depth, shapes, anchors, visible) = make_module(use_empty=True), make_inputs()
    leaves = [x.requires_grad_() for x in (query, images, depth, anchors)]
    module(query, images, depth, shapes, anchors, visible).square().sum().backward()
    for leaf in (*leaves, *module.parameters()):
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().max() > 1e-6


def test_the_tapped_matrix_makes_the_output():
    module, inputs = make_module(), make_inputs()
    with saccade.tap(module) as seen:
        out = module(*inputs)
    value = module.value_proj(inputs[1]).flatten(1, 2).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    read = (seen[""].attention @ value).transpose(1, 2).flatten(2)
    assert_close(inputs[0] + module.output_proj(read), out)


def test_heads_start_in_directions_of_their_own():
    module = DeformableLifting(16, 8, num_levels=2, num_points=3)
    across = module.sampling_offsets.bias.view(8, 2, 3, 2)
    along = module.sampling_offsets_depth.bias.view(8, 2, 3)
    for head in range(8):
        cos, sin = math.cos(math.pi * head / 4), math.sin(math.pi * head / 4)
        for point in range(3):
            way = torch.tensor([cos, sin]) / max(abs(cos), abs(sin)) * (point + 1)
            assert_close(across[head, :, point], way.expand(2, -1))
            assert_close(along[head, :, point], torch.full((2,), (cos + sin) / 2 * (point + 1)))
    for layer in (module.sampling_offsets, module.sampling_offsets_depth, module.attention_weights):
        assert (layer.weight == 0).all()
    assert (module.attention_weights.bias == 0).all()


def test_compiled_whole_and_exported_it_gives_the_same():
    module, inputs = make_module(use_empty=True), make_inputs()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    leaves = [inputs[0].requires_grad_(), *module.parameters()]
    expected, out = module(*inputs), compiled(*inputs)
    assert_close(out, expected)
    upstream = torch.randn_like(expected)
    assert_close(*(torch.autograd.grad(each, leaves, upstream) for each in (out, expected)))
    assert_close(torch.export.export(module, inputs).module()(*inputs), expected)


def test_it_is_no_mixer_by_name():
    assert "deformable_lifting" not in saccade.mixers.list_mixers()


def test_errors_say_what_to_do():
    module, (query, images, depth, shapes, anchors, visible) = make_module(), make_inputs()
    wrong = {
        r"query is \(2, 7, 11\): give \(B, Q, 12\)": (query[..., 1:], images, depth, shapes, anchors),
        r"images is \(1, 3, 39, 12\): give \(2, cameras, S, 12\)": (query, images[:1], depth, shapes, anchors),
        r"shapes is \[\(5, 6\)\] for 39 pixels: .* of 2 levels": (query, images, depth, shapes[:1], anchors),
        r"depth is \(2, 3, 38, 5\): give \(2, 3, 39, bins\)": (query, images, depth[:, :, 1:], shapes, anchors),
        r"anchors is \(2, 3, 6, 2, 3\): give \(2, 3, 7, Z, 3\)": (query, images, depth, shapes, anchors[:, :, 1:]),
        r"num_points is 4 and there are 3 anchors": (query, images, depth, shapes, anchors[..., [0, 1, 1], :]),
        r"visible is torch.bool \(2, 2, 7\)": (query, images, depth, shapes, anchors, visible[:, 1:]),
        r"visible is torch.float32": (query, images, depth, shapes, anchors, visible.float()),
    }
    for message, inputs in wrong.items():
        with pytest.raises(InputError, match=message):
            module(*inputs)
    with pytest.raises(InputError, match="num_points is 0"):
        DeformableLifting(12, num_points=0)
