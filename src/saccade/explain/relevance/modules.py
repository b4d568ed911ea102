"""What goes into and comes out of named modules, seen or replaced while a `with` lasts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from saccade.errors import InputError, check_choice

__all__ = ["check_points", "watching"]

See = Callable[[str, Tensor], Tensor]


def check_points(model: Any, points: Sequence[str]) -> None:
    """Raise InputError unless each is the name of a module, or "NAME:in"."""
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    if points and not modules:
        raise InputError(
            f"{points[0]!r} names a module, but the model is a {type(model).__name__}: give a torch.nn.Module"
        )
    for point in points:
        check_choice("module", point.removesuffix(":in"), modules)


@contextmanager
def watching(model: Any, points: Sequence[str], see: See) -> Iterator[None]:
    """Call `see(point, tensor)` wherever a module runs, and go on with what it returns.

    Args:
        model: has these modules.
        points: names of modules, whose output is meant, or "NAME:in", their first input. The second call of a module is
            "NAME#2".
        see: gets each tensor.
    """
    modules = dict(model.named_modules()) if points else {}
    calls = dict.fromkeys(points, 0)

    def pass_through(point: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise InputError(f"{point!r} is a {type(value).__name__}: name a module whose value there is one tensor")
        calls[point] += 1
        return see(point if calls[point] == 1 else f"{point}#{calls[point]}", value)

    with ExitStack() as hooks:
        for point in points:
            module = modules[point.removesuffix(":in")]
            if point.endswith(":in"):
                hook = module.register_forward_pre_hook(
                    lambda _module, args, point=point: (pass_through(point, args[0] if args else None), *args[1:])
                )
            else:
                hook = module.register_forward_hook(
                    lambda _module, _args, returned, point=point: pass_through(point, returned)
                )
            hooks.callback(hook.remove)
        yield
