"""From pixels to the features of a frozen encoder."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pipeline.distributed import bf16_units
from pipeline.errors import UserError


def used_precision(precision: str, device: torch.device) -> str:
    """What --precision means on a device: `auto` is bf16 on a GPU with bf16 units, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and bf16_units() else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 autocast where `used_precision` is that; a context that does nothing elsewhere."""
    enabled = used_precision(precision, device) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def normalise(
    image: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> Tensor:
    """uint8 [b, H, W, 3] → float32 [b, 3, H, W] on the device, (x / 255 - mean) / std."""
    centre, scale = (_channels(tuple(values), device) for values in (mean, std))
    pixels = image.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
    return (pixels - centre) / scale


@lru_cache(maxsize=16)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A number per channel, [1, 3, 1, 1]; kept, since each copy to a GPU makes the host wait."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(1, 3, 1, 1)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, by a copy that the host does not wait for."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def pool(tokens: Tensor, prefix: int, feature: str) -> Tensor:
    """Tokens after the last norm [b, prefix + L, D] → [b, D]: cls token, or mean of patches."""
    return tokens[:, 0] if feature == "cls" else tokens[:, prefix:].mean(dim=1)


@torch.no_grad()
def last_tokens(vit: VisionTransformer, pixels: Tensor, precision: str) -> Tensor:
    """Tokens after the last norm, float32 [b, prefix + L, D], of pixels [b, 3, H, W]."""
    with autocast(precision, pixels.device):
        tokens = vit.forward_features(pixels)
    return tokens.float()


@torch.no_grad()
def image_features(vit: VisionTransformer, pixels: Tensor, feature: str, precision: str) -> Tensor:
    """Features float32 [b, D] of normalised pixels [b, 3, H, W], see FEATURES; where the encoder
    was trained to normalise the mean of its patches (fc_norm), they are normalised."""
    return feature_of(vit, last_tokens(vit, pixels, precision), feature)


def feature_of(vit: VisionTransformer, tokens: Tensor, feature: str) -> Tensor:
    """A feature [b, D] of the tokens after the last norm [b, prefix + L, D]."""
    if feature == "own":
        return vit.forward_head(tokens, pre_logits=True)
    return vit.fc_norm(pool(tokens, vit.num_prefix_tokens, feature))


def image_size(vit: VisionTransformer) -> int:
    """Side of the (square) images that the encoder takes, in pixels."""
    height, width = vit.patch_embed.img_size
    if height != width:
        raise UserError(f"the encoder takes {height} by {width} images; square ones are needed")
    return height
