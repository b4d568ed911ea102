"""Give timm the networks of this library: after `import saccade.timm`, `timm.create_model("saccade_halonet_h1")`.

Every name of `saccade.list_models()` is registered behind "saccade_", since timm has some of them itself. Options,
weights (`pretrained=True` or a path in `pretrained`) and features_only are those of `saccade.create_model`.
"""

from collections.abc import Callable
from typing import Any

from timm.models import register_model

from saccade.backbones import create_model, describe_model, list_models

__all__ = ["PREFIX"]  # timm adds the names of the networks

PREFIX = "saccade_"
default_cfgs: dict[str, dict[str, Any]] = {}  # where timm looks for image size, mean and so on

_NOT_OURS = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_model_args", "device", "dtype"}


def _register(name: str) -> None:
    def build(pretrained: bool | str = False, **options: Any) -> Any:
        return create_model(name, pretrained, **{key: value for key, value in options.items() if key not in _NOT_OURS})

    build.__name__ = build.__qualname__ = PREFIX + name
    build.__doc__ = f"{name} of saccade."
    default_cfgs[build.__name__] = describe_model(name).default_cfg
    entry: Callable[..., Any] = register_model(build)
    globals()[build.__name__] = entry


for _name in list_models():
    _register(_name)
