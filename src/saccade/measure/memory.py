"""How much memory a model holds, moves and needs at once: parameters, bytes of traffic, peak."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from saccade.errors import InputError
from saccade.measure.dispatch import tensors, watching

__all__ = ["PeakMemory", "count_bytes", "count_parameters", "measure_peak_memory"]


def count_parameters(model: nn.Module) -> int:
    """Count the numbers in a model's parameters, frozen ones too; a shared parameter counts once.

    Raises: InputError if a lazy layer has not seen its input's size.

    >>> count_parameters(nn.Linear(8, 16))
    144
    """
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise InputError(f"parameter {lazy[0]} has no size yet: call the model once, then count")
    return sum(parameter.numel() for parameter in model.parameters())


def count_bytes(model: Callable[..., Any], *inputs: Any) -> int:
    """Count the bytes that the operations of `model(*inputs)` read and write, without gradients.

    The sum over all operations of the size of their tensor arguments and results: an upper bound of the traffic to
    memory, which caches and fusion make smaller. Views and allocations count nothing; of an expanded tensor the bytes
    that exist count, not the repetitions.

    >>> count_bytes(lambda x: x.mT + 1, torch.zeros(4, 5))  # 20 floats read, 20 written
    160
    """
    total = 0

    def saw(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        nonlocal total
        given, made = tensors((args, kwargs)), tensors(out)
        if _moves_data(op, given, made):
            total += sum(_size(each) for each in (*given, *made))

    with torch.no_grad(), watching(saw):
        model(*inputs)
    return total


def _moves_data(op: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    if torch.Tag.inplace_view in getattr(op, "tags", ()) or "empty" in str(op):
        return False
    owners = {id(each.untyped_storage()) for each in given}
    is_view = all(id(each.untyped_storage()) in owners for each in made)
    return not is_view or op._schema.is_mutable


def _size(tensor: Tensor) -> int:
    span = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride()))
    return min(tensor.numel(), max(span, 0)) * tensor.element_size()


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that was held at once.

    Attributes:
        bytes: held above what was held before.
        device: "cpu" or "cuda:0", for instance.
        method: "allocator" (all that the device's allocator gave out) or "tensors" (live tensor storage; scratch space
            inside an operation is not seen).
    """

    bytes: int
    device: str
    method: str


def measure_peak_memory(fn: Callable[[], Any], *, device: str | torch.device = "cpu") -> PeakMemory:
    """Measure the most memory that `fn()` holds at once beyond what was held before it.

    What exists already (parameters, inputs) does not count; what autograd saves does, while it is saved. On CUDA the
    allocator's own peak is read. Elsewhere the tensors that operations return are followed until their storage is
    freed; views and in-place results add nothing, and compiled functions run uncompiled.

    Args:
        fn: what to run, once. Warm it up first where libraries allocate workspaces on first use.
        device: whose memory: tensors on others are not counted.

    Returns: PeakMemory.
    Raises: InputError if there is no such device.
    """
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device is {str(device)!r}, which cannot be used here: {error}") from error
    if place.type == "cuda":
        return PeakMemory(_allocator_peak(fn, place), str(place), "allocator")
    return PeakMemory(_tensor_peak(fn, place), str(place), "tensors")


def _allocator_peak(fn: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    fn()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _tensor_peak(fn: Callable[[], Any], device: torch.device) -> int:
    live = WeakIdKeyDictionary(ref_type=ref)  # storage -> bytes; an entry goes when its storage is freed
    peak = 0

    def saw(_op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        nonlocal peak
        given = {id(each.untyped_storage()) for each in tensors((args, kwargs))}
        for storage in (each.untyped_storage() for each in tensors(out)):
            if storage.device == device and (storage in live or id(storage) not in given):
                live[storage] = storage.nbytes()
        peak = max(peak, sum(live.values()))

    with watching(saw):
        fn()
    return peak
