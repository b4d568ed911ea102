"""ConViT: attention that starts as a convolution, and may leave it head by head."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import tap
from saccade.backbones import ConViT
from saccade.backbones.weights import fit_weights
from saccade.claims.framework import (
    Case,
    Paper,
    at_least,
    at_most,
    claim,
    count_model_parameters,
    equal,
    measure_model_flops,
    play,
    read_norm_eps,
    relative_difference,
    rounding,
    run_official,
)
from saccade.claims.framework.experiment import load_digits
from saccade.claims.framework.oracles import dense_attention
from saccade.errors import InputError
from saccade.measure import count_parameters
from saccade.mixers import Attention, GatedPositionalAttention
from saccade.mixers.mixer import merge_heads, split_heads

PAPER = Paper(
    title="ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
    arxiv="2103.10697",
    published="2021-03-19",
    summary="In the first ten of twelve blocks each head mixes attention to content with attention to places, by a "
    "learned gate. Places start at one neighbour for each head, so that a layer starts as a soft convolution, which "
    "training may leave. The class token joins behind those blocks.",
    home=(
        "saccade.mixers.GatedPositionalAttention",
        "saccade.ops.gated_positional_attention",
        "saccade.backbones.ConViT",
    ),
    differences=(
        "The softmax over places is computed axis by axis, which is exact since squared distances add up; official "
        "code forms it for all pairs.",
        "Official code divides the mixture by its sum, which is 1 but for rounding; only impl='reference' does.",
        "Where all blocks are local the official class token never joins, and its head reads the first patch; ours "
        "refuses such a network.",
        "Official code serves square maps of one size; ours any map, with interpolated position embeddings.",
    ),
)

LAYER = "the layer's definition"
NAMES = {"Ti": "convit_tiny", "S": "convit_small", "B": "convit_base"}
PLUS = {"Ti+": "convit_tiny_plus", "S+": "convit_small_plus", "B+": "convit_base_plus"}


@claim("params", {"Ti": 5_710_512, "S": 27_777_322, "B": 86_540_040}, source="official code")
def networks_have_their_sizes() -> dict[str, int]:
    """The networks have so many parameters."""
    return count_model_parameters(NAMES)


@claim(
    "params",
    {"Ti+": 10.0, "S+": 48.0, "B+": 152.0},
    equal("whole millions, recalled, and 48.98 and 153.1 with exact counts", within=1.2),
    source="table of the networks, recalled",
)
def wider_networks_have_their_sizes() -> dict[str, float]:
    """With 64 channels a head the networks have so many million parameters."""
    return {name: count / 1e6 for name, count in count_model_parameters(PLUS).items()}


@claim(
    "flops",
    {"Ti": 1.25, "S": 5.75, "B": 17.51},
    equal("averages by content and by place are taken apart here, without a projection of all pairs", relative=0.01),
    source="measured in the official code, at 224 x 224",
)
def networks_have_their_cost() -> dict[str, float]:
    """An image takes so many milliards of multiply-adds."""
    flops = measure_model_flops(NAMES.values())
    return {name: flops[model] / 2e9 for name, model in NAMES.items()}


@claim("params", (20, 45, 80), source=LAYER)
def parameters_beyond_attention() -> tuple[int, ...]:
    """A layer has 5 h parameters more than attention without biases: 3 h and h for places, h gates."""
    pairs = [(192, 4), (432, 9), (768, 16)]
    return tuple(
        count_parameters(GatedPositionalAttention(*pair)) - count_parameters(Attention(*pair, qkv_bias=False))
        for pair in pairs
    )


@claim("equivalence", "equal to 5e-6", rounding, source="measured in the official code")
def contains_convolution() -> float:
    """With 9 heads, gates at 1 and a large alpha (30) it is a 3 x 3 convolution with replicated borders, whose kernel
    at offset (h1, h2) is the product of the head's output and value weights."""
    layer, x = _layer(27, 9, alpha=30.0), torch.randn(2, 7, 7, 27, dtype=torch.float64)
    nn.init.normal_(layer.v.weight)
    nn.init.constant_(layer.gating_param, 40.0)
    kernel = torch.stack(  # (O, I, 9): heads count rows first
        [out @ value for out, value in zip(layer.proj.weight.split(3, 1), layer.v.weight.split(3))], -1
    )
    kernel = kernel.unflatten(-1, (3, 3)).mT
    padded = F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1), "replicate")
    return relative_difference(layer(x), F.conv2d(padded, kernel, layer.proj.bias).permute(0, 2, 3, 1))


@claim("equivalence", "equal", rounding, source=LAYER)
def closed_gates_leave_attention() -> float:
    """With gates at 0 it is softmax attention with its own q, k, v and output."""
    layer, x = _layer(18, 9), torch.randn(2, 5, 6, 18, dtype=torch.float64)
    nn.init.constant_(layer.gating_param, -60.0)
    query, key = layer.qk(x).chunk(2, -1)
    query, key, value = (split_heads(part, 9) for part in (query, key, layer.v(x)))
    return relative_difference(layer(x), layer.proj(merge_heads(dense_attention(query, key, value))))


@claim(
    "property",
    {"0.05": 10.0, "0.1": 5.0, "0.2": 2.5},
    equal("a grid's variance is a little off where the Gaussian is narrow", relative=0.01),
    source=LAYER,
)
def strength_sets_the_width() -> dict[str, float]:
    """Attention to places is a Gaussian of variance 1 / (2 alpha) on the grid: along the columns, in the middle."""
    found = {}
    for alpha in (0.05, 0.1, 0.2):
        layer = _layer(4, 1, alpha=alpha)
        weights = layer.position_logits((61, 61))[1][0, 30].softmax(-1)
        found[f"{alpha:g}"] = (weights * (torch.arange(61) - 30.0).square()).sum().item()
    return found


@claim("property", True, source=LAYER)
def attended_distance_falls_with_strength() -> bool:
    """The mean distance to which heads attend falls as alpha grows, from that of uniform attention at 0."""
    distances = [_distance(_places(_layer(9, 9, alpha=alpha), 7), 7).mean() for alpha in (0.0, 0.1, 0.5, 1.0, 3.0, 9.0)]
    uniform = _distance(torch.full((1, 49, 49), 1 / 49, dtype=torch.float64), 7).item()
    return abs(distances[0].item() - uniform) < 1e-12 and all(a > b for a, b in pairwise(distances))


@claim("property", {"offsets": 9, "gate": 0.731}, equal("three decimals are published", within=5e-4), source=LAYER)
def heads_start_on_a_kernel() -> dict[str, float]:
    """At the start the heads' centres tile a 3 x 3 grid, each used once, and every gate is 0.731."""
    layer = _layer(9, 9)
    centres = _places(layer, 7)[:, 24].argmax(-1)  # of the middle token
    tiles = {(int(place) // 7 - 3, int(place) % 7 - 3) for place in centres}
    expected = {(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)}
    gates = layer.gating_param.sigmoid()
    return {"offsets": len(tiles & expected), "gate": gates.mean().item() if gates.max() == gates.min() else 0.0}


@claim("equivalence", "equal", rounding, source=LAYER)
def places_depend_on_offsets_alone() -> float:
    """Away from borders attention to places shifts with the query: narrow heads (alpha = 3) on 15 x 15 tokens."""
    maps = _places(_layer(9, 9, alpha=3.0), 15).unflatten(-1, (15, 15)).unflatten(1, (15, 15))
    return relative_difference(maps[:, 8, 7].roll((-1, 1), (1, 2)), maps[:, 7, 8])


@claim(
    "accuracy",
    {"5 %": (34.8, 47.8), "10 %": (48.0, 59.6), "30 %": (66.1, 73.7), "50 %": (74.6, 78.2), "100 %": (79.9, 81.4)},
    source="table of sample efficiency, recalled; ImageNet top-1 of DeiT-S and ConViT-S on a share of the images",
    needs="ImageNet",
)
def needs_fewer_images() -> None:
    """The fewer images there are, the further it is ahead of DeiT."""


@claim(
    "accuracy",
    {"Ti": 73.1, "S": 81.3, "B": 82.4, "Ti+": 76.7, "S+": 82.2, "B+": 82.5},
    source="table of the networks, + recalled; ImageNet top-1",
    needs="ImageNet, and weights of the authors",
)
def networks_are_accurate() -> None:
    """The networks have these accuracies."""


@claim(
    "accuracy",
    "ahead",
    at_least(0.0, "a tie would be no gain"),
    source="an experiment of ours",
    slow=True,
)
def ahead_with_few_digits() -> float:
    """Trained on 200 digits of 8 x 8 pixels, a token each, three local blocks and one other are more accurate than
    four others of the same size: difference of accuracy."""
    return _train(local_depth=3)[0] - _train(local_depth=0)[0]


@claim(
    "property",
    "most gates fall from 0.731",
    at_most(0.731, "where gates start"),
    source="pictures of the gates in training",
    slow=True,
    guess="a few hundred steps on digits are not 300 epochs of ImageNet",
)
def gates_fall_in_training() -> tuple[float, ...]:
    """In training the mean gate of each layer falls: after the same training on digits."""
    return _train(local_depth=3)[1]


def replay(case: Case) -> dict[str, Tensor]:
    """The network (logits, and attention of the first block with the mean distance of its heads), or the layer."""
    if case.cls.endswith("GPSA"):
        layer = case.build(_layer_from_official)
        return play(case, lambda state, inputs: {"y": _run_layer(layer, state, inputs["x"])})
    if not case.cls.endswith("VisionTransformer"):
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: replay serves VisionTransformer and GPSA")
    shown = _Shown(case.build(_from_official))

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {f"model.{name}": tensor for name, tensor in fit_weights(shown.model, state).items()}
        outputs = run_official(shown, state, inputs["x"])
        return {name: output for name, output in outputs.items() if f"out.{name}" in case.expected}

    return play(case, forward)


class _Shown(nn.Module):
    """All that is recorded of the authors' network."""

    def __init__(self, model: ConViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with tap(self.model, kinds=("attention",), names=["blocks.0.attn"], detach=False) as seen:
            logits = self.model(images)
        attention = seen.attention["blocks.0.attn"]
        side = images.shape[-1] // self.model.patch_size
        return {
            "y": logits,
            "logits": logits,
            "block0_attention": attention,
            "block0_attention_distance": _distance(attention.mean(0), side),
        }


def _from_official(
    img_size: int = 224,
    patch_size: int = 16,
    in_chans: int = 3,
    num_classes: int = 1000,
    embed_dim: int = 48,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = False,
    qk_scale: float | None = None,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    hybrid_backbone: object = None,
    norm_layer: str | None = None,
    global_pool: object = None,
    local_up_to_layer: int = 10,
    locality_strength: float = 1.0,
    use_pos_embed: bool = True,
) -> ConViT:
    """The network with the arguments of the official one."""
    if hybrid_backbone is not None:
        raise InputError("hybrid_backbone is given: replay serves networks of patches")
    return ConViT(
        embed_dim,
        depth,
        num_heads,
        local_depth=local_up_to_layer,
        locality_strength=locality_strength,
        image_size=img_size,
        patch_size=patch_size,
        mlp_ratio=mlp_ratio,
        qkv_bias=qkv_bias,
        scale=qk_scale or None,
        positions=use_pos_embed,
        norm_eps=read_norm_eps(norm_layer, 1e-5),
        num_classes=num_classes,
        in_chans=in_chans,
    )


def _layer_from_official(
    dim: int,
    num_heads: int = 8,
    qkv_bias: bool = False,
    qk_scale: float | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    locality_strength: float = 1.0,
    use_local_init: bool = True,
) -> GatedPositionalAttention:
    return GatedPositionalAttention(
        dim, num_heads, qkv_bias=qkv_bias, scale=qk_scale or None, locality_strength=locality_strength
    )


def _run_layer(layer: GatedPositionalAttention, state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """On tokens (B, N, C) of a square map."""
    side = round(tokens.shape[1] ** 0.5)
    out: Tensor = run_official(layer, state, tokens.unflatten(1, (side, side)))
    return out.flatten(1, 2)


def _layer(dim: int, heads: int, *, alpha: float = 1.0) -> GatedPositionalAttention:
    return GatedPositionalAttention(dim, heads, locality_strength=alpha).double()


def _places(layer: GatedPositionalAttention, side: int) -> Tensor:
    """Attention to places, (heads, N, N)."""
    rows, columns = layer.position_logits((side, side))
    logits = rows[:, :, None, :, None] + columns[:, None, :, None, :]
    return logits.flatten(3).softmax(-1).flatten(1, 2)


def _distance(attention: Tensor, side: int) -> Tensor:
    """Mean distance to which each head attends, (heads,), from (heads, N, N) of a square map."""
    places = torch.cartesian_prod(*[torch.arange(side, dtype=attention.dtype)] * 2)
    return (attention * torch.cdist(places, places)).sum(-1).mean(-1)


def _train(local_depth: int) -> tuple[float, tuple[float, ...]]:
    """Train on 200 digits for 40 epochs; accuracy on 359 others, and each layer's mean gate."""
    torch.manual_seed(0)
    (train, labels), (val, truth) = load_digits(8)
    train, labels = train[:200], labels[:200]
    model = ConViT(
        36, 4, 9, local_depth=local_depth, image_size=8, patch_size=1, mlp_ratio=2.0, num_classes=10, in_chans=1
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(40):
        for chosen in torch.randperm(200).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(train[chosen]), labels[chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (model.eval()(val).argmax(-1) == truth).double().mean().item()
    layers = (block.attn for block in model.blocks)
    gates = [layer.gating_param.sigmoid() for layer in layers if isinstance(layer, GatedPositionalAttention)]
    return accuracy, tuple(gate.mean().item() for gate in gates)
