"""Agent attention in its hosts: steps of Swin by its published way, official names, other image sizes; errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import saccade
from saccade.backbones import AgentCSwin, AgentPVT, AgentSwin
from saccade.backbones.patches import PatchMerging
from saccade.backbones.weights import fit_weights, load_weights
from saccade.errors import InputError
from saccade.mixers import AgentAttention, Attention, CrossShapedAttention, WindowAttention

HOSTS = ("agent_cswin_test", "agent_deit_test", "agent_pvt_test", "agent_swin_test")


def build(name, **options):
    torch.manual_seed(0)
    model = saccade.create_model(name, num_classes=5, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("space", [(6, 4), (5, 7), (1, 1)])
def test_merging_puts_four_neighbours_side_by_side_as_swin_does(space):
    step, x = PatchMerging(3, 6).double(), torch.randn(2, *space, 3, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, space[1] % 2, 0, space[0] % 2))
    four = [padded[:, 0::2, 0::2], padded[:, 1::2, 0::2], padded[:, 0::2, 1::2], padded[:, 1::2, 1::2]]
    assert_close(step(x), step.reduction(step.norm(torch.cat(four, -1))))


def rolled_windows(attention, table, x, shift, size=7):
    """Swin's published way: the map is rolled, cut into windows, masked where they join what was apart, rolled back."""
    height, width = x.shape[1:3]
    regions = torch.zeros(1, height, width, 1)
    parts = (slice(0, -size), slice(-size, -shift), slice(-shift, None)) if shift else (slice(None),)
    for number, (rows, columns) in enumerate((rows, columns) for rows in parts for columns in parts):
        regions[:, rows, columns] = number

    def cut(t):
        return (
            t.view(len(t), height // size, size, width // size, size, -1)
            .transpose(2, 3)
            .reshape(-1, size**2, t.shape[-1])
        )

    places = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    offsets = places[:, :, None] - places[:, None] + size - 1  # from key to query
    bias = table[(offsets[0] * (2 * size - 1) + offsets[1]).flatten()].view(size**2, size**2, -1).permute(2, 0, 1)
    numbers = cut(regions)
    mask = torch.where(numbers != numbers.mT, -100.0, 0.0).double().repeat(len(x), 1, 1).unsqueeze(1)
    q, k, v = (
        t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for t in attention.qkv(cut(x.roll((-shift, -shift), (1, 2)))).chunk(3, -1)
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias + mask).transpose(1, 2).flatten(2)
    out = attention.proj(out).view(len(x), height // size, width // size, size, size, -1).transpose(2, 3)
    return out.reshape(x.shape).roll((shift, shift), (1, 2))


@pytest.mark.parametrize(("block", "side", "shift"), [(0, 14, 0), (1, 14, 3), (1, 7, 0), (1, 21, 3)])
def test_windows_are_those_of_swin_with_its_tables(block, side, shift):
    model = AgentSwin((8, 16), (1, 2), (1, 2), agent_depths=(1, 0), num_agents=(4, 4), mlp_ratios=(1, 1)).double()
    table = torch.randn(169, 2, dtype=torch.float64)
    name = f"layers.1.blocks.{block}.attn.relative_position_bias_table"
    renamed = model.rename({name: table, name.replace("bias_table", "index"): table, "layers.1.attn_mask": table})
    assert renamed.keys() == {f"stages.1.blocks.{block}.attn.position_bias_table"}
    attention = model.stages[1].blocks[block].attn
    attention.position_bias_table.data = renamed.popitem()[1]
    x = torch.randn(2, side, side, 16, dtype=torch.float64)
    assert_close(attention(x), rolled_windows(attention, table, x, shift))


def test_queries_of_pvt_stand_before_keys_and_values():
    model = build("agent_pvt_test")
    state = {
        "block2.0.attn.q.weight": torch.full((2, 2), 1.0),
        "block2.0.attn.kv.weight": torch.full((4, 2), 2.0),
        "patch_embed1.proj.bias": torch.zeros(1),
        "patch_embed3.norm.bias": torch.zeros(1),
        "pos_embed4": torch.zeros(1),
    }
    renamed = model.rename(state)
    assert renamed.keys() == {
        "patch_embed.proj.bias",
        "stages.2.downsample.norm.bias",
        "stages.3.pos_embed",
        "stages.1.blocks.0.attn.qkv.weight",
    }
    assert renamed["stages.1.blocks.0.attn.qkv.weight"][:, 0].tolist() == [1, 1, 2, 2, 2, 2]


def test_blocks_have_the_attention_of_the_table():
    kinds = {
        "agent_deit_base": [AgentAttention] * 4 + [Attention] * 8,
        "agent_swin_base": [AgentAttention] * 6 + [WindowAttention] * 18,
        "agent_cswin_tiny": [AgentAttention] * 6 + [CrossShapedAttention] * 19,
        "agent_pvt_tiny": [AgentAttention] * 8,
    }
    for name, expected in kinds.items():
        with torch.device("meta"):
            model = saccade.create_model(name)
        found = [module for path, module in model.named_modules() if path.endswith(".attn")]
        assert len(found) == len(expected)
        assert all(isinstance(mixer, kind) for mixer, kind in zip(found, expected)), name
    with torch.device("meta"):
        stripes = [block.attn.stripe_size for block in saccade.create_model("agent_cswin_tiny").stages[3].blocks]
    assert stripes == [None]


@pytest.mark.parametrize("name", HOSTS)
def test_weights_of_another_image_size_are_interpolated(name):
    small, large = build(name), build(name, image_size=96)
    load_weights(large, small.state_dict(), "small")
    fitted = fit_weights(large, small.state_dict())
    bias = next(key for key in fitted if key.endswith("ah_bias"))
    assert fitted[bias].shape[3] == 1.5 * small.state_dict()[bias].shape[3]
    images = torch.randn(1, 3, 96, 96)
    assert_close(large(images), small(images), rtol=1e-3, atol=1e-3)  # as it does itself with larger images


@pytest.mark.parametrize(("name", "side"), [("agent_pvt_test", 32), ("agent_swin_test", 4), ("agent_cswin_test", 4)])
def test_images_too_small_for_the_last_stage_are_refused(name, side):
    model = build(name)
    assert model(torch.randn(1, 3, side, side)).shape == (1, 5)
    with pytest.raises(InputError, match=f"give {side} x {side} pixels at least"):
        model(torch.randn(1, 3, side - 1, side))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AgentSwin((8, 16), (1,), (1, 2)), r"depths is \(1,\) and dims is \(8, 16\): give one for each stage"),
        (
            lambda: AgentPVT((8,) * 4, (1,) * 4, (1,) * 4, agent_depths=(1, 1, 0, 1)),
            "stage 2 has blocks without agents",
        ),
        (lambda: AgentCSwin((8,) * 4, (1,) * 4, (1,) * 4, num_agents=(3, 4, 9, 9)), "num_agents is 3"),
    ],
)
def test_options_that_do_not_fit(call, message):
    with pytest.raises(InputError, match=message):
        call()
