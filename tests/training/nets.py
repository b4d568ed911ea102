"""A tiny network and tiny images that it can learn, for the tests of training."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from saccade.data import ImageData
from saccade.training import TrainSettings, read_checkpoint

SETTINGS = TrainSettings(
    epochs=3, batch_size=16, warmup_epochs=1, learning_rate=0.01, augment="none", accelerator="cpu"
)


def make_data(train=50, val=21, classes=3, size=8, seed=0):
    """Noise, with the corner that belongs to the class lit up."""
    rng = torch.Generator().manual_seed(seed)
    half = size // 2
    parts = []
    for count in (train, val):
        images = torch.randint(0, 120, (count, 3, size, size), generator=rng, dtype=torch.uint8)
        labels = torch.arange(count) % classes
        for image, label in zip(images, labels.tolist()):
            top, left = half * (label // 2), half * (label % 2)
            image[:, top : top + half, left : left + half] += 60
        parts.append(TensorDataset(images, labels))
    names = tuple(f"corner {index}" for index in range(classes))
    return ImageData("corners", names, *parts, size, (0.3, 0.3, 0.3), (0.2, 0.2, 0.2), (), f"{train}-{val}-{seed}")


class Net(nn.Module):
    """A convolution with batch norm and dropout or neither; computes in the dtype of its weights."""

    def __init__(self, classes=3, norm=True, dropout=0.1, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 8, 4, stride=4)
            self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
            self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))
            self.register_buffer("table", torch.arange(8).flip(0))
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
            self.dropout = nn.Dropout(dropout)
            self.head = nn.Linear(32, classes)

    def no_weight_decay(self):
        return {"scale"}

    def forward(self, images):
        x = self.norm(self.stem(images.to(self.stem.weight.dtype))).relu()
        return self.head(self.dropout((x * self.scale)[:, self.table].flatten(1)))


def exact_net():
    """In float64 and without randomness or statistics of a batch, so that the order of sums hardly counts."""
    return Net(norm=False, dropout=0.0).double()


def weights_of(result):
    return read_checkpoint(result.checkpoint).state


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
