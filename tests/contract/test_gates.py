"""Laws of every exported gate. A gate that cannot keep one gets a row in a table here, with the reason."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.gates import create_gate, describe_gate, list_gates

DIM = 8
NAMES = list_gates()
VARIANTS = {"layer_router": [{"form": "sigmoid", "pool_size": 3, "start": -0.5}]}
"""Options to try besides the defaults."""
CASES = [(name, options) for name in NAMES for options in ({}, *VARIANTS.get(name, []))]
every_name = pytest.mark.parametrize("name", NAMES)
every_gate = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n} {o or ''}".strip() for n, o in CASES])


def make_gate(name, options=None, dtype=torch.float64):
    """A gate whose parameters are not near 0, so that none of them can be forgotten unseen."""
    gate = create_gate(name, DIM, **options or {}).to(dtype)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return gate.eval()


def make_input(*space, batch=5, dtype=torch.float64):
    return torch.randn(batch, *space, DIM, dtype=dtype)


def test_variants_are_of_gates_that_exist():
    assert set(VARIANTS) <= set(NAMES)


@every_gate
@pytest.mark.parametrize("space", [(12,), (7, 9), (1, 1), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_values_broadcast_to_the_map_and_are_of_its_kind(name, options, space, training):
    x = make_input(*space)
    gate = make_gate(name, options).train(training)(x)
    assert gate.ndim == x.ndim
    assert (gate * x).shape == x.shape
    assert gate.dtype == x.dtype
    assert gate.isfinite().all()


@every_gate
def test_values_are_between_0_and_1(name, options):
    for training in (False, True):
        gate = make_gate(name, options).train(training)(make_input(7, 9, batch=50))
        assert (gate > -1e-9).all()
        assert (gate < 1 + 1e-9).all()


@every_gate
def test_samples_do_not_meet(name, options):
    gate, x = make_gate(name, options), make_input(7, 9)
    assert_close(gate(x), torch.cat([gate(image) for image in x.split(1)]))
    assert gate(x[:0]).shape[0] == 0


@every_gate
def test_in_evaluation_the_same_input_gives_the_same_values(name, options):
    gate, x = make_gate(name, options), make_input(7, 9)
    assert torch.equal(gate(x), gate(x))


@every_gate
def test_in_training_a_gradient_reaches_every_parameter(name, options):
    gate, x = make_gate(name, options).train(), make_input(7, 9).requires_grad_()
    values = gate(x)
    (values * torch.randn_like(values)).sum().backward()
    assert x.grad.abs().max() > 1e-9
    for parameter_name, parameter in gate.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 1e-9, parameter_name


@every_gate
def test_a_saved_state_loads_into_a_fresh_gate(name, options):
    gate, x = make_gate(name, options), make_input(7, 9, batch=50)
    file = io.BytesIO()
    torch.save(gate.state_dict(), file)
    file.seek(0)
    fresh = make_gate(name, options)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x), gate(x))
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert torch.equal(twin(x), gate(x))


@every_gate
@pytest.mark.parametrize("training", [False, True])
def test_compiled_whole_it_gives_the_same(name, options, training):
    torch.compiler.reset()
    gate = make_gate(name, options).train(training)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager", dynamic=False)
    for space in [(7, 9), (8, 4)]:
        x = make_input(*space).requires_grad_()
        results = []
        for call in (gate, compiled):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)  # the noise of training
                results.append(call(x))
        assert_close(*results)
        if training:
            leaves, upstream = [x, *gate.parameters()], torch.randn_like(results[0])
            assert_close(*(torch.autograd.grad(out, leaves, upstream) for out in results))


@every_gate
def test_exported_it_gives_the_same(name, options):
    gate = make_gate(name, options)
    exported = torch.export.export(gate, (make_input(7, 9),)).module()
    x = make_input(7, 9)
    assert_close(exported(x), gate(x))


class _Gated(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, x):
        return self.gate(x) * x


@every_gate
@pytest.mark.parametrize("training", [False, True])
def test_taps_see_what_was_applied(name, options, training):
    model, x = _Gated(make_gate(name, options)).train(training), make_input(7, 9)
    with saccade.tap(model) as seen:
        out = model(x)
    assert list(seen) == ["gate"]
    assert torch.equal(seen["gate"].gate * x, out)
    assert not seen["gate"].gate.requires_grad
    with saccade.tap(model, kinds=("gate",), detach=False) as seen:
        model(x)
    assert seen["gate"].gate.requires_grad or not training


# Errors


@every_name
@pytest.mark.parametrize("shape", [(2, 7, 9, DIM + 1), (2, DIM, 7, 9), (2, DIM)], ids=str)
def test_inputs_of_another_width_or_with_channels_first(name, shape):
    with pytest.raises(InputError, match=r"x is \(.*\): .* takes \(B, \*space, 8\), channels last. Move the channels"):
        make_gate(name)(torch.zeros(shape, dtype=torch.float64))


@every_name
def test_a_map_without_tokens(name):
    with pytest.raises(InputError, match="every axis of space needs at least one token"):
        make_gate(name)(make_input(0, 9))


@every_name
def test_options_and_names_that_do_not_exist(name):
    with pytest.raises(InputError, match=r"has no option 'tempratur': (did you mean|choose one of) "):
        create_gate(name, DIM, tempratur=3)
    with pytest.raises(InputError, match="gate is 'layer_ruter': did you mean layer_router"):
        create_gate("layer_ruter", DIM)


@every_name
def test_every_gate_says_in_a_sentence_what_it_decides(name):
    assert 30 < len(describe_gate(name)) < 200
    assert describe_gate(name).endswith(".")
