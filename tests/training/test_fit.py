"""fit: what it learns, that a stopped run ends as an unstopped one, and how it fails."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from saccade.data import normalize
from saccade.errors import InputError, WorkError
from saccade.training import TrainSettings, batches, evaluate, fit, read_checkpoint
from saccade.training.batches import Batches
from saccade.training.recipe import learning_rate
from tests.training.nets import SETTINGS, Net, assert_same_bits, exact_net, make_data, weights_of

FILES = ["last.ckpt", "model.json", "model.safetensors", "result.json", "run.json"]
RANDOM = replace(SETTINGS, augment="light")


class Stop(Exception):
    pass


def stop_after(epoch):
    def on_epoch(row):
        if row["epoch"] == epoch:
            raise Stop

    return on_epoch


def test_learns_reports_and_leaves_what_it_says(tmp_path, capfd):
    data, model, rows = make_data(), Net(), []
    result = fit(model, data, SETTINGS, tmp_path, on_epoch=rows.append, config={"model": "net"})
    assert result.accuracy == 1.0
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert [{**row, "epochs": 3} for row in result.history] == rows
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert result.seconds == rows[-1]["seconds"] > rows[0]["seconds"] > 0
    assert sorted(os.listdir(tmp_path)) == FILES
    assert capfd.readouterr() == ("", "")

    assert not model.training
    found = evaluate(model, data.val, mean=data.mean, std=data.std)
    assert torch.equal(found.predicted, result.predicted)
    assert torch.equal(found.correct, result.correct)
    assert found.loss == pytest.approx(rows[-1]["val_loss"])
    checkpoint = read_checkpoint(result.checkpoint)
    assert_same_bits(checkpoint.state, model.state_dict())
    sizes = {"image_size": 8, "mean": [0.3] * 3, "std": [0.2] * 3}
    assert checkpoint.config == {"model": "net", "classes": list(data.classes), **sizes}


def test_equals_the_recipe_written_out(tmp_path):
    data, model = make_data(), exact_net()
    settings = replace(SETTINGS, clip_norm=0.05, ema_decay=0.8, weight_decay=0.5)
    result = fit(exact_net(), data, settings, tmp_path)

    decayed = [model.stem.weight, model.head.weight]
    spared = [model.stem.bias, model.scale, model.head.bias]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.5}, {"params": spared, "weight_decay": 0.0}])
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    order = Batches(50, 16, seed=0)
    step = 0
    for epoch in range(3):
        order.set_epoch(epoch)
        for indices, _ in order:
            images, labels = (part[indices] for part in data.train.tensors)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step, 4)
            optimizer.zero_grad()
            cross_entropy(model(normalize(images, data.mean, data.std)), labels, label_smoothing=0.1).backward()
            norm = sum(value.grad.square().sum() for value in model.parameters()).sqrt()
            for value in model.parameters():
                value.grad *= min(1.0, 0.05 / norm)
            optimizer.step()
            step += 1
            decay = min(0.8, (1 + step) / (10 + step))
            for name, value in model.named_parameters():
                average[name] = decay * average[name] + (1 - decay) * value.detach()
    weights = weights_of(result)
    for name, value in average.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ema_decay", [0.0, 0.99])
def test_stopped_after_each_epoch_ends_with_the_same_bits(tmp_path, ema_decay):
    settings = replace(RANDOM, ema_decay=ema_decay)
    whole = fit(Net(), make_data(), settings, tmp_path / "whole")
    for epoch in (0, 1, 2):
        with pytest.raises(Stop):
            fit(Net(seed=epoch), make_data(), settings, tmp_path / "parts", on_epoch=stop_after(epoch))
        torch.rand(epoch)  # what the caller draws in between does not count
    model = Net(seed=7)
    parts = fit(model, make_data(), settings, tmp_path / "parts", on_epoch=stop_after(0))
    assert_same_bits(weights_of(parts), weights_of(whole))
    assert_same_bits(model.state_dict(), weights_of(whole))
    assert torch.equal(parts.predicted, whole.predicted)
    assert torch.equal(parts.correct, whole.correct)
    for one, other in zip(parts.history, whole.history, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert [row["seconds"] for row in parts.history] == sorted(row["seconds"] for row in parts.history)


def test_seed_decides_and_the_callers_generator_is_left_alone(tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = fit(Net(), make_data(), RANDOM, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again = fit(Net(), make_data(), RANDOM, tmp_path / "b")
    other = fit(Net(), make_data(), replace(RANDOM, seed=1), tmp_path / "c")
    assert_same_bits(weights_of(first), weights_of(again))
    assert not torch.equal(weights_of(first)["head.weight"], weights_of(other)["head.weight"])


def forbid(*_):
    raise AssertionError("trained again")


def test_finished_run_returns_at_once(tmp_path, monkeypatch):
    first = fit(Net(), make_data(), SETTINGS, tmp_path)
    monkeypatch.setattr("saccade.training.launch.run", forbid)
    model = Net(seed=1)
    again = fit(model, make_data(), SETTINGS, tmp_path)
    assert (again.accuracy, again.seconds, again.history) == (first.accuracy, first.seconds, first.history)
    assert torch.equal(again.correct, first.correct)
    assert torch.equal(again.predicted, first.predicted)
    assert (again.correct.dtype, again.predicted.dtype) == (torch.bool, torch.long)
    assert_same_bits(model.state_dict(), weights_of(first))


@pytest.mark.parametrize("lost", [["result.json"], ["model.safetensors"], ["result.json", "model.json"]])
def test_run_stopped_after_its_last_epoch_only_writes_what_is_missing(tmp_path, monkeypatch, lost):
    first = fit(Net(), make_data(), SETTINGS, tmp_path)
    weights = weights_of(first)
    for name in lost:
        (tmp_path / name).unlink()
    monkeypatch.setattr("saccade.training.launch.run", forbid)
    again = fit(Net(seed=1), make_data(), SETTINGS, tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    assert_same_bits(weights_of(again), weights)
    assert again.history == first.history


def test_folder_of_another_run_is_refused_and_the_differences_named(tmp_path):
    fit(Net(), make_data(), SETTINGS, tmp_path, config={"model": "a"})
    files = {name: (tmp_path / name).read_bytes() for name in FILES}
    other = replace(SETTINGS, learning_rate=0.02, epochs=4)
    for model, data, settings, config, message in (
        (Net(), make_data(), other, "a", "epochs was 3 and is 4; learning_rate was 0.01 and is 0.02"),
        (Net(), make_data(seed=1), SETTINGS, "a", "data was '50-21-0' and is '50-21-1'"),
        (Net(norm=False), make_data(), SETTINGS, "a", "weights was"),
        (Net(), make_data(), SETTINGS, "b", "config was.*'model': 'a'.* and is .*'model': 'b'"),
    ):
        with pytest.raises(InputError, match=rf"{tmp_path} belongs to a run .*{message}.*choose another folder"):
            fit(model, data, settings, tmp_path, config={"model": config})
    assert files == {name: (tmp_path / name).read_bytes() for name in FILES}


def test_a_run_may_go_on_on_other_machines(tmp_path):
    first = fit(Net(), make_data(), SETTINGS, tmp_path)
    again = fit(Net(), make_data(), replace(SETTINGS, accelerator="auto", strategy="ddp"), tmp_path)
    assert again.history == first.history


def test_foreign_and_damaged_files_are_named(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"last\.ckpt of something else: choose another folder"):
        fit(Net(), make_data(), SETTINGS, tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == b"mine"
    with pytest.raises(Stop):
        fit(Net(), make_data(), SETTINGS, tmp_path / "run", on_epoch=stop_after(0))
    (tmp_path / "run" / "last.ckpt").write_bytes(b"spoilt")
    with pytest.raises(InputError, match=r"last\.ckpt is damaged.*To start this run anew, remove .*last\.ckpt"):
        fit(Net(), make_data(), SETTINGS, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("[]")
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        fit(Net(), make_data(), SETTINGS, tmp_path / "run")
    with pytest.raises(InputError, match=r"run\.json cannot be written"):
        fit(Net(), make_data(), SETTINGS, tmp_path / "run" / "run.json")
    with pytest.raises(InputError, match="config cannot be written as JSON"):
        fit(Net(), make_data(), SETTINGS, tmp_path / "new", config={"model": Net})


class NanAt(nn.Module):
    """Returns NaN the n-th time it runs in a mode."""

    def __init__(self, at, training):
        super().__init__()
        self.net, self.at, self.mode, self.calls = Net(), at, training, 0

    def forward(self, images):
        self.calls += self.training == self.mode
        return self.net(images) * (torch.nan if self.training == self.mode and self.calls == self.at else 1.0)


@pytest.mark.parametrize(
    ("model", "place"),
    [
        (NanAt(6, True), r"training loss .* epoch 2 of 3, step 2 of 4, learning rate 0.00962"),
        (NanAt(4, False), r"validation loss .* epoch 2 of 3, after its last step"),
    ],
)
def test_nan_is_located_and_advice_given(tmp_path, model, place):
    rows = []
    advice = r"start anew in another folder with learning_rate=0\.0033 \(it was 0\.01\), clip_norm=1 \(it was 0\)"
    with pytest.raises(WorkError, match=f"{place}: {advice}"):
        fit(model, make_data(), replace(SETTINGS, clip_norm=0), tmp_path, on_epoch=rows.append)
    assert len(rows) == 1
    assert not os.path.exists(tmp_path / "result.json")


def test_full_disk_is_reported_and_the_run_goes_on_when_there_is_room(tmp_path, monkeypatch):
    whole = fit(Net(), make_data(), RANDOM, tmp_path / "whole")
    fsync, saved = os.fsync, []

    def fill(handle):
        if len(saved) > 1:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(
        WorkError, match=r"last\.ckpt could not be written: the disk is full.*Make room and start again"
    ):
        fit(Net(), make_data(), RANDOM, tmp_path / "full", on_epoch=lambda row: saved.append(row["epoch"]))
    assert saved == [0, 1]
    assert sorted(os.listdir(tmp_path / "full")) == ["last.ckpt", "run.json"]
    monkeypatch.undo()
    rest = fit(Net(), make_data(), RANDOM, tmp_path / "full", on_epoch=lambda row: saved.append(row["epoch"]))
    assert saved == [0, 1, 2]
    assert_same_bits(weights_of(rest), weights_of(whole))


def test_wrong_number_of_classes_says_how_to_build_the_model(tmp_path):
    with pytest.raises(InputError, match=r"returned \(13, 5\) for 13 images of 3 classes.*num_classes=3"):
        fit(Net(classes=5), make_data(), SETTINGS, tmp_path)


class InterruptedEarly(Net):
    def no_weight_decay(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("model", [Net(), InterruptedEarly()])
def test_interrupt_reaches_the_caller_and_interrupts_stay_possible(tmp_path, model):
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores interrupts
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(model, make_data(), SETTINGS, tmp_path, on_epoch=lambda row: signal.raise_signal(signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert len(fit(Net(), make_data(), SETTINGS, tmp_path).history) == 3


def test_bfloat16_trains_and_keeps_float32_weights(tmp_path):
    result = fit(Net(), make_data(), replace(SETTINGS, precision="bf16-mixed"), tmp_path)
    assert result.accuracy > 0.9
    assert weights_of(result)["head.weight"].dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what this machine lacks")
@pytest.mark.parametrize("wish", [{"accelerator": "gpu"}, {"accelerator": "mps"}])
def test_devices_that_are_not_there_are_refused(tmp_path, wish):
    settings = replace(SETTINGS, **wish)
    with pytest.raises(InputError, match=f"cannot train with accelerator={settings.accelerator!r}"):
        fit(Net(), make_data(), settings, tmp_path)


def test_float16_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(InputError, match="'16-mixed', which needs a CUDA GPU"):
        fit(Net(), make_data(), replace(SETTINGS, precision="16-mixed"), tmp_path)


def test_images_that_do_not_fit_in_memory_give_the_same_bits(tmp_path, monkeypatch):
    fast = fit(Net(), make_data(), RANDOM, tmp_path / "fast")
    monkeypatch.setattr(batches, "_IN_MEMORY", 0)
    slow = fit(Net(), make_data(), RANDOM, tmp_path / "slow")
    assert_same_bits(weights_of(slow), weights_of(fast))


def test_smallest_run_is_one_step(tmp_path):
    settings = TrainSettings(epochs=1, accelerator="cpu", augment="none")
    assert len(fit(Net(), make_data(train=3, val=1), settings, tmp_path).history) == 1
