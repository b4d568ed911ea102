"""What a study may conclude: how sure each accuracy is, which ones differ, and the sentence that recommends.

Images and seeds are resampled together (the pigeonhole bootstrap: Owen, Annals of Applied Statistics 1(2), 2007),
which errs on the wide side. Of S seeds, S - 1 are drawn each time, so that the spread of few seeds is not
underestimated (one seed leaves nothing to draw). A few invented images, half right and half wrong, join the held-out
ones before they are resampled (Agresti and Coull, 1998; for differences Bonett and Price, 2012): without them, a mixer
that is right on all of ten images would get an interval of width zero.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saccade.errors import InputError

__all__ = ["Comparison", "Interval", "accuracy_interval", "compare", "recommend"]

_BATCHES, _BATCH = 40, 250  # 10 000 resamples, of which 250 at a time stand in memory


@dataclass(frozen=True)
class Interval:
    """A value between 0 and 1 (or a difference of two) with its confidence interval, and how that was made."""

    value: float
    low: float
    high: float
    confidence: float
    method: str


@dataclass(frozen=True)
class Comparison:
    """The mixer with the highest accuracy, and its lead over each other one: best minus other, by image and seed.

    The `confidence` of a lead holds for all leads at once (Bonferroni).
    """

    best: str
    leads: dict[str, Interval]

    @property
    def tied(self) -> tuple[str, ...]:
        """The best, then those whose accuracy cannot be told apart from it, smallest lead first."""
        near = [name for name, lead in self.leads.items() if lead.low <= 0]
        return (self.best, *sorted(near, key=lambda name: self.leads[name].value))


def accuracy_interval(correct: Sequence[ArrayLike], confidence: float = 0.95, seed: int = 0) -> Interval:
    """The mean accuracy over seeds and held-out images, with a bootstrap interval over both.

    Args:
        correct: for each seed, whether each held-out image was classified rightly: (seeds, images).
        confidence: the share of such intervals that contain the true accuracy.
        seed: of the resampling.

    With one seed the interval covers the choice of images only, and its `method` says so.

    >>> accuracy_interval([[True] * 50]).high, accuracy_interval([[True] * 50]).low < 0.95
    (1.0, True)
    """
    table = _table("correct", correct)
    invented = max(1, round(NormalDist().inv_cdf((1 + confidence) / 2) ** 2 / 2))
    low, high = _bootstrap(table, [0.0, 1.0] * invented, confidence, seed)
    return Interval(float(table.mean()), low, high, confidence, _method(table))


def compare(correct: Mapping[str, Sequence[ArrayLike]], confidence: float = 0.95, seed: int = 0) -> Comparison:
    """How far the most accurate mixer leads each other one, on the same images with the same seeds.

    Args:
        correct: for each mixer what `accuracy_interval` takes, images and seeds in the same order.
        confidence: that all intervals together contain the true differences.
        seed: of the resampling.

    Raises: InputError if there is no mixer, or two of them were not tried on the same seeds and images.
    """
    tables = {name: _table(name, rows) for name, rows in correct.items()}
    if not tables:
        raise InputError("there is no mixer to compare: give the correctness of at least one.")
    best = max(tables, key=lambda name: tables[name].mean())
    others = [name for name in tables if name != best]
    for name in others:
        if tables[name].shape != tables[best].shape:
            raise InputError(
                f"{name} has (seeds, images) = {tables[name].shape} but {best} has {tables[best].shape}: "
                "compare mixers on the same held-out images and seeds."
            )
    each = 1 - (1 - confidence) / max(1, len(others))
    leads = {}
    for name in others:
        lead = tables[best] - tables[name]
        low, high = _bootstrap(lead, [-1.0, 1.0], each, seed)
        leads[name] = Interval(float(lead.mean()), low, high, confidence, f"paired {_method(lead)}, Bonferroni")
    return Comparison(best, leads)


def recommend(results: Mapping[str, Any], correct: Mapping[str, Sequence[ArrayLike]]) -> dict[str, Any]:
    """Write the "recommendation" of results.json: which mixer to take, why, how sure, and whether to trust pictures.

    Args:
        results: as in results.json, without "recommendation". `data["majority"]`, where given, is the share of the most
            frequent class among the held-out images: no mixer is recommended that does not clearly beat it.
        correct: for each mixer that finished what `accuracy_interval` takes.

    Returns: a dict that JSON can hold. `certain` is True when one mixer is more accurate than all others beyond chance;
        only then `winner` names it. Otherwise `winner` is None, and `tied` names all that cannot be told apart from
        the best (itself included). `suggested` is the winner, or the cheapest to run of the tied. `sentence`, `reasons`
        and `trust` are for people; `best` and `leads` hold the figures behind them.
    """
    mixers = {m["name"]: m for m in results.get("mixers", ()) if m.get("status") == "done" and m["name"] in correct}
    leftovers = _failures(results) + _skipped(results) + _left_out(results)
    kind = results.get("compares", "mixer")
    if not mixers:
        sentence = f"No {kind} finished, so there is nothing to recommend."
        return _record(sentence, reasons=leftovers, trust="There are no pictures to judge.")
    comparison = compare({name: correct[name] for name in mixers})
    best, tied = mixers[comparison.best], comparison.tied
    guess = _guess(results)
    learned = best["accuracy"]["low"] > guess
    certain = learned and len(mixers) > 1 and len(tied) == 1
    suggested, cost = (comparison.best, _price(mixers, comparison)) if len(tied) == 1 else _cheapest(mixers, tied)
    if not learned:
        suggested, cost = None, []
        sentence = f"No {kind} is clearly better than guessing on these images, so none is recommended."
    elif certain:
        sentence = _use(comparison, len(correct[comparison.best]))
    elif len(mixers) == 1:
        sentence = f"Only {suggested} finished, so there is nothing to compare it with."
    else:
        sentence = _tie(tied, f"{len(mixers)} {kind}s", len(mixers) == len(tied), suggested)
    guessing = [] if learned else [f"Always answering the same class would be right on about {_percent(guess)}."]
    reasons = [*guessing, *_why(mixers, comparison), _how_sure(comparison, correct[comparison.best]), *cost, *leftovers]
    trust = _trust(mixers, suggested, kind)
    return _record(sentence, comparison, comparison.best if certain else None, suggested, certain, reasons, trust)


def _table(name: str, rows: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """The correctness as (seeds, images)."""
    arrays = [np.asarray(row, dtype=np.float64) for row in rows]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) != 1 or len(shapes[0]) != 1 or 0 in shapes[0]:
        raise InputError(f"{name} holds arrays of shape {shapes}: give every seed one row over the same images.")
    return np.stack(arrays)


def _method(table: NDArray[np.float64]) -> str:
    return "bootstrap over images and seeds" if len(table) > 1 else "bootstrap over images (one seed)"


def _bootstrap(
    table: NDArray[np.float64], invented: Sequence[float], confidence: float, seed: int
) -> tuple[float, float]:
    """The interval of the table's mean. Images alike in all seeds are drawn together, as one multinomial."""
    seeds, rng = len(table), np.random.default_rng(seed)
    padded = np.concatenate([table, np.tile(invented, (seeds, 1))], axis=1)
    kinds, counts = np.unique(padded, axis=1, return_counts=True)  # (seeds, kinds), (kinds,)
    total = padded.shape[1]
    share = counts / total
    sums = np.concatenate([rng.multinomial(total, share, size=_BATCH) @ kinds.T for _ in range(_BATCHES)])
    drawn = max(1, seeds - 1)
    picks = rng.integers(seeds, size=(len(sums), drawn))
    # whole numbers are added before the one division, so that a difference of zero is exactly zero
    means = np.take_along_axis(sums, picks, axis=1).sum(axis=1) / (drawn * total)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = table.mean()
    return float(min(low, value)), float(max(high, value))


def _record(
    sentence: str,
    comparison: Comparison | None = None,
    winner: str | None = None,
    suggested: str | None = None,
    certain: bool = False,
    reasons: Sequence[str] = (),
    trust: str = "",
) -> dict[str, Any]:
    return {
        "sentence": sentence,
        "winner": winner,
        "suggested": suggested,
        "tied": list(comparison.tied) if comparison and len(comparison.tied) > 1 else [],
        "certain": certain,
        "reasons": list(reasons),
        "trust": trust,
        "best": comparison.best if comparison else None,
        "leads": {name: asdict(lead) for name, lead in comparison.leads.items()} if comparison else {},
    }


def _use(comparison: Comparison, seeds: int) -> str:
    others = list(comparison.leads)
    than = _join(others) if len(others) <= 3 else _others(len(others))
    limit = ", as far as one training run each can tell" if seeds == 1 else ""
    return f"Use {comparison.best}: on your held-out images it is more accurate than {than}{limit}."


def _tie(tied: Sequence[str], total: str, every: bool, suggested: str | None) -> str:
    share = "" if every else f"{len(tied)} of "
    who = _join(tied) if len(tied) <= 4 else f"{share}the {total}"
    sentence = f"On accuracy, {who} cannot be told apart."
    return f"{sentence} The cheapest of them to run is {suggested}." if suggested else sentence


def _why(mixers: Mapping[str, Any], comparison: Comparison) -> list[str]:
    best, leads = comparison.best, comparison.leads
    tied, beaten = comparison.tied[1:], [name for name in leads if name not in comparison.tied]
    figure = mixers[best]["accuracy"]
    ends = f"({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"
    reasons = [f"{best} has the highest accuracy: {_percent(figure['value'])} {ends}."]
    if tied:
        most = f"{100 * leads[tied[-1]].value:.1f}"
        more = f" and {_others(len(tied) - 1)} of the tied by up to {most}" if tied[1:] else ""
        reasons.append(f"It leads {tied[0]} by {_points(leads[tied[0]])}{more}. Zero lies within: it may be chance.")
    if beaten:
        nearest = min(beaten, key=lambda name: leads[name].value)
        more = f" and {_others(len(beaten) - 1)} by more" if beaten[1:] else ""
        reasons.append(f"It leads {nearest} by {_points(leads[nearest])}{more}. Chance does not explain that.")
    return reasons


def _how_sure(comparison: Comparison, correct: Sequence[ArrayLike]) -> str:
    seeds, images = len(correct), np.size(correct[0])
    sure = "The intervals in brackets hold at 95 %"
    if len(comparison.leads) > 1:
        sure += f", those of the {len(comparison.leads)} differences all at once"
    covers = f"They cover the choice of {images} held-out images"
    if seeds == 1:
        return f"{sure}. {covers} but not the luck of training, since one seed was run: more seeds would put it in."
    return f"{sure}. {covers} and the luck of training over {seeds} seeds."


def _cheapest(mixers: Mapping[str, Any], tied: Sequence[str]) -> tuple[str | None, list[str]]:
    """The tied mixer that costs least, by latency where all have one and else by FLOPs, and the words for it."""
    for cost, unit in ((_latency, "ms"), (_megaflops, "MFLOPs")):
        costs = {name: cost(mixers[name]) for name in tied}
        if max(costs.values()) < math.inf:
            first, second, *_ = sorted(tied, key=lambda name: costs[name])
            return first, [
                f"Of those that cannot be told apart, {first} is the cheapest to run: {costs[first]:.3g} {unit} an "
                f"image; next is {second} with {costs[second]:.3g}. To take it is a choice on cost, not on accuracy."
            ]
    return None, ["Their costs were not measured, so there is no ground to choose one of them."]


def _price(mixers: Mapping[str, Any], comparison: Comparison) -> list[str]:
    """What the best costs beside the fastest, which somebody may prefer."""
    costs, best = {name: _latency(mixer) for name, mixer in mixers.items()}, comparison.best
    fastest = min(costs, key=lambda name: costs[name])
    if costs[best] == math.inf or len(costs) == 1:
        return []
    if fastest == best:
        return [f"It is also the fastest: {costs[best]:.3g} ms an image."]
    return [
        f"If speed counts more: {fastest} is the fastest with {costs[fastest]:.3g} ms an image against "
        f"{costs[best]:.3g} ms, and less accurate by {_points(comparison.leads[fastest])}."
    ]


def _latency(mixer: Mapping[str, Any]) -> float:
    """Milliseconds an image; infinite where not measured, which is never the cheapest."""
    latency = mixer.get("latency_ms") or {}
    return (latency.get("median") or math.inf) / latency.get("batch", 1)


def _megaflops(mixer: Mapping[str, Any]) -> float:
    return (mixer.get("flops") or math.inf) / 1e6


def _trust(mixers: Mapping[str, Any], suggested: str | None, kind: str) -> str:
    """Whether the pictures can be believed, by the verdicts of `saccade.explain.faithfulness`."""
    verdicts = {name: (mixer.get("faithfulness") or {}).get("verdict") for name, mixer in mixers.items()}
    measured = [name for name, verdict in verdicts.items() if verdict]
    if not measured:
        return "Whether the pictures show what the models use was not measured, so do not rely on them."
    good = [name for name in measured if verdicts[name] == "better than random"]
    poor = [name for name in measured if name not in good]
    method = mixers[measured[0]]["faithfulness"].get("method", "the explanation").replace("_", " ")
    finding = f"The pictures of {method} point to what the model uses, better than chance, for"
    if not good:
        sentence = (
            f"Do not rely on the pictures of {method}: for no {kind} do they clearly find more than chance would."
        )
    elif poor:
        sentence = f"{finding} {_join(good)}, but not for {_join(poor)}: do not rely on those."
    else:
        sentence = f"{finding} {f'all {kind}s' if len(good) == len(mixers) > 1 else _join(good)}."
    abpc = (mixers[suggested].get("faithfulness") or {}).get("abpc") if suggested else None
    if not abpc:
        return sentence
    own, low, high, random, least, most = (
        f"{abpc[key]:.2f}".replace("-", "−") for key in ("value", "low", "high", "random", "random_low", "random_high")
    )
    return f"{sentence} For {suggested}: ABPC {own} ({low} to {high}), in random order {random} ({least} to {most})."


def _failures(results: Mapping[str, Any]) -> list[str]:
    failed = [mixer for mixer in results.get("mixers", ()) if mixer.get("status") == "failed"]
    return [
        f"{mixer['name']} failed and is not compared: {mixer.get('error') or 'no reason given'}" for mixer in failed
    ]


def _left_out(results: Mapping[str, Any]) -> list[str]:
    """What could not be measured or drawn of a network that was compared."""
    lines = []
    for mixer in results.get("mixers", ()):
        if mixer.get("unscaled"):
            lines.append(f"What larger images cost {mixer['name']} was not measured: {mixer['unscaled']}.")
        for method, reason in (mixer.get("unpictured") or {}).items():
            lines.append(f"{mixer['name']} has no pictures of {method.replace('_', ' ')}: {reason}.")
    return lines


def _skipped(results: Mapping[str, Any]) -> list[str]:
    count = len(results.get("data", {}).get("skipped") or ())
    if not count:
        return []
    return [f"{count} image{'s' * (count > 1)} could not be used and {'are' if count > 1 else 'is'} left out."]


def _guess(results: Mapping[str, Any]) -> float:
    data = results.get("data", {})
    return data.get("majority") or 1 / max(1, len(data.get("classes") or ()))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(lead: Interval) -> str:
    figures = [f"{100 * x:.1f}".replace("-", "−") for x in (lead.value, lead.low, lead.high)]
    return f"{figures[0]} points ({figures[1]} to {figures[2]})"


def _others(count: int) -> str:
    return "the other one" if count == 1 else f"the other {count}"


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
