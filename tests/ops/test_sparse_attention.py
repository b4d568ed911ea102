"""sparse_attention: the tiled engine is the reference, in every shape, layout and dtype; memory; compilers; errors."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saccade.errors import InputError
from saccade.ops import Global, Halo, Neighborhood, QueryTables, RelativeTable, Window, sparse_attention
from saccade.ops import sparse_attention_weights as attention_weights
from tests.ops.cases import CASES, IDS, patterns

IMPLS = ("tiled", "reference")
BIASES = ("no bias", "number tables", "query tables")


def make_case(pattern, space, *, bias="no bias", extra=0, heads=4, kv_heads=2, dim=3, value_dim=5, seed=0, batch=2):
    """Tensors in float64 that take part in gradients, and the call that uses them."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()

    keys = pattern.key_space(space)
    sizes = [(heads, *space, dim), (kv_heads, *keys, dim), (kv_heads, *keys, value_dim)]
    inputs = [draw(batch, *size) for size in sizes]
    tables, options = [], {}
    rows = [2 * length + 13 for length in keys]  # beyond any offset
    if bias == "number tables":
        tables = [draw(heads, *rows)]
        options["bias"] = RelativeTable(*tables)
    elif bias == "query tables":
        tables = [draw(length, dim) for length in rows]
        options["bias"] = QueryTables(tables)
    if extra:
        extras = [draw(batch, kv_heads, extra, dim), draw(batch, kv_heads, extra, value_dim)]
        options |= dict(zip(("extra_key", "extra_value"), extras))
        tables = [*tables, *extras]
    return SimpleNamespace(inputs=inputs, leaves=[*inputs, *tables], options=options)


def check_tiled_is_reference(pattern, space, **case):
    case = make_case(pattern, space, **case)
    for return_lse in (False, True):
        results = [
            sparse_attention(*case.inputs, pattern, impl=impl, return_lse=return_lse, **case.options) for impl in IMPLS
        ]
        tiled, reference = (result if return_lse else (result,) for result in results)
        assert_close(tuple(tiled), tuple(reference))
        assert tiled[0].shape == (*case.inputs[0].shape[:-1], case.inputs[2].shape[-1])
        upstream = [torch.randn_like(x) for x in reference]
        grads = [
            torch.autograd.grad(list(result), case.leaves, upstream, materialize_grads=True)  # an empty batch uses none
            for result in (tiled, reference)
        ]
        assert_close(*grads)


@pytest.mark.parametrize(("pattern", "space"), CASES, ids=IDS)
@pytest.mark.parametrize("bias", BIASES)
def test_tiled_equals_reference_in_value_and_gradient_in_telling_cases(pattern, space, bias):
    check_tiled_is_reference(pattern, space, bias=bias)


@given(
    case=patterns(max_tokens=80),
    bias=st.sampled_from(BIASES),
    extra=st.integers(0, 2),
    sizes=st.sampled_from([(1, 1, 1, 1), (2, 1, 4, 2), (3, 3, 1, 2), (4, 2, 2, 3)]),
    batch=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_tiled_equals_reference_in_value_and_gradient(case, sizes, **options):
    sizes = dict(zip(("heads", "kv_heads", "dim", "value_dim"), sizes))
    check_tiled_is_reference(*case, **sizes, **options)


@pytest.mark.parametrize(("pattern", "space"), CASES, ids=IDS)
def test_reference_is_torchs_attention_under_the_mask(pattern, space):
    inputs = make_case(pattern, space, kv_heads=4).inputs
    out = sparse_attention(*inputs, pattern, impl="reference")
    flat = F.scaled_dot_product_attention(*(x.flatten(2, -2) for x in inputs), attn_mask=pattern.mask(space))
    assert_close(out.flatten(2, -2), flat)


def test_scale_is_the_callers():
    inputs = make_case(Window(2), (4, 4), dim=4).inputs
    default = sparse_attention(*inputs, Window(2))
    assert_close(sparse_attention(*inputs, Window(2), scale=0.5), default)
    means = inputs[2].unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5))
    means = means.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 1)
    for impl in IMPLS:
        assert_close(sparse_attention(*inputs, Window(2), scale=0.0, impl=impl), means)


def test_a_dense_bias_is_served_by_the_reference():
    pattern, table = Window((2, 3)), torch.randn(4, 3, 5, dtype=torch.float64)
    inputs = make_case(pattern, (4, 6)).inputs
    dense = torch.zeros(4, 24, 24, dtype=torch.float64)
    for n in range(24):
        for m in pattern.mask((4, 6))[n].nonzero().flatten().tolist():
            dense[:, n, m] = table[:, m // 6 - n // 6 + 1, m % 6 - n % 6 + 2]
    expected = sparse_attention(*inputs, pattern, bias=RelativeTable(table))
    assert_close(sparse_attention(*inputs, pattern, bias=dense, impl="reference"), expected)


# Extra keys


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("pattern", "space"), [(Neighborhood(3), (5, 7)), (Window(2, shift=1), (4, 6)), (Global(), (3, 4))]
)
def test_extra_keys_are_seen_by_all_as_in_dense_attention_over_both(pattern, space, impl):
    case = make_case(pattern, space, extra=3, kv_heads=4)
    result = sparse_attention(*case.inputs, pattern, impl=impl, return_lse=True, **case.options)
    query, key, value = (x.flatten(2, -2) for x in case.inputs)
    key, value = torch.cat([case.options["extra_key"], key], 2), torch.cat([case.options["extra_value"], value], 2)
    mask = F.pad(pattern.mask(space), (3, 0), value=True)
    dense = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert_close(result.out.flatten(2, -2), dense)
    logits = (query @ key.mT * 3**-0.5).masked_fill(~mask, -torch.inf)
    assert_close(result.lse.flatten(2), logits.logsumexp(-1))
    upstream = torch.randn_like(dense)
    grads = torch.autograd.grad(result.out.flatten(2, -2), case.leaves, upstream)
    assert_close(grads, torch.autograd.grad(dense, case.leaves, upstream))


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("extra", [0, 2])
def test_weights_average_the_values_into_the_output(bias, extra):
    pattern, space = Halo(2, 1), (4, 6)
    case = make_case(pattern, space, bias=bias, extra=extra, kv_heads=4)
    query, key, value = case.inputs
    weights = attention_weights(
        query, key, pattern, bias=case.options.get("bias"), extra_key=case.options.get("extra_key")
    )
    assert weights.shape == (2, 4, 24, extra + 24)
    assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights[..., extra:][..., ~pattern.mask(space)] == 0).all()
    value = value.flatten(2, -2)
    value = torch.cat([case.options["extra_value"], value], 2) if extra else value
    assert_close(
        (weights @ value).unflatten(2, space), sparse_attention(query, key, case.inputs[2], pattern, **case.options)
    )


# Layouts


LAYOUTS = {
    "channels last": lambda x: x.movedim(1, -2).contiguous().movedim(-2, 1),
    "every second number": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
    "space transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch expanded": lambda x: x[:1].expand(2, -1, -1, -1, -1),
    "heads expanded": lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1, -1),
    "offset": lambda x: F.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("pattern", [Window(2), Window(2, shift=1), Neighborhood(3)], ids=str)
def test_strides_of_the_inputs_do_not_matter(layout, pattern):
    inputs = make_case(pattern, (4, 6)).inputs
    views = [layout(x) for x in inputs]
    out = sparse_attention(*views, pattern)
    plain = sparse_attention(*(view.contiguous() for view in views), pattern)
    assert_close(out, plain)
    upstream = torch.randn_like(out)
    assert_close(*(torch.autograd.grad(result, inputs, upstream) for result in (out, plain)))


# Precision


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("return_lse", [False, True])
def test_half_precision_is_close_to_full(bias, impl, dtype, return_lse):
    """The output averages values, so weights and result, rounded to eps, err by eps of the largest value each; logits
    of size l that are themselves rounded move a weight by l eps, and l is below 6 here."""
    pattern, space = Neighborhood(5), (9, 11)
    case = make_case(pattern, space, bias=bias, dim=16, value_dim=16)
    options = case.options
    if bias == "number tables":
        options["bias"] = RelativeTable(options["bias"].table.float())
    elif bias == "query tables":
        options["bias"] = QueryTables([0.1 * table.float() for table in options["bias"].tables])  # small logits
    inputs = [x.to(dtype) for x in case.inputs]
    out = sparse_attention(*inputs, pattern, impl=impl, return_lse=return_lse, **options)
    full = sparse_attention(*(x.double() for x in inputs), pattern, impl="reference", return_lse=True, **options)
    if return_lse:
        out, lse = out
        assert lse.dtype == torch.float32
        assert (lse - full.lse).abs().max() < 4 * 6 * torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert (out - full.out).abs().max() < 6 * torch.finfo(dtype).eps * inputs[2].abs().max()


def test_half_precision_gradients_are_close_to_full():
    pattern, space = Neighborhood(5), (9, 11)
    inputs = [x.detach().bfloat16().requires_grad_() for x in make_case(pattern, space, dim=16, value_dim=16).inputs]
    full = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = sparse_attention(*inputs, pattern), sparse_attention(*full, pattern, impl="reference")
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, full, upstream.double())
    for half, whole in zip(*grads):
        assert half.dtype == torch.bfloat16
        error = (half - whole).square().mean().sqrt() / whole.square().mean().sqrt()
        assert error < 4 * torch.finfo(torch.bfloat16).eps  # root mean square, of a handful of roundings


def test_a_nan_stays_with_the_queries_whose_window_holds_it():
    pattern, space = Window(4), (8, 12)
    query, key, value = (x.detach() for x in make_case(pattern, space).inputs)
    key[:, :, 1, 5] = torch.nan
    out = sparse_attention(query, key, value, pattern)
    sees = pattern.mask(space)[:, 1 * 12 + 5].view(space)
    assert torch.equal(out.isnan().any(-1), sees.expand(2, 4, -1, -1))


# Memory


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation, forward or backward, allocates."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self.entries = max(self.entries, each.untyped_storage().nbytes() // each.element_size())
        return out


def largest_tensor(pattern, side, impl, **case):
    case = make_case(pattern, (side, side), batch=1, heads=2, kv_heads=2, dim=4, value_dim=4, **case)
    with Largest() as largest:
        out = sparse_attention(*case.inputs, pattern, impl=impl, **case.options)
        torch.autograd.grad(out, case.leaves, torch.ones_like(out))
    return largest.entries


@pytest.mark.parametrize("bias", BIASES[:2])
@pytest.mark.parametrize(
    "pattern",
    [
        Window(8),
        Window(8, shift=4),
        Halo(8, 3),
        Neighborhood(7),
        Neighborhood(7, dilation=2),
        Neighborhood(7, stride=4),
    ],
    ids=str,
)
def test_tiled_forms_nothing_that_grows_faster_than_the_map(pattern, bias):
    assert largest_tensor(pattern, 16, "reference", bias=bias) >= 2 * 16**4  # heads x N x N: the instrument sees it
    small, large = (largest_tensor(pattern, side, "tiled", bias=bias) for side in (32, 64))
    assert large <= 6.5 * small  # 4, times (14 / 11)^2 where the small map has border tiles only; N x N grows 16 times
    assert large < 2 * 64**4 / 16


# Compilers


class Attend(torch.nn.Module):
    def __init__(self, pattern, table=None):
        super().__init__()
        self.pattern = pattern
        self.table = table

    def forward(self, query, key, value):
        bias = None if self.table is None else RelativeTable(self.table)
        return sparse_attention(query, key, value, self.pattern, bias=bias, return_lse=True)


COMPILED = {
    "tiles that share a mask": (Window(2), None),
    "tiles of their own, a table": (Neighborhood(3), torch.nn.Parameter(torch.randn(4, 5, 5, dtype=torch.float64))),
}


@pytest.mark.parametrize(("pattern", "table"), COMPILED.values(), ids=COMPILED)
def test_compiled_whole_it_gives_the_same_at_two_sizes(pattern, table):
    torch.compiler.reset()
    module = Attend(pattern, table)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    for space in [(4, 6), (6, 4)]:
        inputs = make_case(pattern, space).inputs
        out, expected = compiled(*inputs), module(*inputs)
        assert_close(out, expected)
        upstream = [torch.randn_like(x) for x in expected]
        assert_close(*(torch.autograd.grad(result, inputs, upstream) for result in (out, expected)))


@pytest.mark.slow
def test_compiled_by_inductor_with_sizes_found_to_vary_and_a_pattern_made_inside():
    torch.compiler.reset()

    def attend(query, key, value):
        pattern = Window(2, shift=1 if query.shape[2] > 4 else 0)
        return sparse_attention(query, key, value, pattern)

    compiled = torch.compile(attend, fullgraph=True)
    for space in [(4, 6), (6, 4), (8, 8)]:
        inputs = make_case(Window(2), space).inputs
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)  # inductor's own imports
            out = compiled(*inputs)
        expected = attend(*inputs)
        assert_close(out, expected)
        upstream = torch.randn_like(out)
        assert_close(*(torch.autograd.grad(result, inputs, upstream) for result in (out, expected)))


@pytest.mark.parametrize(("pattern", "table"), COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("space", [(4, 6), (8, 4)])
def test_exported_it_gives_the_same(pattern, table, space):
    module, inputs = Attend(pattern, table), make_case(pattern, space).inputs
    exported = torch.export.export(module, tuple(inputs)).module()
    other = make_case(pattern, space, seed=1).inputs
    assert_close(tuple(exported(*other)), tuple(module(*other)))


# Errors


def shapes(query=(2, 4, 4, 6, 3), key=(2, 2, 4, 6, 3), value=(2, 2, 4, 6, 5)):
    return [torch.zeros(shape) for shape in (query, key, value)]


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (shapes(key=(2, 2, 4, 5, 3), value=(2, 2, 4, 5, 5)), {}, r"key has space \(4, 5\): .* takes keys on \(4, 6\)"),
        (shapes(value=(2, 2, 4, 5, 5)), {}, r"value is \(2, 2, 4, 5, 5\) but key is \(2, 2, 4, 6, 3\): both share"),
        (shapes(), {"bias": torch.zeros(24, 24)}, r"bias is a tensor \(24, 24\) and impl is 'auto': .*'reference'"),
        (shapes(), {"extra_key": torch.zeros(2, 2, 1, 3)}, "extra_key and extra_value go together: give both or none"),
        (shapes(), {"impl": "flash"}, "impl is .flash.: choose one of auto, flex, reference, tiled, triton"),
        (
            [torch.zeros(1, 1, 2, 2, 2, 2, 3)] * 3,
            {},
            r"query is \(1, 1, 2, 2, 2, 2, 3\): .* one to three axes",
        ),
        (
            shapes(),
            {"extra_key": torch.zeros(2, 3, 1, 3), "extra_value": torch.zeros(2, 3, 1, 5)},
            "query has 4 heads and key has 3: .* Give a number of key heads that divides 4",
        ),
    ],
)
def test_calls_that_cannot_be_served(inputs, options, message):
    with pytest.raises(InputError, match=message):
        sparse_attention(*inputs, Window(2), **options)


def test_a_pattern_of_another_kind():
    with pytest.raises(TypeError, match=r"pattern is int: give a Pattern such as Window\(7\)"):
        sparse_attention(*shapes(), 7)
