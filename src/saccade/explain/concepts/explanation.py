"""`explain_concepts`: what a layer sees, and how much each part of it adds to the answer (2023, arXiv:2306.07304)."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.errors import InputError
from saccade.explain.classifier import Classifier, check_images, check_whole, evaluating
from saccade.explain.concepts.bank import ConceptBank, extract_concepts
from saccade.explain.concepts.cut import Cut, crop, find_cut
from saccade.explain.concepts.importance import Answer, code_importance
from saccade.explain.concepts.measures import relative_error
from saccade.explain.dictionaries import num_active
from saccade.explain.methods.attribution import enlarge
from saccade.explain.methods.layers import token_grid
from saccade.explain.question import Classes, Question, read_question

__all__ = ["ConceptExplanation", "code_answer", "explain_concepts"]


@dataclass(frozen=True)
class ConceptExplanation:
    """What `explain_concepts` found.

    Attributes:
        importance: (concepts,), mean over images.
        per_image: (B, concepts), for each image's own answer.
        codes: (B, *space, concepts), how much of each concept is where in the layer's output.
        bank: encodes other activations of the layer; give it as `method` to explain other images by the same concepts.
        cut: the layer, found or given, and where its channels are.
        target, against: the question whose answer the importance is about, as in `Explanation`.
        answers, answers_from_codes: (B,), what the model says, and what it says where the layer's output is rebuilt
            from the codes; importance is about the second.
        relative_error: of the rebuilt activations.
        num_active: mean number of concepts that differ from 0 at a position.
        method, importance_method: by which concepts were found and weighed.
        size: (H, W) of the images in pixels.
        seconds: time it took.
    """

    importance: Tensor
    per_image: Tensor
    codes: Tensor
    bank: ConceptBank
    cut: Cut
    target: Tensor
    against: Tensor | None
    answers: Tensor
    answers_from_codes: Tensor
    relative_error: float
    num_active: float
    method: str
    importance_method: str
    size: tuple[int, int]
    seconds: float

    @property
    def layer(self) -> str:
        """Name of the layer."""
        return self.cut.layer

    def ranking(self) -> list[int]:
        """Concepts from the most to the least important."""
        return self.importance.argsort(descending=True).tolist()

    def map(self, concept: int) -> Tensor:
        """Where a concept is: its codes at pixel resolution, (B, H, W), for `overlay`.

        Raises: InputError for an unknown concept, and where the layer's output has no places.
        """
        check_whole("concept", concept, 0, self.codes.shape[-1] - 1)
        codes = self.codes[..., concept]
        if codes.ndim == 1:
            raise InputError(f"layer {self.layer!r} gives one vector an image: its concepts are nowhere in particular")
        if codes.ndim == 2:
            grid = token_grid(codes.shape[1], self.size)
            if grid is None:
                raise InputError(
                    f"{codes.shape[1]} tokens fit no grid in the proportions of a {self.size[0]} x {self.size[1]} "
                    "image: a map needs a layer whose output is one"
                )
            rows, columns, prefix = grid
            codes = codes[:, prefix:].unflatten(1, (rows, columns))
        return enlarge(codes, self.size)

    def prototypes(self, concept: int, count: int = 5) -> list[int]:
        """The images that show most of a concept, by its mean code."""
        check_whole("concept", concept, 0, self.codes.shape[-1] - 1)
        return self.codes[..., concept].flatten(1).mean(1).argsort(descending=True)[:count].tolist()


def explain_concepts(
    model: nn.Module,
    images: Tensor,
    *,
    target: Classes | None = None,
    against: Classes | None = None,
    layer: str | None = None,
    layout: str | None = None,
    method: str | ConceptBank = "nmf",
    num_concepts: int = 20,
    importance: str = "sobol",
    source: Tensor | None = None,
    patch: int | None = None,
    max_rows: int | None = 20_000,
    batch_size: int = 32,
    seed: int = 0,
    bank_options: Mapping[str, Any] | None = None,
    importance_options: Mapping[str, Any] | None = None,
) -> ConceptExplanation:
    """Find concepts in a layer's activations, and say how much each one adds to an answer.

    The layer's output is rebuilt from codes and atoms, and the rest of the model, run with it, is what is explained:
    every attribution method works on codes as it does on pixels. Each pass runs the whole model.

    Args:
        model: as in `explain`; it is not changed.
        images: (B, C, H, W), normalised as in training, such as those that the model puts into one class.
        target, against: the question, as in `explain`; None takes each image's predicted class.
        layer: name of a module whose output is a map, tokens (B, N, dim) or (B, dim); None takes the layer that
            Grad-CAM reads.
        layout: of maps, "NCHW" or "NHWC"; None infers it.
        method: as in `extract_concepts`, or a bank, with which nothing is extracted. "nmf" needs activations that are
            not negative.
        num_concepts: of concepts.
        importance: as in `code_importance`.
        source: images to find concepts in, where they are others than `images`.
        patch: None takes the activations at every position as rows; a side in pixels takes the means over positions of
            crops of that side, enlarged to the size of the images, as CRAFT does (64 of 224).
        max_rows: of these rows, drawn at random where there are more, to find concepts in; None takes all.
        batch_size: the most images in one forward pass.
        seed: of rows, extraction and importance.
        bank_options, importance_options: of `extract_concepts` and `code_importance`.

    Raises: InputError for wrong arguments; WorkError when the model gives NaN.
    """
    start = time.perf_counter()
    check_images(images)
    check_whole("batch_size", batch_size)
    if max_rows is not None:
        check_whole("max_rows", max_rows)
    if source is not None:
        check_images(source)
    with evaluating(model, grad=True) as classify:
        images = images.detach().clone()
        question = read_question(target, against, classify, images, batch_size)
        cut = find_cut(classify, images[:1], layer, layout)
        activations = cut.read(classify, images, batch_size)
        if isinstance(method, str):
            given = images if source is None else source.detach()
            given = given if patch is None else crop(given, patch)
            rows = activations if given is images else cut.read(classify, given, batch_size)
            rows = rows.flatten(0, -2) if patch is None or rows.ndim == 2 else rows.flatten(1, -2).mean(1)
            rows = _draw(rows, max_rows, seed)
            bank = extract_concepts(rows, num_concepts, method=method, seed=seed, **(bank_options or {}))
        elif bank_options or source is not None or patch is not None:
            raise InputError("method is a bank: bank_options, source and patch are of extraction. Leave them out")
        else:
            bank = method
        with torch.no_grad():
            codes = bank.encode(activations)
            answers = _answer(classify, question, images, batch_size)
        answer = code_answer(classify, images, question, cut, bank)
        per_image = code_importance(
            answer, codes, method=importance, batch_size=batch_size, seed=seed, **(importance_options or {})
        )
        with torch.no_grad():
            every = torch.arange(len(codes), device=codes.device)
            rebuilt = torch.cat([answer(codes[i], i) for i in every.split(batch_size)])
            error = relative_error(activations, bank.decode(codes))
    return ConceptExplanation(
        importance=per_image.mean(0),
        per_image=per_image,
        codes=codes,
        bank=bank,
        cut=cut,
        target=question.target,
        against=question.against,
        answers=answers,
        answers_from_codes=rebuilt,
        relative_error=error,
        num_active=num_active(codes),
        method=method if isinstance(method, str) else getattr(method, "method", type(method).__name__),
        importance_method=importance,
        size=(images.shape[2], images.shape[3]),
        seconds=time.perf_counter() - start,
    )


def code_answer(classify: Classifier, images: Tensor, question: Question, cut: Cut, bank: ConceptBank) -> Answer:
    """From codes at a layer to each image's answer, by the rest of the model."""
    asked, column = question.ask(classify)

    def answer(codes: Tensor, index: Tensor) -> Tensor:
        table = cut.resume(asked, images[index], bank.decode(codes))
        return table.gather(1, column[index, None])[:, 0]

    return answer


def _draw(rows: Tensor, most: int | None, seed: int) -> Tensor:
    if most is None or len(rows) <= most:
        return rows
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:most].to(rows.device)]


def _answer(classify: Classifier, question: Question, images: Tensor, batch_size: int) -> Tensor:
    asked, column = question.ask(classify)
    return torch.cat([asked(part) for part in images.split(batch_size)]).gather(1, column[:, None])[:, 0]
