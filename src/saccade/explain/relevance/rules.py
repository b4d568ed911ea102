"""Relevance rules: how the relevance of an operation's result is shared out among its operands.

A rule sees one recorded operation and the relevance of its first result, and gives one share for each operand (None for
nothing). Each is written in the order of its equation: change input or weights, share out, sum. `Rule` says what the
tape must keep for it. Two kinds of message exist: relevance R, which is conserved, and the coefficient c with R = x
c, which gradients are made of. A complex value always carries a coefficient, so that relevance crosses spectral
layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saccade.explain.relevance.adjoints import Map, Shares, adjoint, affine_norm, read_map
from saccade.explain.relevance.tape import Node, Value

__all__ = [
    "Rule",
    "absorb",
    "affine",
    "alpha_beta",
    "attention_by_equation",
    "attention_coefficient",
    "blend",
    "clamped",
    "coefficient",
    "embedding",
    "epsilon",
    "epsilon_map",
    "even",
    "first_operand",
    "flat",
    "gamma",
    "half",
    "identity",
    "identity_coefficient",
    "magnitude",
    "move",
    "norm_coefficient",
    "product_to_both",
    "signal",
    "softmax_taylor",
    "squared_weights",
    "stabilise",
    "terms",
    "unknown",
    "unpool",
    "winner",
    "z_box",
    "z_plus",
]

EPS = 1e-11
"""Only guards 0 / 0: an epsilon meant to smooth a map is given to the rule."""


@dataclass(frozen=True)
class Rule:
    """A rule with a name.

    Attributes:
        name: as it appears in the coverage of a result.
        share: (node, relevance of its result) -> a share for each operand.
        inputs, output: whether it reads the values of operands that depend on the input, and of the results.
        exact: whether shares sum to the relevance, so that the ledger need not look.
        many: the same given the relevance of every result, where an operation has several that carry some.
    """

    name: str
    share: Callable[[Node, Tensor], Shares]
    inputs: bool = False
    output: bool = False
    exact: bool = False
    many: Callable[[Node, Sequence[Tensor | None]], Shares] | None = None


def stabilise(z: Tensor, eps: float) -> Tensor:
    """z + eps sign(z), where sign(0) = +1."""
    return z + torch.copysign(z.new_tensor(max(eps, torch.finfo(z.dtype).tiny)), z)


def _quotient(relevance: Tensor, z: Tensor, eps: float, times: float = 1.0) -> Tensor:
    """R / z; of a complex value, whose message is R / z already, that message."""
    if z.is_complex():
        return relevance
    return relevance / stabilise(z if times == 1 else times * z, eps)


def _weighed(node: Node, cotangents: Shares, factor: float = 1.0) -> Shares:
    """x * s for each operand; s itself where x is complex; 0 where a mask made x infinite."""
    if node.family == "add" and not node.output.tensor.sum().isfinite():
        return [s if s is None else torch.where(s == 0, 0, v.tensor * s) for v, s in zip(node.inputs, cotangents)]
    return [
        s if s is None or value.tensor.is_complex() else (value.tensor if factor == 1 else factor * value.tensor) * s
        for value, s in zip(node.inputs, cotangents)
    ]


def epsilon(eps: float = EPS) -> Rule:
    """R_i = x_i w_i R / (sum x_i w_i + b + eps sign): shares in proportion to what each operand adds to the result.

    Of any linear map or sum; a bias or constant term takes its own share. `eps` is in units of the result.
    """

    def many(node: Node, relevance: Sequence[Tensor | None]) -> Shares:
        s = [None if r is None or z is None else _quotient(r, z.tensor, eps) for r, z in zip(relevance, node.outputs)]
        return _weighed(node, adjoint(node, s))

    return Rule("epsilon", lambda node, r: many(node, [r]), inputs=True, output=True, many=many)


def terms(eps: float = EPS) -> Rule:
    """`epsilon` of sums and differences; a maximum that is subtracted, as before an exponential, is held fixed."""

    def share(node: Node, relevance: Tensor) -> Shares:
        if node.op == "sub" and len(node.inputs) == 2 and node.inputs[0].active and node.inputs[1].trait == "shift":
            return [_shaped(relevance, node.inputs[0].shape), None]
        return epsilon(eps).share(node, relevance)

    return Rule("epsilon", share, inputs=True, output=True)


def half(eps: float = EPS) -> Rule:
    """Of a product of two operands, each gets half (the uniform rule of AttnLRP, Achtibat et al., 2024).

    An operand that normalises (see `Value.trait`) gets nothing: it is held fixed.
    """

    def share(node: Node, relevance: Tensor) -> Shares:
        fixed = _fixed(node, ("norm",))
        if fixed is not None or (node.family == "gate" and not relevance.is_complex()):
            return _split(node, relevance, fixed)
        s = _quotient(relevance, node.output.tensor, eps)
        return _weighed(node, adjoint(node, [s]), 0.5)

    return Rule("half", share, inputs=True, output=True)


def first_operand(eps: float = EPS) -> Rule:
    """`epsilon` of the first operand; where it is sampled is held fixed."""

    def share(node: Node, relevance: Tensor) -> Shares:
        s = _quotient(relevance, node.output.tensor, eps)
        return [*_weighed(node, adjoint(node, [s]))[:1], *[None] * (len(node.inputs) - 1)]

    return Rule("first_operand", share, inputs=True, output=True)


def blend(eps: float = EPS) -> Rule:
    """`epsilon` of a + t b c, where b and c get half of their product, and of a + w (b - a), where w is held fixed.

    Of b and c, one that normalises is held fixed: the other takes all of the product.
    """

    def share(node: Node, relevance: Tensor) -> Shares:
        shares = _weighed(node, adjoint(node, [_quotient(relevance, node.output.tensor, eps)]))
        if node.op == "lerp":
            return [*shares[:2], *[None] * (len(shares) - 2)]
        normal = [value.active and value.trait == "norm" for value in node.inputs]
        if sum(value.active for value in node.inputs[1:]) < 2:
            return shares
        if sum(normal[1:]) == 1:
            return [shares[0], *(None if held else s for s, held in zip(shares[1:], normal[1:]))]
        return [shares[0], *(s if s is None else s / 2 for s in shares[1:])]

    return Rule("blend", share, inputs=True, output=True)


def product_to_both(eps: float = EPS, *, times: float = 1.0) -> Rule:
    """Of a matrix product of two operands, both get all (counted twice, as official code does); half with `times` 2."""

    def share(node: Node, relevance: Tensor) -> Shares:
        return _weighed(node, adjoint(node, [_quotient(relevance, node.output.tensor, eps, times)]))

    return Rule("product_to_both", share, inputs=True, output=True)


def signal(eps: float = EPS) -> Rule:
    """Of a product of two operands, attention weights and scales that normalise are held fixed (CP-LRP, Ali et al.,
    2022).

        The other operand takes all; without such an operand each gets half.
    """

    def share(node: Node, relevance: Tensor) -> Shares:
        fixed = _fixed(node, ("norm", "softmax", "exp"))
        if fixed is None:
            return half(eps).share(node, relevance)
        if node.family == "gate":
            return _split(node, relevance, fixed)
        s = _quotient(relevance, node.output.tensor, eps)
        return [None if place == fixed else x for place, x in enumerate(_weighed(node, adjoint(node, [s])))]

    return Rule("signal", share, inputs=True, output=True)


def _fixed(node: Node, traits: tuple[str, ...]) -> int | None:
    """Place of the operand that is held fixed, where it is one of several."""
    held = [place for place, value in enumerate(node.inputs) if value.active and value.trait in traits]
    return held[0] if len(held) == 1 and sum(value.active for value in node.inputs) > 1 else None


def _split(node: Node, relevance: Tensor, fixed: int | None) -> Shares:
    """All to the operand that is not fixed, or half to each, as it is: of elementwise products.

    A number takes nothing: it is no signal.
    """
    numbers = [place for place, value in enumerate(node.inputs) if not value.shape]
    fixed = numbers[0] if fixed is None and len(numbers) == 1 and len(node.inputs) == 2 else fixed
    part = relevance if fixed is not None or len(node.inputs) == 1 else relevance / 2
    return [
        None if place == fixed else part.sum_to_size(value.shape) if part.shape != value.shape else part
        for place, value in enumerate(node.inputs)
    ]


def magnitude(eps: float = EPS) -> Rule:
    """R_a = R |a| / (|a| + |b| + eps) for a + b, a - b, a b and a / b (there |1 / b|), and for sums over axes.

    Bounded where the operands cancel.
    """

    def share(node: Node, relevance: Tensor) -> Shares:
        if node.family == "mix":
            x = node.inputs[0].tensor.abs()
            s = relevance / (node.func(x, *node.args[1:], **node.kwargs) + eps)
            return [x * part for part in adjoint(node, [s]) if part is not None]
        if len(node.inputs) == 1:  # the other operand is a number
            return [relevance]
        a, b = (value.tensor.abs() for value in node.inputs)
        if node.op == "div":
            b = 1 / b
        s = relevance / (a + b + eps)
        return [(x * s).sum_to_size(value.shape) for x, value in zip((a, b), node.inputs)]

    return Rule("magnitude", share, inputs=True, output=True)


def even() -> Rule:
    """The same to every value under a sum or mean, and to each of several operands, whatever they are."""

    def share(node: Node, relevance: Tensor) -> Shares:
        if node.family != "mix":
            parts = sum(value.active for value in node.inputs)
            return [_shaped(relevance / parts, value.shape) if value.active else None for value in node.inputs]
        z = node.func(relevance.new_ones(node.inputs[0].shape), *node.args[1:], **node.kwargs)
        return adjoint(node, [relevance / z])

    return Rule("even", share, exact=True)


def move() -> Rule:
    """Relevance goes back to where the values came from, and copies add up."""

    def share(node: Node, relevance: Tensor) -> Shares:
        if _is_complex(node):
            return epsilon().share(node, relevance)
        return adjoint(node, [relevance])

    return Rule("move", share, many=adjoint)


def unpool(eps: float = EPS) -> Rule:
    """Of a maximum over windows: R x / (z + eps) at the place of each window's largest value.

    Where windows share that place, the last one alone is written there, as unpooling does; `move` adds them up.
    """

    def share(node: Node, relevance: Tensor) -> Shares:
        x, (z, places) = node.inputs[0].tensor, (value.tensor for value in node.outputs if value is not None)
        s = (relevance / (z + eps)).flatten(-2)
        return [x * torch.zeros_like(x).flatten(-2).scatter(-1, places.flatten(-2), s).view_as(x)]

    return Rule("unpool", share, inputs=True, output=True)


def winner() -> Rule:
    """All to the operand that won a maximum, as its gradient."""
    return replace(move(), name="winner", inputs=True, output=True)


def identity() -> Rule:
    """R_x = R: of elementwise functions, norms, and products with a constant."""

    def share(node: Node, relevance: Tensor) -> Shares:
        if _is_complex(node):
            return epsilon().share(node, relevance)
        return [_shaped(relevance, value.shape) if value.active else None for value in node.inputs]

    return Rule("identity", share, exact=True)


def absorb(name: str = "absorb") -> Rule:
    """Nothing goes on: the operation is held fixed, and the ledger says what it took."""
    return Rule(name, lambda node, relevance: [None] * len(node.inputs))


def unknown(eps: float = EPS) -> Rule:
    """For operations without a rule: identity where one operand has the result's shape, else input times gradient."""

    def share(node: Node, relevance: Tensor) -> Shares:
        active = [value for value in node.inputs if value.active]
        if len(active) == 1 and active[0].shape == node.output.shape and not _is_complex(node):
            return identity().share(node, relevance)
        try:
            return epsilon(eps).share(node, relevance)
        except RuntimeError:  # torch has no derivative either
            return [None] * len(node.inputs)

    return Rule("unknown", share, inputs=True, output=True)


def _is_complex(node: Node) -> bool:
    return node.output.dtype.is_complex or any(value.dtype.is_complex for value in node.inputs if value.active)


def _shaped(relevance: Tensor, shape: torch.Size) -> Tensor:
    return relevance if relevance.shape == shape else relevance.sum_to_size(shape)


# maps with weights: (map, x, weight, bias, z, R) -> R_x, and the share of the bias
Core = Callable[[Map, Tensor, Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def _on_map(name: str, core: Core, *, bias: str = "term", eps: float = EPS, keep: float = 1.0) -> Rule:
    """A rule of convolutions and dense layers.

    Args:
        core: the rule's equation.
        bias: "term" takes part in the equation; "magnitude" takes |b| / (|z - b| + |b|) first, and the equation is of
            the map without a bias; "none" takes nothing, and so is the equation.
        keep: fraction of the largest shares of each sample that goes on; the rest is dropped.
    """

    def share(node: Node, relevance: Tensor) -> Shares:
        linear = read_map(node)
        shares: Shares = [None] * len(node.inputs)
        x, weight, z = node.inputs[linear.x].tensor, node.inputs[linear.weight].tensor, node.output.tensor
        b = None if linear.bias is None else node.inputs[linear.bias].tensor
        if b is None or bias == "term":
            found, taken = core(linear, x, weight, b, z, relevance)
        elif bias == "none":
            found, taken = core(linear, x, weight, None, z - b.reshape(linear.bias_shape), relevance)
        else:
            wide = b.reshape(linear.bias_shape)
            z = z - wide
            s = relevance / (z.abs() + wide.abs() + eps)
            taken = linear.bias_share(b.abs(), s)
            found, _ = core(linear, x, weight, None, z, z.abs() * s)
        shares[linear.x] = found if keep == 1 else _largest(found, keep)
        if linear.bias is not None:
            shares[linear.bias] = taken
        return shares

    return Rule(name, share, inputs=True, output=True)


def _largest(relevance: Tensor, keep: float) -> Tensor:
    """Zero outside the largest fraction of each sample's entries."""
    rows = relevance.flatten(1)
    count = max(1, int(keep * rows.shape[1]))
    best = rows.topk(count, 1)
    return torch.zeros_like(rows).scatter(1, best.indices, best.values).view_as(relevance)


def epsilon_map(
    eps: float = EPS, *, times: float = 1.0, bias: str = "term", keep: float = 1.0, signed: bool = True
) -> Rule:
    """`epsilon` of maps with weights; `times` 2 leaves half of the relevance with the weights.

    Without `signed` the epsilon is added whatever the sign of the result, and a result near -eps explodes.
    """

    def core(m: Map, x: Tensor, w: Tensor, b: Tensor | None, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor | None]:
        s = _quotient(r, z, eps, times) if signed else r / (times * z + eps)
        return x * m.back(s, w), m.bias_share(b, s)

    return _on_map("epsilon", core, bias=bias, eps=eps, keep=keep)


def z_plus(eps: float = EPS, *, bias: str = "term") -> Rule:
    """z+ : only what raises the result takes part (Montavon et al., 2017), of inputs of either sign."""

    def core(m: Map, x: Tensor, w: Tensor, b: Tensor | None, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor | None]:
        up, down = _signed(x)
        more, less = w.clamp(min=0), w.clamp(max=0)
        b = None if b is None else b.clamp(min=0)
        s = r / stabilise(m.add_bias(_sum(m.apply, (up, more), (down, less)), b), eps)
        return _back(m, s, (up, more), (down, less)), m.bias_share(b, s)

    return _on_map("z_plus", core, bias=bias, eps=eps)


def alpha_beta(alpha: float = 2.0, beta: float = 1.0, eps: float = EPS) -> Rule:
    """alpha times what raises the result minus beta times what lowers it, alpha - beta = 1 (Bach et al., 2015)."""

    def core(m: Map, x: Tensor, w: Tensor, b: Tensor | None, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor | None]:
        up, down = _signed(x)
        more, less = w.clamp(min=0), w.clamp(max=0)
        raises, lowers = ((up, more), (down, less)), ((up, less), (down, more))
        parts = (None, None) if b is None else (b.clamp(min=0), b.clamp(max=0))
        found, taken = torch.zeros_like(x), None if b is None else torch.zeros_like(b)
        for factor, terms, part in ((alpha, raises, parts[0]), (-beta, lowers, parts[1])):
            s = factor * r / stabilise(m.add_bias(_sum(m.apply, *terms), part), eps)
            found = found + _back(m, s, *terms)
            if taken is not None and part is not None:
                taken = taken + part * m.at_bias(s).reshape(part.shape)
        return found, taken

    return _on_map("alpha_beta", core)


def gamma(gamma: float = 0.25, eps: float = EPS, *, bias: str = "term", keep: float = 1.0) -> Rule:
    """Favours what agrees with the sign of the result: weights w + gamma w+ where it is positive, w + gamma w-
    elsewhere.

        The generalised form, for inputs of either sign (Andeol et al., 2021).
    """

    def core(m: Map, x: Tensor, w: Tensor, b: Tensor | None, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor | None]:
        up, down = _signed(x)
        more, less = w + gamma * w.clamp(min=0), w + gamma * w.clamp(max=0)
        found, taken = torch.zeros_like(x), None if b is None else torch.zeros_like(b)
        for where, terms, part in (
            (z > 0, ((up, more), (down, less)), None if b is None else b + gamma * b.clamp(min=0)),
            (z <= 0, ((up, less), (down, more)), None if b is None else b + gamma * b.clamp(max=0)),
        ):
            s = r * where / stabilise(m.add_bias(_sum(m.apply, *terms), part), eps)
            found = found + _back(m, s, *terms)
            if taken is not None and part is not None:
                taken = taken + part * m.at_bias(s).reshape(part.shape)
        return found, taken

    return _on_map("gamma", core, bias=bias, eps=eps, keep=keep)


def clamped(eps: float = EPS, *, recompute: bool, bias: str = "term", keep: float = 1.0) -> Rule:
    """Weights below 0 count as 0, inputs stay as they are; the result is `recompute`d with these weights or not."""

    def core(m: Map, x: Tensor, w: Tensor, b: Tensor | None, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor | None]:
        w = w.clamp(min=0)
        s = r / stabilise(m.add_bias(m.apply(x, w), b) if recompute else z, eps)
        return x * m.back(s, w), m.bias_share(b, s)

    return _on_map("clamped", core, bias=bias, eps=eps, keep=keep)


def z_box(low: float | Tensor, high: float | Tensor, eps: float = EPS) -> Rule:
    """For the first layer, whose inputs lie between `low` and `high`: numbers, or tensors that broadcast to it."""

    def core(m: Map, x: Tensor, w: Tensor, b: Tensor | None, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor | None]:
        bottom, top = (torch.as_tensor(each, dtype=x.dtype, device=x.device).expand_as(x) for each in (low, high))
        terms = (x, w), (-bottom, w.clamp(min=0)), (-top, w.clamp(max=0))
        s = r / stabilise(_sum(m.apply, *terms), eps)
        return _back(m, s, *terms), None

    return _on_map("z_box", core)


def flat() -> Rule:
    """Spread evenly over the inputs that a result sees."""

    def core(m: Map, x: Tensor, w: Tensor, b: Tensor | None, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor | None]:
        w = torch.ones_like(w)
        return m.back(r / m.apply(torch.ones_like(x), w), w), None

    return _on_map("flat", core)


def squared_weights(eps: float = EPS) -> Rule:
    """Shares in proportion to w squared, whatever the inputs (the w2 rule)."""

    def core(m: Map, x: Tensor, w: Tensor, b: Tensor | None, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor | None]:
        w = w.square()
        return m.back(r / stabilise(m.apply(torch.ones_like(x), w), eps), w), None

    return _on_map("squared_weights", core)


def _signed(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Positive and negative part; None for a negative part that is all 0, as behind a ReLU."""
    return (x, None) if x.amin() >= 0 else (x.clamp(min=0), x.clamp(max=0))


def _sum(f: Callable[[Tensor, Tensor], Tensor], *terms: tuple[Tensor | None, Tensor]) -> Tensor:
    found = [f(x, w) for x, w in terms if x is not None]
    return sum(found[1:], found[0])


def _back(m: Map, s: Tensor, *terms: tuple[Tensor | None, Tensor]) -> Tensor:
    """Sum of x * back(s, w) over pairs of x and w."""
    return _sum(lambda x, w: x * m.back(s, w), *terms)


def embedding() -> Rule:
    """A token id carries what its row carries."""

    def share(node: Node, relevance: Tensor) -> Shares:
        return [None, relevance.sum(-1)] if node.inputs[1].active else adjoint(node, [relevance])

    return Rule("embedding", share, exact=True)


def embedding_coefficient() -> Rule:
    """A token id carries the relevance of its row, row times coefficient."""

    def share(node: Node, c: Tensor) -> Shares:
        return [None, (node.output.tensor * c).sum(-1)] if node.inputs[1].active else adjoint(node, [c])

    return Rule("embedding", share, output=True)


# of softmax and fused attention


def softmax_taylor(*, causal: bool = False) -> Rule:
    """R_x = x (R - p sum R) for p = softmax(x), its first-order expansion (AttnLRP); x = -inf takes nothing.

    Args:
        causal: read the lower triangle of x in place of x, as one official implementation does for any model.
    """

    def share(node: Node, relevance: Tensor) -> Shares:
        x, p, axis = node.inputs[0].tensor, node.output.tensor, node.arg(1, "dim")
        x = x.masked_fill(x.isinf(), 0)
        return [(x.tril() if causal else x) * (relevance - p * relevance.sum(axis, keepdim=True))]

    return Rule("softmax_taylor", share, inputs=True, output=True)


def attention_by_equation(eps: float = EPS, *, values_only: bool = False) -> Rule:
    """Fused attention as its equation: softmax(q k^T scale + mask) v, by `half`, `softmax_taylor` and `half`.

    Args:
        values_only: weights are held fixed and the values take all (CP-LRP).
    """

    def share(node: Node, relevance: Tensor) -> Shares:
        query, key, value, mask, weights, scale = attention_parts(node)
        s = relevance / stabilise(node.output.tensor, eps)
        shares: Shares = [None] * len(node.inputs)
        if values_only:
            shares[2] = _of_heads(value * (weights.mT @ s), node.inputs[2])
            return shares
        shares[2] = _of_heads(value * (weights.mT @ s) / 2, node.inputs[2])
        of_weights = weights * (s @ value.mT) / 2
        c = of_weights - weights * of_weights.sum(-1, keepdim=True)  # R / x at the logits
        shares[0] = query * (c @ key) * (scale / 2)
        shares[1] = _of_heads(key * (c.mT @ query) * (scale / 2), node.inputs[1])
        if mask is not None:
            shares[3] = mask.masked_fill(mask.isinf(), 0) * c.sum_to_size(mask.shape)
        return shares

    return Rule("values_only" if values_only else "attention", share, inputs=True, output=True)


def attention_parts(node: Node) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, float]:
    """Query, key, value (a head of keys stands once for each head of queries that shares it), the mask if it is added,
    the weights, and the scale."""
    query, key, value = (each.tensor for each in node.inputs[:3])
    if query.ndim > 2 and key.shape[-3] < query.shape[-3]:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    schema = [argument.name for argument in node.func._schema.arguments]
    named = dict(zip(schema, node.args)) | node.kwargs
    scale = named.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query @ key.mT * scale
    mask = named.get("attn_mask", named.get("attn_bias"))
    added = mask.tensor if mask is not None and mask.dtype != torch.bool else None
    if mask is not None:
        logits = logits + mask.tensor if mask.dtype != torch.bool else logits.masked_fill(~mask.tensor, -torch.inf)
    if named.get("is_causal"):
        upper = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(upper, -torch.inf)
    return query, key, value, added, logits.softmax(-1).nan_to_num(0.0), scale


def _of_heads(part: Tensor, shared: Value) -> Tensor:
    """What heads of queries give to the heads of keys or values that they share, added up."""
    return part if part.shape == shared.tensor.shape else part.unflatten(-3, (shared.tensor.shape[-3], -1)).sum(-3)


# of norms


def affine(eps: float = EPS) -> Rule:
    """A norm as an affine map whose scale is held fixed, by `epsilon`; the bias takes its share (the LN-rule)."""

    def share(node: Node, relevance: Tensor) -> Shares:
        norm = affine_norm(node)
        shares: Shares = [None] * len(node.inputs)
        s = relevance / stabilise(node.output.tensor, eps)
        shares[0] = node.inputs[0].tensor * norm.back(s)
        if norm.bias is not None:
            place = min(2, len(node.inputs) - 1)
            shares[place] = (norm.bias * s).sum()
        return shares

    return Rule("affine", share, inputs=True, output=True)


# coefficients: R = x c


def coefficient(factor: float = 1.0, *, hold_norms: bool = False) -> Rule:
    """The operation's own derivative.

    Args:
        factor: 1 / 2 is the half-rule of products.
        hold_norms: a scale that normalises gets nothing, and the operand that it normalises the whole derivative.
    """

    def share(node: Node, c: Tensor) -> Shares:
        fixed = _fixed(node, ("norm",)) if hold_norms else None
        scaled = c if factor == 1 or fixed is not None else factor * c
        return [None if place == fixed else each for place, each in enumerate(adjoint(node, [scaled]))]

    return Rule("derivative" if factor == 1 else "half", share, inputs=True, output=True, many=adjoint)


def identity_coefficient(eps: float = 1e-6) -> Rule:
    """c_x = c f(x) / (x + eps sign(x)): relevance passes an elementwise function unchanged."""

    def share(node: Node, c: Tensor) -> Shares:
        return [c * (node.output.tensor / stabilise(node.inputs[0].tensor, eps)), *[None] * (len(node.inputs) - 1)]

    return Rule("identity", share, inputs=True, output=True)


def norm_coefficient() -> Rule:
    """The derivative of a norm whose scale is held fixed (the LN-rule)."""

    def share(node: Node, c: Tensor) -> Shares:
        return [affine_norm(node).back(c), *[None] * (len(node.inputs) - 1)]

    return Rule("affine", share, inputs=True, output=True)


def attention_coefficient(*, values_only: bool = False) -> Rule:
    """The derivative of fused attention, or of its values with the weights held fixed (the AH-rule)."""

    def many(node: Node, messages: Sequence[Tensor | None]) -> Shares:
        query, key, value, mask, weights, scale = attention_parts(node)
        shares: Shares = [None] * len(node.inputs)
        c, of_lse = messages[:2]  # the log of the sum of exponentials, where parts are merged by it
        d = torch.zeros_like(weights)
        if c is not None:
            shares[2] = _of_heads(weights.mT @ c, node.inputs[2])
            at_weights = weights * (c @ value.mT)
            d = at_weights - weights * at_weights.sum(-1, keepdim=True)
        if of_lse is not None:
            d = d + weights * of_lse[..., None]
        if not values_only:
            shares[0], shares[1] = scale * (d @ key), _of_heads(scale * (d.mT @ query), node.inputs[1])
            if mask is not None and node.inputs[3].active:
                shares[3] = d.sum_to_size(mask.shape)
        return shares

    name = "values_only" if values_only else "derivative"
    return Rule(name, lambda node, c: many(node, [c, None]), inputs=True, many=many)
