"""DHVT: convolutions and a token for each head make a plain vision transformer learn from few images."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import tap
from saccade.backbones import DHVT, Backbone, Isotropic
from saccade.backbones.dhvt import AggregationMlp, DHVTBlock
from saccade.backbones.mlp import Mlp
from saccade.backbones.residual import TokenBlock
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
from saccade.claims.framework.experiment import load_digits
from saccade.errors import InputError
from saccade.mixers import Attention, HeadTokenAttention
from saccade.mixers.mixer import merge_heads, split_heads

PAPER = Paper(
    title="Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets",
    arxiv="2210.05958",
    published="2022-10-12",
    summary="A vision transformer for small data: patches come from overlapping convolutions, MLPs have a depthwise "
    "convolution and scale the class token by what they see of the map, and in attention each head contributes a token "
    "that sums its channels up. No positions are learned.",
    home=("saccade.mixers.HeadTokenAttention", "saccade.backbones.DHVT"),
    differences=(
        "Official code has synchronised batch norm in the patch embedding; ours the plain one, with the same names "
        "(torch.nn.SyncBatchNorm.convert_sync_batchnorm changes it).",
        "Official code serves square maps; ours any.",
        "Its switch apply_dhvt=False, a plain vision transformer, is not served.",
    ),
)

LAYER = "the layers' definition"
SIZES = {
    "T cifar patch 4": ("dhvt_tiny_cifar_patch4", 100, 6_008_650, 775_592_448),
    "S cifar patch 4": ("dhvt_small_cifar_patch4", 100, 23_425_450, 3_057_742_848),
    "T cifar patch 2": ("dhvt_tiny_cifar_patch2", 100, 5_845_162, 3_409_893_888),
    "S cifar patch 2": ("dhvt_small_cifar_patch2", 100, 22_766_698, 12_389_053_440),
    "T domain": ("dhvt_tiny_domain_patch16", 345, 6_105_975, 2_716_244_352),
    "S domain": ("dhvt_small_domain_patch16", 345, 23_788_431, 10_065_703_680),
    "T imagenet": ("dhvt_tiny_imagenet_patch16", 1000, 6_267_334, 2_709_261_312),
    "S imagenet": ("dhvt_small_imagenet_patch16", 1000, 24_040_606, 10_066_206_720),
}


@claim("params", {name: params for name, (_, _, params, _) in SIZES.items()}, source="official code")
def networks_have_their_sizes() -> dict[str, int]:
    """The networks, for 100, 345 and 1000 classes, have so many parameters."""
    counts: dict[str, int] = {}
    for name, (model, classes, *_) in SIZES.items():
        counts |= count_model_parameters({name: model}, num_classes=classes)
    return counts


@claim("flops", {name: flops for name, (*_, flops) in SIZES.items()}, source="counted in the official code")
def networks_take_so_many_flops() -> dict[str, int]:
    """An image takes so many FLOPs, two for a multiply-add."""
    return {
        name: measure_model_flops([model], num_classes=classes)[model] for name, (model, classes, *_) in SIZES.items()
    }


@claim(
    "flops",
    {"T": 1.4, "S": 5.1},
    equal("one decimal is published; 5.033 for S", within=0.07),
    source="table of the networks, corrected by the authors",
)
def imagenet_networks_have_their_cost() -> dict[str, float]:
    """An image of 224 x 224 takes so many milliards of multiply-adds."""
    models = {"T": "dhvt_tiny_imagenet_patch16", "S": "dhvt_small_imagenet_patch16"}
    flops = measure_model_flops(models.values())
    return {name: flops[model] / 2e9 for name, model in models.items()}


@claim("property", 3, source=LAYER)
def one_state_serves_any_grid() -> int:
    """No parameter depends on the image's size: of three sizes, also one that is not square, how many one network
    serves."""
    model = _network()
    sizes = [(32, 32), (48, 48), (20, 44)]
    return sum(bool(model(torch.randn(1, 3, *size)).isfinite().all()) for size in sizes)


@claim("equivalence", "independent of the input", rounding, source=LAYER)
def head_tokens_come_from_the_channels() -> float:
    """With ht_proj and pos_embed at 0 every head token is GELU(ht_norm.bias), whatever the input."""
    layer = _attention()
    for parameter in (*layer.ht_proj.parameters(), layer.pos_embed):
        nn.init.zeros_(parameter)
    expected = F.gelu(layer.ht_norm.bias).repeat(4).expand(2, 4, -1)
    return relative_difference(layer.head_tokens(_tokens()), expected)


@claim("property", {"own token": 16, "others": 0}, source=LAYER)
def a_group_reaches_all_channels_through_its_token() -> dict[str, int]:
    """A head's group of channels changes all channels of its own head token, and no other: how many change."""
    layer, tokens = _attention(), _tokens()
    moved = tokens.clone()
    moved[..., 4:8] += torch.randn(4, dtype=torch.float64)
    changed = (layer.head_tokens(moved) - layer.head_tokens(tokens)).abs().amax(0) > 1e-9  # (heads, C)
    return {"own token": int(changed[1].sum()), "others": int(changed[[0, 2, 3]].sum())}


@claim("equivalence", "equal", rounding, source=LAYER)
def without_head_tokens_it_is_attention() -> float:
    """Plain attention with the same weights is what the layer does when head tokens are hidden as keys: values averaged
    by its token matrix, whose rows are scaled to 1."""
    layer, plain, x = _attention(), Attention(16, 4).double(), _tokens().unflatten(1, (3, 4))
    plain.load_state_dict({name: t for name, t in layer.state_dict().items() if name in plain.state_dict()})
    with tap(layer) as seen:
        layer(x)
    weights = seen.attention[""] / seen.attention[""].sum(-1, keepdim=True)
    value = split_heads(layer.qkv(x).chunk(3, -1)[2].flatten(1, 2), 4)
    return relative_difference(layer.proj(merge_heads(weights @ value)).view_as(x), plain(x))


@claim("equivalence", "equal", rounding, source=LAYER)
def without_its_convolution_the_mlp_is_pointwise() -> float:
    """With weight and bias of bn2 at 0 the MLP of patches is bn3(conv3(GELU(bn1(conv1))))."""
    mlp, x = _mlp(), torch.randn(2, 5, 4, 16, dtype=torch.float64)
    for parameter in mlp.bn2.parameters():
        nn.init.zeros_(parameter)
    hidden = F.gelu(_norm(mlp.bn1, F.linear(x, mlp.conv1.weight.flatten(1), mlp.conv1.bias)))
    expected = _norm(mlp.bn3, F.linear(hidden, mlp.conv3.weight.flatten(1), mlp.conv3.bias))
    return relative_difference(mlp(x, x[:, :1, 0])[0], expected)


@claim("property", {"zero": 0.0, "linear": True}, source=LAYER)
def the_class_token_is_only_scaled() -> dict[str, float | bool]:
    """In the MLP a class token of zeros stays so, and twice the token gives twice the result."""
    mlp, x, token = _mlp(), torch.randn(2, 5, 4, 16, dtype=torch.float64), torch.randn(2, 1, 16, dtype=torch.float64)
    zero, once, twice = (mlp(x, factor * token)[1] for factor in (0, 1, 2))
    return {"zero": zero.abs().max().item(), "linear": bool(torch.equal(twice, 2 * once) and once.abs().max() > 0)}


@claim(
    "accuracy",
    {"T patch 4": 80.93, "S patch 4": 82.91, "T patch 2": 83.54, "S patch 2": 85.68},
    source="CIFAR-100 top-1; S patch 2 from the abstract, the rest recalled",
    needs="CIFAR-100, and 300 epochs on it",
)
def networks_are_accurate_on_cifar() -> None:
    """Trained on CIFAR-100 alone the networks have these accuracies."""


@claim(
    "accuracy",
    {"T": (77.6, 93.4), "S": (82.3, 96.0)},
    source="abstract and table; ImageNet top-1 and top-5",
    needs="ImageNet, and weights of the authors",
)
def networks_are_accurate_on_imagenet() -> None:
    """The networks have these accuracies."""


@claim(
    "accuracy",
    "several points ahead of a vision transformer",
    at_least(0.02, "seven of 359 digits; single runs differ by a few"),
    source="an experiment of ours",
    slow=True,
)
def ahead_with_few_digits() -> float:
    """Trained on 300 digits of 8 x 8 pixels, 2 x 2 to a token, it is more accurate than a vision transformer of the
    same width and depth: difference of accuracy."""

    def block(number: int) -> nn.Module:
        return TokenBlock(64, Attention(64, 4), Mlp(64, 256))

    torch.manual_seed(0)
    ours = DHVT(64, 3, 4, patch_size=2, num_classes=10, in_chans=1)
    torch.manual_seed(0)
    plain = Isotropic(block, dim=64, depth=3, image_size=8, patch_size=2, num_classes=10, in_chans=1)
    return _train(ours) - _train(plain)


def replay(case: Case) -> dict[str, Tensor]:
    """The network: logits, patches, and what the first attention and the first MLP return."""
    if not case.cls.endswith("VisionTransformer"):
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: replay serves VisionTransformer")
    biased = {"qkv_bias": "state.blocks.0.attn.qkv.bias" in case.tensors}
    case = replace(case, args=biased | case.args)
    shown = _Shown(case.build(_from_official))

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {f"model.{name}": tensor for name, tensor in fit_weights(shown.model, state).items()}
        outputs = run_official(shown, state, inputs["x"])
        return {name: output for name, output in outputs.items() if f"out.{name}" in case.expected}

    return play(case, forward)


class _Shown(nn.Module):
    """All that is recorded of the authors' network."""

    def __init__(self, model: DHVT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = self.model(images)
        x, prefix = self.model.embed(images)
        assert prefix is not None
        block = self.model.blocks[0]
        assert isinstance(block, DHVTBlock)
        space = (x.shape[1], x.shape[2])
        tokens = torch.cat([prefix, x.flatten(1, 2)], 1)
        attended = block.mix(block.norm1(tokens), space)
        hidden = block.norm2(tokens + attended)
        patches, scaled = block.mlp(hidden[:, 1:].unflatten(1, space), hidden[:, :1])
        return {
            "y": logits,
            "x.logits": logits,
            "x.patch": x.flatten(1, 2),
            "x.himhsa0": attended,
            "x.daff0": torch.cat([scaled, patches.flatten(1, 2)], 1),
        }


def _from_official(
    img_size: int = 224,
    patch_size: int = 16,
    in_chans: int = 3,
    num_classes: int = 1000,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    norm_layer: str | None = None,
    apply_dhvt: bool = True,
) -> DHVT:
    """The network with the arguments of the official one."""
    if not apply_dhvt:
        raise InputError("apply_dhvt is False: replay serves DHVT, not the plain vision transformer beside it")
    return DHVT(
        embed_dim,
        depth,
        num_heads,
        patch_size=patch_size,
        mlp_ratio=mlp_ratio,
        qkv_bias=qkv_bias,
        scale=qk_scale or None,
        norm_eps=read_norm_eps(norm_layer, 1e-6),
        num_classes=num_classes,
        in_chans=in_chans,
    )


def _network() -> DHVT:
    return DHVT(16, 2, 4, patch_size=4, num_classes=3).eval()


def _attention() -> HeadTokenAttention:
    """A layer of 16 channels and 4 heads, with weights and biases large enough for all to matter."""
    layer = HeadTokenAttention(16, 4).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def _mlp() -> AggregationMlp:
    mlp = AggregationMlp(16, 24).double().eval()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.5)
    for norm in (mlp.bn1, mlp.bn2, mlp.bn3):
        nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return mlp


def _norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """As in evaluation, on the last axis."""
    mean, variance = layer.running_mean, layer.running_var
    assert mean is not None
    assert variance is not None
    return (x - mean) / (variance + layer.eps).sqrt() * layer.weight + layer.bias


def _tokens() -> Tensor:
    return torch.randn(2, 12, 16, dtype=torch.float64)


def _train(model: Backbone) -> float:
    """Train on 300 digits for 40 epochs; accuracy on 359 others."""
    (train, labels), (val, truth) = load_digits(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(40):
        for chosen in torch.randperm(300).split(60):
            optimizer.zero_grad()
            F.cross_entropy(model(train[chosen]), labels[chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        return (model.eval()(val).argmax(-1) == truth).double().mean().item()
