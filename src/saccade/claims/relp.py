"""RelP: components of a circuit found from relevance coefficients, for the price of one gradient."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.claims.framework import Case, Paper, at_least, claim, equal, play, relative_difference, rounding
from saccade.errors import InputError
from saccade.explain.relevance import (
    Recipe,
    activation_patching,
    attribution_patching,
    coefficients,
    relevance_patching,
)
from saccade.explain.relevance.recipes import gradient, relp

PAPER = Paper(
    title="RelP: Faithful and Efficient Circuit Discovery via Relevance Patching",
    arxiv="2508.21258",
    published="2025-08-28",
    summary="Which components carry the difference between two runs is estimated for all of them at once, from two "
    "forward passes and one walk back. In place of the gradient stands the coefficient of relevance propagation, which "
    "is less noisy where norms and activations bend.",
    home=(
        "saccade.explain.relevance.relevance_patching",
        "saccade.explain.relevance.attribution_patching",
        "saccade.explain.relevance.activation_patching",
        "saccade.explain.relevance.recipes.relp",
    ),
    differences=(
        "Official code is a patched TransformerLens; ours are rules on operations, for any module.",
        "In official code, use_lrp set after construction leaves the Identity-rule out: late_switch of recorded cases "
        "is relp() without it.",
        "Official code wraps the activation function of its MLPs; our Identity-rule serves the operations gelu, silu, "
        "mish, elu, celu, selu, hardswish, leaky_relu, relu6 and tanh wherever they run.",
    ),
)
METHOD = "the method's definition"


@claim("property", "equal", rounding, source=METHOD)
def rewrites_leave_the_forward_unchanged() -> float:
    """The metric under the rules equals the metric of the model: nothing but the way back is changed."""
    model, inputs, metric = _chain(bias=True)
    activation, _ = coefficients(model, inputs, metric, ["2"])["2"]
    return relative_difference(activation, model[:3](inputs))


@claim("equivalence", "equal", rounding, source=METHOD)
def without_rules_it_is_attribution_patching() -> dict[str, float]:
    """With all rules off RelP is attribution patching, and both are autograd's gradient times the difference."""
    model, corrupted, metric = _chain(bias=True)
    clean = torch.randn_like(corrupted)
    ours = relevance_patching(model, clean, corrupted, metric, ["1"], axes=(0,), recipe=relp(()))["1"]
    hidden = model[:2](corrupted).detach().requires_grad_()
    (slope,) = torch.autograd.grad(metric(model[2:](hidden)), hidden)
    by_hand = (slope * (model[:2](clean) - hidden)).sum(1).detach()
    theirs = attribution_patching(model, clean, corrupted, metric, ["1"], axes=(0,))["1"]
    return {"attribution": relative_difference(ours, theirs), "autograd": relative_difference(ours, by_hand)}


@claim("equivalence", "equal", rounding, source=METHOD)
def all_three_agree_on_a_linear_model() -> dict[str, float]:
    """For a linear model activation patching, attribution patching and RelP agree exactly."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)).double()
    clean, corrupted = torch.randn(2, 4, 5, dtype=torch.double)
    runs = [f(model, clean, corrupted, _first_logit, ["0", "1"]) for f in _METHODS.values()]
    return {name: relative_difference(_flat(runs[i]), _flat(runs[0])) for i, name in ((1, "AtP"), (2, "RelP"))}


@claim("property", {"RelP": "the metric", "input times gradient": "not"}, source=METHOD)
def a_chain_without_biases_conserves() -> dict[str, str]:
    """For Linear - GELU - Linear - SiLU - Linear without biases, the sum of a * c is the metric at every layer under
    the Identity-rule, up to its 1e-6 next to zero, and of a * gradient it is not."""
    model, inputs, metric = _chain(bias=False)
    value = metric(model(inputs)).item()

    def off(recipe: Recipe) -> float:
        found = coefficients(model, inputs, metric, ["0", "1", "2", "3"], recipe=recipe)
        return max(abs((a * c).sum().item() / value - 1) for a, c in found.values())

    return {
        "RelP": "the metric" if off(relp()) < 1e-4 else f"off by {off(relp()):.1e}",
        "input times gradient": "not" if off(gradient()) > 1e-2 else "the metric",
    }


@claim(
    "property", {"with": 1.0, "without": 2.0}, equal("1e-6 beside x in the Identity-rule", within=1e-3), source=METHOD
)
def a_gate_counts_once_with_the_half_rule() -> dict[str, float]:
    """A gated block without biases hands on the metric once with the Half-rule, and twice without it."""
    model, inputs = _Gated(6).double(), torch.randn(4, 6, dtype=torch.double)
    value = _first_logit(model(inputs)).item()
    rules = ("LN-rule", "Identity-rule", "Half-rule")
    return {
        name: ((a * c).sum() / value).item()
        for name, recipe in (("with", relp(rules)), ("without", relp(rules[:2])))
        for a, c in coefficients(model, inputs, _first_logit, ["start"], recipe=recipe).values()
    }


@claim("complexity", {"RelP": 2, "activation patching": 2 + 3 * 4}, source=METHOD)
def two_forward_passes() -> dict[str, int]:
    """RelP runs the model twice (and walks back once) whatever is scored; activation patching runs it twice, and once a
    score: 3 components at 4 positions."""
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
    clean, corrupted = torch.randn(2, 2, 4, 5)
    counts = {}
    for name, method in (("RelP", relevance_patching), ("activation patching", activation_patching)):
        calls: list[int] = []
        with model.register_forward_hook(lambda *_, calls=calls: calls.append(1)):
            method(model, clean, corrupted, lambda out: out.sum(), ["0", "1", "2"], axes=(1,))
        counts[name] = len(calls)
    return counts


@claim(
    "accuracy",
    "0.956 (RelP) above 0.006 (attribution patching), MLP outputs of GPT-2 Large",
    at_least(0.0, "the order is published for large models; here it is a toy's, trained on the spot"),
    source="table of correlations; the order, on a transformer of 4 layers",
    slow=True,
    guess="in four layers of 32 channels gradients are hardly noisy, so that both estimates are good",
)
def relp_follows_activation_patching_more_closely() -> dict[str, float]:
    """Pearson correlation with activation patching over layers and positions, that of RelP minus that of attribution
    patching, on a transformer trained to name the token that occurs once: at MLP outputs and block inputs."""
    found = _correlations()
    return {point: found[point]["RelP"] - found[point]["AtP"] for point in found}


@claim(
    "accuracy",
    "RelP close to activation patching",
    at_least(0.5, "0.956 is published for GPT-2 Large; a toy's size is not the paper's"),
    source="table of correlations",
    slow=True,
)
def relp_correlates_with_activation_patching() -> dict[str, float]:
    """Pearson correlation of RelP with activation patching in the same experiment."""
    return {point: row["RelP"] for point, row in _correlations().items()}


@claim(
    "accuracy",
    "RelP matches integrated gradients",
    source="sparse feature circuits",
    needs="sparse autoencoders trained on Pythia's activations",
)
def sparse_feature_circuits() -> None:
    """In sparse feature circuits RelP is as faithful and complete as integrated gradients, which need ten steps."""


def replay(case: Case) -> dict[str, Tensor]:
    """The official HookedTransformer, of any number of layers, heads, widths, vocabulary, activation and norm.

    Coefficients and scores at all recorded hook points: "grad" without rules, "relp" with the listed ones, and
    "late_switch" with those that official code turns on after construction.
    """
    models = case.record.get("models")
    if not isinstance(models, dict):
        raise InputError(f"{case.key}/{case.name} names no models: replay serves recorded HookedTransformers")

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, row in models.items():
            model = _Hooked(**row["config"]).eval()
            own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            model.load_state_dict(own)
            tokens = {k.removeprefix(f"{name}."): v for k, v in inputs.items() if k.startswith(f"{name}.")}
            found |= {f"{name}.{key}": value for key, value in _replay_model(model, tokens, row["rules"], case, name)}
        return found

    return play(case, forward)


def _replay_model(
    model: nn.Module, tokens: dict[str, Tensor], rules: list[str], case: Case, name: str
) -> list[tuple[str, Tensor]]:
    late = tuple(rule for rule in rules if rule != "Identity-rule")
    answers = tokens["answers"]

    def metric(logits: Tensor) -> Tensor:
        last = logits[:, -1]
        return (last.gather(1, answers[:, :1]) - last.gather(1, answers[:, 1:])).mean()

    found = []
    for kind, recipe in (("grad", gradient()), ("relp", relp(rules)), ("late_switch", relp(late))):
        prefix = f"out.{name}.{kind}.coef."
        points = [key.removeprefix(prefix) for key in case.expected if key.startswith(prefix)]
        if not points:
            continue
        clean = coefficients(model, tokens["clean"], metric, points, recipe=recipe)
        for point, (activation, c) in coefficients(model, tokens["corrupt"], metric, points, recipe=recipe).items():
            found.append((f"{kind}.coef.{point}", c))
            if f"out.{name}.{kind}.score.{point}" in case.expected:
                found.append((f"{kind}.score.{point}", (c * (clean[point][0] - activation)).sum(-1)))
        if f"out.{name}.{kind}.logits_corrupt" in case.expected:
            logits = model(tokens["corrupt"]).detach()
            found += [(f"{kind}.logits_corrupt", logits), (f"{kind}.metric_corrupt", metric(logits))]
    return found


class _Hooked(nn.Module):
    """TransformerLens' HookedTransformer, pre-norm, under its names."""

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        n_ctx: int,
        d_head: int,
        d_vocab: int,
        n_heads: int = -1,
        d_mlp: int | None = None,
        act_fn: str | None = None,
        normalization_type: str | None = "LN",
        gated_mlp: bool = False,
        attn_only: bool = False,
        eps: float = 1e-5,
        d_vocab_out: int = -1,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            raise InputError(f"replay does not serve the settings {', '.join(sorted(others))} of HookedTransformer")
        heads = d_model // d_head if n_heads == -1 else n_heads
        self.embed = _parameters(W_E=(d_vocab, d_model))
        self.pos_embed = _parameters(W_pos=(n_ctx, d_model))
        norm = _norm_maker(normalization_type, d_model, eps)
        mlp = None if attn_only else lambda: _HookedMlp(d_model, d_mlp or 4 * d_model, act_fn or "relu", gated_mlp)
        self.blocks = nn.ModuleList(_HookedBlock(d_model, heads, d_head, norm, mlp) for _ in range(n_layers))
        self.ln_final = norm()
        out = d_vocab if d_vocab_out == -1 else d_vocab_out
        self.unembed = _parameters(W_U=(d_model, out), b_U=(out,))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed.W_E[tokens] + self.pos_embed.W_pos[: tokens.shape[1]]  # type: ignore[index]
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.ln_final(x) @ self.unembed.W_U + self.unembed.b_U
        return out


class _HookedBlock(nn.Module):
    def __init__(self, dim: int, heads: int, head: int, norm: Callable[[], nn.Module], mlp: Any) -> None:
        super().__init__()
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_post = (nn.Identity() for _ in range(3))
        self.ln1, self.attn = norm(), _HookedAttention(dim, heads, head)
        self.has_mlp = mlp is not None
        if self.has_mlp:
            self.ln2, self.mlp, self.hook_resid_mid, self.hook_mlp_out = norm(), mlp(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.hook_resid_pre(x)
        x = x + self.hook_attn_out(self.attn(self.ln1(x)))
        if self.has_mlp:
            x = self.hook_resid_mid(x)
            x = x + self.hook_mlp_out(self.mlp(self.ln2(x)))
        out: Tensor = self.hook_resid_post(x)
        return out


class _HookedAttention(nn.Module):
    def __init__(self, dim: int, heads: int, head: int) -> None:
        super().__init__()
        for name in "QKV":
            setattr(self, f"W_{name}", nn.Parameter(torch.zeros(heads, dim, head)))
            setattr(self, f"b_{name}", nn.Parameter(torch.zeros(heads, head)))
        self.W_O, self.b_O = nn.Parameter(torch.zeros(heads, head, dim)), nn.Parameter(torch.zeros(dim))
        self.hook_z = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            torch.einsum("bnd,hde->bhne", x, getattr(self, f"W_{name}")) + getattr(self, f"b_{name}")[:, None]
            for name in "QKV"
        )
        scores = query @ key.mT / query.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        z = self.hook_z((weights @ value).transpose(1, 2))
        return torch.einsum("bnhe,hed->bnd", z, self.W_O) + self.b_O


class _HookedMlp(nn.Module):
    def __init__(self, dim: int, hidden: int, act: str, gated: bool) -> None:
        super().__init__()
        if act not in _ACTS:
            raise InputError(f"act_fn is {act!r}: replay serves {', '.join(_ACTS)}")
        self.act, self.gated = _ACTS[act], gated
        if gated:
            self.W_gate = nn.Parameter(torch.zeros(dim, hidden))
        self.W_in, self.b_in = nn.Parameter(torch.zeros(dim, hidden)), nn.Parameter(torch.zeros(hidden))
        self.W_out, self.b_out = nn.Parameter(torch.zeros(hidden, dim)), nn.Parameter(torch.zeros(dim))
        self.hook_post = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            post = self.act(x @ self.W_gate) * (x @ self.W_in) + self.b_in
        else:
            post = self.act(x @ self.W_in + self.b_in)
        out: Tensor = self.hook_post(post) @ self.W_out + self.b_out
        return out


_ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
}


class _HookedNorm(nn.Module):
    """Division by the root of the mean square, of x or of x minus its mean; w and b where the kind has them."""

    def __init__(self, dim: int, eps: float, centre: bool, affine: bool) -> None:
        super().__init__()
        self.eps, self.centre = eps, centre
        if affine:
            self.w = nn.Parameter(torch.ones(dim))
        if affine and centre:
            self.b = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centre else x
        x = x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        x = x * self.w if hasattr(self, "w") else x
        return x + self.b if hasattr(self, "b") else x


def _norm_maker(kind: str | None, dim: int, eps: float) -> Callable[[], nn.Module]:
    if kind is None:
        return nn.Identity
    if kind not in ("LN", "LNPre", "RMS", "RMSPre"):
        raise InputError(f"normalization_type is {kind!r}: replay serves LN, LNPre, RMS, RMSPre and None")
    return lambda: _HookedNorm(dim, eps, kind.startswith("LN"), not kind.endswith("Pre"))


def _parameters(**shapes: tuple[int, ...]) -> nn.Module:
    module = nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return module


class _Gated(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.start = nn.Identity()
        self.gate, self.up, self.down = (nn.Linear(dim, dim, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


_METHODS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "activation": activation_patching,
    "AtP": attribution_patching,
    "RelP": relevance_patching,
}


def _first_logit(out: Tensor) -> Tensor:
    return out[:, 0].mean()


def _flat(scores: dict[str, Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in scores.values()])


def _chain(*, bias: bool) -> tuple[nn.Sequential, Tensor, Callable[[Tensor], Tensor]]:
    layers = nn.Linear(5, 8, bias), nn.GELU(), nn.Linear(8, 7, bias), nn.SiLU(), nn.Linear(7, 3, bias)
    return nn.Sequential(*layers).double(), torch.randn(4, 5, dtype=torch.double), _first_logit


@lru_cache(maxsize=1)
def _correlations() -> dict[str, dict[str, float]]:
    """Pearson correlation with activation patching, over layers and positions, of a transformer trained here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _Hooked(4, 32, 8, 8, 20, n_heads=4, d_mlp=64, act_fn="gelu")
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[-2] ** -0.5 if parameter.ndim > 2 else 0.15)
        _train(model)
        model.eval()
        clean, answer = _name_once(64)
        corrupted, other = _swap_names(clean, answer)
    rows = torch.arange(len(clean))

    def metric(logits: Tensor) -> Tensor:
        return (logits[rows, -1, answer] - logits[rows, -1, other]).mean()

    found: dict[str, dict[str, float]] = {}
    for point in ("hook_mlp_out", "hook_resid_pre"):
        names = [f"blocks.{layer}.{point}" for layer in range(4)]
        scores = {key: _flat(f(model, clean, corrupted, metric, names, axes=(1,))) for key, f in _METHODS.items()}
        table = torch.corrcoef(torch.stack(list(scores.values())))
        found[point] = {"AtP": table[0, 1].item(), "RelP": table[0, 2].item()}
    return found


def _name_once(batch: int) -> tuple[Tensor, Tensor]:
    """Sequences of 8 of 20 tokens where every name but one occurs twice, and that one: three pairs, one, a mark."""
    names = torch.rand(batch, 19).argsort(1)[:, :4] + 1
    tokens = torch.cat([names[:, :3].repeat(1, 2), names[:, 3:]], 1)
    order = torch.rand(batch, 7).argsort(1)
    return torch.cat([tokens.gather(1, order), torch.zeros(batch, 1, dtype=torch.long)], 1), names[:, 3]


def _swap_names(tokens: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """The single name swapped with the first of another one, so that this other name is the single one."""
    other = torch.where(tokens[:, 0] == answer, tokens[:, 1], tokens[:, 0])
    is_other = (tokens == other[:, None]).long()
    first = is_other.argmax(1)
    swapped = tokens.clone()
    swapped[torch.arange(len(tokens)), first] = answer
    return swapped, other


def _train(model: nn.Module, steps: int = 900) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        tokens, answer = _name_once(128)
        loss = F.cross_entropy(model(tokens)[:, -1], answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
