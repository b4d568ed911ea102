"""How complex is a feature: from which layer on can it be read off linearly? (2024, arXiv:2407.06076; formulas
recalled.)

A feature is simple if a linear probe reads it from early layers already. What a probe can read is V-information (2020,
arXiv:2002.10689): for linear predictors with a Gaussian of fixed width it is the explained variance, and as a share of
all variance R^2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.errors import InputError, check_choice
from saccade.explain.classifier import Classifier, batches, check_images, check_whole, evaluating
from saccade.explain.concepts import ConceptExplanation, find_cut
from saccade.explain.methods.layers import outputs
from saccade.explain.relevance.modules import watching

__all__ = [
    "Complexity",
    "Flow",
    "complexity_over_checkpoints",
    "feature_complexity",
    "find_blocks",
    "residual_flow",
    "v_information",
]

_FAMILIES = ("linear", "quadratic")
_READINGS = ("flatten", "mean")
_CONTAINERS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class Complexity:
    """What `feature_complexity` found.

    Attributes:
        complexity: (F,) in [0, 1], 1 minus the mean over layers of the information below; it is about these layers and
            no others. NaN for a feature that does not vary.
        information: (layers, F), V-information over variance: R^2 of the probe, at least 0.
        importance: (F,), mean absolute importance over images; None where features are bare numbers.
        layers: names of the layers probed, in the order given or of the forward pass.
        held_out: number of images that the probes were measured on.
    """

    complexity: Tensor
    information: Tensor
    importance: Tensor | None
    layers: tuple[str, ...]
    held_out: int


@dataclass(frozen=True)
class Flow:
    """What `residual_flow` found.

    Attributes:
        skip, main: (blocks, F), information about each feature in a block's input, and in what the block adds to it.
        blocks: names.
        left_out: names of blocks whose output has another shape than their input; empty where blocks were named.
    """

    skip: Tensor
    main: Tensor
    blocks: tuple[str, ...]
    left_out: tuple[str, ...]


def feature_complexity(
    model: nn.Module,
    images: Tensor,
    features: Tensor | ConceptExplanation,
    *,
    layers: Sequence[str] | None = None,
    layout: str | None = None,
    reading: str = "mean",
    family: str = "linear",
    ridge: float = 1e-3,
    held_out: float = 0.3,
    batch_size: int = 64,
    seed: int = 0,
) -> Complexity:
    """Say from which layers on features can be read, and so how complex they are for this model.

    Complexity is 0 for a feature that the first layer shows already, and about 1 - 1/layers for one that the last alone
    shows. It measures linear access, not the length of a description.

    Args:
        model: runs in eval mode without gradients; it is not changed.
        images: (B, C, H, W), some hundreds at least.
        features: (B, F), a number an image and feature, such as codes or projections of the penultimate layer; or what
            `explain_concepts` found on these images, whose mean codes are then the features, with their importance
            (`importance="input_x_gradient"` as in the paper).
        layers: names of modules; None takes `find_blocks`.
        layout: of maps, "NCHW" or "NHWC"; None infers it.
        reading: of all layers: "mean" over positions, which hides where things are, or "flatten", which has positions
            times channels dimensions.
        family, ridge, held_out, seed: as in `v_information`.
        batch_size: the most images in one forward pass.

    Raises: InputError for wrong arguments.
    """
    check_images(images)
    values, importance = _read_features(features, images)
    check_choice("reading", reading, _READINGS)
    check_whole("batch_size", batch_size)
    with evaluating(model, grad=False) as classify:
        names = find_blocks(classify.model, images[:1]) if layers is None else list(layers)
        if not names or len(set(names)) < len(names):
            raise InputError(f"layers are {names}: name at least one, each once, or give None to find them")
        rows = _read_layers(classify, images, names, layout, reading, batch_size)
    information = torch.stack(
        [v_information(each, values, family=family, ridge=ridge, held_out=held_out, seed=seed) for each in rows]
    ).clamp(min=0)
    count = len(_split(len(images), held_out, seed)[1])
    return Complexity(1 - information.mean(0), information, importance, tuple(names), count)


def complexity_over_checkpoints(
    model: nn.Module,
    images: Tensor,
    features: Tensor | ConceptExplanation,
    checkpoints: Mapping[str, Mapping[str, Tensor]],
    *,
    layers: Sequence[str] | None = None,
    layout: str | None = None,
    reading: str = "mean",
    family: str = "linear",
    ridge: float = 1e-3,
    held_out: float = 0.3,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Complexity]:
    """`feature_complexity` of the same features in earlier states of a model: when could each be read, and where?

    Args:
        model: takes the checkpoints' weights for a while; afterwards it has its own again.
        checkpoints: label -> state dict, such as of epochs.
        The others are those of `feature_complexity`; features stay those given.

    Returns: label -> Complexity. Raises: InputError for no checkpoint, or one that does not fit the model.
    """
    if not checkpoints:
        raise InputError("checkpoints is empty: give label -> state dict")
    own = {name: value.clone() for name, value in model.state_dict().items()}
    found = {}
    try:
        for label, state in checkpoints.items():
            try:
                model.load_state_dict(state)
            except RuntimeError as error:
                raise InputError(f"checkpoint {label!r} does not fit the model: {error}") from error
            found[label] = feature_complexity(
                model,
                images,
                features,
                layers=layers,
                layout=layout,
                reading=reading,
                family=family,
                ridge=ridge,
                held_out=held_out,
                batch_size=batch_size,
                seed=seed,
            )
    finally:
        model.load_state_dict(own)
    return found


def residual_flow(
    model: nn.Module,
    images: Tensor,
    features: Tensor | ConceptExplanation,
    *,
    blocks: Sequence[str] | None = None,
    layout: str | None = None,
    reading: str = "mean",
    family: str = "linear",
    ridge: float = 1e-3,
    held_out: float = 0.3,
    batch_size: int = 64,
    seed: int = 0,
) -> Flow:
    """Say which way features take through residual blocks: around a block, or through it.

    The skip branch is a block's input, the main branch its output minus its input. That is exact for blocks x + f(x);
    where a block ends with an activation, as in ResNet, its effect counts to the main branch.

    Args:
        blocks: names of residual blocks; None takes those of `find_blocks` that have parts and keep the shape.
        The others are those of `feature_complexity`.

    Raises: InputError for wrong arguments, for a block that does not keep the shape, and where none is found.
    """
    check_images(images)
    values, _ = _read_features(features, images)
    check_choice("reading", reading, _READINGS)
    check_whole("batch_size", batch_size)
    with evaluating(model, grad=False) as classify:
        modules = dict(classify.model.named_modules())
        names = list(blocks) if blocks is not None else find_blocks(classify.model, images[:1])
        for name in names:
            check_choice("block", name, modules)
        if blocks is None:
            names = [name for name in names if any(True for _ in modules[name].children())]
        shapes = _shapes(classify, images[:1], names)
        changing = [name for name in names if shapes[name][0] != shapes[name][1]]
        if blocks is not None and changing:
            before, after = shapes[changing[0]]
            raise InputError(
                f"block {changing[0]!r} makes {tuple(after)} of {tuple(before)}: what it adds to its input is not "
                "defined. Name blocks that keep the shape"
            )
        kept = [name for name in names if name not in changing]
        if not kept:
            raise InputError("no block keeps the shape of its input: name residual blocks")
        pairs = _read_branches(classify, images, kept, layout, reading, batch_size)
    read = {"family": family, "ridge": ridge, "held_out": held_out, "seed": seed}
    skip, main = (
        torch.stack([v_information(pair[side], values, **read) for pair in pairs]).clamp(min=0)  # type: ignore[arg-type]
        for side in (0, 1)
    )
    return Flow(skip, main, tuple(kept), tuple(changing))


def v_information(
    rows: Tensor,
    features: Tensor,
    *,
    family: str = "linear",
    ridge: float = 1e-3,
    held_out: float = 0.3,
    seed: int = 0,
) -> Tensor:
    """V-information of rows about features over the features' variance: R^2 of ridge probes, in closed form.

    Args:
        rows: (N, D).
        features: (N, F).
        family: "linear" in the columns, which are brought to mean 0 and variance 1, or "quadratic": in their squares
            too.
        ridge: penalty on squared coefficients of standardised features, a unit of mean squared error. Where rows have
            more dimensions than there are images it decides a lot.
        held_out: share of the rows, drawn at random, that R^2 is measured on; 0 measures on those that were fitted.
        seed: of the draw.

    Returns: (F,) float64, on the CPU: at most 1, below 0 where the probe is worse than the mean. NaN for a feature that
        does not vary.
    Raises: InputError for wrong arguments.

    >>> rows = torch.linspace(-1, 1, 50)[:, None]
    >>> v_information(rows, torch.cat([3 * rows + 1, rows**2], 1), ridge=0.0, held_out=0.0).round(decimals=6).abs()
    tensor([1., 0.], dtype=torch.float64)
    """
    from sklearn.linear_model import Ridge

    check_choice("family", family, _FAMILIES)
    if rows.ndim != 2 or features.ndim != 2 or len(rows) != len(features):
        raise InputError(f"rows are {tuple(rows.shape)} and features {tuple(features.shape)}: give (N, D) and (N, F)")
    if not 0 <= held_out < 1 or not ridge >= 0:
        raise InputError(f"held_out is {held_out} and ridge {ridge}: give a share below 1, and a number from 0 up")
    x, z = rows.detach().cpu().double(), features.detach().cpu().double()
    if not x.isfinite().all() or not z.isfinite().all():
        raise InputError("rows or features hold NaN or infinite values: look for them in the model's activations")
    fitted, measured = _split(len(x), held_out, seed)
    if len(fitted) < 2 or len(measured) < 2:
        raise InputError(f"{len(x)} rows with held_out {held_out} leave less than two to fit or to measure: give more")
    x, z = _standardise(x, fitted), _standardise(z, fitted)
    if family == "quadratic":
        x = torch.cat([x, _standardise(x.square(), fitted)], 1)
    probe = Ridge(alpha=ridge * len(fitted), fit_intercept=False, solver="svd" if ridge == 0 else "auto")
    probe.fit(x[fitted].numpy(), z[fitted].numpy())
    guess = torch.from_numpy(probe.predict(x[measured].numpy())).view(len(measured), -1)
    wanted = z[measured]
    around = (wanted - wanted.mean(0)).square().sum(0)
    found = 1 - (wanted - guess).square().sum(0) / torch.where(around > 0, around, 1)
    return torch.where(around > 0, found, torch.nan)


def find_blocks(model: nn.Module, image: Tensor) -> list[str]:
    """The layers whose outputs are steps of the model: members of its outermost `Sequential`s and `ModuleList`s.

    That is each block of a ResNet or a transformer, and each convolution or linear layer, with the activation and the
    pooling that follow it, of a plain network. The member that gives the logits is left out.

    Args:
        image: (1, C, H, W).

    Returns: names, in the order of the forward pass. Raises: InputError if there are none.
    """
    with evaluating(model, grad=False) as classify:
        members = dict(_members(model))
        with outputs(members) as seen:
            logits = classify(image)
    blocks: list[tuple[str, Tensor]] = []
    for name, output in dict(seen).items():
        if any(True for _ in members[name].parameters()):
            blocks.append((name, output))
        elif blocks and blocks[-1][1].ndim == output.ndim:
            blocks[-1] = (name, output)
    names = [name for name, out in blocks if out.shape != logits.shape or not torch.equal(out, logits)]
    if not names:
        raise InputError(
            f"{type(model).__name__} has no layers with parameters in a Sequential or ModuleList: name the layers"
        )
    return names


def _members(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    found = []
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(module, _CONTAINERS) and not isinstance(child, _CONTAINERS):
            found.append((path, child))
        else:
            found += _members(child, f"{path}.")
    return found


def _read_features(features: Tensor | ConceptExplanation, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """(B, F) values, and (F,) importance."""
    importance = None
    if isinstance(features, ConceptExplanation):
        importance = features.per_image.detach().cpu().double().abs().mean(0)
        codes = features.codes
        features = codes.flatten(1, -2).mean(1) if codes.ndim > 2 else codes
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
        given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InputError(f"features are {given} for {len(images)} images: give (B, F), or concepts of these images")
    return features, importance


def _read_layers(
    classify: Classifier, images: Tensor, names: Sequence[str], layout: str | None, reading: str, batch_size: int
) -> list[Tensor]:
    """(B, D) of each layer."""
    cuts = {cut.point: cut for cut in (find_cut(classify, images[:1], name, layout) for name in names)}
    parts: dict[str, list[Tensor]] = {point: [] for point in cuts}

    def keep(point: str, value: Tensor) -> Tensor:
        if point in cuts:
            parts[point].append(_reduce(value.movedim(cuts[point].axis, -1), reading))
        return value

    for (part,) in batches(batch_size, images):
        with watching(classify.model, list(names), keep):
            classify(part)
    return [torch.cat(parts[point]) for point in cuts]


def _shapes(classify: Classifier, image: Tensor, names: Sequence[str]) -> dict[str, list[torch.Size]]:
    """The shapes of each block's first input and output."""
    seen: dict[str, torch.Size] = {}

    def note(point: str, value: Tensor) -> Tensor:
        seen.setdefault(point, value.shape)
        return value

    with watching(classify.model, [point for name in names for point in (f"{name}:in", name)], note):
        classify(image)
    for name in names:
        if name not in seen:
            raise InputError(f"block {name!r} does not run in a forward pass: name one that does")
    return {name: [seen[f"{name}:in"], seen[name]] for name in names}


def _read_branches(
    classify: Classifier, images: Tensor, names: Sequence[str], layout: str | None, reading: str, batch_size: int
) -> list[tuple[Tensor, Tensor]]:
    """(B, D) of each block's input, and of its output minus its input."""
    axes = {name: find_cut(classify, images[:1], name, layout).axis for name in names}
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    entered: dict[str, Tensor] = {}

    def keep(point: str, value: Tensor) -> Tensor:
        name = point.removesuffix(":in")
        if point.endswith(":in"):
            entered[name] = value.clone()
        elif name in axes:  # not the second call of a block
            pair = (entered[name], value - entered[name])
            skip, main = (_reduce(each.movedim(axes[name], -1), reading) for each in pair)
            parts[name].append((skip, main))
        return value

    points = [point for name in names for point in (f"{name}:in", name)]
    for (part,) in batches(batch_size, images):
        with watching(classify.model, points, keep):
            classify(part)
    return [(torch.cat([a for a, _ in parts[name]]), torch.cat([b for _, b in parts[name]])) for name in names]


def _reduce(x: Tensor, reading: str) -> Tensor:
    """(B, *space, D) as (B, D) or (B, space times D)."""
    if reading == "flatten":
        return x.flatten(1).clone()
    return x.flatten(1, -2).mean(1) if x.ndim > 2 else x.clone()


def _split(count: int, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Which rows are fitted, and which are measured."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if held_out == 0:
        return order, order
    number = round(held_out * count)
    return order[number:], order[:number]


def _standardise(x: Tensor, fitted: Tensor) -> Tensor:
    spread = x[fitted].std(0, correction=0)
    return (x - x[fitted].mean(0)) / torch.where(spread > 0, spread, 1)
