"""Parameters, bytes of traffic and peak memory against counts made by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saccade.errors import InputError
from saccade.measure import count_bytes, count_parameters, measure_peak_memory

SIDE = 64
MATRIX = 4 * SIDE * SIDE  # bytes


def make_matrix(**options):
    return torch.ones(SIDE, SIDE, **options)


def peak(fn):
    return measure_peak_memory(fn).bytes


# Parameters


def test_shared_parameters_count_once_and_frozen_ones_count():
    layer = nn.Linear(7, 7)
    layer.bias.requires_grad_(False)
    assert count_parameters(nn.Sequential(layer, nn.BatchNorm1d(7), layer)) == 7 * 7 + 7 + 2 * 7


def test_a_lazy_layer_is_refused_by_name():
    with pytest.raises(InputError, match=r"parameter 1\.weight has no size yet: call the model once"):
        count_parameters(nn.Sequential(nn.ReLU(), nn.LazyLinear(3)))


# Traffic

TRAFFIC = {  # matrices read and written
    "read one, write one": (lambda x: x + 1, 2),
    "read two, write one": (lambda x: x @ x, 3),
    "two operations": (lambda x: (x + 1).exp(), 4),
    "a list is read": (lambda x: torch.cat([x, x]), 4),
    "in place": (lambda x: x.clone().mul_(2), 4),
    "views": (lambda x: x.view(-1, 2)[1:].mT.unflatten(0, (1, -1)).detach(), 0),
    "allocation": (lambda x: torch.empty_like(x), 0),
    "overlapping": (lambda x: x.view(-1).unfold(0, 5, 1).clone(), 1 + 5 * (1 - 4 / SIDE**2)),
    "nothing": (lambda x: x[:0] + 1, 0),
    "expanded": (lambda x: x[:1].expand(SIDE, SIDE).clone(), 1 + 1 / SIDE),
}


@pytest.mark.parametrize(("fn", "matrices"), TRAFFIC.values(), ids=TRAFFIC)
def test_every_operation_reads_its_arguments_and_writes_its_results(fn, matrices):
    assert count_bytes(fn, make_matrix()) == matrices * MATRIX


def test_half_precision_halves_the_traffic():
    assert count_bytes(torch.sin, make_matrix(dtype=torch.bfloat16)) == MATRIX


def test_parameters_are_read_and_composite_operations_taken_apart():
    model, tokens = nn.Sequential(nn.Linear(8, 4), nn.ReLU()), torch.zeros(5, 8)
    assert count_bytes(model, tokens) == 4 * ((5 * 8 + 8 * 4 + 4 + 5 * 4) + 2 * 5 * 4)
    with torch.inference_mode():
        assert count_bytes(torch.matmul, make_matrix().mT, make_matrix()) == 3 * MATRIX


# Peak memory

PEAKS = {  # matrices alive at once
    "one": (lambda x: x + 1, 1),
    "a chain holds two": (lambda x: x.sin().cos().tan().exp(), 2),
    "two at a time": (lambda x: (x + 1) @ (x + 2), 3),
    "in place": (lambda x: x.sin().mul_(2).add_(1).t_(), 1),
    "in place on the input": (lambda x: x.mul_(1), 0),
    "views": (lambda x: x.sin().view(-1)[3:].unfold(0, 5, 1).mT, 1),
    "kept": (lambda x: [x + i for i in range(5)], 5),
    "into a result that was there": (lambda x: torch.add(x, 1, out=x), 0),
    "allocated": (lambda x: torch.empty(3, SIDE, SIDE), 3),
    "grown": (lambda x: x.sin().resize_(2, SIDE, SIDE), 2),
}


@pytest.mark.parametrize(("fn", "matrices"), PEAKS.values(), ids=PEAKS)
def test_peak_is_what_lives_at_once(fn, matrices):
    x = make_matrix()
    assert peak(lambda: fn(x)) == matrices * MATRIX


def test_freed_memory_is_not_counted():
    def fn():
        for _ in range(5):
            left = make_matrix()
            right = left + 1
            del left, right
        return make_matrix()

    assert peak(fn) == 2 * MATRIX


def test_what_autograd_saves_counts_until_backward_frees_it():
    x = make_matrix(requires_grad=True)

    def forward():
        return x.sin().cos().exp()  # cos saves what sin returned, exp saves its own result

    with torch.no_grad():
        assert peak(forward) == 2 * MATRIX
    assert peak(forward) == 3 * MATRIX

    def twice():
        for _ in range(2):
            torch.autograd.grad(forward().sum(), x)

    def once():
        torch.autograd.grad(forward().sum(), x)

    assert peak(twice) == peak(once) >= 3 * MATRIX


def test_backward_counts_saved_tensors_and_gradients():
    layers = [make_matrix(requires_grad=True) for _ in range(3)]

    def step():
        x = torch.zeros(1, SIDE)
        for layer in layers:
            x = x @ layer
        torch.autograd.grad(x.sum(), layers)

    assert 3 * MATRIX <= peak(step) <= 3 * MATRIX + 20 * 4 * SIDE  # a gradient for each layer; rows are small


def test_attention_maps_are_held_by_plain_attention_only():
    query = torch.zeros(1, 1, 4 * SIDE, 8)
    assert peak(lambda: (query @ query.mT).softmax(-1) @ query) >= 2 * 4 * (4 * SIDE) ** 2
    assert peak(lambda: F.scaled_dot_product_attention(query, query, query)) < 4 * (4 * SIDE) ** 2


def test_nothing_is_held_by_the_measurement():
    kept = []
    measure_peak_memory(lambda: kept.append(make_matrix() + 1))
    assert peak(lambda: kept.pop() + 1) == MATRIX


def test_result_states_device_and_method():
    result = measure_peak_memory(lambda: make_matrix())
    assert (result.bytes, result.device, result.method) == (MATRIX, "cpu", "tensors")
    assert measure_peak_memory(lambda: make_matrix(device="meta")).bytes == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_reads_the_allocator():
    x = torch.ones(1024, 1024, device="cuda")
    result = measure_peak_memory(lambda: (x + 1) * (x + 2), device="cuda")
    assert (result.bytes, result.device, result.method) == (3 * x.nbytes, f"cuda:{x.device.index}", "allocator")


@pytest.mark.parametrize("device", ["cpux", "cuda:99"])
def test_an_absent_device_is_refused(device):
    with pytest.raises(InputError, match=f"device is '{device}', which cannot be used here"):
        measure_peak_memory(make_matrix, device=device)
