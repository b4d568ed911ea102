"""Claims about whole networks: their parameters and FLOPs by name, and replay of recorded outputs."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.backbones import Backbone, create_model, describe_model
from saccade.backbones.weights import fit_weights
from saccade.claims.framework.recorded import Case, play, run_official
from saccade.measure import count_flops

__all__ = ["count_model_parameters", "measure_model_flops", "read_norm_eps", "replay_network"]


def count_model_parameters(models: Mapping[str, str], **options: Any) -> dict[str, int]:
    """Parameters with 1000 classes, for each name of the paper; nothing is allocated.

    Args:
        models: the paper's name -> a name of `list_models`.
        options: of all of them.
    """
    with torch.device("meta"):
        built = {name: create_model(model, **options) for name, model in models.items()}
    return {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in built.items()}


def measure_model_flops(models: Iterable[str], **options: Any) -> dict[str, int]:
    """FLOPs of one image of the size for which the network was trained, a multiply-add as two; nothing is allocated.

    Args:
        models: names of `list_models`.
        options: of all of them; image_size replaces the network's own.
    """
    counts = {}
    for name in models:
        size = options.get("image_size") or describe_model(name).image_size
        with torch.device("meta"), torch.no_grad():
            model = create_model(name, **options)
            counts[name] = count_flops(model.eval(), torch.zeros(1, 3, size, size)).total
    return counts


def replay_network(case: Case, model: Backbone) -> dict[str, Tensor]:
    """Run a network on a case whose input is `in.x` and whose output is `out.y`; its `rename` reads the state."""

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": run_official(model, fit_weights(model, state), inputs["x"])}

    return play(case, forward)


def read_norm_eps(norm: object, default: float) -> float:
    """The eps of norms in the words of a recorded argument, such as "LayerNorm eps 1e-6".

    >>> read_norm_eps("LayerNorm eps 1e-6", 1e-5), read_norm_eps(None, 1e-5)
    (1e-06, 1e-05)
    """
    found = re.search(r"eps\W*([-.\de]+)", str(norm))
    return float(found[1]) if found else default
