"""evaluate: each image is judged by itself, in its place."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from saccade.data import normalize
from saccade.errors import InputError
from saccade.training import evaluate
from tests.training.nets import Net, make_data


def test_equals_the_model_applied_to_all_images_at_once():
    data, model = make_data(), Net().train()
    images, labels = data.val.tensors
    logits = Net().eval()(normalize(images, data.mean, data.std))
    for batch_size in (1, 8, 100):
        found = evaluate(model, data.val, mean=data.mean, std=data.std, batch_size=batch_size)
        assert torch.equal(found.predicted, logits.argmax(1))
        assert torch.equal(found.correct, found.predicted == labels)
        assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert model.training
    assert not found.predicted.requires_grad


def test_mode_comes_back_after_an_error():
    model = Net().train()
    model.head = nn.Linear(5, 3)
    data = make_data()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        evaluate(model, data.val, mean=data.mean, std=data.std)
    assert model.training


def test_empty_dataset_is_refused():
    nothing = TensorDataset(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.long))
    with pytest.raises(InputError, match="no images"):
        evaluate(Net(), nothing, mean=(0.5,) * 3, std=(0.5,) * 3)
