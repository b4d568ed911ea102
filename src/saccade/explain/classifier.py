"""A model as a checked function from images to logits, and the checks that explanations share."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from saccade.errors import InputError, WorkError

__all__ = ["Classifier", "Output", "batches", "check_images", "check_whole", "evaluating", "read_target"]

Output = Callable[[Any], Tensor]  # from what a model returns to its logits


class Classifier:
    """(B, C, H, W) -> (B, classes): calls the model and refuses what is not a finite table of logits.

    Of a model that returns several things the logits are those that `output` picks; without it the entry or attribute
    `logits`, or the only table (B, classes) among them.
    With `questions` (classes, Q) it gives (B, Q), the logits times these: sums of logits, of which a class is one.
    Images are copied first, so that a model whose first operation works in place neither changes the caller's
    tensor nor fails on one that collects gradients.
    """

    def __init__(self, model: nn.Module, questions: Tensor | None = None, output: Output | None = None) -> None:
        self.model = model
        self.questions = questions
        self.output = output

    def __call__(self, images: Tensor) -> Tensor:
        logits = self.logits(self.model(images.clone()))
        if len(logits) != len(images):
            raise self._no_logits(logits, f" for {len(images)} images")
        if not logits.isfinite().all():
            raise WorkError(
                f"{type(self.model).__name__} gives logits that are NaN or infinite{_where_not_finite(self, images)}: "
                "nothing can be explained. Check its weights, and that the images are normalised as in training"
            )
        if torch.is_grad_enabled() and images.requires_grad and not logits.requires_grad:
            raise InputError(
                f"the logits of {type(self.model).__name__} carry no gradient of the images: it cuts the graph "
                "(detach, no_grad, whole numbers). Remove the cut, or use a method without gradients, such as occlusion"
            )
        return self._ask(logits)

    def asking(self, questions: Tensor) -> "Classifier":
        """The same model as a table of other answers."""
        return Classifier(self.model, questions, self.output)

    def logits(self, returned: Any) -> Tensor:
        """The table (B, classes) in what the model returned."""
        found = _find_logits(returned) if self.output is None else self.output(returned)
        if not isinstance(found, Tensor) or found.ndim != 2:
            raise self._no_logits(found)
        return found

    def answers(self, returned: Any) -> Tensor:
        """What a call gives, from what the model returned."""
        return self._ask(self.logits(returned))

    def _ask(self, logits: Tensor) -> Tensor:
        return logits if self.questions is None else logits @ self.questions.to(logits)

    def _no_logits(self, found: object, given: str = "") -> InputError:
        return InputError(
            f"{type(self.model).__name__} returns {_describe(found)}{given}: an explanation needs one tensor of logits "
            "(B, classes). Say where they are with output=, such as output=lambda returned: returned[0], or wrap the "
            "model in a module whose forward returns that tensor"
        )

    def score(self, images: Tensor, target: Tensor) -> Tensor:
        """The sum of the target's logits, whose gradient holds every image's own gradient."""
        return self(images).gather(1, target[:, None]).sum()


def _describe(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    size = f" of {len(output)}" if isinstance(output, tuple | list | dict) else ""
    tables = len(_tables(output))
    return f"a {type(output).__name__}{size}" + (f", {tables} of them tables (B, classes)" if tables > 1 else "")


def _find_logits(returned: Any) -> Any:
    if isinstance(returned, Tensor):
        return returned
    named = returned.get("logits") if isinstance(returned, Mapping) else getattr(returned, "logits", None)
    tables = [named] if isinstance(named, Tensor) else _tables(returned)
    return tables[0] if len(tables) == 1 else returned


def _tables(returned: Any) -> list[Tensor]:
    values = returned.values() if isinstance(returned, Mapping) else returned
    several = isinstance(returned, Mapping | tuple | list)
    return [each for each in values if isinstance(each, Tensor) and each.ndim == 2] if several else []


def _where_not_finite(classify: Classifier, images: Tensor) -> str:
    """After which layer the first NaN or infinite value appeared."""
    seen: list[str] = []

    def look(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            seen.append(name)

    with ExitStack() as hooks, torch.no_grad():
        for name, module in classify.model.named_modules():
            hooks.enter_context(module.register_forward_hook(lambda _module, _args, out, name=name: look(name, out)))
        classify.model(images.clone())
    return f" from layer {seen[0]!r} on" if seen and seen[0] else ""


@contextmanager
def evaluating(model: nn.Module, *, grad: bool, output: Output | None = None) -> Iterator[Classifier]:
    """The model in eval mode, gradients on or off whatever the caller's context; each module's mode is put back.

    Of a compiled model the original runs, eagerly: a compiled graph shows no layer.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    if output is not None and not callable(output):
        raise InputError(f"output is {output!r}: give a function from what the model returns to its logits")
    modes = [(module, module.training) for module in model.modules()]
    original = getattr(model, "_orig_mod", model)
    compiled = any(map(_is_compiled, original.modules()))  # parts of it; asked first, since it imports the compiler
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    model.eval()
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(grad), eager:
            yield Classifier(original, output=output)
    finally:
        for module, training in modes:
            module.training = training


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def check_images(images: Tensor) -> None:
    """Raise InputError unless `images` are finite normalised floats (B, C, H, W) with B > 0."""
    if not isinstance(images, Tensor):
        raise InputError(f"images are a {type(images).__name__}: give a tensor (B, 3, H, W) of normalised floats")
    shape = tuple(images.shape)
    if images.ndim == 3:
        raise InputError(f"images have shape {shape}: give (B, 3, H, W). Add the batch axis with images[None]")
    if images.ndim != 4 or 0 in shape:
        raise InputError(f"images have shape {shape}: give (B, 3, H, W) with at least one image")
    if not images.is_floating_point():
        raise InputError(f"images are {images.dtype}: give what the model takes, (x / 255 - mean) / std as floats")
    if not images.isfinite().all():
        raise InputError("images hold NaN or infinite values: give finite normalised floats")


def check_whole(name: str, value: int, low: int = 1, high: int | None = None) -> None:
    """Raise InputError unless `value` is a whole number from `low` to `high`."""
    wrong = isinstance(value, bool) or not isinstance(value, int) or value < low
    if wrong or (high is not None and value > high):
        raise InputError(
            f"{name} is {value!r}: give a whole number "
            + (f"of at least {low}" if high is None else f"from {low} to {high}")
        )


def read_target(target: object, classify: Classifier, images: Tensor, batch_size: int, name: str = "target") -> Tensor:
    """(B,) class indices: the given ones, checked, or the classes that the model predicts."""
    with torch.no_grad():
        if target is None:
            return torch.cat([classify(part).argmax(1) for (part,) in batches(batch_size, images)])
        num_classes = classify(images[:1]).shape[1]
    given = torch.as_tensor(target, device=images.device)
    if given.is_floating_point() or given.dtype == torch.bool or given.shape not in ((), (len(images),)):
        raise InputError(
            f"{name} is {given.dtype} of shape {tuple(given.shape)}: give one class index, or one for each of the "
            f"{len(images)} images"
        )
    if given.min() < 0 or given.max() >= num_classes:
        wrong = given.flatten()[(given.flatten() < 0) | (given.flatten() >= num_classes)][0].item()
        raise InputError(f"{name} is {wrong} but the model knows {num_classes} classes: give 0 to {num_classes - 1}")
    return given.long().expand(len(images)).clone()


def batches(batch_size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors' first axis, `batch_size` at a time."""
    return zip(*(tensor.split(batch_size) for tensor in tensors), strict=True)
