"""A model with codebooks after named modules: trained, read as whole numbers, searched and steered.

The experiment of Codebook Features (2023, arXiv:2310.17230), for any module.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.errors import InputError, check_choice
from saccade.explain.classifier import evaluating
from saccade.explain.dictionaries.codebook import Codebook, Edit
from saccade.explain.dictionaries.matches import Matches, match_features
from saccade.explain.dictionaries.site import run_once
from saccade.explain.relevance.modules import check_points, watching

__all__ = ["CodeIndex", "CodedModel"]


class CodeIndex(NamedTuple):
    """Which codes fired where.

    Attributes:
        ids: place -> (inputs, ..., groups, k).
        num_codes: place -> codes of a group.
    """

    ids: dict[str, Tensor]
    num_codes: dict[str, int]

    def find(self, place: str, code: int, *, group: int = 0) -> Tensor:
        """(hits, axes): the number of the input and the position in it of every activation that has this code."""
        own = self._of_group(place, group)
        if not 0 <= code < self.num_codes[place]:
            raise InputError(f"code is {code}: {place!r} has codes 0 to {self.num_codes[place] - 1}")
        return (own == code).any(-1).nonzero()

    def fired(self, place: str, *, group: int = 0) -> Tensor:
        """(inputs, ..., codes), whether each code is one of an activation's."""
        own = self._of_group(place, group)
        return F.one_hot(own, self.num_codes[place]).amax(-2).bool()

    def match(self, place: str, labels: Tensor, *, group: int = 0) -> Matches:
        """How well each code detects each value of a label (inputs, ...), one for each activation."""
        fired = self.fired(place, group=group)
        if labels.shape != fired.shape[:-1]:
            raise InputError(f"labels are {tuple(labels.shape)}: {place!r} has activations {tuple(fired.shape[:-1])}")
        return match_features(fired.flatten(0, -2), labels.flatten())

    def _of_group(self, place: str, group: int) -> Tensor:
        check_choice("place", place, self.ids)
        own = self.ids[place]
        if not 0 <= group < own.shape[-2]:
            raise InputError(f"group is {group}: {place!r} has {own.shape[-2]} group(s)")
        return own[..., group, :]


class CodedModel(nn.Module):
    """A copy of a model in which activations at named places are replaced by their codes. Call and train it as before.

    Args:
        model: stays as it is; `copy=False` trains its own parameters, and still leaves its forward pass alone.
        codebooks: place -> codebook. A place is the name of a module whose output is one tensor, or
            "NAME:in", its first input: "blocks.0.attention.proj:in" with a group a head is what each head gives before
            they are mixed. On the branch of a residual, what goes around stays continuous.
        copy: see model.
        axis: where the channels are at all places: -1, or 1 for maps (B, C, H, W), whose ids are (B, H, W, groups, k).
    """

    def __init__(
        self, model: nn.Module, codebooks: Mapping[str, Codebook], *, copy: bool = True, axis: int = -1
    ) -> None:
        super().__init__()
        if not codebooks:
            raise InputError("no codebooks are given: name a module for each, such as {'blocks.0.mlp': codebook}")
        check_points(model, list(codebooks))
        self.model = deepcopy(model) if copy else model
        self.places, self.axis = tuple(codebooks), axis
        self.books = nn.ModuleList(codebooks.values())
        self._edits: dict[str, Edit] = {}

    @property
    def codebooks(self) -> dict[str, Codebook]:
        """Place -> codebook."""
        return dict(zip(self.places, self.books))  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with watching(self.model, self.places, self._replace):
            return self.model(*args, **kwargs)

    def _replace(self, point: str, x: Tensor) -> Tensor:
        place = point.partition("#")[0]  # a later call of the same module has the same codes
        coded: Tensor = self.codebooks[place](x.movedim(self.axis, -1), self._edits.get(place))
        return coded.movedim(-1, self.axis)

    @contextmanager
    def editing(self, edits: Mapping[str, Edit]) -> Iterator[None]:
        """Change the ids at some places while the `with` lasts: place -> edit, as `force_codes` makes one."""
        for place in edits:
            check_choice("place", place, self.places)
        before, self._edits = self._edits, {**self._edits, **edits}
        try:
            yield
        finally:
            self._edits = before

    def read(self, *args: Any) -> dict[str, Tensor]:
        """Place -> ids (..., groups, k) of one call, in eval mode without gradients.

        Raises: InputError where a place did not run, or ran more than once.
        """
        return self._collect(args, lambda place, x: self._choose(place, x), coded=True)

    def index(self, inputs: Iterable[Tensor]) -> CodeIndex:
        """The codes of all inputs, which come in batches of the same shape but for the first axis."""
        parts = [self.read(batch) for batch in inputs]
        if not parts:
            raise InputError("there are no inputs to index")
        ids = {place: torch.cat([part[place] for part in parts]) for place in self.places}
        return CodeIndex(ids, {place: book.num_codes for place, book in self.codebooks.items()})

    def initialise(self, *args: Any, seed: int = 0) -> None:
        """Set all codes by k-means from what the model shows at each place of one call, without codes in between."""
        seen = self._collect(args, lambda _, x: x, coded=False)
        for place, x in seen.items():
            self.codebooks[place].initialise(x, seed=seed)

    def replace_dead(self, *args: Any, noise: float = 0.0, generator: torch.Generator | None = None) -> dict[str, int]:
        """Give codes that training did not use since the last time activations of this call; how many, by place."""
        seen = self._collect(args, lambda _, x: x, coded=True)
        return {
            place: self.codebooks[place].replace_dead(x, noise=noise, generator=generator) for place, x in seen.items()
        }

    def _choose(self, place: str, x: Tensor) -> Tensor:
        ids, edit = self.codebooks[place].encode(x), self._edits.get(place)
        return ids if edit is None else edit(ids)

    def _collect(self, args: Sequence[Any], take: Callable[[str, Tensor], Tensor], *, coded: bool) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def see(place: str, x: Tensor) -> Tensor:
            seen[place] = take(place, x.clone().movedim(self.axis, -1))
            return self._replace(place, x) if coded else x

        with evaluating(self, grad=False):  # codebooks count nothing
            run_once(self.model, args, self.places, see)
        return seen
