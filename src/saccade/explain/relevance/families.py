"""Which operations share their rules. An operation is known by its aten name; what stands in no row is unknown."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.explain.relevance.tape import Node, Value

__all__ = ["DROPS", "FAMILIES", "MAPS", "SHAPES_ONLY", "family_of", "trait_of"]

FAMILIES: dict[str, tuple[str, ...]] = {
    # maps with weights; with two operands that depend on the input, matrix products are "product"
    "convolution": ("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution"),
    "dense": ("addmm", "mm", "bmm", "baddbmm", "linear", "mv", "dot", "addmv", "matmul"),
    # sums of operands; products with a constant are "scale", of two operands "gate"
    "add": ("add", "sub", "rsub"),
    "scale": ("mul", "div"),
    "mix": (
        "sum",
        "mean",
        "cumsum",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d",
        "upsample_linear1d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "upsample_trilinear3d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
        "_fft_r2c",
        "_fft_c2r",
        "_fft_c2c",
        "trace",
    ),
    # values that only change place, or are copied: relevance goes back the same way
    "move": (
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "permute",
        "transpose",
        "t",
        "numpy_T",
        "movedim",
        "expand",
        "repeat",
        "unsqueeze",
        "squeeze",
        "slice",
        "select",
        "narrow",
        "diagonal",
        "as_strided",
        "unfold",
        "cat",
        "stack",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "clone",
        "copy",
        "alias",
        "detach",
        "contiguous",
        "lift_fresh",
        "_to_copy",
        "index",
        "index_select",
        "gather",
        "take",
        "masked_select",
        "masked_fill",
        "where",
        "constant_pad_nd",
        "reflection_pad1d",
        "reflection_pad2d",
        "reflection_pad3d",
        "replication_pad1d",
        "replication_pad2d",
        "replication_pad3d",
        "flip",
        "roll",
        "rot90",
        "tril",
        "triu",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "im2col",
        "col2im",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "_upsample_nearest_exact2d",
        "overlay",
        "slice_scatter",
        "select_scatter",
        "as_strided_scatter",
        "diagonal_scatter",
        "scatter",
        "scatter_add",
        "scatter_src",
        "index_put",
        "index_add",
        "index_copy",
        "view_as_real",
        "view_as_complex",
        "real",
        "imag",
        "native_dropout",
        "slice_backward",
        "select_backward",
    ),
    # the operand that won takes all: the operation's own gradient says which
    "winner": (
        "max_pool1d_with_indices",
        "max_pool2d_with_indices",
        "max_pool3d_with_indices",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
        "fractional_max_pool2d",
        "max",
        "min",
        "amax",
        "amin",
        "maximum",
        "minimum",
        "topk",
        "sort",
        "median",
        "kthvalue",
        "scatter_reduce",
    ),
    "activation": (
        "relu",
        "relu6",
        "leaky_relu",
        "_prelu_kernel",
        "gelu",
        "silu",
        "mish",
        "elu",
        "celu",
        "selu",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "sigmoid",
        "log_sigmoid_forward",
        "softplus",
        "softshrink",
        "hardshrink",
        "tanh",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "log2",
        "log10",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "pow",
        "square",
        "abs",
        "neg",
        "sin",
        "cos",
        "erf",
        "atan",
        "clamp",
        "clamp_min",
        "clamp_max",
        "threshold",
        "conj",
        "_conj",
        "resolve_conj",
        "resolve_neg",
        "nan_to_num",
    ),
    "softmax": ("_softmax", "softmax", "_safe_softmax"),
    "log_softmax": ("_log_softmax", "log_softmax"),
    "norm": (
        "native_layer_norm",
        "native_group_norm",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_batch_norm_no_update",
        "_batch_norm_with_update",
        "_batch_norm_with_update_functional",
        "cudnn_batch_norm",
        "miopen_batch_norm",
        "_fused_rms_norm",
        "batch_norm",
    ),
    "statistic": ("var", "var_mean", "std", "std_mean", "linalg_vector_norm", "norm", "logsumexp"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    "embedding": ("embedding",),
    "blend": ("lerp", "addcmul"),
    "sampler": ("grid_sampler_2d", "grid_sampler_3d"),
    "step": ("floor", "ceil", "round", "trunc", "sign", "sgn", "heaviside", "floor_divide", "remainder", "fmod"),
}
FAMILY = {op: family for family, ops in FAMILIES.items() for op in ops}
MAPS = ("convolution", "dense")
DROPS = ("masked_fill", "where", "tril", "triu", "constant_pad_nd", "scatter", "index_put", "native_dropout", "col2im")
"""Moves after which an entry may come from no operand."""
SHAPES_ONLY = (
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "new_empty_strided",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "rand_like",
    "randn_like",
    "zero",
    "fill",
)
"""Results that take nothing but the shape of their operand."""

_TRANSPARENT = ("move", "scale", "add")  # what keeps a trait, where the other operands are constants


def family_of(node: "Node") -> str:
    """Name of the family of a recorded operation: also "product" (matrix) and "gate" (elementwise) of two operands."""
    family = FAMILY.get(node.op, "unknown")
    if family in (*MAPS, "scale"):
        factors = _factors(node)
        if len(factors) == 2 and all(value.active for value in factors):
            return "gate" if family == "scale" else "product"
        if not any(value.active for value in factors):
            return "add"  # only the term that a matrix product is added to
        if node.op == "div" and not getattr(node.args[0], "active", False):
            return "activation"  # a constant over x
    return family


def _factors(node: "Node") -> tuple["Value", ...]:
    if node.op in ("addmm", "baddbmm", "addmv"):
        return node.inputs[1:3]
    return node.inputs[:2] if len(node.inputs) > 1 else (node.inputs[0],)


def trait_of(node: "Node") -> str | None:
    """What part a result plays in a softmax or norm, composed or not.

    "softmax": attention weights. "exp": weights before they are divided by their sum. "norm": a scale that normalises,
    such as that sum. "shift": a maximum, which is subtracted to keep numbers small.
    """
    if node.family == "softmax":
        return "softmax"
    if node.op in ("exp", "exp2"):
        return "exp"
    exponent = node.args[1] if node.op == "pow" else None
    root = isinstance(exponent, int | float) and (exponent < 0 or exponent == 0.5)
    if node.op in _SCALES or root:
        return "norm"
    if node.op in _MAXIMA:
        return "shift"
    traits = {value.trait for value in node.inputs if value.active}
    if traits == {"exp"} and (node.family == "mix" or node.op in ("add", "scatter_add", "index_add")):
        return "norm"
    if traits == {"norm"} and node.family == "mix":
        return "norm"  # the mean norm of a map's channels is a scale as well
    if node.family == "gate" and node.op == "div" and [value.trait for value in node.inputs] == ["exp", "norm"]:
        return "softmax"
    if len(traits) == 1 and (node.family in _TRANSPARENT or node.op in ("clamp_min", "clamp", "reciprocal", "div")):
        return traits.pop()
    return None


_SCALES = ("rsqrt", "sqrt", "linalg_vector_norm", "norm", "std", "var")
_MAXIMA = ("amax", "max", "maximum", "scatter_reduce", "logsumexp")
