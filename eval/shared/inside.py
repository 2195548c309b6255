"""What an encoder's patches look like from inside: principal components, attention, similarity.

Shapes: n images, L = h · w patches, D width, H heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.errors import UserError

BINS = 256  # of the histogram that the foreground's threshold is read from


def otsu(values: Tensor) -> float:
    """The threshold that splits values [N] into two groups of largest variance between them.

    Source: Otsu 1979.
    """
    low, high = values.min().item(), values.max().item()
    if low == high:
        return low
    counts = torch.histc(values.double().cpu(), BINS, low, high)
    centres = low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * (high - low) / BINS
    below = counts.cumsum(0)
    total, weighted = below[-1], (counts * centres).cumsum(0)
    above = total - below
    between = (weighted[-1] * below - weighted * total) ** 2 / (below * above).clamp_min(1)
    equal = (between[:-1] >= between[:-1].max() * (1 - 1e-9)).nonzero()  # all of an empty gap
    return low + (equal.double().mean().item() + 1) * (high - low) / BINS


def components(x: Tensor, count: int) -> Tensor:
    """Scores [N, count] of rows x [N, D] on their first principal components.

    The sign of a component, which is arbitrary, makes the score farthest from zero positive.
    """
    x = (x - x.mean(0)).double()
    _, _, axes = torch.linalg.svd(x, full_matrices=False)
    scores = x @ axes[:count].T
    scores = scores * scores.gather(0, scores.abs().argmax(0, keepdim=True)).sign()
    return F.pad(scores, (0, count - scores.shape[1])).float()


def foreground(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which patches of tokens [n, L, D] show an object, bool [n, L].

    As in DINOv2's pictures by a threshold of the first principal component; here Otsu's, and for
    each image by itself, since any set of images is shown. The side that has the smaller share of
    the image's border is the object.
    """
    edge = torch.zeros(grid, dtype=torch.bool)
    edge[[0, -1]] = edge[:, [0, -1]] = True
    edge = edge.flatten().to(tokens.device)
    masks = []
    for image in tokens:
        first = components(image, 1)[:, 0]
        mask = first > otsu(first)
        on_edge, inside = mask[edge].float().mean(), mask[~edge].float().mean()
        masks.append(~mask if on_edge > inside else mask)
    return torch.stack(masks)


def pca_colours(tokens: Tensor, grid: tuple[int, int], mask: Tensor) -> Tensor:
    """The first three principal components of the patches in `mask` (bool [n, L]) as red, green
    and blue, the others black: uint8 [n, h, w, 3] of tokens [n, L, D]. One basis for all images."""
    n, _, width = tokens.shape
    mask = mask.flatten()
    colours = torch.zeros(len(mask), 3, device=tokens.device)
    if mask.any():
        scores = components(tokens.reshape(-1, width)[mask], 3)
        low, high = scores.quantile(0.02, 0), scores.quantile(0.98, 0)
        shares = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        colours[mask] = 0.1 + 0.9 * shares  # never as black as the background
    return (colours.view(n, *grid, 3) * 255).round().to(torch.uint8).cpu()


def cosine_map(tokens: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Cosine similarity of each patch of tokens [n, L, D] with the one at (row, column): float32
    [n, h, w]."""
    tokens = F.normalize(tokens, dim=-1)
    chosen = tokens[:, patch[0] * grid[1] + patch[1]]
    return torch.einsum("nld,nd->nl", tokens, chosen).view(len(tokens), *grid).cpu()


@torch.no_grad()
def last_attention(vit: VisionTransformer, pixels: Tensor) -> tuple[Tensor, bool]:
    """Where the last block looks: float32 [n, H, L], and whether it is the cls token that looks.

    The attention of the cls token to each patch, after softmax; of an encoder without one, the
    mean over its patches. Attention is computed unfused for this pass, in fp32. A block can have
    several attentions, whose heads then follow one another.
    """
    attentions: list[Any] = [m for m in vit.blocks[-1].modules() if hasattr(m, "attn_drop")]
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs[0])

    fused = [getattr(attention, "fused_attn", False) for attention in attentions]
    hooks = [attention.attn_drop.register_forward_pre_hook(keep) for attention in attentions]
    for attention in attentions:
        attention.fused_attn = False
    try:
        vit.forward_features(pixels)
    finally:
        for attention, hook, before in zip(attentions, hooks, fused, strict=True):
            hook.remove()
            attention.fused_attn = before
    prefix, size = vit.num_prefix_tokens, kept[0].shape[-1]
    if size != prefix + vit.patch_embed.num_patches:
        raise UserError("the last block of this encoder attends within windows; no map to show")
    # SAM's heads are in its batch.
    weights = torch.cat([k.float().view(len(pixels), -1, size, size) for k in kept], dim=1)
    has_cls = getattr(vit, "cls_token", None) is not None
    if has_cls:
        return weights[:, :, 0, prefix:].cpu(), True
    return weights[:, :, prefix:, prefix:].mean(2).cpu(), False
