"""Scores of named parts as sentences whose numbers are the scores' own (Feldhus et al., 2022, arXiv:2210.07222).

Parts are the tokens of a text, in order, or the regions of an image. Small groups of parts whose mean score beats a
threshold are candidates; those that cover most are joined into spans, and templates say what share of the positive
relevance each span holds.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.errors import InputError, check_choice
from saccade.explain.classifier import check_whole
from saccade.explain.statements import Group, Statement, check_sentences, percent, read_names, read_scores

__all__ = [
    "AREAS",
    "TOKENS",
    "Span",
    "Verbalization",
    "Wording",
    "list_filters",
    "name_cells",
    "score_regions",
    "verbalize",
    "verbalize_map",
]

_METRICS = {"mean": 0.4, "deviation": 1.0, "variance": 1.0}
_FORMS = ("corrected", "coded")
_LONGEST = 11  # 2 ** 11 filters; one more doubles them
_ROUNDING = 1e-9  # of the largest score: equal scores must not beat their own mean by an error of rounding
_TOP = 5  # candidates of each search that may be quoted


class Wording(NamedTuple):
    """Templates of sentences.

    Attributes:
        first: of the span that covers most; {kind}, {quote} and {percent} are filled in.
        further: of all others.
        nothing: says that no part is quoted.
        between: stands between the names of a span.
        decimals: of a percentage.
    """

    first: str
    further: str
    nothing: str
    between: str = " "
    decimals: int = 2


TOKENS = Wording(
    "The {kind} » {quote} « is most important for the prediction, with {percent} % of the positive relevance.",
    "The {kind} » {quote} « is also salient, with {percent} %.",
    "No word stands out.",
)
AREAS = Wording(
    "Most important for the prediction: {quote}, with {percent} % of the positive relevance.",
    "Also salient: {quote}, with {percent} %.",
    "No area stands out.",
    ", ",
)


@dataclass(frozen=True)
class Span:
    """Parts that lie together.

    Attributes:
        indices: of the parts, rising.
        names: theirs.
        value: their mean score, in units of the largest score; on an image, their mean over pixels, in units of the
            largest part's.
        share: their sum, as a share of the sum of all positive scores.
    """

    indices: Group
    names: tuple[str, ...]
    value: float
    share: float

    @property
    def percent(self) -> float:
        """The share in percent."""
        return 100 * self.share


@dataclass(frozen=True)
class Verbalization:
    """What `verbalize` and `verbalize_map` say.

    Attributes:
        sentences: one a span, or the one that says that there is none.
        spans: what is quoted, from large to small.
        scores: (parts,) float64, of which shares are.
        names: of the parts.
        threshold: what the value of each span beats, in its unit.
        candidates: groups of parts that beat it, by the search that found them, with their values.
        regions: (H, W) long, the part of each pixel; None for a text.
    """

    sentences: tuple[str, ...]
    spans: tuple[Span, ...]
    scores: Tensor
    names: tuple[str, ...]
    threshold: float
    candidates: Mapping[str, Mapping[Group, float]] = field(repr=False)
    regions: Tensor | None = field(default=None, repr=False)

    @property
    def text(self) -> str:
        """The sentences, with blanks between them."""
        return " ".join(self.sentences)

    def __str__(self) -> str:
        return self.text

    def list_parts(self, count: int | None = None) -> tuple[Span, ...]:
        """The `count` single parts with the largest scores above 0, from large to small; None lists all of them."""
        order = [part for part in self.scores.argsort(descending=True, stable=True).tolist() if self.scores[part] > 0]
        values = _divide(self.scores, self._sizes)
        return tuple(_make_span((part,), self.scores, self.names, values, self._sizes) for part in order[:count])

    @property
    def _sizes(self) -> Tensor:
        return _count_pixels(self.regions, len(self.names))

    def check(self, source: Tensor | None = None) -> tuple[Statement, ...]:
        """Read the percentages back from the text and hold them against the scores.

        Args:
            source: the scores, or the map, to compute anew from; None takes the scores kept here.
        """
        if source is None:
            source = self.scores
        elif self.regions is not None:
            source = score_regions(source, self.regions, len(self.names))
        return check_sentences(self.text, source, self.names, ordered=self.regions is None)


def verbalize(
    scores: Tensor | Sequence[float],
    names: Sequence[str],
    *,
    metric: str = "mean",
    value: float | None = None,
    filter_length: int = 5,
    sign: str | None = "+",
    quantile: float = 0.75,
    wording: Wording = TOKENS,
    form: str = "corrected",
) -> Verbalization:
    """Say which words, in the order of a text, its scores hold to be important.

    Candidates are found three times: "convolution", groups of 2 to `filter_length` - 2 tokens within a window of that
    length, gaps allowed; "span", odd runs up to that length; "total", single tokens. The five of each that hold the
    largest share are joined where they meet. A run whose mean does not beat the threshold loses its weakest token, and
    falls apart there, until what is left does: so every quoted span is above the threshold. Tokens at its ends that
    speak for nothing are cut off.

    Args:
        scores: (N,), one a token, large where it speaks for the prediction.
        names: the tokens.
        metric: how the threshold is made of the scores divided by their largest: "mean", of the share `value` of
            largest scores (at least two of them); "deviation" and "variance", `value` times that, of the population.
            It is never below 0.
        value: None is 0.4 for "mean" and 1 for the others.
        filter_length: odd, 3 to 11.
        sign: "+" leaves out groups with a score below 0; None takes them. For what speaks against the prediction,
            give -scores.
        quantile: spans are quoted whose share reaches this quantile of all spans' shares.
        wording: templates.
        form: "corrected"; "coded" is the authors' code, for comparison with it: float32, scores divided by the
            absolute value of their largest, the last window left out, the last token of a group not counted in what
            it covers, no single tokens, ties from the end, runs quoted whether or not their mean beats the threshold.
            It knows "-" too, for groups with all scores below 0, which only a filter without zeros can find.

    Returns: Verbalization; without spans where no score is positive, or none beats the threshold.
    Raises: InputError for wrong arguments.

    >>> found = verbalize([0.1, 0.0, 0.7, 0.6, 0.1, -0.2, 0.0, 0.0], "a most brilliant film of his , perhaps".split())
    >>> found.text
    'The phrase » brilliant film « is most important for the prediction, with 86.67 % of the positive relevance.'
    >>> [(span.indices, round(span.share, 4)) for span in found.spans]
    [((2, 3), 0.8667)]
    """
    found = read_scores(scores)
    names = read_names(names, len(found))
    check_choice("form", form, _FORMS)
    coded = form == "coded"
    if sign not in ("+", None, *("-" if coded else ())):
        raise InputError(f'sign is {sign!r}: give "+" or None; for what speaks against the prediction give -scores')
    check_whole("filter_length", filter_length, 3, _LONGEST)
    if filter_length % 2 == 0:
        raise InputError(
            f"filter_length is {filter_length}: a run has no centre in a filter of even length. Give "
            f"{filter_length - 1} or {min(filter_length + 1, _LONGEST)}"
        )
    limit, scaled = _scale(found, metric, value, quantile, coded)
    searches: dict[str, dict[Group, float]] = {"convolution": {}, "span": {}, "total": {}}
    if coded or (found > 0).any():
        filters = list_filters(filter_length)
        searches = {name: _slide(scaled, filters[name], limit, sign, coded) for name in ("convolution", "span")}
        if not coded:
            searches["total"] = {(i,): each for i, each in enumerate(scaled.tolist()) if each > limit}

    def touching(part: int) -> tuple[int, int]:
        return part - 1, part + 1

    sizes = _count_pixels(None, len(found))
    spans = _choose(found, names, scaled, sizes, limit, searches, touching, quantile, coded)
    return Verbalization(_write(spans, wording), spans, found, names, limit, searches)


def verbalize_map(
    map: Tensor,
    names: Sequence[str] | None = None,
    *,
    grid: int | tuple[int, int] = 3,
    regions: Tensor | None = None,
    metric: str = "mean",
    value: float | None = None,
    reach: int = 3,
    quantile: float = 0.75,
    wording: Wording = AREAS,
) -> Verbalization:
    """Say in which parts of an image the positive relevance lies.

    A part's score is the sum of its pixels' values above 0, so that a share is a share of the map's positive relevance;
    the threshold is held against the mean over its pixels, so that a part does not stand out by its size. Candidates
    are single parts ("total") and groups of up to `reach` parts that touch ("span"), all of which are above the mean of
    the map, since an image needs no filling words; then all is as in `verbalize`, where parts meet that share an edge.

    Args:
        map: (H, W), large where a pixel speaks for the prediction; one image's `Explanation.map[i]`. For what speaks
            against it, give -map.
        names: of the parts; None names a grid's cells by where they stand, "top left" or "row 2 column 7".
        grid: cells of a side, or (rows, columns), where there are no `regions`.
        regions: (H, W) whole numbers, superpixels or segments: the index of each pixel's name. Every pixel needs a
            part, so that shares are of the whole map: call the rest "elsewhere".
        metric, value, quantile: as in `verbalize`.
        reach: most parts of a candidate.
        wording: templates.

    Returns: Verbalization; without spans where no value is positive, or no part beats the threshold.
    Raises: InputError for wrong arguments.

    >>> map = torch.zeros(6, 9)
    >>> map[0, :3], map[5, 4] = 2.0, 2.0
    >>> found = verbalize_map(map)
    >>> found.text
    'Most important for the prediction: top left, with 75.00 % of the positive relevance.'
    >>> [(statement.quote, statement.holds) for statement in found.check(map)]
    [('top left', True)]
    """
    _check_map(map)
    check_whole("reach", reach, 1, 4)
    if regions is None:
        rows, columns = _read_grid(grid, map)
        regions = _cut_grid(map.shape[0], map.shape[1], rows, columns)
        names = name_cells(rows, columns) if names is None else names
        names = read_names(names, rows * columns, unique=True)
    else:
        if names is None:
            raise InputError("regions have no names: give one for each number in regions, as names=[...]")
        names = read_names(names, len(names), unique=True)
        regions = _read_regions(regions, map, len(names))
    scores, sizes = score_regions(map, regions, len(names)), _count_pixels(regions, len(names))
    limit, scaled = _scale(_divide(scores, sizes), metric, value, quantile, False)
    beside = _find_neighbours(regions, len(names))
    level = (scaled * sizes).sum() / sizes.sum()
    strong = {part for part, each in enumerate(scaled) if each > level}
    groups = _grow({part: beside[part] & strong for part in strong}, reach)
    values = {group: _mean(scaled, group, sizes) for group in groups}
    kept = {group: each for group, each in values.items() if each > limit}
    searches: dict[str, dict[Group, float]] = {
        "span": {group: each for group, each in kept.items() if len(group) > 1},
        "total": {group: each for group, each in kept.items() if len(group) == 1},
    }
    spans = _choose(scores, names, scaled, sizes, limit, searches, beside.__getitem__, quantile, False)
    return Verbalization(_write(spans, wording), spans, scores, names, limit, searches, regions)


def list_filters(length: int) -> dict[str, list[Group]]:
    """The places of the ones in every filter of each search.

    >>> filters = list_filters(5)
    >>> len(filters["convolution"]), filters["span"]
    (20, [(1, 2, 3), (0, 1, 2, 3, 4)])
    """
    convolution = [ones for count in range(2, length - 1) for ones in combinations(range(length), count)]
    runs = range(3, length + 1, 2)
    span = [tuple(range((length - count) // 2, (length + count) // 2)) for count in runs]
    return {"convolution": convolution, "span": span}


def score_regions(map: Tensor, regions: Tensor, count: int) -> Tensor:
    """(count,) float64: the sum of a map's values above 0 in each region; both (H, W)."""
    _check_map(map)
    if map.shape != regions.shape:
        raise InputError(f"the map is {tuple(map.shape)} but regions are {tuple(regions.shape)}: give one of this size")
    positive = map.detach().cpu().double().clamp(min=0).flatten()
    return positive.new_zeros(count).index_add(0, regions.flatten(), positive)


def name_cells(rows: int, columns: int) -> tuple[str, ...]:
    """Names of a grid's cells by where they stand, row by row.

    >>> name_cells(2, 3)
    ('top left', 'top', 'top right', 'bottom left', 'bottom', 'bottom right')
    >>> name_cells(1, 6)[5]
    'row 1 column 6'
    """
    if rows not in _ROWS or columns not in _COLUMNS:
        return tuple(f"row {row} column {column}" for row in range(1, rows + 1) for column in range(1, columns + 1))
    pairs = product(_ROWS[rows], _COLUMNS[columns])
    return tuple(" ".join(filter(None, pair)) or "centre" for pair in pairs)


_ROWS = {
    1: ("",),
    2: ("top", "bottom"),
    3: ("top", "", "bottom"),
    4: ("top", "upper middle", "lower middle", "bottom"),
    5: ("top", "upper", "", "lower", "bottom"),
}
_COLUMNS = {
    1: ("",),
    2: ("left", "right"),
    3: ("left", "", "right"),
    4: ("far left", "left", "right", "far right"),
    5: ("far left", "left", "", "right", "far right"),
}


def _cut_grid(height: int, width: int, rows: int, columns: int) -> Tensor:
    """(H, W) long: the cell of each pixel; cells differ by at most a pixel a side."""
    return (torch.arange(height) * rows // height)[:, None] * columns + torch.arange(width) * columns // width


def _find_neighbours(regions: Tensor, count: int) -> list[set[int]]:
    """Which regions share an edge of a pixel with each."""
    beside: list[set[int]] = [set() for _ in range(count)]
    for one, other in ((regions[1:], regions[:-1]), (regions[:, 1:], regions[:, :-1])):
        for a, b in torch.stack([one.flatten(), other.flatten()]).unique(dim=1).T.tolist():
            if a != b:
                beside[a].add(b)
                beside[b].add(a)
    return beside


def _grow(beside: dict[int, set[int]], reach: int) -> list[Group]:
    """All groups of up to `reach` parts that hang together."""
    groups: set[Group] = {(part,) for part in beside}
    newest = groups
    for _ in range(reach - 1):
        newest = {
            tuple(sorted({*group, other})) for group in newest for part in group for other in beside[part] - {*group}
        }
        groups = groups | newest
    return sorted(groups)


def _scale(scores: Tensor, metric: str, value: float | None, quantile: float, coded: bool) -> tuple[float, Tensor]:
    """The threshold, and the scores divided by their largest."""
    check_choice("metric", metric, _METRICS)
    value = _METRICS[metric] if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"value is {value!r}: give a number above 0, such as {_METRICS[metric]}")
    if metric == "mean" and value > 1:
        raise InputError(f"value is {value}: give the share of largest scores that the mean is of, 0 to 1")
    if not 0 <= quantile <= 1:
        raise InputError(f"quantile is {quantile}: give a number from 0, which quotes every span, to 1")
    scaled = scores / (scores.max().abs() or 1)
    scaled = scaled.float() if coded else scaled
    count = int(len(scores) * value) if metric == "mean" else 0
    limit = {
        "mean": lambda: scaled.topk(min(len(scores), max(count, 1 if coded else 2))).values.mean(),
        "deviation": lambda: value * scaled.std(correction=0),
        "variance": lambda: value * scaled.var(correction=0),
    }[metric]()
    return limit.item() if coded else max(limit.item(), 0.0) + _ROUNDING, scaled


def _slide(scaled: Tensor, filters: list[Group], limit: float, sign: str | None, coded: bool) -> dict[Group, float]:
    """Groups under the ones of a filter, anywhere in the sequence, whose mean is above the limit."""
    length = 1 + max(max(ones) for ones in filters) if filters else 0
    overhang = 0 if coded else length - 1  # of zeros alone: what lies outside is NaN, and above nothing
    padded = pad(scaled, (overhang, overhang), value=torch.nan)
    if not filters or len(padded) < length:
        return {}
    windows = padded.unfold(0, length, 1)
    windows = windows[:-1] if coded else windows
    found = {}
    for ones in filters:
        chosen = windows[:, list(ones)]
        means = chosen.mean(1)
        fits = means > limit
        if sign == "+":
            fits &= (chosen >= 0).all(1)
        elif sign == "-":  # as coded, a filter's zeros are not below 0 either
            fits &= (chosen < 0).all(1) & (len(ones) == length)
        for start in fits.nonzero().flatten().tolist():
            found[tuple(start - overhang + one for one in ones)] = means[start].item()
    return found


def _choose(
    scores: Tensor,
    names: tuple[str, ...],
    scaled: Tensor,
    sizes: Tensor,
    limit: float,
    searches: Mapping[str, Mapping[Group, float]],
    touching: Callable[[int], Iterable[int]],
    quantile: float,
    coded: bool,
) -> tuple[Span, ...]:
    """The spans to quote, from large to small."""
    total = scores.clamp(min=0).sum().item()

    def cover(group: Group) -> float:
        if coded:
            return max(scores[group[0] : group[-1]].sum().item() / total, 0)
        return percent(scores, group, total)

    parts: set[int] = set()
    for groups in searches.values() if total > 0 else ():
        if coded:
            best = sorted(groups, key=lambda group: (cover(group), group), reverse=True)
        else:
            best = sorted(groups, key=lambda group: (-cover(group), group))
        parts |= {part for group in best[:_TOP] for part in group}
    runs, kept = _fall_apart(parts, touching), []
    while runs:
        run = runs.pop()
        if coded or _mean(scaled, run, sizes) > limit:
            kept.append(run if coded else _cut_ends(run, scores))
        else:
            weakest = min(run, key=lambda part: (scaled[part].item(), part))
            runs += _fall_apart(set(run) - {weakest}, touching)
    if not kept:
        return ()
    covers = {run: cover(run) for run in kept}
    least = torch.tensor(list(covers.values()), dtype=torch.double).quantile(quantile).item()
    ranked = sorted((run for run in kept if covers[run] >= least), key=lambda run: (-covers[run], run))
    return tuple(_make_span(run, scores, names, scaled, sizes) for run in ranked)


def _cut_ends(run: Group, scores: Tensor) -> Group:
    """Without parts at its ends whose score is not above 0."""
    inside = [place for place, part in enumerate(run) if scores[part] > 0]
    return run[inside[0] : inside[-1] + 1]


def _fall_apart(parts: set[int], touching: Callable[[int], Iterable[int]]) -> list[Group]:
    """The pieces that hang together."""
    left, pieces = set(parts), []
    while left:
        edge = [left.pop()]
        piece = []
        while edge:
            part = edge.pop()
            piece.append(part)
            beside = left.intersection(touching(part))
            left -= beside
            edge += beside
        pieces.append(tuple(sorted(piece)))
    return pieces


def _make_span(parts: Group, scores: Tensor, names: tuple[str, ...], scaled: Tensor, sizes: Tensor) -> Span:
    share = scores[list(parts)].sum().item() / scores.clamp(min=0).sum().item()
    return Span(parts, tuple(names[part] for part in parts), _mean(scaled, parts, sizes), share)


def _mean(scaled: Tensor, parts: Group, sizes: Tensor) -> float:
    of = list(parts)
    return ((scaled[of] * sizes[of]).sum() / sizes[of].sum()).item()


def _count_pixels(regions: Tensor | None, count: int) -> Tensor:
    """(count,) float64: the weight of each part in a mean; tokens all have the same."""
    if regions is None:
        return torch.ones(count, dtype=torch.double)
    return regions.flatten().bincount(minlength=count).double()


def _divide(scores: Tensor, sizes: Tensor) -> Tensor:
    """Scores a pixel, in units of the largest; 0 for a part without pixels."""
    means = scores / sizes.clamp(min=1)
    return means / (means.max().abs() or 1)


def _write(spans: tuple[Span, ...], wording: Wording) -> tuple[str, ...]:
    sentences: list[str] = []
    for span in spans:
        quote = wording.between.join(span.names)
        kind = "word" if len(span.names) == 1 else "span" if "." in quote else "phrase"
        template = wording.further if sentences else wording.first
        sentences.append(template.format(kind=kind, quote=quote, percent=f"{span.percent:.{wording.decimals}f}"))
    return tuple(sentences) or (wording.nothing,)


def _check_map(map: Tensor) -> None:
    if not isinstance(map, Tensor) or map.ndim != 2 or not map.numel() or not map.isfinite().all():
        given = f"of shape {tuple(map.shape)}" if isinstance(map, Tensor) else f"a {type(map).__name__}"
        raise InputError(f"the map is {given}: give the finite map of one image, (H, W), such as explanation.map[0]")


def _read_grid(grid: int | tuple[int, int], map: Tensor) -> tuple[int, int]:
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    check_whole("rows of the grid", rows, 1, map.shape[0])
    check_whole("columns of the grid", columns, 1, map.shape[1])
    return rows, columns


def _read_regions(regions: Tensor, map: Tensor, count: int) -> Tensor:
    if not isinstance(regions, Tensor) or regions.shape != map.shape or regions.is_floating_point():
        given = f"{regions.dtype} {tuple(regions.shape)}" if isinstance(regions, Tensor) else type(regions).__name__
        raise InputError(f"regions are {given}: give whole numbers of the map's size {tuple(map.shape)}")
    regions = regions.detach().cpu().long()
    if regions.min() < 0 or regions.max() >= count:
        raise InputError(
            f"regions hold {regions.min()} to {regions.max()} but there are {count} names: give 0 to {count - 1}; "
            'pixels of no region need one too, called "elsewhere" for instance'
        )
    return regions
