"""AverageWeights: the average in closed form, and the buffers that it must leave alone."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn


class Numbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.register_buffer("statistic", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("table", torch.tensor([3, 5]))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_average_is_the_weighted_sum_and_stands_in_the_model_during_validation(decay):
    from saccade.training.module import AverageWeights

    course = SimpleNamespace(model=Numbers())
    callback, trainer = AverageWeights(decay), SimpleNamespace(global_step=0)
    callback.on_train_start(trainer, course)
    values = torch.arange(1.0, 8.0, dtype=torch.float64) ** 2
    for step, value in enumerate(values, start=1):
        course.model.weight.data.fill_(value)
        course.model.statistic.fill_(-value)
        trainer.global_step = step
        callback.on_train_batch_end(trainer, course, None, None, 0)

    decays = [min(decay, (1 + step) / (10 + step)) for step in range(1, 8)]
    shares = [(1 - decays[i]) * torch.tensor(decays[i + 1 :]).prod().item() for i in range(7)]
    expected = sum(share * value for share, value in zip(shares, values)).expand(2)  # the first weights were 0
    callback.on_validation_start(trainer, course)
    torch.testing.assert_close(course.model.weight.data, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(course.model.statistic, -expected, rtol=1e-6, atol=0)
    assert course.model.table.tolist() == [3, 5]
    assert course.model.mask.tolist() == [0.0, -torch.inf]
    callback.on_validation_end(trainer, course)
    assert course.model.weight.tolist() == [49.0, 49.0]
    assert course.model.statistic.tolist() == [-49.0, -49.0]


@pytest.mark.usefixtures("process_group")
def test_sharded_weights_are_gathered_anew_after_each_swap():
    from torch.distributed.fsdp import fully_shard

    from saccade.training.module import AverageWeights

    course = SimpleNamespace(model=nn.Linear(1, 1, bias=False, dtype=torch.float64))
    nn.init.zeros_(course.model.weight)
    fully_shard(course.model)
    callback, trainer = AverageWeights(0.5), SimpleNamespace(global_step=100)
    callback.on_train_start(trainer, course)
    one = torch.ones(1, 1, dtype=torch.float64)
    course.model(one).backward()
    with torch.no_grad():
        course.model.weight.fill_(1.0)
        callback.on_train_batch_end(trainer, course, None, None, 0)
        callback.on_validation_start(trainer, course)
        assert course.model(one).item() == 0.5
        callback.on_validation_end(trainer, course)
    assert course.model(one).item() == 1.0
