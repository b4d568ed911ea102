"""Activations of a running model, batch by batch, and a dictionary's training on them."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saccade.errors import DivergedError, InputError, check_choice
from saccade.explain.classifier import check_whole, evaluating
from saccade.explain.dictionaries.dictionary import ConceptDictionary
from saccade.taps import tap

__all__ = ["Activations", "Training", "train_dictionary"]

_KINDS = ("output", "attention", "gate", "features")


class Activations:
    """Rows (N, dim) that a layer shows while a model runs over batches of inputs; can be read again and again.

    Args:
        model: runs in eval mode without gradients.
        inputs: one argument of the model a batch. A list, or what else can be read twice.
        layer: name of a module.
        kind: "output" reads what the module returns; "attention", "gate" and "features" what a tap sees of it.
        axis: where the channels are: -1, or 1 for maps (B, C, H, W).

    Reading raises InputError where the layer is unknown, did not run or returns no tensor.
    """

    def __init__(
        self, model: nn.Module, inputs: Iterable[Tensor], layer: str, *, kind: str = "output", axis: int = -1
    ) -> None:
        check_choice("kind", kind, _KINDS)
        self.modules = dict(model.named_modules())
        check_choice("layer", layer, self.modules)
        self.model, self.inputs, self.layer, self.kind, self.axis = model, inputs, layer, kind, axis

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.inputs:
            with evaluating(self.model, grad=False):
                seen = self._run(batch)
            if not seen:
                raise InputError(
                    f"layer {self.layer!r} showed no tensor ({self.kind}): it did not run, or returns none"
                )
            yield torch.cat([each.movedim(self.axis, -1).flatten(0, -2) for each in seen])

    def _run(self, batch: Tensor) -> list[Tensor]:
        if self.kind != "output":
            with tap(self.model, kinds=(self.kind,), names=[self.layer]) as found:
                self.model(batch)
            return [getattr(each, self.kind) for each in found.calls(self.layer)]
        seen: list[Tensor] = []
        hook = self.modules[self.layer].register_forward_hook(
            lambda _module, _args, output: seen.append(output.clone()) if isinstance(output, Tensor) else None
        )
        try:
            self.model(batch)
        finally:
            hook.remove()
        return seen


class Training(NamedTuple):
    """What became of a training.

    Attributes:
        losses: (steps,).
        active: share of the atoms that occurred in the last tenth of the steps.
    """

    losses: Tensor
    active: float


def train_dictionary(
    dictionary: ConceptDictionary,
    rows: Tensor | Iterable[Tensor],
    *,
    steps: int,
    batch_size: int = 256,
    rate: float = 3e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    warmup: float = 0.05,
    calibrate: bool = True,
    buffer: int = 16384,
    generator: torch.Generator | None = None,
) -> Training:
    """Train a dictionary in place with Adam: warm-up, cosine to 0, gradients clipped at norm 1.

    Args:
        dictionary: goes back to eval mode.
        rows: all activations (N, dim), or a stream of such parts, such as `Activations`, that is read again when it
            ends and shuffled within `buffer` rows. What stands behind the activations in a longer row is for the loss.
        steps: of the optimizer.
        batch_size: rows a step.
        rate, betas: of Adam.
        warmup: share of the steps in which the rate rises.
        calibrate: set centre and scale from the first rows; otherwise they stay.
        buffer: rows of a stream that are held and mixed.
        generator: of the order; None takes torch's own.

    Raises: InputError for a stream that is empty or cannot be read again; DivergedError for a loss that is not finite.
    """
    for name, value in {"steps": steps, "batch_size": batch_size, "buffer": buffer}.items():
        check_whole(name, value)
    optimizer = torch.optim.Adam([each for each in dictionary.parameters() if each.requires_grad], rate, betas)
    rising = max(1, round(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    losses, used = torch.zeros(steps), torch.zeros(dictionary.num_concepts, dtype=torch.bool)
    batches = _shuffled(rows, batch_size, buffer, generator)
    for step in range(steps):
        part, held = next(batches)
        if step == 0 and calibrate:
            dictionary.calibrate(held[..., : dictionary.dim])
        dictionary.train()
        loss = dictionary.loss(part)
        if not loss.isfinite():
            raise DivergedError(f"the loss is {loss.item()} in step {step}: lower the rate, or look at the activations")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(dictionary.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        dictionary.renormalise()
        losses[step] = loss.detach()
        if step >= steps - max(1, steps // 10):
            dictionary.eval()
            with torch.no_grad():
                used |= (dictionary.encode(part[..., : dictionary.dim]) != 0).flatten(0, -2).any(0).cpu()
    dictionary.eval()
    return Training(losses, used.double().mean().item())


def _shuffled(
    rows: Tensor | Iterable[Tensor], size: int, buffer: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, and the rows that each was drawn from."""
    parts: Iterable[Tensor] = [rows] if isinstance(rows, Tensor) else rows
    while True:
        held: list[Tensor] = []
        count, empty = 0, True
        for part in parts:
            held, count, empty = [*held, part], count + len(part), False
            if count >= buffer and not isinstance(rows, Tensor):
                yield from _mix(torch.cat(held), size, generator)
                held, count = [], 0
        if empty:
            raise InputError("the stream of activations is empty or at its end: give what can be read again, as a list")
        if held:
            yield from _mix(torch.cat(held), size, generator)


def _mix(held: Tensor, size: int, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(held), generator=generator)
    for chosen in order.split(size):
        if len(chosen) == size or len(held) < size:  # a short rest would weigh more
            yield held[chosen.to(held.device)], held
