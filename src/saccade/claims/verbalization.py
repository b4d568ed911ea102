"""Saliency map verbalization: scores of tokens as sentences whose numbers can be held against them."""

import math
import re
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from saccade.claims.framework import Case, Paper, at_least, claim, encode_result, exact, rounding
from saccade.errors import InputError
from saccade.explain import Verbalization, Wording, check_sentences, verbalize
from saccade.explain.verbalization import list_filters

PAPER = Paper(
    title="Saliency Map Verbalization: Comparing Feature Importance Representations from Model-free and "
    "Instruction-based Methods",
    arxiv="2210.07222",
    published="2022-10-13",
    summary="Binary filters slide over the scores of a text; groups of tokens above a threshold are ranked by the "
    "share of positive scores that they cover, joined into spans, and put into templates. The sentences are faithful "
    "to the scores by construction, which a language model's are not: any text's percentages can be read back.",
    home=("saccade.explain.verbalize", "saccade.explain.verbalize_map", "saccade.explain.check_sentences"),
    missing=("sentences of a language model, and the study with people who read them",),
    differences=(
        "Official code leaves the last token of a group out of what it covers, so that a single token covers nothing, "
        "and never tries the last window: ours does by default, and form='coded' is as coded.",
        "Groups that are joined may fall below the threshold, and are quoted all the same; by default ours fall apart "
        "at their weakest token until what is left beats it, and tokens at the ends that speak for nothing go.",
        "Official code raises an error where nothing is above the threshold; ours says so in a sentence.",
        "Scores are divided by the absolute value of their largest, so that scores all below 0 are quoted too; by "
        "default ours quotes nothing then.",
        "Single tokens all cover 0 in official code, and which five of these ties it takes is not recorded: the coded "
        "form takes none, which fits the recorded cases.",
        "Official code takes filters of even length, whose runs have no centre; ours refuses them.",
        "For images, parts are cells of a grid or regions, and candidates are groups of parts that touch.",
    ),
)

DEFINITION = "the search, from the card of its code"
EXPERIMENT = "an experiment of ours: two topics of Python's documentation, naive Bayes"
TOPICS = ("compound", "formatstrings")


@claim("equivalence", {"groups": 0.0, "values": 0.0}, rounding, source=DEFINITION)
def sliding_filters_are_the_definition() -> dict[str, float]:
    """Groups and values are those of a search through all pairs and triples of tokens within five: how many groups
    differ, and the largest difference of values."""
    scores = torch.randn(40, dtype=torch.float64)
    found = verbalize(scores, ["x"] * 40)
    scaled = scores / scores.max()
    written = {}
    for count in (2, 3):
        for group in combinations(range(40), count):
            mean = scaled[list(group)].mean().item()
            if group[-1] - group[0] < 5 and scaled[list(group)].min() >= 0 and mean > found.threshold:
                written[group] = mean
    ours = found.candidates["convolution"]
    return {
        "groups": float(len(ours.keys() ^ written.keys())),
        "values": max(abs(ours[group] - written[group]) for group in ours.keys() & written.keys()),
    }


@claim("property", {"above the threshold": 1.0, "percentages": 1.0}, source="faithfulness by construction")
def every_span_beats_the_threshold_and_every_percentage_recomputes() -> dict[str, float]:
    """Of all spans quoted for 200 random texts, the share whose mean beats the threshold, and of all percentages, read
    back from the sentences, the share that the scores give."""
    said = [verbalize(scores, words, quantile=0.0) for scores, words in _texts()]
    statements = [statement.holds for each in said for statement in each.check()]
    assert len(statements) == sum(len(each.spans) for each in said)
    return {"above the threshold": _above(said), "percentages": sum(statements) / len(statements)}


@claim(
    "property",
    1.0,
    source="faithfulness by construction",
    guess="the coded form joins groups that beat the threshold into runs that need not",
)
def spans_of_the_coded_form_beat_the_threshold() -> float:
    """The same of the published code: the share of quoted spans whose mean beats the threshold."""
    return _above([verbalize(scores, words, form="coded") for scores, words in _texts()])


@claim("property", {"a factor": 1.0, "a shift": True}, source="normalisation by the largest score")
def a_factor_changes_nothing_and_a_shift_does() -> dict[str, float | bool]:
    """The share of 200 random texts whose sentences are the same after a factor of 0.01 and of 37, and whether a shift
    of all scores by 0.5 changes some."""
    texts = _texts()
    before = [verbalize(scores, words).text for scores, words in texts]
    same = [
        verbalize(factor * scores, words).text == text
        for (scores, words), text in zip(texts, before)
        for factor in (0.01, 37.0)
    ]
    shifted = [verbalize(scores + 0.5, words).text for scores, words in texts]
    return {"a factor": sum(same) / len(same), "a shift": shifted != before}


@claim(
    "complexity",
    {f"L = {length}": sum(math.comb(length, count) for count in range(2, length - 1)) for length in (3, 5, 7, 9, 11)},
    source="the filters",
)
def filters_are_all_patterns_with_two_to_all_but_two_ones() -> dict[str, int]:
    """Filters of the convolution by their length L: the sum of C(L, i) for i from 2 to L - 2, which is 20 for 5."""
    return {f"L = {length}": len(set(list_filters(length)["convolution"])) for length in (3, 5, 7, 9, 11)}


@claim("property", {"true": 1.0, "forged": 0.0}, exact, source="misquoted numbers, of texts from language models")
def misquoted_percentages_are_found() -> dict[str, float]:
    """Read back from sentences in the words of the published code, the share of percentages that is taken for right: as
    written, and each moved by two hundredths."""
    true: list[bool] = []
    forged: list[bool] = []
    for scores, words in _texts():
        said = verbalize(scores, words, quantile=0.0)
        for shift, verdicts in ((0.0, true), (0.02, forged)):
            text = " ".join(
                f"snippet: '{' '.join(span.names)}' contains {span.percent + shift:.2f}% of prediction score."
                for span in said.spans
            )
            verdicts += [each.holds for each in check_sentences(text, scores, [*words])]
    return {"true": sum(true) / len(true), "forged": sum(forged) / len(forged)}


@claim(
    "accuracy",
    "over 0.8",
    at_least(0.8, "the card's figure for an experiment of this kind"),
    source=EXPERIMENT,
)
def without_the_quoted_span_the_class_is_less_likely() -> float:
    """The share of 60 sentences whose class falls more in probability without the first span quoted than without a
    random span of equal length, on average over 20 of them."""
    bayes, sentences = _bayes()
    wins = []
    for words, label in sentences:
        weights = bayes.weigh(words) * (1 if label else -1)
        said = verbalize(weights, words)
        if not said.spans:
            continue
        quoted = said.spans[0].indices
        rest = [word for place, word in enumerate(words) if place not in quoted]
        chance = []
        for start in torch.randint(len(words) - len(quoted) + 1, (20,)).tolist():
            chance.append(bayes.predict(words[:start] + words[start + len(quoted) :], label))
        wins.append(bayes.predict(rest, label) < sum(chance) / len(chance))
    return sum(wins) / len(wins)


@claim(
    "accuracy",
    "language models read best, templates help least, all text is easier than heat maps",
    source="the study with readers, recalled",
    needs="people who read the sentences, and a language model that writes them",
)
def readers_prefer_fluent_text() -> None:
    """Simulatability, helpfulness and ease of the two ways to verbalise and of heat maps, rated by people."""


_METRICS = {"quantile": "deviation"}  # named so in the code; it is a multiple of the standard deviation
_WORDING = Wording(
    "The {kind} » {quote} « is most important for the prediction", "The {kind} » {quote} « is also salient", ""
)


def replay(case: Case) -> dict[str, Tensor]:
    """Both searches, the summary and the total order of the published code, for each text of the case."""
    outputs: dict[str, Tensor] = {}
    for number, record in enumerate(case.record.get("cases") or ()):
        scores = case.tensors.get(f"in.{number}.attributions")
        if scores is None:
            raise InputError(f"{case.key}/{case.name} has no in.{number}.attributions: give the scores of each text")
        metric: dict[str, Any] = record["metric"]
        said = verbalize(
            scores,
            record["words"],
            metric=_METRICS.get(metric["name"], metric["name"]),
            value=metric["value"],
            filter_length=record["filter_length"],
            sign=record["sgn"],
            wording=_WORDING,
            form="coded",
        )
        found: dict[str, Any] = {"summary": said.text}
        for search in ("convolution", "span"):
            groups = sorted(said.candidates[search].items(), reverse=True)
            found[f"{search} search.indices"] = [group for group, _ in groups]
            found[f"{search} search.values"] = [[value] for _, value in groups]
        listed = said.list_parts(len(record.get("out", {}).get("total order", ())))
        found["total order"] = [
            f"Token '{part.names[0]}' with {round(part.percent, 2)}% of prediction score" for part in listed
        ]
        outputs |= {f"out.{number}.{name}": encode_result(value) for name, value in found.items()}
    if not outputs:
        raise InputError(f"{case.key}/{case.name} lists no cases: give each text's words, metric, filter length, sign")
    return outputs


@cache
def _texts() -> list[tuple[Tensor, tuple[str, ...]]]:
    """Scores and words of 200 random texts of 5 to 44 words, which are all different, so that a quote has one place."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 45, (200,), generator=generator).tolist()
    return [
        (torch.randn(length, generator=generator, dtype=torch.float64), tuple(f"word{i}" for i in range(length)))
        for length in lengths
    ]


def _above(said: list[Verbalization]) -> float:
    beats = [span.value > each.threshold for each in said for span in each.spans]
    return sum(beats) / len(beats)


class _Bayes:
    """Log-odds of words between two topics, and of sentences, whose words are independent."""

    def __init__(self, counts: Tensor, index: dict[str, int]) -> None:
        chances = (counts + 1) / (counts + 1).sum(1, keepdim=True)
        self.odds, self.index = (chances[1] / chances[0]).log(), index

    def weigh(self, words: list[str]) -> Tensor:
        """Log-odds that each word adds."""
        return torch.stack([self.odds[self.index[word]] for word in words])

    def predict(self, words: list[str], label: int) -> float:
        """The probability of a topic."""
        odds = self.weigh(words).sum() if words else torch.zeros(())
        return torch.sigmoid(odds if label else -odds).item()


@cache
def _bayes() -> tuple[_Bayes, list[tuple[list[str], int]]]:
    """Naive Bayes of every other sentence, and 60 of the sentences between, which it takes for what they are."""
    from pydoc_data.topics import topics

    sentences: list[tuple[list[str], int]] = []
    for label, topic in enumerate(TOPICS):
        for text in re.split(r"[.:]\s", topics[topic]):
            words = re.findall(r"[a-z]+", text.lower())
            if 10 <= len(words) <= 40:
                sentences.append((words, label))
    index = {word: place for place, word in enumerate(sorted({word for words, _ in sentences for word in words}))}
    counts = torch.zeros(2, len(index), dtype=torch.float64)
    for words, label in sentences[::2]:
        for word in words:
            counts[label, index[word]] += 1
    bayes = _Bayes(counts, index)
    held = [(words, label) for words, label in sentences[1::2] if bayes.predict(words, label) > 0.5]
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0)).tolist()
    return bayes, [held[place] for place in order[:60]]
