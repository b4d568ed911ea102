"""Shows every operation that torch runs: what FLOPs, bytes and peak memory are counted from."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Saw", "tensors", "watching"]

Saw = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]


def tensors(tree: object) -> list[Tensor]:
    """The strided tensors in a nest of tuples, lists and dicts; sparse ones have no storage to speak of."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


@contextmanager
def watching(saw: Saw, *, keep: Callable[[Any], bool] = lambda op: False) -> Iterator[None]:
    """Call `saw(op, args, kwargs, out)` after each operation inside the `with`.

    Composite operations are taken apart into those that do the work, as autograd would do (inference mode would
    show them whole), unless `keep(op)`. Compiled functions run uncompiled and fused transformer layers layer by
    layer, since what they do inside could not be seen.
    """
    fused_layers = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused_layers)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_Watcher(saw, keep))
        yield


class _Watcher(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, saw: Saw, keep: Callable[[Any], bool]) -> None:
        super().__init__()
        self._saw = saw
        self._keep = keep

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and not self._keep(func):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self._saw(func, args, kwargs, out)
        return out
