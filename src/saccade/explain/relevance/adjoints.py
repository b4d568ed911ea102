"""The adjoint of one recorded operation: what a cotangent of its results is at its operands.

Frequent linear operations have theirs written out, since it needs no values; every other one is torch's own
derivative of that single operation. Constants get a cotangent only where they are terms of a sum, so that a ledger
can say what they absorbed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.explain.relevance.families import MAPS
from saccade.explain.relevance.tape import Node, Value

__all__ = ["Map", "adjoint", "affine_norm", "read_map"]

Shares = list[Tensor | None]
"""One entry for each of a node's inputs."""


def adjoint(node: Node, cotangents: Sequence[Tensor | None]) -> Shares:
    """Cotangents at the inputs of a node, given those of its outputs; None for inputs that get none."""
    cotangents = [*cotangents, *[None] * (len(node.outputs) - len(cotangents))]
    rule = _ADJOINTS.get(node.op)
    if node.family in MAPS or node.family == "product":
        rule = _product if node.family == "product" else _of_map
    if rule is not None and cotangents[0] is not None and all(c is None for c in cotangents[1:]):
        return rule(node, cotangents[0])
    if node.op in _MANY:
        return _MANY[node.op](node, cotangents)
    return _by_autograd(node, cotangents)


class Map(NamedTuple):
    """A map with weights, z = apply(x, weight) + bias, and its adjoint in x.

    Attributes:
        x, weight, bias: places among the node's inputs.
        apply: (x, weight) -> z without the bias.
        back: (s, weight) -> adjoint at x.
        bias_shape: shape in which the bias is added to z.
    """

    x: int
    weight: int
    bias: int | None
    apply: Callable[[Tensor, Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]
    bias_shape: tuple[int, ...]

    def add_bias(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """z + bias."""
        return z if bias is None else z + bias.reshape(self.bias_shape)

    def at_bias(self, s: Tensor) -> Tensor:
        """Adjoint at the bias: the sum of s over all places where it is added."""
        return s.sum_to_size(*(1,) * (s.ndim - len(self.bias_shape)), *self.bias_shape)

    def bias_share(self, bias: Tensor | None, s: Tensor) -> Tensor | None:
        """bias * adjoint at the bias; None without one."""
        return None if bias is None else bias * self.at_bias(s).reshape(bias.shape)


def read_map(node: Node) -> Map:
    """The map of a node of family "convolution" or "dense"."""
    return _convolution(node) if node.family == "convolution" else _dense(node)


def _convolution(node: Node) -> Map:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    options = stride, padding, dilation, transposed, output_padding, groups

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten.convolution(x, weight, None, *options)
        return out

    def back(s: Tensor, weight: Tensor) -> Tensor:
        like = s.new_empty(x.shape)  # the values play no part
        found: Tensor = torch.ops.aten.convolution_backward(s, like, weight, None, *options, [True, False, False])[0]
        return found

    bias_shape = () if bias is None else (*bias.shape, *(1,) * (len(weight.shape) - 2))
    return Map(0, 1, None if bias is None else 2, apply, back, bias_shape)


def _dense(node: Node) -> Map:
    first = 1 if node.op in ("addmm", "baddbmm", "addmv") else 0
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    left = node.inputs[first]
    apply, back = _dense_pair(node.op, left.active)
    x, weight = (first, first + 1) if left.active else (first + 1, first)
    if alpha != 1:
        apply, back = (_times(alpha, f) for f in (apply, back))
    bias = 0 if first and beta else None
    assert beta in (0, 1), "a scaled term of a matrix product"
    return Map(x, weight, bias, apply, back, tuple(node.inputs[0].shape) if first else ())


Pair = Callable[[Tensor, Tensor], Tensor]


def _dense_pair(op: str, left: bool) -> tuple[Pair, Pair]:
    """Product with a weight and its adjoint, for an x that stands left or right of it."""
    if op == "dot":
        return torch.dot, torch.mul
    if left:
        return (lambda x, w: x @ w), (lambda s, w: s[:, None] * w if w.ndim == 1 else s @ w.mT)
    return (lambda x, w: w @ x), (lambda s, w: w.mT @ s)


def _times(alpha: float, f: Pair) -> Pair:
    return lambda x, w: alpha * f(x, w)


def _of_map(node: Node, s: Tensor) -> Shares:
    linear, shares = read_map(node), _none(node)
    shares[linear.x] = linear.back(s, node.inputs[linear.weight].tensor)
    if linear.bias is not None:
        shares[linear.bias] = linear.at_bias(s).reshape(node.inputs[linear.bias].shape)
    return shares


def _product(node: Node, s: Tensor) -> Shares:
    shares, first = _none(node), 1 if node.op == "baddbmm" or node.op == "addmm" else 0
    if node.op in ("mv", "dot", "addmv"):
        return _by_autograd(node, [s])
    left, right = (value.tensor for value in node.inputs[first : first + 2])
    alpha = node.kwargs.get("alpha", 1)
    scaled = s if alpha == 1 else alpha * s
    shares[first], shares[first + 1] = scaled @ right.mT, left.mT @ scaled
    if first and node.kwargs.get("beta", 1):
        shares[0] = _fit(s, node.inputs[0])
    return shares


class AffineNorm(NamedTuple):
    """A normalisation whose scale is held fixed, an affine map of x.

    Attributes:
        back: s -> adjoint at x.
        bias: what is added to the map of x, broadcasting to the output; None for nothing.
    """

    back: Callable[[Tensor], Tensor]
    bias: Tensor | None


def affine_norm(node: Node) -> AffineNorm:
    """The map of a node of family "norm", its standard deviation a constant."""
    x = node.inputs[0].tensor
    if node.op == "native_layer_norm":
        _, shape, weight, bias, _ = node.args
        axes = tuple(range(-len(shape), 0))
        mean, scale = _get(node.outputs[1]), _get(node.outputs[2])
        return _centred(x, axes, mean, scale, _get(weight), _get(bias), True)
    if node.op == "_fused_rms_norm":
        _, shape, weight, _ = node.args
        scale = _get(node.outputs[1])
        return _centred(x, tuple(range(-len(shape), 0)), None, scale, _get(weight), None, False)
    if node.op == "native_group_norm":
        _, weight, bias, batch, channels, _, groups, _ = node.args
        mean, scale = (_get(each).reshape(batch, groups, 1) for each in node.outputs[1:])
        inner = (1, channels, *(1,) * (x.ndim - 2))
        weight, bias = (None if each is None else _get(each).reshape(inner) for each in (weight, bias))

        def back(s: Tensor) -> Tensor:
            s = (s if weight is None else s * weight).reshape(batch, groups, -1)
            return ((s - s.mean(-1, keepdim=True)) * scale).reshape(x.shape)

        return AffineNorm(back, bias)
    return _batch_norm(node, x)


def _batch_norm(node: Node, x: Tensor) -> AffineNorm:
    weight, bias, mean, var = (_get(each) for each in node.args[1:5])
    flags = [each for each in node.args[5:] if isinstance(each, bool)]
    numbers = [each for each in node.args[5:] if isinstance(each, float)]
    axes, inner = (0, *range(2, x.ndim)), (1, -1, *(1,) * (x.ndim - 2))
    training = (flags[0] if flags else False) or mean is None
    if training:
        var, mean = torch.var_mean(x, axes, correction=0)
    scale = (var + numbers[-1]).rsqrt().reshape(inner)
    weight, bias = (None if each is None else each.reshape(inner) for each in (weight, bias))
    slope = scale if weight is None else scale * weight
    if training:
        return AffineNorm(lambda s: (s - s.mean(axes, keepdim=True)) * slope, bias)
    shift = -mean.reshape(inner) * slope
    return AffineNorm(lambda s: s * slope, shift if bias is None else shift + bias)


def _centred(
    x: Tensor, axes: tuple[int, ...], mean: Tensor | None, scale: Tensor, weight: Any, bias: Any, centre: bool
) -> AffineNorm:
    def back(s: Tensor) -> Tensor:
        s = (s if weight is None else s * weight) * scale
        return s - s.mean(axes, keepdim=True) if centre else s

    return AffineNorm(back, bias)


def _get(value: Value | None) -> Any:
    return None if value is None else value.tensor


def _none(node: Node) -> Shares:
    return [None] * len(node.inputs)


def _fit(s: Tensor, value: Value) -> Tensor:
    """Sum a cotangent over the axes along which an operand was broadcast."""
    return s if s.shape == value.shape else s.sum_to_size(value.shape)


def _first(f: Callable[[Node, Tensor], Tensor]) -> Callable[[Node, Tensor], Shares]:
    """Adjoint of an operation with one operand that counts."""

    def rule(node: Node, s: Tensor) -> Shares:
        return [f(node, s), *[None] * (len(node.inputs) - 1)]

    return rule


def _add(node: Node, s: Tensor) -> Shares:
    alpha = node.arg(2, "alpha", 1)
    sides = {"add": [1, alpha], "sub": [1, -alpha], "rsub": [-alpha, 1]}[node.op]
    if len(node.inputs) == 1:  # the other operand is a number
        sides = sides[:1] if isinstance(node.args[0], Value) else sides[1:]
    return [_fit(s if side == 1 else side * s, value) for side, value in zip(sides, node.inputs)]


def _scale(node: Node, s: Tensor) -> Shares:
    """Cotangent of x in x * y and x / y, and of both if both depend on the input."""
    a, b = node.args[:2]
    if node.kwargs or len(node.args) > 2:  # a rounding mode
        return _by_autograd(node, [s])
    shares: Shares = []
    for value, other, place in ((a, b, 0), (b, a, 1)):
        if not isinstance(value, Value):
            continue
        if not value.active:
            shares.append(None)
            continue
        factor = other.tensor if isinstance(other, Value) else other
        if node.op == "mul":
            part = s * factor.conj() if isinstance(factor, Tensor) else s * factor
        elif place == 0:
            part = s / (factor.conj() if isinstance(factor, Tensor) else factor)
        else:
            part = -s * factor / value.tensor.square()
        shares.append(_fit(part if value.dtype.is_complex or not part.is_complex() else part.real, value))
    return shares


def _copy(node: Node, s: Tensor) -> Shares:
    return [None, _fit(s, node.inputs[1])]


def _expand(node: Node, s: Tensor) -> Tensor:
    return s.sum_to_size(node.inputs[0].shape)


def _reshape(node: Node, s: Tensor) -> Tensor:
    return s.reshape(node.inputs[0].shape)


def _permute(node: Node, s: Tensor) -> Tensor:
    order = [axis % s.ndim for axis in node.args[1]]
    return s.permute([order.index(axis) for axis in range(s.ndim)])


def _to_copy(node: Node, s: Tensor) -> Tensor:
    source = node.inputs[0]
    numbers = source.dtype if source.dtype.is_floating_point or source.dtype.is_complex else s.dtype
    return s.to(device=source.device, dtype=numbers)


def _slice(node: Node, s: Tensor) -> Tensor:
    axis, start, end, step = (node.arg(1 + i, name, d) for i, (name, d) in enumerate(_SLICE))
    out = s.new_zeros(node.inputs[0].shape)
    torch.ops.aten.slice(out, axis, start, end, step).copy_(s)
    return out


_SLICE = (("dim", 0), ("start", None), ("end", None), ("step", 1))


def _select(node: Node, s: Tensor) -> Tensor:
    out = s.new_zeros(node.inputs[0].shape)
    out.select(node.args[1], node.args[2]).copy_(s)
    return out


def _cat(node: Node, s: Tensor) -> Shares:
    axis = node.arg(1, "dim", 0)
    sizes = [value.shape[axis] if len(value.shape) == s.ndim else 0 for value in node.inputs]
    return list(s.split(sizes, axis))


def _stack(node: Node, s: Tensor) -> Shares:
    return list(s.unbind(node.arg(1, "dim", 0)))


def _mean(node: Node, s: Tensor) -> Tensor:
    source, axes = node.inputs[0], node.arg(1, "dim")
    keep = node.arg(2, "keepdim", False)
    axes = tuple(range(len(source.shape))) if not isinstance(axes, list | tuple) or not axes else axes
    axes = sorted(axis % len(source.shape) for axis in axes)
    for axis in () if keep else axes:
        s = s.unsqueeze(axis)
    count = 1
    for axis in axes if node.op == "mean" else ():
        count *= source.shape[axis]
    return (s / count if count != 1 else s).expand(source.shape)


def _max_pool2d(node: Node, s: Tensor) -> Tensor:
    x, kernel, *rest = node.args
    defaults: list[Any] = [[], 0, 1, False]
    stride, padding, dilation, ceil_mode = [*rest, *defaults[len(rest) :]]
    indices = _get(node.outputs[1])
    found: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
        s, s.new_empty(x.shape), kernel, stride, padding, dilation, ceil_mode, indices
    )
    return found


def _embedding(node: Node, s: Tensor) -> Shares:
    """Token ids carry what their rows carry."""
    return [None, s] if node.inputs[1].active else [_by_autograd(node, [s])[0], None]


def _overlay(node: Node, s: Tensor) -> Shares:
    """What an alias had before an operation in place, and what the changed tensor put into it."""
    changed, alias, size = node.args
    flat = s.new_zeros(size)
    flat.as_strided(*alias).copy_(s)
    new = flat.as_strided(*changed).clone()
    flat.as_strided(*changed).zero_()
    return [flat.as_strided(*alias).clone(), new]


def _many(fill: Callable[[Node, list[Tensor]], Tensor]) -> Callable[[Node, Sequence[Tensor | None]], Shares]:
    """Adjoint of an operation that cuts its operand in pieces: pieces without a cotangent count as zeros."""

    def rule(node: Node, cotangents: Sequence[Tensor | None]) -> Shares:
        like = next(c for c in cotangents if c is not None)
        parts = [
            like.new_zeros(value.shape) if part is None else part
            for part, value in zip(cotangents, node.outputs)
            if value is not None
        ]
        return [fill(node, parts), *[None] * (len(node.inputs) - 1)]

    return rule


def _by_autograd(node: Node, cotangents: Sequence[Tensor | None]) -> Shares:
    """Torch's derivative of this one operation; operands whose values were not kept play no part, and are zeros."""
    leaves: list[Tensor | None] = []

    def leaf(value: Value) -> Tensor:
        if not value.active or not (value.dtype.is_floating_point or value.dtype.is_complex):
            leaves.append(None)
            return value.tensor
        data = torch.zeros(value.shape, dtype=value.dtype, device=value.device) if value.data is None else value.data
        made = data.detach().requires_grad_()
        leaves.append(made)
        return made

    with torch.enable_grad():
        args = _mapped(node.args, leaf)
        out = node.func(*args, **_mapped(node.kwargs, leaf))
    outs = tuple(out) if isinstance(out, tuple | list) else (out,)
    pairs = [(o, c) for o, c in zip(outs, cotangents) if c is not None and o.requires_grad]
    wanted = [each for each in leaves if each is not None]
    if not pairs or not wanted:
        return _none(node)
    found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True))
    return [None if each is None else next(found) for each in leaves]


def _mapped(tree: Any, f: Callable[[Value], Tensor]) -> Any:
    if isinstance(tree, Value):
        return f(tree)
    if isinstance(tree, tuple | list):
        return type(tree)(_mapped(each, f) for each in tree)
    if isinstance(tree, dict):
        return {name: _mapped(each, f) for name, each in tree.items()}
    return tree


_SAME = dict.fromkeys(("clone", "alias", "detach", "contiguous", "lift_fresh"), _first(lambda node, s: s))
_RESHAPES = dict.fromkeys(
    ("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze"), _first(_reshape)
)
_ADJOINTS: dict[str, Callable[[Node, Tensor], Shares]] = {
    **_SAME,
    **_RESHAPES,
    "_to_copy": _first(_to_copy),
    "expand": _first(_expand),
    "permute": _first(_permute),
    "transpose": _first(lambda node, s: s.transpose(node.args[1], node.args[2])),
    "t": _first(lambda node, s: s.t()),
    "slice": _first(_slice),
    "select": _first(_select),
    "cat": _cat,
    "stack": _stack,
    "add": _add,
    "sub": _add,
    "rsub": _add,
    "mul": _scale,
    "div": _scale,
    "sum": _first(_mean),
    "mean": _first(_mean),
    "max_pool2d_with_indices": _first(_max_pool2d),
    "embedding": _embedding,
    "copy": _copy,
    "overlay": _overlay,
}
_MANY: dict[str, Callable[[Node, Sequence[Tensor | None]], Shares]] = {
    "split": _many(lambda node, parts: torch.cat(parts, node.arg(2, "dim", 0))),
    "split_with_sizes": _many(lambda node, parts: torch.cat(parts, node.arg(2, "dim", 0))),
    "unbind": _many(lambda node, parts: torch.stack(parts, node.arg(1, "dim", 0))),
}
