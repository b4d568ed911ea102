"""What every test starts from: a seeded generator, one thread a worker, and hypothesis that draws the same examples."""

import os
import sys

import pytest
import torch
from hypothesis import settings

settings.register_profile("saccade", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("saccade")

if not torch.cuda.is_available():  # before anything imports triton, whose kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """Networks share code, and torch refuses to compile the same code for more than eight of them in one process."""
    if compiler := sys.modules.get("torch._dynamo"):
        compiler.reset()
