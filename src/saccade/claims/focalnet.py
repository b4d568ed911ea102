"""FocalNet: context is gathered first, at several granularities, and meets the query in one product."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.backbones import FocalNet
from saccade.backbones.patches import channels_first
from saccade.backbones.residual import Block, PostNormBlock
from saccade.backbones.weights import fit_weights
from saccade.claims.framework import (
    Case,
    Paper,
    at_least,
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
from saccade.claims.framework.experiment import train_on_digits
from saccade.errors import InputError
from saccade.measure import count_flops
from saccade.mixers import Attention, FocalModulation
from saccade.mixers.focal_modulation import Modulation
from saccade.ops import focal_context

PAPER = Paper(
    title="Focal Modulation Networks",
    arxiv="2203.11926",
    published="2022-03-22",
    summary="Each token is multiplied by a modulator, and no token is compared with another: depthwise convolutions, "
    "one on the other, gather its surroundings at several granularities, a mean over the map ends them, and gates made "
    "of the token itself weigh them. Cost is linear in the tokens.",
    home=("saccade.mixers.FocalModulation", "saccade.ops.focal_context", "saccade.backbones.FocalNet"),
    differences=(
        "The factory functions of the official code leave levels and windows to its configuration files; our networks "
        "carry them in their names, srf and lrf.",
        "Convolutions of official code drop the pixels at the right and at the bottom that fill no patch, and so do "
        "ours; an image too small for one token of the last map is refused.",
        "Every level's GELU and the gates depend on the content, so no fixed matrix mixes the tokens: taps show the "
        "matrix for the content at hand, a mean over channels.",
    ),
)

LAYER = "the layer's definition"
SIZES = {
    "T srf": ("focalnet_tiny_srf", 28_427_116, 4.4),
    "T lrf": ("focalnet_tiny_lrf", 28_647_928, 4.5),
    "S srf": ("focalnet_small_srf", 49_891_216, 8.6),
    "S lrf": ("focalnet_small_lrf", 50_342_440, 8.7),
    "B srf": ("focalnet_base_srf", 88_148_144, 15.3),
    "B lrf": ("focalnet_base_lrf", 88_749_768, 15.4),
    "T iso": ("focalnet_tiny_iso_16", 5_880_280, 1.1),
    "S iso": ("focalnet_small_iso_16", 22_376_344, 4.3),
    "B iso": ("focalnet_base_iso_16", 87_237_400, 16.9),
}
FLOPS = {
    "T srf": 8_806_671_360,
    "T lrf": 8_949_672_960,
    "S srf": 17_197_102_080,
    "S lrf": 17_430_420_480,
    "B srf": 30_482_362_368,
    "B lrf": 30_793_453_568,
    "T iso": 2_217_661_440,
    "S iso": 8_597_121_024,
    "B iso": 33_841_434_624,
}
LARGE = {
    "L w5 L3": ("focalnet_large_fl3", 239_134_898),
    "L w3 L4": ("focalnet_large_fl4", 239_315_402),
    "XL w5 L3": ("focalnet_xlarge_fl3", 408_787_378),
    "XL w3 L4": ("focalnet_xlarge_fl4", 409_028_042),
    "H w3 L3": ("focalnet_huge_fl3", 745_276_338),
    "H w3 L4": ("focalnet_huge_fl4", 747_989_578),
}


@claim("params", {name: params for name, (_, params, _) in SIZES.items()}, source="official code")
def networks_have_their_sizes() -> dict[str, int]:
    """The networks for 1000 classes have so many parameters."""
    return count_model_parameters({name: model for name, (model, *_) in SIZES.items()})


@claim("params", {name: params for name, (_, params) in LARGE.items()}, source="official code, 21842 classes")
def large_networks_have_their_sizes() -> dict[str, int]:
    """The networks for ImageNet-22K have so many parameters."""
    return count_model_parameters({name: model for name, (model, _) in LARGE.items()}, num_classes=21842)


@claim(
    "flops",
    {name: cost for name, (*_, cost) in SIZES.items()},
    equal("one decimal is published, and 15.24 for B srf was rounded up", within=0.06),
    source="table of the networks, at 224 x 224",
)
def networks_have_their_cost() -> dict[str, float]:
    """An image takes so many milliards of multiply-adds."""
    flops = measure_model_flops(model for model, *_ in SIZES.values())
    return {name: flops[model] / 2e9 for name, (model, *_) in SIZES.items()}


@claim("flops", FLOPS, source="counted in the official code, at 224 x 224")
def networks_take_so_many_flops() -> dict[str, int]:
    """An image takes so many FLOPs, two for a multiply-add."""
    flops = measure_model_flops(model for model, *_ in SIZES.values())
    return {name: flops[model] for name, (model, *_) in SIZES.items()}


@claim(
    "complexity",
    {"f": 14 * 14 * 64 * (2 * 64 + 4), "levels": 14 * 14 * 64 * (9 + 25 + 49), "h and proj": 2 * 14 * 14 * 64**2},
    source="cost of the layer",
)
def multiply_adds_of_the_layer() -> dict[str, int]:
    """f takes H W C (2 C + L + 1) multiply-adds, the convolutions H W C times the sum of k^2, h and proj H W C^2 each;
    14 x 14 tokens, C = 64, k = 3, 5, 7."""
    layer, x = FocalModulation(64, focal_levels=3), torch.zeros(1, 14, 14, 64)
    _, context, gates = layer.f(x).split([64, 64, 4], -1)
    levels = count_flops(lambda: focal_context(context, gates, _kernels(layer))).total
    ends = count_flops(layer.h, x).total + count_flops(layer.proj, x).total
    return {"f": count_flops(layer.f, x).total // 2, "levels": levels // 2, "h and proj": ends // 2}


@claim("complexity", 4.0, source="cost of the layer")
def cost_is_linear_in_the_tokens() -> float:
    """Four times the tokens take four times the FLOPs."""
    small, large = (count_flops(FocalModulation(64), torch.zeros(1, side, side, 64)).total for side in (14, 28))
    return large / small


@claim("equivalence", "equal", rounding, source=LAYER)
def equivariant_to_shifts_of_a_torus() -> float:
    """With maps that go round, a shifted input gives the shifted output; the mean over the map stays as it is."""
    layer, x = _layer(), _random_map(9, 11)
    moved = x.roll((2, 5), (1, 2))
    return relative_difference(_on_a_torus(layer, moved), _on_a_torus(layer, x).roll((2, 5), (1, 2)))


@claim("equivalence", "equal", rounding, source=LAYER)
def equivariant_to_shifts_away_from_the_border() -> float:
    """Without the mean, and 3 tokens or more from the border (k = 3, 5), a shifted input gives the shifted output."""
    layer, x = _gate(_layer(), (1.0, -0.5, 0.0)), _random_map(12, 12)
    outs = layer(x.roll(2, 1))[:, 5:9, 3:9], layer(x)[:, 3:7, 3:9]
    return relative_difference(*outs)


@claim("property", "different", at_least(0.01, "equal maps would give 0"), source=LAYER)
def attention_with_absolute_positions_is_not() -> float:
    """Self-attention with learned positions gives another map, rolled or not."""
    layer, x, positions = Attention(8, 2).double(), _random_map(6, 6), torch.randn(1, 6, 6, 8, dtype=torch.float64)
    return relative_difference(layer(x.roll(2, 1) + positions), layer(x + positions).roll(2, 1))


@claim("property", {"1": 3, "2": 7, "3": 13}, source=LAYER)
def receptive_fields_of_levels() -> dict[str, int]:
    """Level l sees 1 + the sum of (k_j - 1) tokens along each side: k = 3, 5, 7, columns and rows that the gradient
    reaches with all gates but the level's at 0 (0 if the two differ)."""
    seen = {}
    for level in range(3):
        gates = tuple(float(other == level) for other in range(4))
        layer, x = _gate(_layer(levels=3), gates), _random_map(15, 15).requires_grad_()
        context = channels_first(layer.modulate(x).modulator)
        (grad,) = torch.autograd.grad(context[0, :, 7, 7].sum(), x)
        reached = grad[0].abs().amax(-1) > 0
        rows, columns = (int(reached.any(axis).sum()) for axis in (0, 1))
        seen[str(level + 1)] = rows if rows == columns and rows**2 == int(reached.sum()) else 0
    return seen


@claim("equivalence", "equal", rounding, source=LAYER)
def one_level_is_a_gated_stack_of_convolutions() -> float:
    """With all gates but the second level's at 0 it is q h(g GELU(conv GELU(conv z)))."""
    layer, x = _gate(_layer(), (0.0, 0.7, 0.0)), _random_map(7, 6)
    query, context, _ = layer.f(x).split([8, 8, 3], -1)
    stack = channels_first(context)
    for size, conv in zip((3, 5), layer.focal_layers):
        stack = F.gelu(F.conv2d(stack, conv.weight, padding=size // 2, groups=8))  # type: ignore[arg-type]
    return relative_difference(layer(x), layer.proj(query * layer.h(0.7 * stack.permute(0, 2, 3, 1))))


@claim("equivalence", "equal", rounding, source=LAYER)
def the_mean_alone_is_like_squeeze_and_excitation() -> float:
    """With the gates of levels at 0 and that of the mean at 1 every token is multiplied by the same vector,
    h(GELU(mean z_L))."""
    layer, x = _gate(_layer(), (0.0, 0.0, 1.0)), _random_map(7, 6)
    query, context, _ = layer.f(x).split([8, 8, 3], -1)
    coarsest = channels_first(context)
    for size, conv in zip((3, 5), layer.focal_layers):
        coarsest = F.gelu(F.conv2d(coarsest, conv.weight, padding=size // 2, groups=8))  # type: ignore[arg-type]
    squeezed = layer.h(F.gelu(coarsest.mean((2, 3))))[:, None, None]
    return relative_difference(layer(x), layer.proj(query * squeezed))


@claim("equivalence", "equal", rounding, source=LAYER)
def linear_in_the_query() -> float:
    """Twice the weights of q give twice what the output projection gets: tokens do not compete."""
    layer, x = _layer(), _random_map(7, 6)
    before = layer.modulate(x)
    with torch.no_grad():
        layer.f.weight[:8] *= 2
        layer.f.bias[:8] *= 2
    after = layer.modulate(x)
    return relative_difference(after.query * after.modulator, 2 * before.query * before.modulator)


@claim("property", "varies", at_least(0.01, "without content it would be 0"), source="pictures of the modulator")
def the_modulator_shows_where_something_is() -> float:
    """The norm of the modulator over channels differs between a token on a bright square and one far from it, with the
    mean left out."""
    layer, x = _gate(_layer(), (1.0, 1.0, 0.0)), torch.zeros(1, 12, 12, 8, dtype=torch.float64)
    x[:, 2:5, 2:5] = 1
    norms = layer.modulate(x).modulator.norm(dim=-1)[0]
    return (norms[3, 3] - norms[10, 10]).abs().item()


@claim(
    "accuracy",
    {"T": 82.3, "B": 83.9, "L, 22K, 224": 86.5, "L, 22K, 384": 87.3},
    source="abstract; ImageNet top-1",
    needs="ImageNet, and weights of the authors",
)
def networks_are_accurate() -> None:
    """The networks have these accuracies."""


@claim(
    "accuracy",
    {"box AP": 49.0, "single-scale mIoU": 50.5, "multi-scale mIoU": 51.4},
    source="abstract",
    needs="COCO and ADE20K, and weights of the authors",
)
def base_is_accurate_in_dense_tasks() -> None:
    """B in Mask R-CNN, 1 x schedule (2.1 above Swin-B), and in UperNet."""


@claim(
    "accuracy",
    "focal modulation at least as accurate as its ablations and attention",
    at_least(-0.02, "seven of 359 digits: single runs differ by as much"),
    source="an experiment of ours",
    slow=True,
    guess="one seed of a tiny task; its ablations are trained as long",
)
def digits_from_context() -> dict[str, float]:
    """On digits of 8 x 8 pixels (L = 2, w = 3) it is at least as accurate as without gates, without the mean, and as
    attention: differences of accuracy."""
    makers: dict[str, Callable[[int], nn.Module]] = {
        "modulation": lambda dim: FocalModulation(dim, focal_levels=2),
        "no gates": lambda dim: _Ablated(dim, (1.0, 1.0, 1.0)),
        "no mean": lambda dim: _Ablated(dim, (None, None, 0.0)),
        "attention": lambda dim: Attention(dim, 2),
    }
    accuracies = {}
    for name, make in makers.items():
        torch.manual_seed(0)
        accuracies[name] = train_on_digits(make)
    first = accuracies.pop("modulation")
    return {name: first - accuracy for name, accuracy in accuracies.items()}


def replay(case: Case) -> dict[str, Tensor]:
    """The network (logits, tokens behind the last norm, and what the first block's modulation shows), or the layer."""
    if case.cls.endswith("FocalModulation"):
        layer = case.build(_layer_from_official)
        return play(case, lambda state, inputs: {"y": run_official(layer, _rename_layer(state), inputs["x"])})
    if not case.cls.endswith("FocalNet"):
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: replay serves FocalNet and FocalModulation")
    shown = _Shown(case.build(_from_official))

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {f"model.{name}": tensor for name, tensor in fit_weights(shown.model, state).items()}
        outputs = run_official(shown, state, inputs["x"])
        return {name: output for name, output in outputs.items() if f"out.{name}" in case.expected}

    return play(case, forward)


class _Shown(nn.Module):
    """All that is recorded of the authors' network."""

    def __init__(self, model: FocalNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.model.forward_features(images)
        logits = self.model.forward_head(features)
        block = self.model.stages[0].blocks[0]  # type: ignore[index]
        assert isinstance(block, Block)
        x = self.model.patch_embed(images)
        x = x if isinstance(block, PostNormBlock) else block.norm1(x)
        _, modulator, gates = block.attn.modulate(x)  # type: ignore[operator]
        return {
            "y": logits,
            "x.logits": logits,
            "x.featuremaps": features.flatten(2).mT,
            "x.modulation0": block.attn(x),
            "x.modulator0": channels_first(modulator),
            "x.gates0": channels_first(gates),
        }


def _from_official(
    img_size: int = 224,
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 1000,
    embed_dim: int = 96,
    depths: tuple[int, ...] = (2, 2, 6, 2),
    mlp_ratio: float = 4.0,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.1,
    norm_layer: str | None = None,
    patch_norm: bool = True,
    use_checkpoint: bool = False,
    focal_levels: tuple[int, ...] = (2, 2, 2, 2),
    focal_windows: tuple[int, ...] = (3, 3, 3, 3),
    use_conv_embed: bool = False,
    use_layerscale: bool = False,
    layerscale_value: float = 1e-4,
    use_postln: bool = False,
    use_postln_in_modulation: bool = False,
    normalize_modulator: bool = False,
    **unused: Any,
) -> FocalNet:
    """The network with the arguments of the official one, which passes over names that it does not know."""
    stages = len(depths)
    return FocalNet(
        embed_dim,
        depths,
        focal_levels[:stages],
        focal_windows[:stages],
        patch_size=patch_size,
        patch_norm=patch_norm,
        overlap=use_conv_embed,
        mlp_ratio=mlp_ratio,
        layer_scale=layerscale_value if use_layerscale else None,
        post_norm=use_postln,
        norm_in_modulation=use_postln_in_modulation,
        normalize_modulator=normalize_modulator,
        norm_eps=read_norm_eps(norm_layer, 1e-5),
        num_classes=num_classes,
        in_chans=in_chans,
    )


def _layer_from_official(
    dim: int,
    focal_window: int,
    focal_level: int,
    focal_factor: int = 2,
    bias: bool = True,
    proj_drop: float = 0.0,
    use_postln_in_modulation: bool = False,
    normalize_modulator: bool = False,
) -> FocalModulation:
    return FocalModulation(
        dim,
        focal_window=focal_window,
        focal_levels=focal_level,
        focal_factor=focal_factor,
        bias=bias,
        normalize=normalize_modulator,
        post_norm=use_postln_in_modulation,
    )


def _rename_layer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace(".0.weight", ".weight").replace("ln.", "norm."): t.flatten(1) if name == "h.weight" else t
        for name, t in state.items()
    }


class _Ablated(FocalModulation):
    """Gates that are given, where they are not None."""

    def __init__(self, dim: int, given: tuple[float | None, ...]) -> None:
        super().__init__(dim, focal_levels=len(given) - 1)
        self.given = given

    def modulate(self, x: Tensor) -> Modulation:
        query, context, gates = self.f(x).split([self.dim, self.dim, self.levels + 1], -1)
        pairs = zip(gates.split(1, -1), self.given)
        gates = torch.cat([gate if given is None else torch.full_like(gate, given) for gate, given in pairs], -1)
        return Modulation(query, self.h(focal_context(context, gates, _kernels(self))), gates)


def _kernels(layer: FocalModulation) -> list[Tensor]:
    return [conv.weight for conv in layer.focal_layers]  # type: ignore[misc]


def _layer(levels: int = 2) -> FocalModulation:
    """A layer of 8 channels, with weights and biases large enough for all to matter."""
    layer = FocalModulation(8, focal_levels=levels).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def _gate(layer: FocalModulation, gates: tuple[float, ...]) -> FocalModulation:
    """Gates that are the same for every token."""
    with torch.no_grad():
        layer.f.weight[-len(gates) :] = 0
        layer.f.bias[-len(gates) :] = torch.tensor(gates, dtype=torch.float64)
    return layer


def _on_a_torus(layer: FocalModulation, x: Tensor) -> Tensor:
    """The layer with circular padding, step by step."""
    query, context, gates = layer.f(x).split([8, 8, layer.levels + 1], -1)
    level, weights, total = channels_first(context), channels_first(gates), torch.zeros(())
    for number, kernel in enumerate(_kernels(layer)):
        level = F.gelu(F.conv2d(F.pad(level, [kernel.shape[-1] // 2] * 4, "circular"), kernel, groups=8))
        total = total + level * weights[:, number : number + 1]
    total = total + F.gelu(level.mean((2, 3), keepdim=True)) * weights[:, -1:]
    out: Tensor = layer.proj(query * layer.h(total.permute(0, 2, 3, 1)))
    return out


def _random_map(height: int, width: int) -> Tensor:
    return torch.randn(2, height, width, 8, dtype=torch.float64)
