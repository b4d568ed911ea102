"""saccade: visual attention for PyTorch. Names are imported on first use, so that `import saccade` stays light."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from saccade.backbones import create_model, list_models
    from saccade.explain import explain, faithfulness, list_methods
    from saccade.mixers import create_mixer, list_mixers
    from saccade.taps import tap

_HOMES = {
    "create_mixer": "saccade.mixers",
    "create_model": "saccade.backbones",
    "explain": "saccade.explain",
    "faithfulness": "saccade.explain",
    "list_methods": "saccade.explain",
    "list_mixers": "saccade.mixers",
    "list_models": "saccade.backbones",
    "tap": "saccade.taps",
}

__all__ = [
    "__version__",
    "create_mixer",
    "create_model",
    "explain",
    "faithfulness",
    "list_methods",
    "list_mixers",
    "list_models",
    "tap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'saccade' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    return home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)  # the package explain can be called


def __dir__() -> list[str]:
    return __all__
