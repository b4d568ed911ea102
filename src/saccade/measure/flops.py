"""How much a model computes, in floating-point operations (FLOPs).

What counts, by the convention of the field: matrix products, convolutions, attention and Fourier transforms, forward
and backward. A multiply-add is two FLOPs (eight if complex), so a figure given in MACs is half of ours.

- Attention that runs fused counts as its two products, 2 N M (D + E) a head, on every device (torch's own counter has
  no formula for the CPU's and gives 0). Causal or masked attention counts as dense: every score is formed. Its
  backward pass forms the scores a second time, and these count, for that is what runs: five products for two.
- A convolution counts its padding as if it were image. Its bias, like any bias, is not counted.
- A Fourier transform of N points counts 5 N log2 N, of real numbers half of that: what FFTW's benchmark takes.

What counts nothing: views and moves of memory, pointwise operations, reductions, softmax and normalisation, which are
bound by memory. A product that a model spells as pointwise multiplication and a sum is therefore not seen: compare
`count_bytes` and the time as well. Every other operation without a formula (pooling, resampling, scans, sorting,
solvers, fused recurrent layers, custom operations) is named in `uncounted` with its number of calls, so that a total is
never quietly too small. `torch.utils.flop_counter.register_flop_formula` gives a custom operation its formula.

What runs is counted, by watching torch's dispatcher: custom autograd functions and exported programs through the
operations they call, compiled functions by running them uncompiled. A kernel launched past the dispatcher (a bare
Triton kernel) is not seen at all; wrap it with `torch.library`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from saccade.errors import InputError
from saccade.measure.dispatch import tensors, watching
from saccade.measure.formulas import find_formula, is_cheap

__all__ = ["FlopCount", "count_flops"]


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one call.

    Attributes:
        total: of everything.
        by_module: of each module that has any, with all that runs inside it, under its name in `named_modules()`;
            "" is the whole.
        by_op: of each operation, under its name: "aten.mm".
        uncounted: calls of each operation that computes but has no formula. Empty: the total is complete.
    """

    total: int
    by_module: dict[str, int]
    by_op: dict[str, int]
    uncounted: dict[str, int]


def count_flops(model: Callable[..., Any], *inputs: Any, backward: bool = False) -> FlopCount:
    """Count the floating-point operations of `model(*inputs)`, a multiply-add as two.

    The call is a real one, on the device of the inputs and in the mode (training or not) in which the model is; the
    module's documentation says what counts.

    Args:
        model: a module, or any function of tensors.
        inputs: its arguments.
        backward: count the gradients of the summed outputs as well, by the parameters and by those inputs which
            require one. They are computed and thrown away: `.grad` stays as it is.

    Returns: FlopCount.
    Raises: InputError if `backward` is asked for and nothing requires a gradient.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    >>> count_flops(model, torch.zeros(3, 8)).by_module
    {'': 1152, '0': 768, '2': 384}
    """
    by_module, by_op, uncounted = Counter[str](), Counter[str](), Counter[str]()

    def saw(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        name = str(getattr(op, "overloadpacket", op))
        formula = find_formula(op)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
            by_op[name] += flops
            by_module.update(dict.fromkeys(names(), flops))
        elif not is_cheap(op):
            uncounted[name] += 1

    watch = watching(saw, keep=lambda op: find_formula(op) is not None)
    with _modules_at_work(model) as names, torch.set_grad_enabled(backward), watch:
        out = model(*inputs)
        if backward:
            _differentiate(model, inputs, out)
    return FlopCount(by_op.total(), dict(by_module), dict(by_op), dict(uncounted))


def _differentiate(model: Callable[..., Any], inputs: tuple[Any, ...], out: Any) -> None:
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    sources = [each for each in (*parameters, *tensors(inputs)) if each.requires_grad]
    results = [each for each in tensors(out) if each.requires_grad]
    if not sources or not results:
        raise InputError(
            "backward=True, but no output depends on a parameter or an input that requires a gradient. "
            "Call requires_grad_() on one, or count with backward=False"
        )
    torch.autograd.grad(results, sources, [torch.ones_like(each) for each in results], allow_unused=True)


@contextmanager
def _modules_at_work(model: Callable[..., Any]) -> Iterator[Callable[[], set[str]]]:
    """Yield a function that names the modules for which an operation runs right now, "" always among them.

    In the forward pass these are the modules being called. In the backward pass they are those during whose call the
    running graph node was made: nodes are numbered in the order of the forward pass.
    """
    running: list[tuple[str, int]] = []
    spans: list[tuple[str, int, int]] = []

    def enter(name: str, *_: object) -> None:
        running.append((name, torch.autograd._get_sequence_nr()))

    def leave(*_: object) -> None:
        spans.append((*running.pop(), torch.autograd._get_sequence_nr()))

    def names() -> set[str]:
        called = {name for name, _ in running}
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        return {"", *called, *(name for name, start, stop in spans if start <= number < stop)}

    with ExitStack() as hooks:
        for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
            hooks.callback(module.register_forward_pre_hook(partial(enter, name)).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield names
