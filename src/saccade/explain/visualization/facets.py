"""Facets of a unit: the kinds of images that it answers to, each with a mean image to start from.

Multifaceted feature visualization (2016, arXiv:1602.03616).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from saccade.errors import InputError
from saccade.explain.classifier import batches, check_images, check_whole, evaluating
from saccade.explain.visualization.unit import read_layer

__all__ = ["Facets", "find_facets"]


class Facets(NamedTuple):
    """Kinds of images, the largest first.

    Attributes:
        starts: (K, C, H, W), mean of each facet's images that are nearest to its centre.
        members: K tensors of image indices, the nearest to the centre first.
        labels: (N,), each image's facet.
    """

    starts: Tensor
    members: list[Tensor]
    labels: Tensor


def find_facets(
    model: nn.Module,
    images: Tensor,
    *,
    layer: str,
    num_facets: int = 10,
    per_facet: int = 15,
    components: int = 50,
    tsne: bool = False,
    batch_size: int = 32,
    seed: int = 0,
) -> Facets:
    """Cluster images that excite a unit by what a layer makes of them: principal components, then k-means.

    Which images is the caller's choice: those of a class, or those with the largest `excitation`.

    Args:
        model: runs in eval mode without gradients, and is left as it was.
        images: (N, C, H, W), at least as many as facets.
        layer: name of the module whose whole output is an image's code; the paper takes the last layer but one.
        num_facets: K.
        per_facet: images that a mean is taken of, at most; a small facet has fewer.
        components: principal components that are kept, at most.
        tsne: cluster in the two dimensions of t-SNE, as published (recalled), not in the components. It wants many
            images and another seed gives others.
        batch_size: the most images in one forward pass.
        seed: of k-means and t-SNE.

    Raises: InputError for wrong arguments, and for a layer that shows no tensor.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    check_images(images)
    sizes = {"num_facets": num_facets, "per_facet": per_facet, "components": components, "batch_size": batch_size}
    for name, value in sizes.items():
        check_whole(name, value)
    if num_facets > len(images):
        raise InputError(
            f"num_facets is {num_facets} of {len(images)} images: give more images, or ask for fewer facets"
        )
    with evaluating(model, grad=False) as classify:
        parts = [read_layer(classify.model, part, layer).flatten(1) for (part,) in batches(batch_size, images)]
    codes = torch.cat(parts).double().cpu().numpy()
    codes = PCA(min(components, *codes.shape), svd_solver="full").fit_transform(codes)
    if tsne:
        perplexity = min(30.0, (len(codes) - 1) / 3)
        codes = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(codes)
    found = KMeans(num_facets, n_init=10, random_state=seed).fit(codes)
    distance = torch.from_numpy(found.transform(codes))  # (N, K)
    order = torch.bincount(torch.from_numpy(found.labels_).long(), minlength=num_facets).argsort(descending=True)
    labels = order.argsort()[torch.from_numpy(found.labels_).long()]
    members = []
    for facet, centre in enumerate(order.tolist()):
        own = (labels == facet).nonzero().flatten()
        members.append(own[distance[own, centre].argsort(stable=True)])
    starts = torch.stack([images[own[:per_facet].to(images.device)].mean(0) for own in members])
    return Facets(starts, members, labels)
