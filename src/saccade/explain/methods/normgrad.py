"""NormGrad (Rebuffi et al., 2020, arXiv:2004.02866): how much each place would teach an identity layer put there.

Every map is a choice of three: the layer of the network, the virtual identity layer whose gradient is split over
places, and the number that a place's share is summed up to.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from saccade.errors import InputError, check_choice
from saccade.explain.classifier import Classifier, batches, check_whole
from saccade.explain.methods.attribution import Attribution, Detail, LayerMap, enlarge
from saccade.explain.methods.layers import activations_and_slopes, find_maps
from saccade.explain.parameters import step_downhill, with_parameters

__all__ = ["combine_maps", "form_shares", "normgrad", "share_identity_gradient", "stretch"]

_VIRTUAL = ("bias", "conv", "depthwise", "scaling")
_STRATEGIES = ("linear", "uniform")
_FLAT = 16.0


def normgrad(
    classify: Classifier,
    images: Tensor,
    target: Tensor,
    *,
    batch_size: int,
    layer: str | Sequence[str] | None = None,
    layout: str | None = None,
    scales: int = 1,
    virtual: str = "conv",
    kernel_size: int = 1,
    aggregate: str = "norm",
    combine: str = "product",
    weights: str | Sequence[float] | None = None,
    meta_rate: float = 0.0,
) -> Attribution:
    """Norm of each place's share in the gradient of a virtual 1 x 1 identity convolution: |activation| |gradient|.

    Without sign under the defaults, in logits; `virtual="scaling", aggregate="filter_norm"` is the paper's selective
    form, which counts evidence for the target alone, and `virtual="scaling", aggregate="sum"` has a sign.

    Args:
        layer: module whose output is a map, or several, whose maps are combined; None finds it, as grad_cam does.
        layout: "NCHW", "NHWC" or "NLC", how the layers' outputs lie; None infers it, as grad_cam does.
        scales: with `layer` None, how many resolutions are combined, from the last backwards: at each one the last
            layer with more tokens than those after it. The paper combines the four after VGG's poolings.
        virtual: the identity layer: "bias", "scaling" (of each channel), "conv" or "depthwise" convolution.
        kernel_size: of the convolution, odd; its places beyond the border are 0.
        aggregate: "norm", "filter_norm" (of what is above 0), "sum" or "max" of the share.
        combine: "product" or "sum" of the layers' maps, each enlarged and stretched to 0..1 for the purpose. A single
            layer's map is returned as it is.
        weights: of the layers, in the order of `layer` or of the forward pass: exponents of the product, factors of
            the sum. None gives each 1, as the paper's script does; a sequence, "uniform" or "linear" (rising evenly
            with depth) is divided by its sum, as in the authors' fork of TorchRay.
        meta_rate: learning rate of the step down the target's cross-entropy that every parameter makes before the map
            is made, each image its own; 0 makes none. The paper's script has 1e-4; below 0 it goes uphill. Afterwards
            the parameters are bit for bit as before.

    Raises: InputError if no layer returns a map, if a named one does not, if the logit does not depend on it, for a
        choice that does not exist, and for a `meta_rate` where the question is not a plain class.
    """
    check_choice("virtual", virtual, _VIRTUAL)
    check_choice("aggregate", aggregate, _AGGREGATES)
    check_choice("combine", combine, _COMBINE)
    check_whole("kernel_size", kernel_size)
    check_whole("scales", scales)
    if kernel_size % 2 == 0 or (kernel_size > 1 and virtual in ("bias", "scaling")):
        raise InputError(f"kernel_size is {kernel_size}: give an odd number to conv or depthwise, and 1 to others")
    if not math.isfinite(meta_rate):
        raise InputError(f"meta_rate is {meta_rate}: give a learning rate such as 1e-4, or 0")
    if meta_rate and classify.questions is not None:
        raise InputError("meta_rate needs one class as target: the step goes down its cross-entropy")
    names = [layer] if isinstance(layer, str) else layer
    if names is not None and scales != 1:
        raise InputError(f"scales is {scales} and layers are named: give one of both")
    if names is not None and not names:
        raise InputError("layer is an empty sequence: name at least one, or give None to find it")
    layers = find_maps(classify, images[:1], names, layout, scales)
    exponents = _read_weights(weights, len(layers))

    def draw(part: Tensor, classes: Tensor) -> Tensor:
        maps = [
            enlarge(share_identity_gradient(*each, virtual, kernel_size, aggregate), part.shape[-2:])
            for each in activations_and_slopes(classify, part, classes, layers)
        ]
        return maps[0] if len(maps) == 1 else combine_maps(torch.stack(maps), exponents, combine)

    def draw_after_step(part: Tensor, classes: Tensor) -> Tensor:
        stepped = step_downhill(classify.model, part, classes, meta_rate, read=classify.logits)
        with with_parameters(classify.model, stepped):
            return draw(part, classes)

    if meta_rate:
        parts = [draw_after_step(*each) for each in batches(1, images, target)]
    else:
        parts = [draw(*each) for each in batches(batch_size, images, target)]
    return Attribution(torch.cat(parts).to(images), layer=_join(layers), detail=Detail(tuple(layers)))


def share_identity_gradient(
    activation: Tensor, slope: Tensor, virtual: str, kernel_size: int, aggregate: str, *, impl: str = "fast"
) -> Tensor:
    """Each place's share in the gradient of a virtual identity layer's parameters, summed up to a number.

    Args:
        activation, slope: (B, C, h, w), the layer's output and the gradient of the logit by it.
        virtual, kernel_size, aggregate: see `normgrad`.
        impl: "reference" forms the share, (B, parameters, h, w); "fast" never forms that of a convolution, which for
            C channels has C^2 numbers a place.

    Returns: (B, h, w).
    """
    check_choice("impl", impl, ("fast", "reference"))
    if impl == "reference" or virtual in ("bias", "scaling"):
        return _AGGREGATES[aggregate](form_shares(activation, slope, virtual, kernel_size))
    near, slopes = _neighbours(activation, kernel_size), slope.unsqueeze(2)
    if virtual == "conv":  # the outer product of all gradients and all neighbours
        return _OUTER[aggregate](slopes.transpose(1, 2), near.flatten(1, 2).unsqueeze(1)).squeeze(1)
    return _REDUCE[aggregate](_OUTER[aggregate](slopes, near))


def form_shares(activation: Tensor, slope: Tensor, virtual: str, kernel_size: int = 1) -> Tensor:
    """(B, parameters, h, w): each place's share, whose sum over places is the virtual layer's gradient."""
    near = _neighbours(activation, kernel_size)  # (B, C, k k, h, w)
    if virtual == "bias":
        return slope
    if virtual == "scaling":
        return activation * slope
    if virtual == "depthwise":
        return (near * slope.unsqueeze(2)).flatten(1, 2)
    return (slope[:, :, None, None] * near.unsqueeze(1)).flatten(1, 3)


def combine_maps(
    maps: Tensor, weights: Tensor | None = None, combine: str = "product", *, flat: float = _FLAT
) -> Tensor:
    """Maps (layers, B, H, W), stretched to 0..1, as their weighted product or sum (B, H, W); no weights count as 1."""
    weights = maps.new_ones(len(maps)) if weights is None else weights.to(maps)
    return _COMBINE[combine](stretch(maps, flat=flat), weights.view(-1, 1, 1, 1))


def stretch(maps: Tensor, *, flat: float = _FLAT) -> Tensor:
    """Maps (..., H, W) from 0 to 1, each by its own least and largest value; a constant one becomes 0.

    Constant is what spreads over at most `flat` roundings of its largest value: those are no map to be stretched.
    """
    lifted = maps - maps.amin((-2, -1), keepdim=True)
    height = lifted.amax((-2, -1), keepdim=True)
    noise = flat * torch.finfo(maps.dtype).eps * maps.abs().amax((-2, -1), keepdim=True)
    return torch.where(height > noise, lifted / torch.where(height > 0, height, 1), 0)


_AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda share: share.norm(dim=1),
    "filter_norm": lambda share: share.clamp(min=0).norm(dim=1),
    "sum": lambda share: share.sum(1),
    "max": lambda share: share.amax(1),
}

_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda maps, weights: (maps**weights).prod(0),
    "sum": lambda maps, weights: (maps * weights).sum(0),
}


# aggregates of the outer products of a (B, G, n, h, w) and b (B, G, m, h, w), over n and m: (B, G, h, w)


def _outer_max(a: Tensor, b: Tensor) -> Tensor:
    """The largest product has both largest, both least, or one of each where they differ in sign."""
    ends = [x * y for x in (a.amax(2), a.amin(2)) for y in (b.amax(2), b.amin(2))]
    return torch.stack(ends).amax(0)


def _outer_filter_norm(a: Tensor, b: Tensor) -> Tensor:
    """Positive products come from two positive or two negative factors."""
    above, below = (_squares((sign * a).clamp(min=0)) * _squares((sign * b).clamp(min=0)) for sign in (1, -1))
    return (above + below).sqrt()


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(2)


_OUTER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "norm": lambda a, b: (_squares(a) * _squares(b)).sqrt(),
    "filter_norm": _outer_filter_norm,
    "sum": lambda a, b: a.sum(2) * b.sum(2),
    "max": _outer_max,
}

_REDUCE = {**_AGGREGATES, "filter_norm": _AGGREGATES["norm"]}  # channels' norms are above 0 already


def _neighbours(x: Tensor, kernel_size: int) -> Tensor:
    """(B, C, h, w) -> (B, C, k k, h, w): the values around each place, 0 beyond the border."""
    if kernel_size == 1:
        return x.unsqueeze(2)
    patches = unfold(pad(x, (kernel_size // 2,) * 4), kernel_size)
    return patches.view(*x.shape[:2], kernel_size**2, *x.shape[2:])


def _read_weights(weights: str | Sequence[float] | None, count: int) -> Tensor | None:
    if weights is None:
        return None
    if isinstance(weights, str):
        check_choice("weights", weights, _STRATEGIES)
        weights = [1.0] * count if weights == "uniform" else [(i + 1) / count for i in range(count)]
    given = torch.tensor([float(weight) for weight in weights], dtype=torch.double)
    if len(given) != count or not (given >= 0).all() or not given.sum() > 0 or not given.isfinite().all():
        raise InputError(
            f"weights are {tuple(weights)} for {count} layer(s): give one number from 0 up for each, not all 0"
        )
    return given / given.sum()


def _join(layers: Sequence[LayerMap]) -> str:
    return ", ".join(each.name for each in layers)
