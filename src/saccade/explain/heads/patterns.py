"""What patterns heads draw: maps around the query, coded by a small autoencoder and clustered."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.errors import InputError, WorkError, check_choice
from saccade.explain.attention import AttentionLayer, read_in_parts
from saccade.explain.classifier import check_whole

__all__ = ["HeadPatterns", "head_patterns", "recentre_maps"]

_OUTSIDE = ("mean", "zero")
_BATCH = 64  # maps a step of training


@dataclass(frozen=True)
class HeadPatterns:
    """Attention maps of single queries, M of them drawn at random, in K clusters.

    Attributes:
        layers: names, in the order of the network.
        maps: (M, 2 h - 1, 2 w - 1), attention around the query, which stands in the middle, scaled to a maximum of 1,
            0 outside the image.
        inside: (M, 2 h - 1, 2 w - 1) booleans, what lies in the image.
        origin: (M, 4) long, number of the layer, head, image and query of each map.
        codes: (M, latent), of the autoencoder.
        points: (M, 2), the codes' principal components.
        cluster: (M,) long. Clusters are numbered from the largest down.
        means: (K, 2 h - 1, 2 w - 1), mean map of each cluster inside the image, NaN where it has none.
        representatives: (K,) long, number of the map whose code is nearest to the cluster's centre.
        shares: (L, H, K), share of each head's maps in each cluster; NaN for heads that a layer has not.
        explained: share of the coded maps' variance, around their mean map, that the autoencoder reproduces.
    """

    layers: tuple[str, ...]
    maps: Tensor
    inside: Tensor
    origin: Tensor
    codes: Tensor
    points: Tensor
    cluster: Tensor
    means: Tensor
    representatives: Tensor
    shares: Tensor
    explained: float


def head_patterns(
    model: nn.Module,
    images: Tensor,
    *,
    clusters: int = 6,
    latent: int = 8,
    layers: str = "*",
    outside: str = "mean",
    max_maps: int = 2048,
    steps: int = 300,
    source: str = "auto",
    num_prefix: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> HeadPatterns:
    """Summarise which patterns the heads draw (2023, arXiv:2303.13731; architecture and scaling are ours).

    Each map is the attention of one query to the image's tokens, moved so that the query stands in the middle. A
    convolutional autoencoder codes the maps' square roots, scaled to a mean square of 1, k-means clusters the codes.

    Args:
        model, images: as in `saccade.explain.read_attention`.
        clusters: K.
        latent: numbers of a code.
        layers: pattern of the names of the layers to look at, which must share one grid.
        outside: what the coder sees where the image ends: "mean" of the map, or "zero". Zeros show where the query
            lies, and maps of evenly spread attention then differ by that.
        max_maps: the most maps, drawn at random from all heads, queries and images.
        steps: of the autoencoder's training, 64 maps each.
        source, num_prefix: as in `read_attention`.
        batch_size: the most images in one forward pass.
        seed: of the draw, the training and the clusters.

    Raises: InputError as `read_attention`, for layers of several grids, and for more clusters than maps; WorkError if
        the autoencoder does not converge.
    """
    limits = {"clusters": clusters, "latent": latent, "max_maps": max_maps, "steps": steps, "batch_size": batch_size}
    for name, value in limits.items():
        check_whole(name, value)
    check_choice("outside", outside, _OUTSIDE)
    generator = torch.Generator().manual_seed(seed)
    names, heads, maps, inside, origin = _draw(
        model, images, layers, max_maps, generator, source=source, num_prefix=num_prefix, batch_size=batch_size
    )
    if len(maps) < clusters:
        raise InputError(f"clusters is {clusters} and there are {len(maps)} maps: give more images, or fewer clusters")
    tiny = torch.finfo(maps.dtype).tiny
    maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=tiny)
    # of square roots a peak and a spread have the same length, and neither drowns the other
    level = maps.sum((1, 2), keepdim=True) / inside.sum((1, 2), keepdim=True)
    roots = (maps / level.clamp(min=tiny)).sqrt()
    if outside == "mean":
        mean = roots.sum((1, 2), keepdim=True) / inside.sum((1, 2), keepdim=True)
        roots = torch.where(inside, roots, mean)
    codes, explained = _encode(roots, inside, latent, steps, generator)
    cluster, representatives = _cluster(codes, clusters, seed)
    counts = torch.zeros(len(names), max(heads), clusters, dtype=torch.double)
    counts.index_put_((origin[:, 0], origin[:, 1], cluster), torch.ones(len(maps)).double(), accumulate=True)
    member = F.one_hot(cluster, clusters).double()
    seen, total = (torch.einsum("mk,mhw->khw", member, each.double()) for each in (inside, maps * inside))
    left, sizes, _ = torch.linalg.svd(codes - codes.mean(0), full_matrices=False)
    points = F.pad((left * sizes)[:, :2], (0, max(0, 2 - latent)))
    return HeadPatterns(
        names,
        maps,
        inside,
        origin,
        codes,
        points,
        cluster,
        torch.where(seen > 0, total / seen.clamp(min=1), torch.nan),
        representatives,
        counts / counts.sum(-1, keepdim=True),
        explained,
    )


def recentre_maps(attention: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Move each query's map so that the query stands in the middle.

    Args:
        attention: (..., N, N) among the tokens of a grid, without prefix tokens.
        grid: (h, w).

    Returns: maps (..., N, 2 h - 1, 2 w - 1), 0 outside the image, and booleans (N, 2 h - 1, 2 w - 1), what lies inside.

    >>> maps, inside = recentre_maps(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), (1, 2))
    >>> maps[:, 0]
    tensor([[0.0000, 0.9000, 0.1000],
            [0.2000, 0.8000, 0.0000]])
    """
    height, width = grid
    rows, columns = (
        torch.arange(side)[None, :] + side - 1 - torch.arange(side)[:, None] for side in grid
    )  # (query's, key's): where a key lies around a query
    target = rows[:, None, :, None] * (2 * width - 1) + columns[None, :, None, :]
    target = target.reshape(height * width, height * width).to(attention.device)
    size = (2 * height - 1) * (2 * width - 1)
    maps = attention.new_zeros(*attention.shape[:-1], size).scatter(-1, target.expand_as(attention), attention)
    inside = torch.zeros(height * width, size, dtype=torch.bool, device=attention.device).scatter(-1, target, True)
    shape = (2 * height - 1, 2 * width - 1)
    return maps.unflatten(-1, shape), inside.unflatten(-1, shape)


def _draw(
    model: nn.Module,
    images: Tensor,
    pattern: str,
    max_maps: int,
    generator: torch.Generator,
    **reading: object,
) -> tuple[tuple[str, ...], list[int], Tensor, Tensor, Tensor]:
    """Names and numbers of heads of the layers, and maps, what is inside, and where each is from."""
    maps, insides, origins = [], [], []
    chosen: list[AttentionLayer] = []
    done = 0
    for read in read_in_parts(model, images, **reading):  # type: ignore[arg-type]
        chosen = [layer for layer in read if fnmatchcase(layer.name, pattern)]
        _check_grids(chosen, read, pattern)
        for number, layer in enumerate(chosen):
            weights = layer.attention.abs()[:, :, layer.num_prefix :, layer.num_prefix :].float().cpu()
            batch, heads, queries = weights.shape[:3]
            part = batch * heads * queries
            # a layer's maps of these images are drawn by their share in all of its maps
            count = max(1, min(part, round(max_maps / len(chosen) * batch / len(images))))
            picked = torch.randperm(part, generator=generator)[:count]
            centred, inside = recentre_maps(weights, layer.grid)
            image, head, query = torch.unravel_index(picked, (batch, heads, queries))
            maps.append(centred.flatten(0, 2)[picked])
            insides.append(inside[query])
            origins.append(torch.stack([torch.full_like(head, number), head, image + done, query], 1))
        done += len(read[0].attention)
    names = tuple(layer.name for layer in chosen)
    heads_of = [layer.attention.shape[1] for layer in chosen]
    return names, heads_of, torch.cat(maps), torch.cat(insides), torch.cat(origins)


def _check_grids(chosen: list[AttentionLayer], read: tuple[AttentionLayer, ...], pattern: str) -> None:
    if not chosen:
        raise InputError(f"layers is {pattern!r}: choose from {', '.join(layer.name for layer in read)}")
    grids = {layer.grid for layer in chosen}
    if len(grids) > 1:
        listed = ", ".join(f"{layer.name}: {layer.grid}" for layer in chosen)
        raise InputError(f"layers have several grids ({listed}): choose those of one with layers='...'")


class _Autoencoder(nn.Module):
    """Two strided convolutions to a code, and the same back."""

    def __init__(self, size: tuple[int, int], latent: int, width: int = 8) -> None:
        super().__init__()
        self.size, self.small = size, [-(-side // 4) for side in size]
        hidden = 2 * width * self.small[0] * self.small[1]
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(hidden, latent),
        )
        # strided kernels differ by place within a stride, so that a single token can stand out
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden),
            nn.GELU(),
            nn.Unflatten(1, (2 * width, *self.small)),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
        )

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.encoder(maps[:, None])
        return codes, self.decoder(codes)[:, 0, : self.size[0], : self.size[1]]


def _encode(maps: Tensor, inside: Tensor, latent: int, steps: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Codes, and how much of the maps' variance inside the image comes back."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        model = _Autoencoder((maps.shape[1], maps.shape[2]), latent)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            picked = torch.randint(len(maps), (_BATCH,))
            known = inside[picked]
            loss = ((model(maps[picked])[1] - maps[picked]) * known).square().sum() / known.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        codes, back = model(maps)
    if not codes.isfinite().all():
        raise WorkError("the autoencoder's codes are NaN or infinite: look for such values in the attention")
    centre = (maps * inside).sum(0) / inside.sum(0).clamp(min=1)
    lost, whole = (((each - maps) * inside).square().sum() for each in (back, centre))
    return codes, (1 - lost / whole.clamp(min=torch.finfo(whole.dtype).tiny)).item()


def _cluster(codes: Tensor, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cluster of each code, numbered from the largest down, and the code nearest to each centre."""
    from sklearn.cluster import KMeans

    found = KMeans(clusters, n_init=4, random_state=seed).fit(codes.double().numpy())
    labels = torch.from_numpy(found.labels_).long()
    order = labels.bincount(minlength=clusters).argsort(descending=True, stable=True)
    centres = torch.from_numpy(found.cluster_centers_)[order]
    cluster = order.argsort()[labels]
    distances = torch.cdist(centres, codes.double()).masked_fill(cluster != torch.arange(clusters)[:, None], torch.inf)
    return cluster, distances.argmin(1)
