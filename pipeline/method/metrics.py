"""How alike features are: linear CKA with the unbiased HSIC, and a k-NN vote.

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),   K = X Xᵀ, L = Y Yᵀ.

HSIC is the unbiased estimator of Song et al. 2012: with the diagonals of K and L set to zero,

    HSIC(K, L) = [ tr(K L) + 1ᵀK1 1ᵀL1 / ((n-1)(n-2)) - 2/(n-2) 1ᵀK L 1 ] / (n (n-3)).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels import philox
from pipeline.kernels.streams import Stream


def hsic(first: Tensor, second: Tensor) -> Tensor:
    """Unbiased HSIC of Gram matrices [..., n, n] (float64): [...]. n must be at least 4."""
    n = first.shape[-1]
    diagonal = torch.eye(n, dtype=torch.bool, device=first.device)
    k, m = first.masked_fill(diagonal, 0), second.masked_fill(diagonal, 0)
    rows_k, rows_m = k.sum(-1), m.sum(-1)
    trace = (k * m).sum((-1, -2))  # both are symmetric
    product = rows_k.sum(-1) * rows_m.sum(-1) / ((n - 1) * (n - 2))
    mixed = 2 / (n - 2) * (rows_k * rows_m).sum(-1)
    return (trace + product - mixed) / (n * (n - 3))


def biased_hsic(first: Tensor, second: Tensor) -> Tensor:
    """Biased HSIC of Gram matrices [..., n, n] (float64): [...] (Gretton et al. 2005).

    tr(K H L H) / (n-1)², where H takes out the mean over the n images.
    """
    k, m = (
        x - x.mean(-1, keepdim=True) - x.mean(-2, keepdim=True) + x.mean((-1, -2), keepdim=True)
        for x in (first, second)
    )
    return (k * m).sum((-1, -2)) / (first.shape[-1] - 1) ** 2


def gram(feature: Tensor) -> Tensor:
    """Linear kernel [..., n, n] of features [..., n, D], in float64.

    The features are centred first: HSIC does not depend on their mean, but small numbers keep
    its differences exact.
    """
    feature = feature.double() - feature.double().mean(-2, keepdim=True)
    return feature @ feature.transpose(-1, -2)


def cka(first: Tensor, second: Tensor) -> Tensor:
    """Linear CKA of two sets of features [n, D] of the same n images, a float64 scalar."""
    k, m = gram(first), gram(second)
    size = (hsic(k, k).clamp_min(0) * hsic(m, m).clamp_min(0)).sqrt()
    return hsic(k, m) / size


def kept_patches(sample: Tensor, length: int, ratio: float, seed: int) -> Tensor:
    """Positions int64 [b, K] that stay, in order; K = length - round(length · ratio).

    Drawn by sample number and seed alone: the same at any rank count and in any batch.
    """
    noise = philox.uniform(sample, seed=seed, epoch=0, stream=Stream.OCCLUSION, count=length)
    keep = length - round(length * ratio)
    return noise.argsort(dim=1)[:, :keep].sort(dim=1).values


def vote(
    query: Tensor, feature: Tensor, label: Tensor, classes: int, *, k: int, temperature: float
) -> Tensor:
    """Votes float32 [b, classes] for queries [b, D] from training features [N, D], labels [N].

    Both are normalised here; images count by exp(cosine / temperature) if among the k nearest
    (Wu et al. 2018, Sect. 3.4), relative to the nearest, which has 1.
    """
    similarity = F.normalize(query, dim=1) @ F.normalize(feature, dim=1).T
    nearest, place = similarity.topk(k, dim=1)
    weight = ((nearest - nearest[:, :1]) / temperature).exp()  # at any temperature one is not 0
    votes = weight.new_zeros(len(query), classes)
    return votes.scatter_add_(1, label[place], weight)
