"""Reading what is to be judged: maps, and the question that they answer."""

from torch import Tensor

from saccade.errors import InputError
from saccade.explain.attribute import Explanation
from saccade.explain.classifier import Classifier
from saccade.explain.question import Classes, Question, read_question

__all__ = ["read_asked", "read_maps"]


def read_maps(explanation: Explanation | Tensor, images: Tensor, name: str = "map") -> Tensor:
    """(B, H, W) float64 on the CPU, checked."""
    maps = explanation.map if isinstance(explanation, Explanation) else explanation
    expected = (len(images), *images.shape[-2:])
    if not isinstance(maps, Tensor) or tuple(maps.shape) != expected:
        given = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise InputError(f"the {name} is {given} but the images ask for (B, H, W) = {expected}: give one value a pixel")
    if not maps.isfinite().all():
        raise InputError(f"the {name} holds NaN or infinite values: it gives no order")
    return maps.detach().cpu().double()


def read_asked(
    explanation: Explanation | Tensor,
    target: Classes | None,
    against: Classes | None,
    classify: Classifier,
    images: Tensor,
    batch_size: int,
) -> Question:
    """The question given, or the explanation's own where none is given."""
    if target is None and isinstance(explanation, Explanation):
        target, against = explanation.target, explanation.against if against is None else against
    return read_question(target, against, classify, images, batch_size)
