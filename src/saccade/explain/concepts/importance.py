"""How much each concept adds to an answer: attribution methods on codes instead of pixels.

A concept's code is multiplied by one number m at all positions of an image, and every method but the plain gradient is
an attribution of the answer as a function of these numbers, from 0 to 1.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.errors import InputError, check_choice, nearest
from saccade.explain.classifier import check_whole
from saccade.explain.concepts.designs import halton_design, hsic_indices, sobol_indices

__all__ = ["Answer", "code_importance", "list_importances"]

Answer = Callable[[Tensor, Tensor], Tensor]
"""(codes (n, *space, concepts), index (n,) of the image that each comes from) -> (n,) numbers."""


def list_importances() -> list[str]:
    """The names that `code_importance` takes as `method`, sorted."""
    return sorted(_METHODS)


def code_importance(
    answer: Answer, codes: Tensor, *, method: str = "sobol", batch_size: int = 64, seed: int = 0, **options: Any
) -> Tensor:
    """Importance of each concept for each image's answer.

    Args:
        answer: from codes to a number each, such as a logit of the rest of the model.
        codes: (B, *space, concepts).
        method: one of `list_importances()`:
            - "gradient": of the answer by a code, summed over positions; "tcav": its sign, whose mean over images is
              TCAV's;
            - "input_x_gradient"; "integrated_gradients" from codes of 0, by `steps` (50) points;
            - "occlusion": the fall without the concept;
            - "rise": mean answer of the `samples` (512) random masks that keep the concept, minus that of all;
            - "shapley": mean fall over `samples` (25) random orders;
            - "sobol": total index of `designs` (32), `variance` as in `sobol_indices`;
            - "hsic": dependence of the answer on the concept's mask, `samples` (512).
        batch_size: the most images in one call of `answer`.
        seed: of random masks and orders.
        options: the method's own, named above.

    Returns: (B, concepts), in the dtype of the codes; in the answer's unit but for gradient (per unit of code), tcav,
        sobol and hsic, of which the last two have no sign.
    Raises: InputError for wrong arguments.

    >>> codes, weight = torch.tensor([[2.0, 1.0]]), torch.tensor([1.0, -3.0])
    >>> code_importance(lambda u, index: u @ weight, codes, method="occlusion")
    tensor([[ 2., -3.]])
    """
    check_choice("method", method, _METHODS)
    check_whole("batch_size", batch_size)
    if not isinstance(codes, Tensor) or codes.ndim < 2 or 0 in codes.shape or not codes.is_floating_point():
        given = tuple(codes.shape) if isinstance(codes, Tensor) else type(codes).__name__
        raise InputError(f"codes are {given}: give floats (B, *space, concepts)")
    known = [name for name in inspect.signature(_METHODS[method]).parameters if name not in _GIVEN]
    for name, value in options.items():
        if name not in known:
            hint = nearest(name, known) if known else "it has no options"
            raise InputError(f"{name!r} is no option of {method}: {hint}")
        if name != "variance":
            check_whole(name, value, 2)
    codes = codes.detach()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _METHODS[method](answer, codes, batch_size, **options).to(codes)


def _gradient(answer: Answer, codes: Tensor, batch_size: int) -> Tensor:
    found = []
    for index in torch.arange(len(codes), device=codes.device).split(batch_size):
        part = codes[index].requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(answer(part, index).sum(), part)
        found.append(_sum_positions(slope))
    return torch.cat(found)


def _tcav(answer: Answer, codes: Tensor, batch_size: int) -> Tensor:
    return _gradient(answer, codes, batch_size).sign()


def _input_x_gradient(answer: Answer, codes: Tensor, batch_size: int) -> Tensor:
    from captum.attr import InputXGradient

    return _attribute(InputXGradient, answer, codes, batch_size)


def _integrated_gradients(answer: Answer, codes: Tensor, batch_size: int, steps: int = 50) -> Tensor:
    from captum.attr import IntegratedGradients

    return _attribute(IntegratedGradients, answer, codes, batch_size, n_steps=steps, internal_batch_size=batch_size)


def _occlusion(answer: Answer, codes: Tensor, batch_size: int) -> Tensor:
    num_concepts = codes.shape[-1]
    masks = torch.cat([torch.ones(1, num_concepts), 1 - torch.eye(num_concepts)])
    answers = _answer_masks(answer, codes, masks, batch_size)
    return answers[:, :1] - answers[:, 1:]


def _shapley(answer: Answer, codes: Tensor, batch_size: int, samples: int = 25) -> Tensor:
    from captum.attr import ShapleyValueSampling

    with torch.no_grad():
        return _attribute(ShapleyValueSampling, answer, codes, batch_size, n_samples=samples)


def _rise(answer: Answer, codes: Tensor, batch_size: int, samples: int = 512) -> Tensor:
    masks = torch.randint(2, (samples, codes.shape[-1])).double()
    answers = _answer_masks(answer, codes, masks, batch_size)
    answers = answers - answers.mean(1, keepdim=True)
    return answers @ masks.to(answers) / masks.sum(0).clamp(min=1).to(answers)


def _sobol(answer: Answer, codes: Tensor, batch_size: int, designs: int = 32, variance: str = "both") -> Tensor:
    masks = halton_design(codes.shape[-1], designs)
    return sobol_indices(_answer_masks(answer, codes, masks, batch_size), codes.shape[-1], variance=variance)


def _hsic(answer: Answer, codes: Tensor, batch_size: int, samples: int = 512) -> Tensor:
    masks = torch.randint(2, (samples, codes.shape[-1]))
    return hsic_indices(_answer_masks(answer, codes, masks, batch_size), masks.to(codes.device))


_METHODS: dict[str, Callable[..., Tensor]] = {
    "gradient": _gradient,
    "hsic": _hsic,
    "input_x_gradient": _input_x_gradient,
    "integrated_gradients": _integrated_gradients,
    "occlusion": _occlusion,
    "rise": _rise,
    "shapley": _shapley,
    "sobol": _sobol,
    "tcav": _tcav,
}
_GIVEN = ("answer", "codes", "batch_size")


def _attribute(method: Callable[..., Any], answer: Answer, codes: Tensor, batch_size: int, **options: Any) -> Tensor:
    """Captum's attribution of the answer to the numbers that codes are multiplied by, from 0 to 1."""
    explainer = method(lambda masks, index: answer(_apply(masks, codes[index]), index))
    found = []
    for index in torch.arange(len(codes), device=codes.device).split(batch_size):
        ones = codes.new_ones(len(index), codes.shape[-1], requires_grad=True)
        found.append(explainer.attribute(ones, additional_forward_args=(index,), **options).detach())
    return torch.cat(found)


@torch.no_grad()
def _answer_masks(answer: Answer, codes: Tensor, masks: Tensor, batch_size: int) -> Tensor:
    """Each image's answers to each mask (M, concepts): (B, M)."""
    masks = masks.to(codes)
    found = []
    for job in torch.arange(len(codes) * len(masks), device=codes.device).split(batch_size):
        index, row = job // len(masks), job % len(masks)
        found.append(answer(_apply(masks[row], codes[index]), index))
    return torch.cat(found).view(len(codes), -1)


def _apply(masks: Tensor, codes: Tensor) -> Tensor:
    """The same mask at every position."""
    return codes * masks.view(len(masks), *[1] * (codes.ndim - 2), -1)


def _sum_positions(codes: Tensor) -> Tensor:
    return codes.flatten(1, -2).sum(1) if codes.ndim > 2 else codes
