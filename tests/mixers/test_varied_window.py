"""VariedWindowAttention against its paper's equations, and where its regions go; errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.mixers import VariedWindowAttention, WindowAttention

DIM, HEADS = 8, 2


def make_mixer(**options):
    mixer = VariedWindowAttention(DIM, HEADS, **options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer


def make_input(*space):
    return torch.randn(2, *space, DIM, dtype=torch.float64)


def attend_as_published(mixer, x, s):
    """The paper's module in its own coordinates, -1 to 1 over the padded map, a head and a window at a time."""
    _, height, width, _ = x.shape
    padded = F.pad(x, (0, 0, 0, -width % s, 0, -height % s))
    rows, columns = padded.shape[1:3]
    pooled = F.leaky_relu(F.avg_pool2d(padded.movedim(-1, 1), s)).movedim(1, -1)
    offsets, scales = mixer.sampling_offsets(pooled), mixer.sampling_scales(pooled)
    qkv = F.pad(mixer.qkv(x), (0, 0, 0, columns - width, 0, rows - height)).chunk(3, -1)
    lines = [torch.linspace(-1, 1, length, dtype=x.dtype) for length in (columns, rows)]  # x, y
    steps = [2 * torch.arange(s, dtype=x.dtype) / (length - 1) for length in (columns, rows)]
    tokens = torch.stack(torch.meshgrid(torch.arange(s), torch.arange(s), indexing="ij")).flatten(1)
    near = (tokens[:, None, :] - tokens[:, :, None]) + s - 1
    images = []
    for image in range(len(x)):
        out = torch.zeros_like(qkv[0][image])
        for head in range(HEADS):
            mine = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
            q, k, v = (part[image, :, :, mine] for part in qkv)
            bias = mixer.position_bias_table[head][near[0], near[1]]
            for i in range(rows // s):
                for j in range(columns // s):
                    o, a = (part[image, i, j, 2 * head : 2 * head + 2] for part in (offsets, scales))
                    o = o / torch.tensor([width // s, height // s])
                    places = [
                        line[w * s : (w + 1) * s].mean() + (step - step.mean()) * (1 + a[axis]) + o[axis]
                        for axis, (line, step, w) in enumerate(zip(lines, steps, (j, i)))
                    ]
                    grid = torch.stack(torch.meshgrid(*places, indexing="xy"), -1)[None]
                    key, value = (
                        F.grid_sample(part.permute(2, 0, 1)[None], grid, align_corners=True)[0].flatten(1).mT
                        for part in (k, v)
                    )
                    window = slice(i * s, (i + 1) * s), slice(j * s, (j + 1) * s)
                    logits = q[window].flatten(0, 1) @ key.mT * (DIM // HEADS) ** -0.5 + bias
                    out[(*window, mine)] = (logits.softmax(-1) @ value).view(s, s, -1)
        images.append(out)
    return mixer.proj(torch.stack(images)[:, :height, :width])


@pytest.mark.parametrize("space", [(6, 9), (7, 5), (3, 4)], ids=str)
def test_it_is_the_published_attention(space):
    mixer, x = make_mixer(window_size=3), make_input(*space)
    assert_close(mixer(x), attend_as_published(mixer, x, 3))


def test_without_regression_it_is_window_attention():
    mixer, x = make_mixer(window_size=(2, 3)), make_input(6, 9)
    state = mixer.state_dict()
    for name in [name for name in state if name.startswith("sampling")]:
        state.pop(name).zero_()
    plain = WindowAttention(DIM, HEADS, window_size=(2, 3)).double()
    plain.load_state_dict(state)
    assert_close(mixer(x), plain(x))


def test_regions_are_those_of_the_heads_and_windows():
    mixer, x = make_mixer(window_size=4), make_input(8, 12)
    with torch.no_grad():
        for regression in (mixer.sampling_offsets, mixer.sampling_scales):
            regression.weight.zero_()
        mixer.sampling_offsets.bias.copy_(torch.tensor([1.0, 2.0, 0.0, -1.0]))  # by head: columns, rows
        mixer.sampling_scales.bias.copy_(torch.tensor([0.0, 1.0, -1.0, -2.0]))
    move, stretch = mixer.regions(x)
    assert move.shape == stretch.shape == (2, HEADS, 2, 3, 2)
    tokens = torch.tensor([3.5 / 2, 5.5 / 3], dtype=torch.float64)  # half the map, shared among its windows
    assert_close(move[0, :, 1, 2], torch.tensor([[2.0, 1.0], [-1.0, 0.0]], dtype=torch.float64) * tokens)
    assert_close(stretch[0, :, 1, 2], torch.tensor([[2.0, 1.0], [-1.0, 0.0]], dtype=torch.float64))


def test_another_width_of_the_output():
    mixer = make_mixer(window_size=3, dim_out=12)
    assert mixer(make_input(7, 5)).shape == (2, 7, 5, 12)


def test_a_window_larger_than_the_map():
    with pytest.raises(InputError, match=r"window_size is \(9, 9\) and the map is \(8, 12\): a window must fit"):
        make_mixer(window_size=9)(make_input(8, 12))


def test_an_implementation_that_does_not_exist():
    with pytest.raises(InputError, match="impl is 'tiled': choose one of auto, reference"):
        make_mixer(impl="tiled")
