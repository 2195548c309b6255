"""The smallest objectives that still have every part, and images for them."""

import torch

from pipeline.config.recipe import RECIPES, Recipe, load_recipe

HEADS, DECODER_HEADS, PATCH = 2, 2, 4
METHODS = ("mae", "rmae", "rmae_dagger", "rmae_ddagger", "cmae")
SIZE = [
    "encoder.arch=vit_tiny_patch16_224",
    "encoder.image_size=16",
    "encoder.options={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}",
    "batch_size=8",
    "data.partitions=4",
    "data.workers=0",
]
DECODER = ["measure.decoder={width: 8, depth: 1, heads: 2}"]
PROJECTORS = ["measure.heads={hidden: 24, out: 12}"]


def tiny_overrides(name: str) -> list[str]:
    return SIZE + (PROJECTORS if "cmae" in name or "mocov3" in name else DECODER)


def tiny_recipe(name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", [*tiny_overrides(name), *overrides])


def images(batch: int = 3, size: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)
