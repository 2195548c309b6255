"""Counting hits, and accuracies as they are written."""

import torch
from torch import Tensor


def count_correct(logits: Tensor, label: Tensor) -> Tensor:
    """Hits of logits [..., b, C] for labels [b]: int64 [..., 3] = top-1, top-5, images."""
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    hit = best == label[:, None]
    images = torch.full(hit.shape[:-2], len(label), device=logits.device)
    return torch.stack([hit[..., :1].sum((-1, -2)), hit.sum((-1, -2)), images], dim=-1)


def as_percent(count: float, images: float) -> float:
    """Accuracy in percent, to a thousandth."""
    return round(100.0 * float(count) / float(images), 3)


def accuracy(count: Tensor) -> dict[str, float]:
    """top1, top5 (percent) and images of a count [3] over all ranks, as a result has them."""
    top1, top5, images = count.tolist()
    return {"top1": as_percent(top1, images), "top5": as_percent(top5, images), "images": images}
