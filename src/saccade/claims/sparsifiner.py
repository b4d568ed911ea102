"""Sparsifiner: a low-rank guess of the attention map picks the keys of each query, per image and head."""

import re
from collections.abc import Iterator
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import tap
from saccade.backbones import Sparsifiner, describe_model
from saccade.backbones.sparsifiner import PruningBlock
from saccade.claims.framework import (
    Case,
    Paper,
    at_least,
    at_most,
    claim,
    count_model_parameters,
    equal,
    play,
    relative_difference,
    rounding,
    run_official,
)
from saccade.claims.framework.experiment import load_digits
from saccade.claims.framework.oracles import dense_attention
from saccade.errors import InputError
from saccade.measure import count_flops, count_parameters
from saccade.mixers import LowRankConnectivityAttention
from saccade.mixers.mixer import split_heads

PAPER = Paper(
    title="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
    arxiv="2303.13755",
    published="2023-03-24",
    summary="A plain vision transformer learns, for each image and head, which pairs of tokens may attend to each "
    "other: a few coefficients for each token, times a sparse basis, make a guess of the attention map, and attention "
    "is computed for its largest entries alone. The guess learns from the attention map of a dense network.",
    home=(
        "saccade.mixers.LowRankConnectivityAttention",
        "saccade.ops.predict_connectivity",
        "saccade.backbones.Sparsifiner",
    ),
    missing=("the training in two phases beside a dense teacher",),
    differences=(
        "Official code scales the products of the guess by heads^-0.5 and not by a width; so do we, since its weights "
        "want it.",
        "The class token competes with the patches for a place among a patch's keys. In all our mixers it is seen by "
        "all; the networks and replay ask for the official way with keep_prefix=False.",
        "Official code computes all N x N products and masks them; ours computes the chosen ones.",
        "A predictor is made for one size of the map; ours resizes its bases linearly for another.",
    ),
)

LAYER = "the layer's definition"
DEIT_SMALL = 22_050_664


@claim("params", {"tiny": 5_918_632, "small": 22_251_880, "base": 86_768_872}, source="official networks, counted")
def networks_have_their_sizes() -> dict[str, int]:
    """The networks have so many parameters."""
    return count_model_parameters({size: f"sparsifiner_{size}" for size in ("tiny", "small", "base")})


@claim("params", {"block": 16_768, "network": 201_216}, source="official networks, counted")
def the_predictor_is_small() -> dict[str, int]:
    """The predictor adds 2 (e c + c) + 2 N K parameters to a block of DeiT-S, and twelve times as many to the network,
    which has 22,050,664 without."""
    with torch.device("meta"):
        layer = LowRankConnectivityAttention(384, 6, num_prefix=1)
    return {
        "block": count_parameters(layer.mask_predictor),
        "network": describe_model("sparsifiner_small").params - DEIT_SMALL,
    }


@claim(
    "flops",
    2 * (2 * 6 * 197 * 64 * 32 + 6 * 32 * 32 * (197 + 196) + 6 * 196 * 32 * 197 + 2 * 384 * (196 * 50 + 197)),
    source="cost of the layer",
)
def products_of_a_layer() -> int:
    """A layer of DeiT-S takes, beside its projections, 2 H N e c multiply-adds for the predictor's own, H c K for each
    token as key and as query, H N K N for the guess, and 2 C for each of the 50 keys of a patch and the 197 of the
    class token: FLOPs, counted while it runs."""
    layer = LowRankConnectivityAttention(384, 6, num_prefix=1)
    counted = count_flops(lambda tokens: layer.connect(tokens, (14, 14)).out, torch.zeros(1, 197, 384))
    projections = count_flops(nn.Linear(384, 4 * 384), torch.zeros(197, 384)).total
    return counted.total - projections


@claim(
    "flops",
    {"keep 0.25": 0.48, "keep 0.1": 0.69},
    equal("which terms are counted, and which rates make the two ends, is uncertain", within=0.06),
    source="abstract: 48 % to 69 % fewer FLOPs of attention",
)
def share_of_the_products_that_is_saved() -> dict[str, float]:
    """With a quarter and a tenth of the keys, sparse coefficients and a sparse basis, a layer of DeiT-S saves about
    half and two thirds of the two products of attention, 2 N^2 C: the arithmetic of a kernel that skips all zeros, with
    the density of a basis at its start."""
    layer = LowRankConnectivityAttention(384, 6, num_prefix=1)
    density = (layer.mask_predictor.proj_back_n.abs() > 0.02).double().mean().item()
    dense = 2 * 197**2 * 384
    guess = 2 * 6 * 197 * 64 * 32 + 2 * 6 * 32 * 197 * 32 + 6 * 197 * 8 * 197 * density
    return {f"keep {rate}": 1 - rate - guess / dense for rate in (0.25, 0.1)}


@claim("equivalence", "equal", rounding, source=LAYER)
def with_all_keys_it_is_dense_attention() -> float:
    """With a keep rate of 1 it is ordinary attention, whatever the predictor's weights."""
    layer, tokens = _layer(keep_rate=1.0), _random_tokens()
    query, key, value = (split_heads(part, 3) for part in layer.qkv(tokens).chunk(3, -1))
    mixed = dense_attention(query, key, value).transpose(1, 2).flatten(2)
    return relative_difference(layer.connect(tokens, (5, 4)).out, layer.proj(mixed))


@claim("property", {"keys of a patch": (9,), "keys of the class token": (21,)}, source=LAYER)
def every_patch_has_its_budget() -> dict[str, tuple[int, ...]]:
    """Each patch sees exactly ceil(keep rate x tokens) keys, here 0.4 of 21, and the class token all: the numbers that
    occur in two images and three heads."""
    layer, tokens = _layer(keep_rate=0.4), _random_tokens()
    connected = layer.connect(tokens, (5, 4))
    patches = connected.selection.mask((20,)).sum(-1)
    prefix = (connected.prefix_attention > 0).sum(-1)
    return {
        "keys of a patch": tuple(patches.unique().tolist()),
        "keys of the class token": tuple(prefix.unique().tolist()),
    }


@claim(
    "property",
    {"images": "different", "heads": "different"},
    at_least(0.1, "a fixed window would give 0"),
    source="abstract",
)
def connections_depend_on_image_and_head() -> dict[str, float]:
    """Which keys a patch sees differs from image to image and from head to head: share of the chosen pairs that the
    next image, and the next head, has not."""
    mask = _layer(keep_rate=0.25).connect(_random_tokens(), (5, 4)).selection.mask((20,))
    shares = {}
    for name, axis in (("images", 0), ("heads", 1)):
        other = mask.roll(1, axis)
        shares[name] = ((mask & ~other).sum() / mask.sum()).item()
    return shares


@claim("property", {"of the output": 0, "of the guess": 6}, source="the two phases of training")
def only_its_own_loss_trains_the_predictor() -> dict[str, int]:
    """A loss on the output reaches no parameter of the predictor, and one on the guess all six: how many have a
    gradient."""
    reached = {}
    for name, layer in (("of the output", _layer()), ("of the guess", _layer(reconstruct=True))):
        connected = layer.connect(_random_tokens(), (5, 4))
        loss = connected.out if name == "of the output" else connected.guess.scores
        loss.square().sum().backward()
        reached[name] = sum(parameter.grad is not None for parameter in layer.mask_predictor.parameters())
    return reached


@claim("property", "near 0", at_most(0.02, "what 400 steps leave"), source="the reconstruction loss", slow=True)
def a_map_of_its_rank_is_rebuilt() -> float:
    """A map that some coefficients and a basis of K rows make exactly is rebuilt: squared error after 400 steps, as a
    share of the one at the start."""
    teacher, student = (_layer(reconstruct=True) for _ in range(2))
    student.qkv.load_state_dict(teacher.qkv.state_dict())
    nn.init.trunc_normal_(student.mask_predictor.proj_back_n, std=0.02)
    optimizer = torch.optim.Adam(student.mask_predictor.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    errors = []
    for _ in range(400):
        tokens = torch.randn(16, 21, 24, dtype=torch.float64)
        with torch.no_grad():
            target = teacher.connect(tokens, (5, 4)).guess.scores
        loss = (student.connect(tokens, (5, 4)).guess.scores - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        errors.append(loss.item())
    return sum(errors[-10:]) / 10 / errors[0]


@claim(
    "property",
    {
        "block 0, over a window": 0.48,
        "block 0, over no training": 0.51,
        "block 1, over a window": 0.33,
        "block 1, over no training": 0.34,
    },
    at_least(0.1, "well above what the seed changes; the official model's figures are single runs"),
    source="an experiment with the official model",
    slow=True,
)
def the_guess_finds_the_keys_that_matter() -> dict[str, float]:
    """On digits, tokens of one pixel, a dense network of two blocks is trained, and then its predictors on its
    attention maps: they find more of the largest quarter of each row than a window of the nearest tokens does, and
    than they did before: differences of recall."""
    return _train_on_digits()


@claim(
    "accuracy",
    "over 60 % fewer FLOPs",
    source="abstract; together with token pruning, at little loss of accuracy on ImageNet",
    needs="ImageNet, and a training of 50 epochs beside a teacher",
)
def with_token_pruning_it_saves_more() -> None:
    """Together with token pruning the networks take over 60 % fewer FLOPs."""


def replay(case: Case) -> dict[str, Tensor]:
    """The Sparsifiner network, with what its blocks computed."""
    if "Sparsifiner" not in case.cls:
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: give one of Sparsifiner")
    options = _read_options(case)
    shared = options["attention_options"]["share_basis"]
    model = _Watched(Sparsifiner(**options), _word(_words(case), "PRUNE_ATTN_MATRIX_ROW", False))

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {f"net.{name}": tensor for name, tensor in state.items()}
        if shared:  # one tensor under two names
            for name in renamed:
                if name.endswith("proj_back_n"):
                    renamed[name] = renamed[name.replace("proj_back_n", "proj_n")]
        outputs = run_official(model, renamed, inputs["x"])
        return {name: output for name, output in outputs.items() if f"out.{name}" in case.expected}

    return play(case, forward)


class _Watched(nn.Module):
    """The network, with what its blocks computed under the names of the official outputs."""

    def __init__(self, net: Sparsifiner, prune_rows: bool) -> None:
        super().__init__()
        self.net = net
        self.prune_rows = prune_rows

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        result = self.net.run(x)
        outputs = {"x": result.logits, "features": result.features}
        masks = []
        alive_before = None
        for number, (layer, alive) in enumerate(zip(result.layers, result.alive)):
            mask = layer.selection.mask((layer.guess.scores.shape[2],)).to(x.dtype)
            if self.prune_rows and alive_before is not None:
                mask = mask * alive_before[:, None, :, None]
            masks.append(F.pad(mask, (0, 0, 1, 0), value=1.0))  # the class token sees all
            outputs[f"attn_mask{number}"] = masks[-1]
            outputs[f"approx_attn{number}"] = layer.guess.scores
            outputs[f"basis_coef{number}"] = layer.guess.coefficients
            if alive is not None:
                outputs[f"token_mask{number}"] = alive.to(torch.uint8)
            alive_before = alive
        guesses = [layer.guess for layer in result.layers]
        parts = {
            "basis": [guess.basis for guess in guesses],
            "basis_coef": [guess.coefficients for guess in guesses],
            "attn_mask": masks,
        }
        for name, tensors in parts.items():
            zeros = [(tensor == 0).to(x.dtype).mean() for tensor in tensors]
            outputs[f"{name}_sparsity"] = torch.stack(zeros).mean().view(1)
        return outputs


def _words(case: Case) -> str:
    """The recorded arguments as "name value" pairs."""
    args = case.record.get("args") or case.record.get("arguments") or ""
    return args if isinstance(args, str) else "; ".join(f"{name} {value}" for name, value in args.items())


def _word(words: str, name: str, default: Any) -> Any:
    """The value behind a name, of the default's type; numbers in brackets are a tuple."""
    found = re.search(rf"\b(?:{name})\b[ =:]*(\[[^\]]*\]|\([^)]*\)|[-\w.]+)", words)
    if found is None:
        return default
    text = found[1]
    if text[0] in "[(":
        return tuple(float(number) for number in re.findall(r"[\d.]+", text))
    return text == "True" if isinstance(default, bool) else type(default)(text)


def _read_options(case: Case) -> dict[str, Any]:
    """Options of our network from the words for the official configuration."""
    words = _words(case)
    depth = _word(words, "depth", 12)
    rates = _word(words, "attn_keep_rate", 1.0)
    keep = _word(words, "token_keep_rate", 1.0)
    keep = keep if isinstance(keep, tuple) else (keep,) * depth
    pruning = re.search(r"(?:pruning in blocks?|pruning_loc)[ =:]*[\[(]?([\d, and]*)", words)
    blocks = [int(number) for number in re.findall(r"\d+", pruning[1])] if pruning else []
    attention: dict[str, Any] = {
        "reduce_n": _word(words, "reduce_n_factor", 6),
        "reduce_c": _word(words, "reduce_c_factor", 2),
        "share_basis": _word(words, "share_inout_proj", False),
        "basis_threshold": _word(words, "BASIS_THRESHOLD", 0.02),
        "reconstruct": _word(words, "USE_ATTN_RECON", False),
        "qkv_bias": _word(words, "qkv_bias", True),
        "keep_prefix": False,
        "topk": _word(words, r"BASIS_COEF top-?k", 8),
    }
    if "BASIS_COEF threshold" in words:
        attention["coefficient_threshold"] = _word(words, "BASIS_COEF threshold", 0.0)
    if "ATTN_SCORE threshold" in words:
        attention["threshold"] = _word(words, "ATTN_SCORE threshold", 0.0)
    return {
        "image_size": _word(words, "img|img_size", 224),
        "patch_size": _word(words, "patch|patch_size", 16),
        "dim": _word(words, "embed|embed_dim", 768),
        "depth": depth,
        "num_heads": _word(words, "heads|num_heads", 12),
        "mlp_ratio": _word(words, "mlp_ratio", 4.0),
        "num_classes": _word(words, "num_classes", 1000),
        "keep_rate": rates,
        "keep_tokens": {block: keep[block] for block in blocks},
        "attention_options": attention,
    }


def _layer(**options: Any) -> LowRankConnectivityAttention:
    """A layer of 24 channels and 3 heads for a class token and 5 x 4 patches, with weights that tell tokens apart."""
    layer = LowRankConnectivityAttention(24, 3, size=(5, 4), num_prefix=1, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def _random_tokens() -> Tensor:
    return torch.randn(2, 21, 24, dtype=torch.float64)


def _train_on_digits() -> dict[str, float]:
    """Train the dense network for 200 steps and its predictors for 150; by how much their recall exceeds others."""
    net = Sparsifiner(
        image_size=8,
        patch_size=1,
        dim=48,
        depth=2,
        num_heads=3,
        mlp_ratio=2.0,
        num_classes=10,
        in_chans=1,
        attention_options={"reduce_n": 4, "reconstruct": True},
    )
    (images, labels), (unseen, _) = load_digits(8)
    predictors = [parameter for block in net.blocks for parameter in block.attn.mask_predictor.parameters()]  # type: ignore[union-attr]
    for parameter in predictors:
        parameter.requires_grad_(False)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=2e-3)
    for chosen in torch.randint(len(images), (200, 50)):
        optimizer.zero_grad()
        F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    net.requires_grad_(False)
    before = [_recall(layer, tokens) for layer, tokens in _layers(net, unseen)]
    for parameter in predictors:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(predictors, lr=5e-3)
    shown = [(layer, tokens, _dense_map(layer, tokens)) for layer, tokens in _layers(net, images)]
    for chosen in torch.randint(len(images), (150, 50)):
        optimizer.zero_grad()
        for layer, tokens, attention in shown:
            guess = layer.connect(tokens[chosen], (8, 8)).guess
            (guess.scores - attention[chosen]).square().sum().backward()
        optimizer.step()
    gains = {}
    for block, (layer, tokens) in enumerate(_layers(net, unseen)):
        recall = _recall(layer, tokens)
        gains[f"block {block}, over a window"] = recall["guess"] - recall["window"]
        gains[f"block {block}, over no training"] = recall["guess"] - before[block]["guess"]
    return gains


def _layers(net: Sparsifiner, images: Tensor) -> Iterator[tuple[LowRankConnectivityAttention, Tensor]]:
    """The attention of each block, with its input in the dense network."""
    patches, prefix = net.embed(images)
    assert prefix is not None
    tokens = torch.cat([prefix, patches.flatten(1, 2)], 1)
    for block in net.blocks:
        assert isinstance(block, PruningBlock)
        yield block.attn, block.norm1(tokens).detach()
        tokens = block(tokens, (8, 8))[0].detach()


def _dense_map(layer: LowRankConnectivityAttention, tokens: Tensor) -> Tensor:
    """Ordinary attention of the patches over all tokens, (B, heads, N, 1 + N)."""
    with tap(layer, kinds=("attention",)) as seen:
        layer.connect(tokens, (8, 8))
    return seen.attention[""][:, :, 1:]


def _recall(layer: LowRankConnectivityAttention, tokens: Tensor) -> dict[str, float]:
    """Share of the largest quarter of each row of dense attention that the guess, in the form in which it chooses, and
    a window of as many nearest tokens have too."""
    attention = _dense_map(layer, tokens)
    layer.reconstruct = False
    guess = layer.connect(tokens, (8, 8)).guess.scores
    layer.reconstruct = True
    place = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    nearest = F.pad(-torch.cdist(place, place), (1, 0), value=-torch.inf)  # (64, 65), without the class token
    budget = ceil(0.25 * 65)
    wanted = _largest(attention, budget)
    return {
        name: ((_largest(scores.expand_as(attention), budget) & wanted).sum() / wanted.sum()).item()
        for name, scores in (("guess", guess), ("window", nearest))
    }


def _largest(scores: Tensor, count: int) -> Tensor:
    """Booleans, the largest entries of each row."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count, -1).indices, True)
