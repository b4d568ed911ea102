"""The attention layers of any model: as mixers show them to taps, or as they are found among its operations."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.errors import InputError, check_choice
from saccade.explain.classifier import check_images, check_whole, evaluating
from saccade.taps import tap

__all__ = ["AttentionLayer", "describe_layers", "read_attention", "read_in_parts"]

_SOURCES = ("auto", "taps", "operations")
_BUDGET = 2**28  # bytes of attention maps held at a time; one image may need more
_MOST_PREFIX = 16  # prefix tokens that are looked for; models have a class token and up to eight registers


@dataclass(frozen=True)
class AttentionLayer:
    """One layer that mixes tokens.

    Attributes:
        name: of its module.
        attention: (B, heads, N, N), share of token m in the output of token n; prefix tokens stand first.
        grid: (h, w) of the image's tokens, row by row behind the prefix tokens.
        num_prefix: class and register tokens, N - h w.
        source: "taps", or "operations" where all but the weights was inferred.
        projection: name of the layer that joins the heads, whose input channels are head after head; None if unknown.
        value: (B, heads, N, D), what was weighed; None where it was not seen.
    """

    name: str
    attention: Tensor
    grid: tuple[int, int]
    num_prefix: int
    source: str
    projection: str | None = None
    value: Tensor | None = None


def read_attention(
    model: nn.Module, images: Tensor, *, source: str = "auto", num_prefix: int | None = None
) -> tuple[AttentionLayer, ...]:
    """Read the attention of every layer, first to last, on images (B, C, H, W).

    Mixers of saccade show theirs to taps, whatever they compute with. In any other model (timm, transformers, plain
    torch) the operations that it runs are searched for weighted sums: fused attention, whose weights are formed again
    from query, key and mask, and products with a softmax. What weights do not say is inferred: the grid is that of the
    last convolution before whose tokens fit, else the one in the image's proportions with the fewest prefix tokens.

    Args:
        model: runs in eval mode without gradients.
        source: "taps" or "operations" alone; "auto" takes operations where taps show nothing. Attention of operations
            beside mixers of saccade is then not seen.
        num_prefix: tokens in front of the grid, where they cannot be inferred from operations.

    Layers of channel attention are left out, as they mix no tokens. So are, among operations, weights that a layer
    mixes among heads after the softmax (talking heads).

    Raises: InputError for a model that shows no attention or attends among channels alone, and for layers without a
        matrix of all tokens: attention of few queries or keys, and of operations, inside windows.

    >>> import saccade
    >>> model = saccade.create_model("study_xxs", num_classes=2, mixer="window")
    >>> layers = read_attention(model, torch.zeros(1, 3, 32, 32))
    >>> [(layer.name, layer.grid) for layer in layers][:2]
    [('stages.0.blocks.0.mixer', (8, 8)), ('stages.1.blocks.0.mixer', (4, 4))]
    """
    check_images(images)
    check_choice("source", source, _SOURCES)
    if num_prefix is not None:
        check_whole("num_prefix", num_prefix, 0)
    with evaluating(model, grad=False):
        layers, channels = _read_taps(model, images) if source != "operations" else ([], [])
        if not layers and not channels and source != "taps":
            layers, channels = _read_operations(model, images, num_prefix)
    if channels and not layers:
        raise InputError(
            f"{channels[0]!r} and all other layers weigh channels, not tokens: attention says nothing about places "
            "there. Use a method that reads pixels, such as integrated_gradients"
        )
    if not layers:
        raise InputError(
            f"{type(model).__name__} shows no attention: neither saccade mixers nor softmax-weighted sums ran. Use "
            "a method that reads pixels, such as integrated_gradients, or put mixers in with saccade.swap"
        )
    return tuple(layers)


def read_in_parts(
    model: nn.Module, images: Tensor, batch_size: int, *, source: str = "auto", num_prefix: int | None = None
) -> Iterator[tuple[AttentionLayer, ...]]:
    """`read_attention` of one image, then of as many at a time as memory and `batch_size` allow."""
    done, size = 0, 1
    while done < len(images):
        part = images[done : done + size]
        layers = read_attention(model, part, source=source, num_prefix=num_prefix)
        yield layers
        image_bytes = sum(layer.attention.nbytes for layer in layers) // len(part)
        done, size = done + len(part), min(batch_size, max(1, _BUDGET // image_bytes))


def describe_layers(layers: tuple[AttentionLayer, ...]) -> str:
    """Say where attention was read, and the tokens of each grid.

    >>> layer = AttentionLayer("blocks.0.attn", torch.zeros(1, 3, 197, 197), (14, 14), 1, "operations")
    >>> describe_layers((layer, layer))
    '2 layers read from operations: 1 prefix + 14 x 14 tokens'
    """
    tokens = dict.fromkeys(
        (f"{layer.num_prefix} prefix + " if layer.num_prefix else "") + "{} x {} tokens".format(*layer.grid)
        for layer in layers
    )
    count = f"{len(layers)} layer{'s' if len(layers) > 1 else ''}"
    return f"{count} read from {layers[0].source}: {', then '.join(tokens)}"


class _NothingSeenError(Exception):
    """Leaves the `with` of a tap that saw no attention."""


def _read_taps(model: nn.Module, images: Tensor) -> tuple[list[AttentionLayer], list[str]]:
    """Layers that mix tokens, and the names of those that mix channels."""
    from saccade.explain.relevance.modules import watching

    projections = [f"{name}.qkv".removeprefix(".") for name, module in model.named_modules() if _has_values(module)]
    values: dict[str, list[Tensor]] = {}

    def keep(point: str, projected: Tensor) -> Tensor:
        values.setdefault(point.partition("#")[0].removesuffix("qkv").removesuffix("."), []).append(projected)
        return projected

    try:
        with watching(model, projections, keep), tap(model, kinds=("attention", "features")) as seen:
            model(images.clone())
            if not seen.attention:
                raise _NothingSeenError
    except _NothingSeenError:
        return [], []
    layers, channels = [], []
    for name in seen:
        calls = seen.calls(name)
        for number, call in enumerate(calls):
            if call.attention is not None and not getattr(model.get_submodule(name), "mixes_tokens", True):
                channels.append(name)
            elif call.attention is not None:
                grid = _tapped_grid(name, call.attention, call.features, images)
                heads, tokens = call.attention.shape[1:3]
                projection = _tapped_projection(model, name, heads)
                parts = values.get(name, [])
                value = _split_values(parts[number :: len(calls)] if len(calls) == len(parts) else parts, heads, tokens)
                prefix = tokens - grid[0] * grid[1]
                layers.append(AttentionLayer(name, call.attention, grid, prefix, "taps", projection, value))
    return layers, channels


def _has_values(module: nn.Module) -> bool:
    """Whether it is a mixer with one projection to query, key and value of all channels."""
    layer = getattr(module, "qkv", None)
    whole = isinstance(layer, nn.Linear) and layer.out_features == 3 * layer.in_features
    return whole and getattr(module, "mixes_tokens", False)


def _split_values(parts: list[Tensor], heads: int, tokens: int) -> Tensor | None:
    """(B, heads, N, D) from what a projection to query, key and value gave: for the map, then for prefix tokens."""
    flat = [part.flatten(1, -2).chunk(3, -1)[2] for part in reversed(parts)]
    if not flat or sum(part.shape[1] for part in flat) != tokens or flat[0].shape[-1] % heads:
        return None
    return torch.cat(flat, 1).unflatten(-1, (heads, -1)).transpose(1, 2)


def _tapped_grid(name: str, attention: Tensor, features: Tensor | None, images: Tensor) -> tuple[int, int]:
    from saccade.explain.methods.layers import token_grid

    _check_square(name, attention)
    tokens = attention.shape[-1]
    if features is None and (inferred := token_grid(tokens, images.shape)):
        return inferred[:2]
    space = () if features is None else tuple(features.shape[1:-1])
    if len(space) != 2 or not 0 <= tokens - space[0] * space[1] <= space[0] * space[1]:
        raise InputError(
            f"{name!r} has attention over {tokens} tokens and features on a grid {space}: give a network whose layers "
            "have features (B, h, w, C) of the same tokens, and at most as many prefix tokens"
        )
    return space


def _tapped_projection(model: nn.Module, name: str, heads: int) -> str | None:
    """The mixer's output layer, if the heads that it shows are the heads that it joins."""
    mixer = model.get_submodule(name)
    layer = getattr(mixer, "proj", None)
    known = getattr(mixer, "num_heads", None) == heads or heads == 1
    fits = known and isinstance(layer, nn.Linear) and layer.in_features % heads == 0
    return f"{name}.proj".removeprefix(".") if fits else None


def _read_operations(
    model: nn.Module, images: Tensor, num_prefix: int | None
) -> tuple[list[AttentionLayer], list[str]]:
    from saccade.explain.relevance.attention import record_attention

    layers, channels = [], []
    for found in record_attention(model, images):
        if found.over == "channels":
            channels.append(found.name)
            continue
        if len(found.attention) != len(images):
            raise InputError(
                f"{found.name!r} attends inside windows, {len(found.attention) // len(images)} of "
                f"{found.attention.shape[-1]} tokens an image: the operations do not say which tokens these are. Put "
                "mixers of saccade in, such as window, which show the matrix of all tokens"
            )
        _check_square(found.name, found.attention)
        grid = _infer_grid(found.name, found.attention.shape[-1], found.maps, images, num_prefix)
        tokens = found.attention.shape[-1]
        layers.append(
            AttentionLayer(
                found.name,
                found.attention,
                grid,
                tokens - grid[0] * grid[1],
                "operations",
                found.projection,
                found.value,
            )
        )
    return layers, channels


def _infer_grid(
    name: str, tokens: int, maps: tuple[tuple[int, int], ...], images: Tensor, num_prefix: int | None
) -> tuple[int, int]:
    counts = range(min(_MOST_PREFIX + 1, tokens)) if num_prefix is None else [num_prefix]
    for height, width in maps:
        if tokens - height * width in counts and height * width >= tokens - height * width:
            return height, width
    rows, columns = images.shape[-2:]
    for count in counts[:2] if maps and num_prefix is None else counts:  # tokens that were merged after a convolution
        height = round(max(0, (tokens - count) * rows / columns) ** 0.5)
        if height and height * height * columns == (tokens - count) * rows and (tokens - count) % height == 0:
            return height, (tokens - count) // height
    prefix = f"up to {_MOST_PREFIX}" if num_prefix is None else str(num_prefix)
    raise InputError(
        f"{name!r} attends over {tokens} tokens: no convolution before it made a map of as many, and behind {prefix} "
        f"prefix tokens they fill no grid in the proportions of the {rows} x {columns} images. Give num_prefix, or "
        "images of the proportions that the model was trained with"
    )


def _check_square(name: str, attention: Tensor) -> None:
    queries, keys = attention.shape[-2:]
    if queries != keys:
        raise InputError(
            f"{name!r} maps {keys} keys to {queries} queries: the matrices of all layers can be read together only "
            "where both are the same tokens. Use a method that reads pixels, such as integrated_gradients"
        )
