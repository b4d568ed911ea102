"""`explain`: one signature for every method that says which pixels a model's answer rests on."""

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from saccade.errors import InputError, WorkError, check_choice, nearest
from saccade.explain import methods
from saccade.explain.classifier import Output, check_images, check_whole, evaluating
from saccade.explain.methods.attribution import Detail
from saccade.explain.question import Classes, read_question

__all__ = ["ALIASES", "Explanation", "explain", "list_methods", "read_method"]

_METHODS = {name: getattr(methods, name) for name in methods.__all__}
ALIASES = {
    "flow": "attention_flow",
    "gradcam": "grad_cam",
    "ig": "integrated_gradients",
    "lrp": "relevance",
    "rollout": "attention_rollout",
}
"""Short names of methods."""


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
        map: (B, H, W), relevance of each pixel; its unit and whether it has a sign are the method's.
        target: (B,) long, the class that each map is about, or (B, classes) booleans, the group.
        method: name of the method.
        layer: name of the module that the method read, given or found, several with ", " between them; None for methods
            that read none.
        error: (B,), for methods whose map should sum to a known difference of logits, by how much the sum is off, in
            logits; None for others.
        seconds: time the method took, without the prediction of `target`.
        against: what the target was held against, in the form of `target`; None if nothing.
        inferred: what the method took the model's tokens to be, in words; None for methods that need not know.
        detail: layers, grids and prefix tokens that were read or inferred, and the account of relevance; see Detail.
    """

    map: Tensor
    target: Tensor
    method: str
    layer: str | None
    error: Tensor | None
    seconds: float
    against: Tensor | None = None
    inferred: str | None = None
    detail: Detail = field(default_factory=Detail)


def list_methods() -> list[str]:
    """The names that `explain` takes as `method`, sorted."""
    return sorted(_METHODS)


def read_method(name: str) -> str:
    """The full name of a method that is given by its name or a short one.

    >>> read_method("lrp")
    'relevance'
    """
    check_choice("method", name, [*_METHODS, *ALIASES])
    return ALIASES.get(name, name)


def explain(
    model: nn.Module,
    images: Tensor,
    *,
    method: str = "integrated_gradients",
    target: Classes | None = None,
    against: Classes | None = None,
    layer: str | Sequence[str] | None = None,
    batch_size: int = 32,
    output: Output | None = None,
    **options: Any,
) -> Explanation:
    """Say how much each pixel of each image adds to the logit of one class, or to another question's answer.

    `target` and `against` span the taxonomy of arXiv:2511.13081: why this class, why this group, why this class and
    not that one, why this group and not that one. What is explained is the mean logit of `target` minus the mean logit
    of `against`.

    Args:
        model: any module that maps (B, 3, H, W) to logits (B, classes). It runs in eval mode; its parameters may be
            frozen, and of a compiled one the original runs; modes, gradients and hooks are afterwards as they were.
        images: (B, 3, H, W), floats normalised as in training; other numbers of channels pass where the model takes
            them.
        method: one of `list_methods()`, or one of `ALIASES` for short, such as "lrp". The default costs 50 gradient
            passes, needs no layer, and says by how much it is wrong.
        target: class index, or (B,) of them; None explains the predicted classes. A group is a set of class indices, or
            (B, classes) booleans for one of its own an image.
        against: what the target is held against, in the same forms, without a class that is in `target`. None asks
            about the target alone.
        layer: module name, for methods that read one, or several for those that combine them; None lets the method find
            it and say which.
        batch_size: the most images in one forward pass, which bounds memory.
        output: takes what the model returns and gives its logits, for a model that returns several things. None takes
            the entry or attribute `logits` (as transformers' models have), or the only table (B, classes) among them.
        options: the method's own, such as `steps` of integrated_gradients; see the functions in
            `saccade.explain.methods`.

    Returns: Explanation with maps (B, H, W) on the images' device, in their dtype.
    Raises: InputError for wrong images, target, layer, method or options, and for a model that returns no logits;
        WorkError when the model or the map is NaN or infinite.

    >>> import torch
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False))
    >>> _ = nn.init.ones_(model[1].weight)
    >>> found = explain(model, torch.tensor([[[[1.0]], [[2.0]], [[-0.5]]]]), target=0)
    >>> round(found.map.item(), 4)  # a linear model: weight times input, summed over channels
    2.5
    """
    method = read_method(method)
    check_images(images)
    check_whole("batch_size", batch_size)
    options |= {} if layer is None else {"layer": layer}
    _check_options(method, options)
    with evaluating(model, grad=True, output=output) as classify:
        images = images.detach().clone()  # a tensor made in inference mode could not be differentiated
        question = read_question(target, against, classify, images, batch_size)
        answer, column = question.ask(classify)
        start = time.perf_counter()
        found = _METHODS[method](answer, images, column, batch_size=batch_size, **options)
    if not found.map.isfinite().all():
        raise WorkError(
            f"the map of {method} holds NaN or infinite values: look for them in the model's activations and gradients"
        )
    seconds = time.perf_counter() - start
    return Explanation(
        found.map.detach(),
        question.target,
        method,
        found.layer,
        found.error,
        seconds,
        question.against,
        found.inferred,
        found.detail,
    )


def _check_options(method: str, options: dict[str, Any]) -> None:
    parameters = inspect.signature(_METHODS[method]).parameters.values()
    known = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.name != "batch_size"]
    for name in options:
        if name not in known:
            hint = nearest(name, known) if known else "it has no options"
            raise InputError(f"{name!r} is no option of {method}: {hint}")
