"""Watch a model from outside: attention maps, gates and features of every mixer and gate that runs inside a `with`.

Mixers and gates call `record` with a function that makes the tensor; it is called only while a tap watches the
module, so watching costs nothing outside the `with`. Nothing is attached to the model: a tap is a table of module
identities on a stack of this thread. Compiled modules run eagerly inside the `with`, since a graph records nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from saccade.errors import check_choice

__all__ = ["Observation", "Seen", "record", "tap", "watched"]

KINDS = ("attention", "gate", "features")


@dataclass
class Observation:
    """What one module showed in one forward pass; what it has none of, or was not asked for, is None.

    Attributes:
        attention: (B, heads, N, M), the share of key m in the output of query n. Rows of softmax attention sum to 1;
            of mixers without a softmax it is the effective token matrix, whose rows need not.
        gate: gate values, in the shape in which the gate applies them.
        features: (B, *space, C), what the module returned.
    """

    attention: Tensor | None = None
    gate: Tensor | None = None
    features: Tensor | None = None


class Seen(Mapping[str, Observation]):
    """Module names, in the order in which they ran, and the last observation of each; `calls(name)` has all of them."""

    def __init__(self) -> None:
        self._calls: dict[str, list[Observation]] = {}

    def __getitem__(self, name: str) -> Observation:
        return self._calls[name][-1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def calls(self, name: str) -> list[Observation]:
        """Every observation of a module that ran more than once, first to last."""
        return self._calls[name]

    @property
    def attention(self) -> dict[str, Tensor]:
        """Name -> (B, heads, N, M) of the modules that showed attention."""
        return {name: seen.attention for name, seen in self.items() if seen.attention is not None}

    def _add(self, name: str, kind: str, value: Tensor) -> None:
        calls = self._calls.setdefault(name, [])
        if not calls or getattr(calls[-1], kind) is not None:  # a kind seen twice: the module ran again
            calls.append(Observation())
        setattr(calls[-1], kind, value)


@dataclass
class _Tap:
    names: dict[int, str]
    kinds: frozenset[str]
    detach: bool
    seen: Seen = field(default_factory=Seen)


_ACTIVE: ContextVar[tuple[_Tap, ...]] = ContextVar("saccade_taps", default=())


def watched(module: nn.Module, kind: str) -> bool:
    """Whether a tap would keep this kind of observation of this module."""
    return any(kind in tap.kinds and id(module) in tap.names for tap in _ACTIVE.get())


def record(module: nn.Module, kind: str, make: Callable[[], Tensor]) -> None:
    """Show `make()` to every tap that watches `module`; without one, `make` is not called."""
    if torch.compiler.is_compiling():
        return
    watching = [tap for tap in _ACTIVE.get() if kind in tap.kinds and id(module) in tap.names]
    if not watching:
        return
    value = make()
    for each in watching:
        each.seen._add(each.names[id(module)], kind, value.detach() if each.detach else value)


@contextmanager
def tap(
    model: nn.Module, *, kinds: tuple[str, ...] = KINDS, names: list[str] | None = None, detach: bool = True
) -> Iterator[Seen]:
    """Record what the mixers and gates of a model show while they run inside the `with`.

    Args:
        model: any module that contains mixers or gates, or is one (its own name is then "").
        kinds: what to keep, of "attention", "gate" and "features". A map has N x M entries a head: leave
            "attention" out where only features are wanted.
        names: module names to watch; None watches all.
        detach: cut the tensors from the graph. False keeps it, for losses on attention maps.

    Yields: Seen, filled while the model runs and still there after the `with`.
    Raises: InputError for an unknown kind or module name; RuntimeError at the end of the `with` if nothing was
        recorded, since an empty answer would look like one.

    >>> import torch, saccade
    >>> mixer = saccade.create_mixer("window", 8, num_heads=2, window_size=2)
    >>> with tap(mixer) as seen:
    ...     _ = mixer(torch.zeros(1, 4, 4, 8))
    >>> seen[""].attention.shape
    torch.Size([1, 2, 16, 16])
    """
    for kind in kinds:
        check_choice("kinds", kind, KINDS)
    modules = dict(model.named_modules())
    for name in names or ():
        check_choice("names", name, modules)
    wanted = {id(module): name for name, module in modules.items() if names is None or name in names}
    mine = _Tap(wanted, frozenset(kinds), detach)
    token = _ACTIVE.set((*_ACTIVE.get(), mine))
    try:
        with torch.compiler.set_stance("force_eager"):
            yield mine.seen
    finally:
        _ACTIVE.reset(token)
    if not mine.seen:
        raise RuntimeError(
            f"the tap on {type(model).__name__} recorded nothing of {', '.join(kinds)}: no saccade mixer or gate ran "
            "inside the `with`. Run the model inside it; put saccade mixers into a foreign model with saccade.swap"
        )
