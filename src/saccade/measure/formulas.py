"""FLOPs of one operation: formulas by operation, and the rule by which an operation counts as none."""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

__all__ = ["find_formula", "is_cheap"]

aten = torch.ops.aten
Formula = Callable[..., int]


def find_formula(op: Any) -> Formula | None:
    """The formula of an operation, called as `formula(*args, **kwargs, out_val=out)`; None if there is none.

    Ours come first, then torch's, where `torch.utils.flop_counter.register_flop_formula` adds a custom operation's.
    """
    packet = getattr(op, "overloadpacket", op)
    return _FORMULAS.get(str(packet)) or flop_registry.get(packet)


def is_cheap(op: Any) -> bool:
    """Whether an operation counts nothing by convention: a view, a move, or a few steps for each element it touches.

    True for pointwise operations (torch's own tag), and for the families in `_CHEAP`; derivatives and in-place
    forms go with the operation they come from. False for whatever is not known.
    """
    if not isinstance(op, OpOverload):
        return False
    forms = [op]
    if op.namespace == "aten":
        base = re.sub(r"^_+|_backward.*|_copy$|_+$", "", op.overloadpacket.__name__)
        if _CHEAP.fullmatch(base):
            return True
        packets = [getattr(aten, name) for name in (base, f"_{base}") if hasattr(aten, name)]
        forms += [getattr(packet, overload) for packet in packets for overload in packet.overloads()]
    return any(form.is_view or torch.Tag.pointwise in form.tags for form in forms)


_CHEAP = re.compile(
    r"""
    # creation and random numbers
    (empty|full|fill|zero|ones|new_|rand|normal|uniform|bernoulli|exponential|arange|linspace).*|eye|scalar_tensor |
    # moves, also those that add what lands on one place
    (clone|copy|cat|stack|split|unsafe_|reshape|repeat|roll|flip|rot90|constant_pad|reflection_pad|lift).*|to |
    (replication_pad|pixel_|channel_shuffle|native_channel_shuffle|im2col|col2im|index|gather|scatter|masked_).* |
    (select|slice|take|nonzero|diag|block_diag|upsample_nearest|resize|unfold).* |
    embedding(_dense)?|(tril|triu)(_indices)? |
    # reductions
    all|amax|amin|aminmax|any|argmax|argmin|count_nonzero|equal|linalg_vector_norm|logsumexp|max|mean|min|nansum|norm |
    prod|std|std_mean|sum|trace|var|var_mean |
    # softmax and normalisation: reductions and pointwise steps in one operation
    (log_|safe_)?softmax|.*(batch|layer|group|rms|weight)_norm.* |
    # pointwise but without the tag
    glu|prelu_kernel|hardswish|log_sigmoid.*|(native|fused)_dropout|rrelu_with_noise.*|complex|polar|floor_divide |
    # losses: pointwise and a reduction
    (mse|nll|huber|smooth_l1|soft_margin)_loss.*|binary_cross_entropy.* |
    # questions about a tensor
    local_scalar_dense|fused_sdp_choice|is_.*|(functional_)?assert.*|sym_.*|linalg_check_errors
    """,
    re.VERBOSE,
)


def _multiply_add(result: Tensor) -> int:
    return 8 if result.is_complex() else 2


def _product(a: Tensor, *_: object, out_val: Tensor, **__: object) -> int:
    """Every entry of the result is a dot product over the last axis of `a`."""
    return _multiply_add(out_val) * out_val.numel() * a.shape[-1]


def _added_product(_: Tensor, a: Tensor, *__: object, out_val: Tensor, **___: object) -> int:
    return _product(a, out_val=out_val)


def _added_product_of_batches(_: Tensor, a: Tensor, *__: object, out_val: Tensor, **___: object) -> int:
    return a.shape[0] * _product(a, out_val=out_val)


def _convolution(image: Tensor, weight: Tensor, *args: Any, out_val: Tensor, **_: object) -> int:
    """Every weight meets every place of the smaller map once: the output, or the input if transposed."""
    transposed = args[4]
    places = image if transposed else out_val
    return _multiply_add(out_val) * weight.numel() * places.shape[0] * math.prod(places.shape[2:])


def _convolution_backward(grad: Tensor, image: Tensor, weight: Tensor, *args: Any, out_val: Any, **_: object) -> int:
    """Each product of the forward pass returns once in the gradient of the image and once in that of the weight."""
    for_image, for_weight, _for_bias = args[-1]
    return (for_image + for_weight) * _convolution(image, weight, *args, out_val=grad)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: object, **___: object) -> int:
    """Scores again, then gradients of query and key (D each), of value and of the weights (E each)."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def _fourier(per_point: float, whole: Tensor, axes: list[int]) -> int:
    return round(per_point * whole.numel() * math.log2(math.prod(whole.shape[axis] for axis in axes)))


def _fourier_complex(image: Tensor, axes: list[int], *_: object, **__: object) -> int:
    return _fourier(5, image, axes)


def _fourier_from_real(image: Tensor, axes: list[int], *_: object, **__: object) -> int:
    return _fourier(2.5, image, axes)


def _fourier_to_real(_: Tensor, axes: list[int], *__: object, out_val: Tensor, **___: object) -> int:
    return _fourier(2.5, out_val, axes)


_FORMULAS: dict[str, Formula] = {
    **dict.fromkeys(["aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten.vdot", "aten._int_mm"], _product),
    **dict.fromkeys(["aten.addmm", "aten.addmm_", "aten._addmm_activation"], _added_product),
    **dict.fromkeys(["aten.baddbmm", "aten.baddbmm_", "aten.addmv", "aten.addmv_"], _added_product),
    **dict.fromkeys(["aten.addbmm", "aten.addbmm_"], _added_product_of_batches),
    "aten.convolution": _convolution,
    "aten.convolution_backward": _convolution_backward,  # torch's counts each group's weights once for every group
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention,
    "aten._scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "aten._scaled_dot_product_attention_math_for_mps": _attention,
    "aten._fft_c2c": _fourier_complex,
    "aten._fft_r2c": _fourier_from_real,
    "aten._fft_c2r": _fourier_to_real,
}
