"""The Triton kernels on Triton's interpreter, and FlexAttention on the CPU, are the reference; what they refuse."""

import importlib
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import (
    Causal,
    Grid,
    Halo,
    Neighborhood,
    PerHead,
    RelativeTable,
    Sinks,
    SlidingWindow,
    Window,
    select_top_k,
    sparse_attention,
)
from tests.ops.cases import patterns

triton = pytest.importorskip("triton", reason="triton has no build for this platform")
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def interpreted(monkeypatch):
    """Small tiles: tests/conftest.py has Triton interpret its kernels, number by number, where there is no device."""
    module = importlib.import_module("saccade.ops.block_lists")
    monkeypatch.setattr(module, "QUERY_TILES", (16, 32))
    monkeypatch.setattr(module, "KEY_TILE", 16)
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here; the tests on a device check them")


def make_inputs(pattern, space, heads=2, kv_heads=1, dim=5, value_dim=20, device="cpu", dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    keys = pattern.key_space(space)
    shapes = [(2, heads, *space, dim), (2, kv_heads, *keys, dim), (2, kv_heads, *keys, value_dim)]
    return [torch.randn(shape, generator=rng).to(device, dtype).requires_grad_() for shape in shapes]


def check(pattern, space, tolerance=3e-6, **sizes):
    """Value, log-sum-exp and gradients of both, against the reference in float64."""
    inputs = make_inputs(pattern, space, **sizes)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours = sparse_attention(*inputs, pattern, impl="triton", return_lse=True)
    truth = sparse_attention(*exact, pattern, impl="reference", return_lse=True)
    assert ours.out.dtype == inputs[0].dtype
    assert ours.lse.dtype == torch.float32
    close = {"atol": tolerance, "rtol": tolerance, "check_dtype": False}
    assert_close(tuple(ours), tuple(truth), **close)
    upstream = [torch.randn_like(truth.out), torch.randn_like(truth.lse).where(truth.lse.isfinite(), 0.0)]
    grads = torch.autograd.grad(list(ours), inputs, [g.to(x.dtype) for g, x in zip(upstream, ours)])
    expected = torch.autograd.grad(list(truth), exact, upstream)
    for got, want in zip(grads, expected):
        assert_close(got, want, atol=10 * tolerance * (1 + want.abs().max().item()), rtol=0, check_dtype=False)


TELLING = [
    (Neighborhood(3), (5, 7)),
    (Neighborhood(2, dilation=2), (9,)),
    (Window(4, ragged=True), (9,)),
    (Grid(2, ragged=True), (5, 4)),
    (Halo(2, 1, padded=True), (4, 4)),
    ((SlidingWindow(3) | Sinks(1)) & Causal(), (40,)),
    (Window(2) & ~Window(2), (6,)),  # nothing at all
    (Neighborhood((3, 1, 3)), (3, 2, 4)),
]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("pattern", "space"), TELLING, ids=str)
def test_triton_is_the_reference_in_telling_cases(pattern, space):
    check(pattern, space)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@settings(max_examples=15, deadline=None)
@given(
    case=patterns(max_tokens=40),
    sizes=st.sampled_from([(1, 1, 1, 1), (4, 2, 16, 16), (3, 3, 17, 2)]),
    seed=st.integers(0, 99),
)
def test_triton_is_the_reference(case, sizes, seed):
    check(*case, **dict(zip(("heads", "kv_heads", "dim", "value_dim"), sizes)), seed=seed)


@pytest.mark.usefixtures("interpreted")
def test_strides_empty_batches_heads_and_extra_keys():
    pattern, space = SlidingWindow(2), (12,)
    inputs = [x.detach() for x in make_inputs(pattern, space, kv_heads=2)]
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    out = sparse_attention(*inputs, pattern, impl="triton")
    assert_close(sparse_attention(*views, pattern, impl="triton"), out)
    every_second = [torch.stack([x, x], -1).flatten(-2)[..., ::2] for x in inputs]
    assert_close(sparse_attention(*every_second, pattern, impl="triton"), out)
    assert sparse_attention(*(x[:0] for x in inputs), pattern, impl="triton").shape == (0, 2, 12, 20)
    per_head = PerHead([Causal(), Window(4)])
    extra = [torch.randn(2, 2, 3, size) for size in (5, 20)]
    both = [
        sparse_attention(*inputs, per_head, extra_key=extra[0], extra_value=extra[1], impl=impl)
        for impl in ("triton", "reference")
    ]
    assert_close(*both)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_any_scale(scale):
    inputs = make_inputs(Neighborhood(3), (9,))
    both = [sparse_attention(*inputs, Neighborhood(3), scale=scale, impl=impl) for impl in ("triton", "reference")]
    assert_close(*both)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in both]
    assert_close(*grads, atol=1e-5, rtol=1e-4)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("pattern", "space"), [*TELLING, (Neighborhood(13), (40, 40)), (Causal(), (1000,))], ids=str)
def test_triton_on_a_device(pattern, space, dtype):
    tolerance = 2e-5 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps
    check(pattern, space, tolerance, dim=32, value_dim=64, device="cuda", dtype=dtype)


@on_cuda
@pytest.mark.parametrize(("pattern", "space"), [(Neighborhood(13), (40, 40)), (Causal(), (1000,))], ids=str)
def test_flex_on_a_device(pattern, space):
    inputs = make_inputs(pattern, space, dim=32, value_dim=32, device="cuda")
    ours, truth = (sparse_attention(*inputs, pattern, impl=impl, return_lse=True) for impl in ("flex", "reference"))
    assert_close(tuple(ours), tuple(truth), atol=1e-2, rtol=1e-2)
    grads = [torch.autograd.grad(each.out, inputs, torch.ones_like(each.out)) for each in (ours, truth)]
    assert_close(*grads, atol=3e-2, rtol=3e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "space"), [(Neighborhood(7), (17, 19)), ((SlidingWindow(9) | Sinks(1)) & Causal(), (150,))], ids=str
)
def test_flex_is_the_reference_on_the_cpu(pattern, space):
    inputs = [x.detach() for x in make_inputs(pattern, space, heads=4, kv_heads=2, dim=16, value_dim=16)]
    with warnings.catch_warnings(action="ignore"):  # of the compiler
        ours = sparse_attention(*inputs, pattern, impl="flex")
    assert_close(ours, sparse_attention(*inputs, pattern, impl="reference"), atol=1e-5, rtol=1e-5)


# Errors


def test_what_the_kernels_refuse():
    pattern, space = Window(2), (4,)
    inputs = make_inputs(pattern, space)
    chosen = select_top_k(torch.zeros(2, 1, 2, 2), 1, query_block=2, key_block=2)
    for impl in ("triton", "flex"):
        with pytest.raises(InputError, match=f"impl is '{impl}' and a bias is given: .* Use impl='tiled'"):
            sparse_attention(*inputs, pattern, bias=RelativeTable(torch.zeros(2, 3)), impl=impl)
        with pytest.raises(InputError, match=f"impl is '{impl}' and the pattern is a Selection"):
            sparse_attention(*inputs, chosen, impl=impl)
    with pytest.raises(InputError, match="on the CPU, where FlexAttention has no backward pass"):
        sparse_attention(*inputs, pattern, impl="flex")
    with pytest.raises(InputError, match="no log-sum-exp to return"), torch.no_grad():
        sparse_attention(*inputs, pattern, impl="flex", return_lse=True)


def test_triton_needs_a_device_or_the_interpreter(monkeypatch):
    monkeypatch.setattr("saccade.ops.triton_attention.INTERPRETED", False)
    with pytest.raises(InputError, match=r"the tensors are on cpu: its kernels run on CUDA, .* Use impl='tiled'"):
        sparse_attention(*make_inputs(Window(2), (4,)), Window(2), impl="triton")


@pytest.mark.usefixtures("interpreted")
def test_triton_has_no_double_precision():
    with pytest.raises(InputError, match=r"query is torch\.float64: its kernels sum in float32"):
        sparse_attention(*make_inputs(Window(2), (4,), dtype=torch.float64), Window(2), impl="triton")
