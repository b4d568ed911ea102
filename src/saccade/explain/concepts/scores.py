"""Is an importance of concepts right? C-deletion, C-insertion and C-muFidelity, beside random orders."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.errors import InputError
from saccade.explain.classifier import check_images, check_whole, evaluating
from saccade.explain.concepts.explanation import ConceptExplanation, code_answer
from saccade.explain.concepts.importance import Answer
from saccade.explain.question import read_question
from saccade.explain.removal import rank, removal_curves
from saccade.explain.score import Score, check_confidence, correlate, draw_resamples, summarize

__all__ = ["ConceptFaithfulness", "concept_curves", "concept_faithfulness", "score_importance"]


@dataclass(frozen=True)
class ConceptFaithfulness:
    """What `concept_faithfulness` measured; areas are means of the answer over the share of concepts, in its unit.

    Attributes:
        deletion: area while concepts are removed from the most important on; small is good.
        insertion: area while they are added to none from the most important on; large is good.
        mu_fidelity: correlation in [-1, 1], over random sets of concepts, of the importance's sum with the answer's
            fall without the set.
        deletion_curves, insertion_curves: (B, concepts + 1), the answers.
    """

    deletion: Score
    insertion: Score
    mu_fidelity: Score
    deletion_curves: Tensor
    insertion_curves: Tensor


def concept_faithfulness(
    model: nn.Module,
    images: Tensor,
    explanation: ConceptExplanation,
    *,
    importance: Tensor | None = None,
    subsets: int = 64,
    repeats: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    confidence: float = 0.95,
) -> ConceptFaithfulness:
    """Hold the importance of concepts against the model's answers without them.

    Args:
        model, images: those that were explained.
        explanation: from `explain_concepts`, whose question is asked.
        importance: (B, concepts), or (concepts,) for all images; None takes the explanation's `per_image`.
        subsets: random sets of half of the concepts an image, for `mu_fidelity`.
        repeats: random orders an image; None takes 32 in all, at least 3 an image.
        batch_size: the most images in one forward pass.
        seed: of sets, orders, ties and intervals.
        confidence: of all intervals.

    Raises: InputError for wrong arguments.
    """
    check_images(images)
    codes = explanation.codes
    if len(images) != len(codes):
        raise InputError(f"there are {len(images)} images but codes of {len(codes)}: give the images explained")
    with evaluating(model, grad=False) as classify:
        question = read_question(explanation.target, explanation.against, classify, images, batch_size)
        return score_importance(
            code_answer(classify, images, question, explanation.cut, explanation.bank),
            codes,
            explanation.per_image if importance is None else importance,
            subsets=subsets,
            repeats=repeats,
            batch_size=batch_size,
            seed=seed,
            confidence=confidence,
        )


def score_importance(
    answer: Answer,
    codes: Tensor,
    importance: Tensor,
    *,
    subsets: int = 64,
    repeats: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    confidence: float = 0.95,
) -> ConceptFaithfulness:
    """`concept_faithfulness` for any function of codes.

    Args:
        answer, codes: as in `code_importance`, with two concepts at least.
        importance: (B, concepts), or (concepts,) for all images.
    """
    num_concepts = codes.shape[-1]
    check_whole("number of concepts", num_concepts, 2)
    repeats = max(3, math.ceil(32 / len(codes))) if repeats is None else repeats
    for name, value in {"repeats": repeats, "batch_size": batch_size}.items():
        check_whole(name, value)
    check_whole("subsets", subsets, 3)
    check_confidence(confidence, repeats, len(codes))
    expected = (len(codes), num_concepts)
    if tuple(importance.shape) not in (expected, expected[1:]) or not importance.isfinite().all():
        raise InputError(f"importance is {tuple(importance.shape)}: give finite numbers {expected} or {expected[1:]}")
    weight = importance.detach().cpu().double().expand(expected)

    generator = torch.Generator().manual_seed(seed)
    equal = weight.new_zeros(len(codes), repeats, num_concepts)  # nothing but ties: random orders
    forth = torch.cat([rank(weight, generator)[:, None], rank(equal, generator)], 1)
    curves = concept_curves(
        answer, codes, torch.cat([forth, num_concepts - 1 - forth], 1), batch_size=batch_size
    ).double()
    most_first, least_first = torch.trapezoid(curves, dx=1 / num_concepts).chunk(2, 1)

    half = num_concepts // 2
    sets = rank(weight.new_zeros(len(codes), subsets, num_concepts), generator)
    ends = concept_curves(answer, codes, sets, torch.tensor([0, half, num_concepts]), batch_size=batch_size).double()
    fall = (ends[..., 0] - ends[..., 1])[:, None]  # (B, 1, subsets)
    places = torch.rand(len(codes), repeats, num_concepts, generator=generator).argsort(-1)
    shuffled = weight[:, None].expand_as(places).gather(-1, places)
    candidates = torch.cat([weight[:, None], shuffled], 1)
    sums = torch.einsum("bsc,bkc->bks", (sets < half).double(), candidates)
    together = correlate(sums, fall)  # (B, 1 + repeats)

    draws = draw_resamples(len(codes), generator)

    def score(values: Tensor, chance: Tensor) -> Score:
        return summarize(values, chance, draws, confidence)

    both = torch.cat([most_first[:, 1:], least_first[:, 1:]], 1)
    return ConceptFaithfulness(
        deletion=score(most_first[:, 0], both),
        insertion=score(least_first[:, 0], both),
        mu_fidelity=score(together[:, 0], together[:, 1:]),
        deletion_curves=curves[:, 0],
        insertion_curves=curves[:, 1 + repeats].flip(-1),
    )


def concept_curves(
    answer: Answer, codes: Tensor, ranks: Tensor, counts: Tensor | None = None, *, batch_size: int = 64
) -> Tensor:
    """Answers while concepts go in each order: (B, orders, K + 1), on the CPU.

    Args:
        answer, codes: as in `code_importance`.
        ranks: (B, orders, concepts), places in the order; 0 goes first.
        counts: (K + 1,) concepts gone at each step, from 0 to all; None removes one after the other.
    """
    space, num_concepts = codes.shape[1:-1], codes.shape[-1]
    table = codes.detach().flatten(1, -2) if space else codes.detach()[:, None]  # (B, positions, concepts)
    table = table[:, :, None]  # concepts as pixels of an image with one row
    with torch.no_grad():
        return removal_curves(
            lambda part, index: answer(part.reshape(len(part), *space, num_concepts), index),
            table,
            torch.zeros_like(table),
            ranks.to(codes.device),
            torch.arange(num_concepts + 1) if counts is None else counts,
            patch=1,
            batch_size=batch_size,
        ).cpu()
