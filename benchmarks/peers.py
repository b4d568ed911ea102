"""Peers that import torchvision without needing it: timm for its data pipeline, zennit for names of blocks."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

__all__ = ["without_torchvision"]


class _Empty(type):
    """A class with any attribute that is asked for, which is its name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """torchvision without its content: any attribute of any of its modules is an empty class.

    There may be no build of it for the torch at hand: one for CUDA refuses a torch for the CPU.
    """

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> Any:
        if fullname.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def exec_module(self, module: ModuleType) -> None:
        def missing(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Empty(name, (), {})

        module.__version__ = "0"  # type: ignore[attr-defined]
        module.__getattr__ = missing  # type: ignore[method-assign]


def without_torchvision() -> None:
    """Put a stand-in where torchvision cannot be imported."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # what a failed import leaves behind
        sys.meta_path.insert(0, _StandIn())
