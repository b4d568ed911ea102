"""Iterative feature merging (2023, arXiv:2310.06756), and pruning by magnitude to compare it with."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from saccade.errors import InputError, check_choice, nearest
from saccade.explain.classifier import check_images, evaluating
from saccade.explain.merging.channels import Axis, ChannelGroup, Channels, find_channels, tensors_of, trace

__all__ = ["LayerWidth", "Narrowed", "fold_batch_norms", "merge_features", "prune_features"]

_ROUNDING = 1e-12  # of the rows' squared lengths: distances below are what float64 makes of 0


@dataclass(frozen=True)
class LayerWidth:
    """What became of one group of channels.

    Attributes:
        name: the module that makes the channels; of several tied by residual adds the first.
        before, after: number of channels; `after` is the layer's feature complexity at this beta.
        kept: why the group was left alone; None if it was not.
        members: for each channel that is left, the original ones that it stands for.
    """

    name: str
    before: int
    after: int
    kept: str | None
    members: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Narrowed:
    """A narrower model.

    Attributes:
        model: a new module in eval mode, with layers of the widths below.
        layers: one row for each group of channels, in the order of the forward pass.
        parameters: number of them before and after. Norms that were folded away count in neither.
    """

    model: nn.Module
    layers: tuple[LayerWidth, ...]
    parameters: tuple[int, int]

    @property
    def widths(self) -> dict[str, int]:
        """Name of each group -> its channels now."""
        return {layer.name: layer.after for layer in self.layers}


def merge_features(
    model: nn.Module,
    image: Tensor,
    *,
    beta: float = 0.1,
    max_ratio: float = 1.0,
    rule: str = "sum",
    batch_norm: str = "fold",
    biases: bool = False,
    keep: Sequence[str] = (),
) -> Narrowed:
    """Merge the two most similar channels of each layer again and again, without data.

    The distance of two channels is that of all weights which make or read them. In each round every group of channels,
    in the order of the forward pass, merges its nearest pair, unless that pair's squared distance is over `beta` times
    the largest one in the group. Rounds go on until no group merges. The largest distance is that of the round, so that
    the threshold moves while channels merge.

    Channels are found by running the model once: convolutions and linear layers, poolings, residual adds (which tie
    channels), concatenations, views. What cannot be followed, such as attention or a norm over channels, keeps its
    channels, and the result says why.

    Args:
        model: maps (B, C, H, W) to a tensor. It stays as it is.
        image: (1, C, H, W) of the size that the model takes; its values do not matter, zeros will do. A small one is
            faster, if the model takes it.
        beta: in [0, 1), 0.01 to 0.3 in the paper; 0 merges copies alone.
        max_ratio: no group goes through more rounds than this share of its width.
        rule: "sum", the paper's: what makes the two channels is added, what reads them is averaged, each channel with
            the number of those that it stands for. Exact where both are proportional with a positive factor and read
            alike, if all that lies between is homogeneous, such as ReLU: other activations keep their channels. "mean":
            what makes them is averaged, what reads them is added, which is exact for copies through any activation.
        batch_norm: "fold" folds norms into the layer before, which is exact, and treats the others as a scale and
            a shift. "sum" adds up their weights, biases, means and variances as the paper's code does: even a merge of
            copies then changes what the model says, because a variance grows with the square of a factor.
        biases: count biases in distances, so that channels which differ in their bias alone are no copies. The paper
            counts tensors of two axes and more.
        keep: names of groups, as in the result, or of modules that hold them: they stay as they are.

    Raises: InputError for wrong arguments, and if nothing in the model can be merged.

    >>> net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3, 2))
    >>> for parameter in net.parameters():
    ...     parameter.data = torch.arange(1.0, 1 + parameter.numel()).view_as(parameter)
    >>> merge_features(net, torch.zeros(1, 1, 1, 1), beta=0.3).layers[0].members
    ((2,), (0, 1))
    """
    if not 0 <= beta < 1:
        raise InputError(f"beta is {beta}: give a share of the largest squared distance, from 0 to below 1")
    if not (max_ratio >= 0 and math.isfinite(max_ratio)):
        raise InputError(f"max_ratio is {max_ratio}: give a share of each group's width, 0 or more")
    check_choice("rule", rule, ("mean", "sum"))
    check_choice("batch_norm", batch_norm, ("fold", "sum"))
    if batch_norm == "sum" and rule == "mean":
        raise InputError("batch_norm is 'sum' with rule 'mean': the paper's code adds up what makes a channel")
    work = _Work(model, image, rule, batch_norm, keep)
    turn, merged = 0, True
    while merged:
        merged = False
        for group in work.open:
            pair = None if turn >= group.width * max_ratio else work.nearest_pair(group, beta, biases)
            if pair is not None:
                work.merge(group, *pair)
                merged = True
        turn += 1
    return work.finish()


def prune_features(model: nn.Module, image: Tensor, widths: Mapping[str, int], *, rule: str = "sum") -> Narrowed:
    """Leave out the channels whose weights are smallest, down to given widths, as something to compare merging with.

    The size of a channel is the norm of the weights, of two axes and more, that make it.

    Args:
        model, image, rule: as in `merge_features`; norms are folded there too. `rule` says here which groups can be
            followed.
        widths: name of a group -> channels to leave, such as the `widths` of a merged model; others stay.

    Raises: InputError for wrong arguments.
    """
    check_choice("rule", rule, ("mean", "sum"))
    work = _Work(model, image, rule, "fold", ())
    known = {group.name: group for group in work.channels.groups}
    for name, width in widths.items():
        check_choice("group", name, known)
        group = known[name]
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= group.width:
            raise InputError(f"the width of {name} is {width!r}: give a whole number from 1 to {group.width}")
        if width < group.width:
            if group.kept:
                raise InputError(f"{name} cannot be pruned: {group.kept}")
            work.prune(group, width)
    return work.finish()


def fold_batch_norms(model: nn.Module, image: Tensor) -> nn.Module:
    """A copy in eval mode, in which each batch norm right after a convolution or linear layer is part of it.

    The norm becomes an identity. One stays where its input goes elsewhere too, where the layer or the norm runs twice,
    and where it is a class of its own that may do more.

    Args:
        model, image: as in `merge_features`.
    """
    check_images(image)
    with evaluating(model, grad=False):
        folded = deepcopy(model)
        nodes, output, _ = trace(folded, image[:1])
    modules = dict(folded.named_modules())
    readers: dict[int, int] = {id(output): 1}
    calls: dict[str, int] = {}
    maker: dict[int, str] = {}
    for node in nodes:
        for value in node.inputs:
            readers[id(value)] = readers.get(id(value), 0) + 1
            if not value.active:
                for name in value.names:
                    calls[name] = calls.get(name, 0) + 1
        if node.op in ("convolution", "addmm", "mm"):
            maker[id(node.output)] = next((name for value in node.inputs for name in value.names), "")
    for node in nodes:
        if "batch_norm" not in node.op:
            continue
        x, mean = node.args[0], node.args[3]
        if mean is None or not mean.names:
            continue
        norm, layer = mean.names[0].rpartition(".")[0], maker.get(id(x), "").rpartition(".")[0]
        once = readers[id(x)] == calls[mean.names[0]] == calls.get(f"{layer}.weight") == 1
        if once and type(modules[norm]) in _NORMS and type(modules.get(layer)) in _FUSERS:
            _replace(folded, layer, _FUSERS[type(modules[layer])](modules[layer], modules[norm]))
            _replace(folded, norm, nn.Identity())
    return folded.eval()


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FUSERS: dict[type, Callable[[Any, Any], nn.Module]] = {
    **dict.fromkeys(_CONVOLUTIONS, fuse_conv_bn_eval),
    **dict.fromkeys(_TRANSPOSED, lambda layer, norm: fuse_conv_bn_eval(layer, norm, transpose=True)),
    nn.Linear: fuse_linear_bn_eval,
}


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


class _Work:
    """A copy of the model while its channels go: tensors in float64, and where each channel lies in them."""

    def __init__(self, model: nn.Module, image: Tensor, rule: str, batch_norm: str, keep: Sequence[str]) -> None:
        check_images(image)
        self.image, self.rule = image[:1], rule
        self.model = fold_batch_norms(model, image) if batch_norm == "fold" else deepcopy(model).eval()
        if batch_norm == "fold":
            _unit_variances(self.model)
        self.before = sum(each.numel() for each in self.model.parameters())
        with evaluating(self.model, grad=False):
            self.channels: Channels = find_channels(
                self.model,
                self.image,
                homogeneous=rule == "sum",
                batch_norm="write" if batch_norm == "sum" else "scale",
                keep=lambda name: any(name == each or name.startswith(f"{each}.") for each in keep),
            )
        self._check(keep)
        self.tensors = {
            name: each.detach().double().cpu()
            for name, each in tensors_of(self.model).items()
            if each.is_floating_point()
        }
        self.members: dict[str, list[tuple[int, ...]]] = {
            group.name: [(i,) for i in range(group.width)] for group in self.channels.groups
        }
        self.grams: dict[tuple[str, Axis], Tensor] = {}

    def _check(self, keep: Sequence[str]) -> None:
        groups = self.channels.groups
        names = {group.name for group in groups}
        for each in keep:
            if not any(name == each or name.startswith(f"{each}.") for name in names):
                raise InputError(f"keep names {each!r}, which holds no group: {nearest(each, names)}")
        if not self.open:
            reasons = "; ".join(f"{each.name}: {each.kept}" for each in groups) or "It makes no channels"
            raise InputError(f"nothing in {type(self.model).__name__} can be merged. {reasons}")

    @property
    def open(self) -> list[ChannelGroup]:
        return [group for group in self.channels.groups if group.kept is None]

    def axes(self, group: ChannelGroup) -> list[Axis]:
        """The axes that carry a group."""
        return [key for key, found in self.channels.places.items() if (found == group.start).any()]

    def places(self, group: ChannelGroup, key: Axis) -> Tensor:
        """(channels, K): where each of the group's channels lies along an axis."""
        found = self.channels.places[key]
        there = ((found >= group.start) & (found < group.start + group.width)).nonzero()[:, 0]
        order = found[there].argsort(stable=True)
        return there[order].view(int(found[there].max()) + 1 - group.start, -1)

    def rows(self, group: ChannelGroup, key: Axis, tensor: Tensor) -> Tensor:
        """(channels, features) of a tensor that is like the one of this axis."""
        return tensor.movedim(key[1], 0)[self.places(group, key)].flatten(1)

    def distances(self, group: ChannelGroup, biases: bool) -> Tensor:
        """(channels, channels) squared ones; infinite from a channel to itself."""
        total = torch.zeros(())
        for key in self.axes(group):
            tensor = self.tensors[key[0]]
            if tensor.ndim < 2 and not (biases and key[0].endswith("bias")):
                continue
            found = self.grams.get((group.name, key))
            if found is None:
                rows = self.rows(group, key, tensor)
                found = self.grams[group.name, key] = rows @ rows.T
            total = total + found
        length = total.diagonal()
        lengths = length[:, None] + length
        found = lengths - 2 * total
        return found.masked_fill(found < _ROUNDING * lengths, 0).fill_diagonal_(math.inf)

    def nearest_pair(self, group: ChannelGroup, beta: float, biases: bool) -> tuple[int, int] | None:
        """The two most similar channels, the first one first; None if they are too far apart."""
        width = len(self.members[group.name])
        if width == 1:
            return None
        distances = self.distances(group, biases)
        least = int(distances.argmin())
        largest = distances.masked_fill(distances.isinf(), 0).max()
        return None if distances.flatten()[least] > beta * largest else divmod(least, width)

    def merge(self, group: ChannelGroup, first: int, second: int) -> None:
        """One channel of two, after all others of the group."""
        members = self.members[group.name]
        sizes = torch.tensor([len(members[first]), len(members[second])], dtype=torch.float64)
        mean, total = (sizes / sizes.sum()).tolist(), [1.0, 1.0]
        order = [i for i in range(len(members)) if i not in (first, second)] + [second]
        for key in self.axes(group):
            summed = {"read": self.rule == "mean", "write": self.rule == "sum", "scale": False}
            self._combine(group, key, first, second, total if summed[self.channels.roles[key]] else mean)
            self._select(group, key, order)
        merged = (*members[first], *members[second])
        self.members[group.name] = [members[i] for i in order[:-1]] + [merged]

    def _combine(self, group: ChannelGroup, key: Axis, first: int, second: int, shares: list[float]) -> None:
        """Put a weighted sum of two channels in place of the second, and keep the products of rows up to date."""
        name, axis = key
        tensor = self.tensors[name].movedim(axis, 0).clone()
        places = self.places(group, key)
        new = shares[0] * tensor[places[first]] + shares[1] * tensor[places[second]]
        for other, (into, along) in [k for k in self.grams if k[1][0] == name and k[1][1] != axis]:
            owner = next(each for each in self.open if each.name == other)
            gone, come = (
                self.rows(owner, (into, along), part.movedim(0, axis))
                for part in (torch.cat([tensor[places[first]], tensor[places[second]]]), new)
            )
            self.grams[other, (into, along)] += come @ come.T - gone @ gone.T
        tensor[places[second]] = new
        self.tensors[name] = tensor.movedim(0, axis)
        gram = self.grams.get((group.name, key))
        if gram is not None:
            gram[second] = shares[0] * gram[first] + shares[1] * gram[second]
            gram[:, second] = shares[0] * gram[:, first] + shares[1] * gram[:, second]

    def _select(self, group: ChannelGroup, key: Axis, order: list[int]) -> None:
        """Leave the channels of this order, which take the first of the places."""
        name, axis = key
        places = self.places(group, key)
        found = self.channels.places[key]
        index = torch.arange(len(found))
        index[places[: len(order)]] = places[order]
        left = torch.ones(len(found), dtype=torch.bool)
        left[places[len(order) :]] = False
        self.tensors[name] = self.tensors[name].index_select(axis, index[left])
        self.channels.places[key] = found[left]
        gram = self.grams.get((group.name, key))
        if gram is not None:
            self.grams[group.name, key] = gram[order][:, order]

    def prune(self, group: ChannelGroup, width: int) -> None:
        """Leave the channels with the largest weights, in their order."""
        size = torch.zeros(group.width, dtype=torch.float64)
        for key in self.axes(group):
            if self.channels.roles[key] == "write" and self.tensors[key[0]].ndim > 1:
                size += self.rows(group, key, self.tensors[key[0]]).square().sum(1)
        order = sorted(size.argsort(descending=True, stable=True)[:width].tolist())
        for key in self.axes(group):
            self._select(group, key, order)
        self.members[group.name] = [(i,) for i in order]

    def finish(self) -> Narrowed:
        """Write the tensors back, and try the model."""
        with evaluating(self.model, grad=False):
            expected = self.model(self.image.clone()).shape
            tensors = tensors_of(self.model)
            for name in {name for name, _ in self.channels.places}:
                tensors[name].data = self.tensors[name].to(tensors[name])
            for module in self.model.modules():
                _read_widths(module)
            try:
                found = self.model(self.image.clone()).shape
            except (RuntimeError, ValueError) as error:
                raise InputError(
                    f"the narrower {type(self.model).__name__} does not run, because its code counts on a width. Name "
                    f"the layer in keep. What it says: {error}"
                ) from error
        assert found == expected
        layers = tuple(
            LayerWidth(each.name, each.width, len(self.members[each.name]), each.kept, tuple(self.members[each.name]))
            for each in self.channels.groups
        )
        return Narrowed(self.model, layers, (self.before, sum(each.numel() for each in self.model.parameters())))


def _unit_variances(model: nn.Module) -> None:
    """Norms that were not folded get a variance of 1 and a weight and a bias: their scale is the weight alone."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            if module.weight is None:
                module.affine = True
                module.weight = nn.Parameter(torch.ones_like(module.running_var))
                module.bias = nn.Parameter(torch.zeros_like(module.running_var))
            with torch.no_grad():
                module.weight.mul_(((1 + module.eps) / (module.running_var + module.eps)).sqrt())
                module.running_var.fill_(1)


def _read_widths(module: nn.Module) -> None:
    """A layer's own account of its widths, from its weights."""
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        first, second = module.weight.shape[:2]
        if 1 < module.groups == module.in_channels == module.out_channels:
            module.groups, module.in_channels, module.out_channels = first, first, first
        elif isinstance(module, _TRANSPOSED):
            module.in_channels, module.out_channels = first, second * module.groups
        else:
            module.in_channels, module.out_channels = second * module.groups, first
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        module.num_features = len(module.running_mean)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
