"""The network that a command explains: a checkpoint, a network of ours or of timm's, and what its images look like."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.errors import InputError, check_choice, nearest

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Subject", "open_subject"]

_TIMM = "timm/"
_SEED = 0  # of weights that are random, so that the call gives the same page again


@dataclass(frozen=True)
class Subject:
    """A network ready to be explained.

    Attributes:
        model: in eval mode.
        name: of the network.
        image_size, mean, std: how its images are prepared.
        classes: their names; numbers where the names are not known.
        weights: in words, where the weights come from.
        trained: whether they were learnt.
        code: lines of Python that build `model`.
    """

    model: "nn.Module"
    name: str
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    classes: Sequence[str]
    weights: str
    trained: bool
    code: tuple[str, ...]


def open_subject(model: str, weights: str | None = None, classes: str | None = None) -> Subject:
    """Build what `--model`, `--weights` and `--classes` name.

    Args:
        model: path of a checkpoint of `saccade study` or `train`, name of a network of ours, or "timm/NAME".
        weights: file for a network that is named; without one its weights are random.
        classes: text file with the name of a class in each line, in the order of the logits.

    Raises: InputError for what is not there, and for weights or names that do not fit.
    """
    from saccade.backbones import list_models
    from saccade.training.checkpoint import SUFFIXES

    if model.startswith(_TIMM):
        found = _open_timm(model.removeprefix(_TIMM), weights)
    elif model in list_models():
        found = _open_ours(model, weights)
    elif Path(model).suffix in SUFFIXES or Path(model).exists():
        if weights is not None:
            raise InputError(f"--weights is given beside the checkpoint {model}, which has its own: leave one out")
        found = _open_checkpoint(model)
    else:
        raise InputError(f"model is {model!r}: there is no such file, and of networks {nearest(model, list_models())}")
    return found if classes is None else _rename(found, Path(classes))


def _open_checkpoint(path: str) -> Subject:
    from saccade.backbones import load_model

    model, config = load_model(path)
    return Subject(
        model=model,
        name=f"{config['model']} ({Path(path).name})",
        weights=f"from {path}",
        trained=True,
        code=("from saccade.backbones import load_model", "", f"model = load_model({path!r}).model"),
        **_images_of(config),
    )


def _open_ours(name: str, weights: str | None) -> Subject:
    import torch

    from saccade.backbones import create_model, describe_model
    from saccade.training.checkpoint import read_checkpoint

    torch.manual_seed(_SEED)
    model = create_model(name, pretrained=weights or False).eval()
    config = {**describe_model(name).default_cfg}
    config["image_size"] = config["input_size"][-1]
    config |= read_checkpoint(weights).config if weights else {}
    config.setdefault("classes", _numbers(int(model.num_classes)))  # type: ignore[arg-type]
    call = f"create_model({name!r}, pretrained={weights!r})" if weights else f"create_model({name!r})"
    return Subject(
        model=model,
        name=name,
        code=("from saccade.backbones import create_model", "", *_seeding(weights), f"model = {call}"),
        **_source(weights),
        **_images_of(config),
    )


def _open_timm(name: str, weights: str | None) -> Subject:
    import torch

    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"model is 'timm/{name}' and timm cannot be imported ({error}): pip install 'saccade[timm]'"
        ) from None
    check_choice("timm's model", name, timm.list_models())
    torch.manual_seed(_SEED)
    state = _read_state(weights) if weights else {}
    config = timm.create_model(name, pretrained=False).default_cfg
    head = state.get(f"{config.get('classifier')}.bias")
    options = {} if head is None else {"num_classes": len(head)}
    model = timm.create_model(name, pretrained=False, **options).eval()
    if weights:
        _load(model, state, weights)
    code = ["import timm", "", *_seeding(weights)]
    arguments = "".join(f", {key}={value}" for key, value in options.items())
    code.append(f"model = timm.create_model({name!r}{arguments})")
    if weights:
        code[1:1] = ["from saccade.training import read_checkpoint"]
        code.append(f"model.load_state_dict(read_checkpoint({weights!r}).state)")
    return Subject(
        model=model,
        name=f"timm/{name}",
        code=tuple(code),
        **_source(weights),
        image_size=int(config["input_size"][-1]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        classes=_numbers(int(model.num_classes)),
    )


def _read_state(path: str) -> Mapping[str, Any]:
    from saccade.training import read_checkpoint

    return read_checkpoint(path).state


def _load(model: "nn.Module", state: Mapping[str, Any], source: str) -> None:
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [name for name in {**own, **given} if own.get(name) != given.get(name)]
    if wrong:
        raise InputError(
            f"{source} does not fit {type(model).__name__}: {wrong[0]} is {given.get(wrong[0], 'missing')} there and "
            f"{own.get(wrong[0], 'missing')} in the network, and {len(wrong) - 1} more differ. Give its own weights"
        )
    model.load_state_dict(dict(state))


def _images_of(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("image_size", "mean", "std", "classes")}


def _source(weights: str | None) -> dict[str, Any]:
    words = f"from {weights}" if weights else "random: none were given"
    return {"weights": words, "trained": weights is not None}


def _seeding(weights: str | None) -> tuple[str, ...]:
    return () if weights else (f"torch.manual_seed({_SEED})  # the weights are random",)


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(label) for label in range(count))


def _rename(subject: Subject, path: Path) -> Subject:
    from dataclasses import replace

    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--classes is {path}: it cannot be read ({error}). Give a text file, a name a line") from None
    names = [name.strip() for name in names if name.strip()]
    if len(names) != len(subject.classes):
        raise InputError(
            f"{path} names {len(names)} classes but {subject.name} knows {len(subject.classes)}: give one name a line"
        )
    return replace(subject, classes=tuple(names))
