"""Taps: what they see is exact, they see all of it, they leave nothing behind, and cost nothing when none is open."""

import gc
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import saccade
from saccade import taps
from saccade.errors import InputError
from saccade.mixers import HaloAttention, NeighborhoodAttention, Pooling, WindowAttention

DIM, HEADS = 8, 2


class Net(nn.Module):
    """Mixers, one of them used twice, between layers that no tap knows."""

    def __init__(self):
        super().__init__()
        self.first = WindowAttention(DIM, HEADS, window_size=3)
        self.linear = nn.Linear(DIM, DIM)
        self.stage = nn.Sequential(nn.LayerNorm(DIM), NeighborhoodAttention(DIM, HEADS, window_size=3))
        self.last = Pooling(DIM)

    def forward(self, x):
        x = self.stage(self.linear(self.first(x)))
        return self.last(self.first(x))


def make_input(batch=2):
    return torch.randn(batch, 6, 5, DIM)


def open_taps():
    return taps._ACTIVE.get()


# What is seen


@pytest.mark.parametrize(
    "mixer",
    [
        WindowAttention(DIM, HEADS, window_size=3, shift=True),
        NeighborhoodAttention(DIM, HEADS, window_size=3, stride=2, causal=(True, False)),
    ],
    ids=lambda mixer: type(mixer).__name__,
)
def test_attention_times_values_is_what_the_fused_path_projects(mixer):
    mixer, x = mixer.double(), make_input().double()
    projected = []
    mixer.proj.register_forward_pre_hook(lambda module, args: projected.append(args[0]))
    with saccade.tap(mixer) as seen:
        out = mixer(x)
    value = mixer.qkv(x).chunk(3, -1)[2].flatten(1, 2).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    average = (seen[""].attention @ value).transpose(1, 2).flatten(2).view_as(x)
    assert_close(average, projected[0])
    assert_close(seen[""].attention.sum(-1), torch.ones(2, HEADS, 30).double())
    assert_close(seen[""].features, out)


def test_watching_does_not_change_the_output():
    net, x = Net(), make_input()
    plain = net(x)
    with saccade.tap(net):
        assert torch.equal(net(x), plain)


def test_names_stand_in_the_order_in_which_modules_ran_and_each_call_is_kept():
    net, x = Net(), make_input()
    with saccade.tap(net) as seen:
        net(x)
    assert list(seen) == ["first", "stage.1", "last"]
    assert len(seen) == 3
    assert [len(seen.calls(name)) for name in seen] == [2, 1, 1]
    assert list(seen.attention) == list(seen)
    once, twice = seen.calls("first")
    assert seen["first"] is twice
    assert_close(once.features, net.first(x))
    assert_close(twice.features, net.first(net.stage(net.linear(once.features))))
    assert not torch.equal(once.attention, twice.attention)


def test_a_module_under_two_names_is_seen_under_the_first():
    mixer = WindowAttention(DIM, HEADS, window_size=3)
    net, x = nn.ModuleDict({"a": mixer, "b": mixer}), make_input()
    with saccade.tap(net) as seen:
        net["b"](net["a"](x))
    assert {name: len(seen.calls(name)) for name in seen} == {"a": 2}


def test_every_pass_inside_the_with_is_kept():
    net, x = Net(), make_input()
    with saccade.tap(net) as seen:
        for _ in range(3):
            net(x)
    assert len(seen.calls("last")) == 3


def test_kinds_and_names_choose_what_is_kept():
    net, x = Net(), make_input()
    with saccade.tap(net, kinds=("features",)) as seen:
        net(x)
    assert seen["last"].attention is None
    assert seen["last"].gate is None
    assert seen["last"].features.shape == x.shape
    assert seen.attention == {}
    with saccade.tap(net, kinds=("attention",), names=["last", "stage.1"]) as seen:
        net(x)
    assert list(seen) == ["stage.1", "last"]
    assert seen["last"].features is None


def test_a_gate_that_records_is_seen():
    class Gate(nn.Module):
        def forward(self, x):
            gate = x.sigmoid()
            taps.record(self, "gate", lambda: gate)
            return x * gate

    net, x = nn.Sequential(Gate(), Gate()), make_input()
    with saccade.tap(net, names=["1"]) as seen:
        net(x)
        Gate()(x)  # of no watched model
    assert list(seen) == ["1"]
    assert_close(seen["1"].gate, (x * x.sigmoid()).sigmoid())
    assert seen["1"].attention is None


def test_prefix_tokens_stand_first_in_the_map_of_attention():
    mixer, x = WindowAttention(DIM, HEADS, window_size=3), make_input()
    with saccade.tap(mixer) as seen:
        out, _ = mixer(x, torch.randn(2, 3, DIM))
    assert seen[""].attention.shape == (2, HEADS, 33, 33)
    assert (seen[""].attention[:, :, :3] > 0).all()
    assert (seen[""].attention[..., :3] > 0).all()
    assert_close(seen[""].features, out)


# Graphs


def test_tensors_are_cut_from_the_graph_unless_a_loss_wants_them():
    net, x = Net(), make_input()
    with saccade.tap(net) as seen:
        net(x)
    assert not any(seen[name].attention.requires_grad for name in ("first", "stage.1"))
    with saccade.tap(net, detach=False) as seen:
        net(x)
    seen["stage.1"].attention.square().sum().backward()
    assert net.stage[1].qkv.weight.grad.abs().sum() > 0
    assert net.first.qkv.weight.grad.abs().sum() > 0  # through the features that reach the next mixer


def test_gradients_through_the_map_are_those_of_attention_itself():
    """The recorded map is not a by-product: with the values held fixed it gives the output's own gradient."""
    mixer, x = NeighborhoodAttention(DIM, HEADS, window_size=3).double(), make_input(1).double()
    with saccade.tap(mixer, detach=False) as seen:
        out = mixer(x)
    value = mixer.qkv(x).chunk(3, -1)[2].flatten(1, 2).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    average = mixer.proj((seen[""].attention @ value).transpose(1, 2).flatten(2).view_as(x))
    upstream = torch.randn_like(out)
    parameters = list(mixer.parameters())
    assert_close(*(torch.autograd.grad(y, parameters, upstream, retain_graph=True) for y in (average, out)))


def test_two_taps_with_different_wishes_both_get_theirs():
    net, x = Net(), make_input()
    with saccade.tap(net, detach=False) as outer, saccade.tap(net.stage, kinds=("attention",)) as inner:
        net(x)
    assert list(inner) == ["1"]
    assert_close(inner["1"].attention, outer["stage.1"].attention)
    assert outer["stage.1"].attention.requires_grad
    assert not inner["1"].attention.requires_grad


def test_a_tap_that_closes_leaves_the_one_around_it_open():
    net, x = Net(), make_input()
    with saccade.tap(net) as outer:
        with saccade.tap(net) as inner:
            net(x)
        net(x)
    assert (len(inner.calls("last")), len(outer.calls("last"))) == (1, 2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_taps_work_without_gradients(mode):
    net, x = Net(), make_input()
    with mode(), saccade.tap(net) as seen:
        net(x)
    assert seen["first"].attention.shape == (2, HEADS, 30, 30)


def test_half_precision_maps_are_float32():
    mixer = HaloAttention(DIM, HEADS, block_size=2, halo_size=1).bfloat16()
    with saccade.tap(mixer) as seen:
        mixer(torch.randn(1, 4, 6, DIM, dtype=torch.bfloat16))
    assert seen[""].attention.dtype == torch.float32


def test_a_compiled_model_is_watched_and_stays_compiled():
    torch.compiler.reset()
    net, x = Net(), make_input()
    net.compile(backend="eager", fullgraph=True)
    net(x)
    with saccade.tap(net) as seen:
        net(x)
    assert list(seen) == ["first", "stage.1", "last"]
    with torch.compiler.set_stance("fail_on_recompile"):
        net(x)


# Nothing left


def live_tensors():
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def test_nothing_is_left_after_fifty_passes():
    net, x = Net(), make_input()

    def watch():
        with saccade.tap(net, detach=False) as seen:
            net(x)
        return len(seen)

    watch()
    before = live_tensors()
    assert {watch() for _ in range(50)} == {3}
    assert live_tensors() < before + 50  # one a pass would be a leak; other tests' rubbish comes and goes
    assert open_taps() == ()


def hooks_of(model):
    return [vars(module)[name] for module in model.modules() for name in vars(module) if name.endswith("_hooks")]


def test_nothing_is_attached_to_the_model_while_it_is_watched():
    net, x = Net(), make_input()
    before = {name: dict(vars(module)) for name, module in net.named_modules()}
    with saccade.tap(net):
        net(x)
        assert not any(hooks_of(net))
        assert {name: dict(vars(module)) for name, module in net.named_modules()} == before


def test_an_exception_inside_passes_through_and_closes_the_tap():
    net, x = Net(), make_input()
    net.last.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError), saccade.tap(net):
        net(x)
    with pytest.raises(ZeroDivisionError), saccade.tap(net):
        net.last(x)  # before anything was recorded
    assert open_taps() == ()


def test_without_a_tap_nothing_is_computed(monkeypatch):
    net, x = Net(), make_input()

    def never(*args, **kwargs):
        raise AssertionError("computed a map that nobody watches")

    monkeypatch.setattr("saccade.mixers.attention.sparse_attention_weights", never)
    monkeypatch.setattr(Pooling, "_token_matrix", never)
    net(x)
    with saccade.tap(net, kinds=("features",)):
        net(x)
    with pytest.raises(AssertionError, match="nobody watches"), saccade.tap(net):
        net(x)


def test_watched_says_whether_somebody_looks():
    net, x = Net(), make_input()
    assert not taps.watched(net.first, "attention")
    with saccade.tap(net, names=["first"], kinds=("attention",)):
        net(x)
        assert taps.watched(net.first, "attention")
        assert not taps.watched(net.first, "features")
        assert not taps.watched(net.last, "attention")
    assert not taps.watched(net.first, "attention")


def test_another_thread_is_not_watched():
    net, x = Net(), make_input()
    with saccade.tap(net) as seen:
        net.last(x)
        thread = threading.Thread(target=net, args=(x,))
        thread.start()
        thread.join()
    assert list(seen) == ["last"]


# Errors


def test_a_tap_that_saw_nothing_says_so():
    message = r"the tap on Linear recorded nothing of attention, gate, features: .*saccade\.swap"
    with pytest.raises(RuntimeError, match=message), saccade.tap(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("attentions",)}, "kinds is 'attentions': did you mean attention"),
        ({"names": ["frist"]}, "names is 'frist': did you mean first"),
    ],
)
def test_a_kind_or_name_that_does_not_exist(options, message):
    with pytest.raises(InputError, match=message), saccade.tap(Net(), **options):
        pass
    assert open_taps() == ()
