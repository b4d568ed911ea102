"""count_flops: hand counts, what is left out and named, whose work it was, and how the call is made."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from saccade.errors import InputError
from saccade.measure import count_flops


def attention_inputs(queries=5, keys=7, dim=4, value_dim=4, heads=3, key_heads=3):
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, heads, queries, dim), (2, key_heads, keys, dim), (2, key_heads, keys, value_dim)]
    return [torch.randn(*shape, generator=rng, requires_grad=True) for shape in shapes]


# Hand counts

PRODUCTS = {
    "vectors": (torch.dot, [(7,), (7,)], 2 * 7),
    "matrix and vector": (torch.mv, [(5, 7), (7,)], 2 * 5 * 7),
    "matrices": (torch.matmul, [(5, 7), (7, 3)], 2 * 5 * 7 * 3),
    "batches": (torch.matmul, [(4, 1, 5, 7), (2, 7, 3)], 4 * 2 * 2 * 5 * 7 * 3),
    "sum of matrices": (torch.addmm, [(5, 3), (5, 7), (7, 3)], 2 * 5 * 7 * 3),
    "sum in place": (lambda a, b, c: a.clone().addmm_(b, c), [(5, 3), (5, 7), (7, 3)], 2 * 5 * 7 * 3),
    "sum of vectors": (torch.addmv, [(5,), (5, 7), (7,)], 2 * 5 * 7),
    "sum of batches": (torch.baddbmm, [(4, 5, 3), (4, 5, 7), (4, 7, 3)], 4 * 2 * 5 * 7 * 3),
    "sum over batches": (torch.addbmm, [(5, 3), (4, 5, 7), (4, 7, 3)], 4 * 2 * 5 * 7 * 3),
    "with activation": (torch._addmm_activation, [(3,), (5, 7), (7, 3)], 2 * 5 * 7 * 3),
    "einsum": (lambda a, b: torch.einsum("bnd,bmd->bnm", a, b), [(2, 5, 7), (2, 3, 7)], 2 * 2 * 5 * 7 * 3),
    "linear": (F.linear, [(2, 5, 7), (3, 7), (3,)], 2 * 2 * 5 * 7 * 3),
}


@pytest.mark.parametrize(("fn", "shapes", "flops"), PRODUCTS.values(), ids=PRODUCTS)
def test_a_matrix_product_counts_two_for_each_multiply_add(fn, shapes, flops):
    count = count_flops(fn, *(torch.ones(shape) for shape in shapes))
    assert (count.total, count.uncounted) == (flops, {})


def test_a_complex_multiply_add_counts_eight():
    left, right = (torch.ones(shape, dtype=torch.complex64) for shape in [(5, 7), (7, 3)])
    assert count_flops(torch.mm, left, right).total == 8 * 5 * 7 * 3


CONVOLUTIONS = {  # a batch of 2, on 9 x 11; weights a place of the output (of the input if transposed), and its places
    "plain": (nn.Conv2d(6, 4, 3, padding=1), 4 * 6 * 9, 9 * 11),
    "stride and bias": (nn.Conv2d(6, 4, 3, stride=2, bias=True), 4 * 6 * 9, 4 * 5),
    "groups and dilation": (nn.Conv2d(6, 4, 3, groups=2, dilation=2), 4 * 3 * 9, 5 * 7),
    "depthwise": (nn.Conv2d(6, 6, 5, padding=2, groups=6), 6 * 25, 9 * 11),
    "transposed": (nn.ConvTranspose2d(6, 4, 2, stride=2), 6 * 4 * 4, 9 * 11),
    "transposed groups": (nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), 6 * 2 * 4, 9 * 11),
}


@pytest.mark.parametrize(("layer", "weights", "places"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_and_its_two_gradients_count_the_same_products(layer, weights, places):
    image, flops = torch.zeros(2, 6, 9, 11), 2 * 2 * weights * places
    assert count_flops(layer, image).total == flops
    assert count_flops(layer, image, backward=True).total == 2 * flops  # the image needs no gradient
    assert count_flops(layer, image.requires_grad_(), backward=True).total == 3 * flops


def test_the_gradients_of_a_linear_layer_count_as_two_products():
    tokens = torch.zeros(2, 5, 7, requires_grad=True)
    assert count_flops(nn.Linear(7, 3), tokens, backward=True).total == 3 * (2 * 2 * 5 * 7 * 3)


MASKS = {"dense": {}, "causal": {"is_causal": True}, "masked": {"attn_mask": torch.ones(5, 7).tril().bool()}}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_fused_attention_counts_its_two_products_where_torch_counts_none(options):
    inputs = attention_inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        F.scaled_dot_product_attention(*inputs, **options)
    ours = count_flops(lambda *qkv: F.scaled_dot_product_attention(*qkv, **options), *inputs)
    assert ours.by_op == {"aten._scaled_dot_product_flash_attention_for_cpu": 2 * 3 * (4 * 5 * 7 * 4)}
    assert theirs.get_total_flops() == 0


def test_fused_attention_counts_five_products_backward():
    count = count_flops(F.scaled_dot_product_attention, *attention_inputs(), backward=True)
    assert count.total == 2 * 3 * (2 + 5) * (2 * 5 * 7 * 4)


def test_plain_attention_counts_four_products_backward_and_each_width():
    inputs = attention_inputs(dim=4, value_dim=6)  # no fused kernel takes unequal widths
    assert count_flops(F.scaled_dot_product_attention, *inputs).total == 2 * 3 * 2 * 5 * 7 * (4 + 6)
    assert count_flops(F.scaled_dot_product_attention, *inputs, backward=True).total == 3 * 2 * 3 * 2 * 5 * 7 * (4 + 6)


def test_plain_and_fused_attention_count_the_same():
    inputs = attention_inputs()
    with sdpa_kernel(SDPBackend.MATH):
        plain = count_flops(F.scaled_dot_product_attention, *inputs)
    assert "aten.bmm" in plain.by_op
    assert plain.total == count_flops(F.scaled_dot_product_attention, *inputs).total


def test_shared_key_heads_count_once_for_each_query_head():
    inputs = attention_inputs(heads=4, key_heads=2)
    count = count_flops(lambda *qkv: F.scaled_dot_product_attention(*qkv, enable_gqa=True), *inputs)
    assert count.total == 2 * 4 * (4 * 5 * 7 * 4)


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
def test_the_fused_attention_of_cuda_counts_as_the_cpus(name):
    op = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention")
    options = {"flash": (), "efficient": (None, False), "cudnn": (None, False)}[name]
    count = count_flops(lambda *qkv: op(*qkv, *options), *(each.to("meta") for each in attention_inputs()))
    assert (count.total, count.uncounted) == (2 * 3 * (4 * 5 * 7 * 4), {})


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_counts_its_two_products():
    query, key, value = (torch.zeros(2, 3, 16, 16) for _ in range(3))
    assert count_flops(flex_attention, query, key, value).by_op == {"flex_attention": 2 * 3 * (4 * 16 * 16 * 16)}


def test_a_fourier_transform_counts_five_n_log_n_and_half_of_that_for_real_numbers():
    image = torch.zeros(2, 8, 16)
    points = 8 * 16 * math.log2(8 * 16)
    assert count_flops(torch.fft.fft2, image.to(torch.complex64)).total == 2 * 5 * points
    assert count_flops(torch.fft.rfft2, image).total == 2 * 2.5 * points
    assert count_flops(torch.fft.irfft, torch.zeros(3, 9, dtype=torch.complex64)).total == 3 * 2.5 * 16 * math.log2(16)


# What is left out, and what is named

CHEAP = {
    "pointwise": lambda x: F.gelu(x) * F.hardswish(x) + F.glu(torch.cat([x, x], -1)) - F.softplus(x.clone().mul_(2)),
    "views and moves": lambda x: F.pad(x.roll(1, -1)[..., [0, 1]].repeat(1, 2), (1, 1)).flip(-1).unfold(-1, 3, 1).mT,
    "sums in place": lambda x: (
        x.clone().index_add_(0, torch.arange(4), x).scatter_add(0, torch.zeros_like(x).long(), x)
    ),
    "reductions": lambda x: x.sum() + x.amax() + x.var() + x.logsumexp(0).mean() + x.norm() + x.argmax(),
    "softmax": lambda x: x.softmax(-1) + x.log_softmax(0),
    "normalisation": lambda x: F.layer_norm(x, [6]) + F.group_norm(x, 2) + F.batch_norm(x, None, None, training=True),
    "dropout and losses": lambda x: F.mse_loss(F.dropout(x), x) + F.cross_entropy(x, torch.zeros(4).long()),
}


@pytest.mark.parametrize("fn", CHEAP.values(), ids=CHEAP)
def test_cheap_operations_count_nothing_and_are_not_named(fn):
    count = count_flops(fn, torch.rand(4, 6, requires_grad=True), backward=True)
    assert (count.total, count.uncounted) == (0, {})


def test_other_operations_are_named_with_their_calls():
    def fn(image):
        pooled = F.avg_pool2d(F.max_pool2d(image, 2), 2)
        return F.interpolate(pooled.cumsum(-1).sort().values.cumsum(-1), scale_factor=2, mode="bilinear")

    names = ["avg_pool2d", "max_pool2d_with_indices", "cumsum", "sort", "upsample_bilinear2d"]
    count = count_flops(fn, torch.rand(1, 2, 8, 8))
    assert (count.total, count.uncounted) == (0, {f"aten.{name}": 1 + (name == "cumsum") for name in names})


def test_a_custom_operation_is_named_until_it_has_a_formula():
    schema = "(Tensor x) -> Tensor"
    op = torch.library.custom_op("saccade_test::square", lambda x: x @ x, mutates_args=(), schema=schema)
    square = torch.ops.saccade_test.square
    assert count_flops(op, torch.zeros(5, 5)).uncounted == {"saccade_test.square": 1}
    register_flop_formula(square)(lambda x, out_shape=None: 2 * x[0] ** 3)
    try:
        assert count_flops(op, torch.zeros(5, 5)).by_op == {"saccade_test.square": 2 * 5**3}
    finally:
        flop_registry.pop(square, None)


# Whose work it was


def test_modules_are_counted_with_what_runs_inside_them():
    model = nn.Sequential(nn.Sequential(nn.Linear(7, 3), nn.ReLU()), nn.Linear(3, 2))
    first, second = 2 * 5 * 7 * 3, 2 * 5 * 3 * 2
    count = count_flops(model, torch.zeros(5, 7))
    assert count.by_module == {"": first + second, "0": first, "0.0": first, "1": second}
    assert count_flops(lambda x: model(x), torch.zeros(5, 7)).by_module == {"": first + second}


class ThreeReadersOfOneInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(7, width) for width in (4, 4, 6))

    def forward(self, tokens):
        return (self.query(tokens) @ self.key(tokens).mT) @ self.value(tokens)


def test_gradients_are_counted_for_the_module_whose_call_they_undo():
    model, tokens = ThreeReadersOfOneInput(), torch.zeros(5, 7, requires_grad=True)
    forward, both = (count_flops(model, tokens, backward=backward).by_module for backward in (False, True))
    assert set(both) == {"", "query", "key", "value"}
    assert both == {name: 3 * flops for name, flops in forward.items()}


def test_a_module_called_twice_counts_twice():
    layer = nn.Linear(7, 7)
    count = count_flops(nn.Sequential(layer, layer), torch.zeros(5, 7), backward=True)
    assert count.by_module[""] == count.by_module["0"] == 2 * 5 * 7 * 7 * (2 + 2 + 1)  # the input needs no gradient


# How the call is made


def make_network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Linear(9, 4)), torch.zeros(2, 3, 5, 5)


def test_inference_mode_counts_the_same():
    model, image = make_network()
    with torch.inference_mode():
        count = count_flops(model, image)
        attention = count_flops(F.scaled_dot_product_attention, *attention_inputs())
    assert count == count_flops(model, image)
    assert attention.total == 2 * 3 * (4 * 5 * 7 * 4)


def test_compiled_and_exported_models_count_the_same():
    model, image = make_network()
    total = count_flops(model, image).total
    compiled = torch.compile(model, fullgraph=True)
    assert count_flops(compiled, image).total == total
    assert count_flops(torch.export.export(model, (image,)).module(), image).total == total


def test_fused_transformer_layers_count_part_by_part():
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True).eval()
    count = count_flops(layer, torch.zeros(3, 5, 8))
    assert count.by_module["self_attn"] == 3 * (2 * 5 * 8 * 8 * 4 + 4 * 5 * 5 * 8)
    assert count.total == count.by_module["self_attn"] + 3 * (2 * 5 * 8 * 16 * 2)
    assert torch.backends.mha.get_fastpath_enabled()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x @ x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad @ x.mT + x.mT @ grad


class SquareLayer(nn.Linear):
    def forward(self, x):
        return Square.apply(super().forward(x))


def test_custom_autograd_functions_count_through_what_they_call():
    count = count_flops(nn.Sequential(SquareLayer(5, 5)), torch.zeros(5, 5), backward=True)
    assert count.by_module == {"": 5 * (2 * 5**3), "0": 5 * (2 * 5**3)}


class Recomputed(nn.Linear):
    def forward(self, x):
        return checkpoint(lambda x: super(Recomputed, self).forward(x).square(), x, use_reentrant=False)


def test_what_checkpointing_computes_twice_counts_twice():
    count = count_flops(nn.Sequential(Recomputed(7, 3)), torch.zeros(5, 7, requires_grad=True), backward=True)
    assert count.by_module == {"": 4 * (2 * 5 * 7 * 3), "0": 4 * (2 * 5 * 7 * 3)}


def test_the_model_is_left_as_it_was():
    model, image = make_network()
    count_flops(model.train(), image, backward=True)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Errors


@pytest.mark.parametrize("fn", [torch.sin, torch.argmax], ids=["input", "output"])
def test_backward_needs_something_to_differentiate(fn):
    with pytest.raises(InputError, match="no output depends on a parameter or an input that requires a gradient"):
        count_flops(fn, torch.zeros(3, requires_grad=fn is torch.argmax), backward=True)


def test_a_failing_model_leaves_nothing_behind():
    model, image = make_network()
    with pytest.raises(RuntimeError):
        count_flops(model, image[:, :2])
    assert count_flops(model, image).by_module[""] == count_flops(model, image).total
