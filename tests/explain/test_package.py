"""saccade.explain is a package and a function at once, whichever import came first."""

import subprocess
import sys

from torch import nn

import saccade.explain
from saccade.explain import methods
from tests.explain.nets import images, linear

IN_EVERY_ORDER = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
for imports in (
    "import saccade",
    "import saccade, saccade.explain",
    "import saccade.explain, saccade",
    "import saccade; saccade.explain; import saccade.explain",
    "from saccade import explain; import saccade; assert explain(model, torch.ones(1, 3, 2, 2), method='random')",
    "from saccade.explain import explain; import saccade",
):
    for name in [name for name in sys.modules if name.split(".")[0] == "saccade"]:
        del sys.modules[name]
    exec(imports)
    assert saccade.explain(model, torch.ones(1, 3, 2, 2), method="random").map.shape == (1, 2, 2), imports
    assert saccade.list_methods() and saccade.faithfulness
"""


def test_the_front_door_explains_after_any_import():
    subprocess.run([sys.executable, "-W", "error", "-c", IN_EVERY_ORDER], check=True)


def test_the_package_stays_a_package():
    assert saccade.explain(linear(), images(), method="random").method == "random"
    assert saccade.explain.explain(linear(), images(), method="random").map.shape == (3, 8, 8)
    assert all(hasattr(saccade.explain, name) for name in saccade.explain.__all__)


def test_every_exported_method_is_listed_and_runs():
    assert saccade.explain.list_methods() == sorted(methods.__all__)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    needs_more = {"attention_flow", "attention_rollout", "selection"}  # attention, and a mask of the model's own
    for method in set(saccade.explain.list_methods()) - needs_more:
        found = saccade.explain.explain(model, images(), method=method)
        assert found.map.shape == (3, 8, 8)
        assert found.map.isfinite().all()
