"""CKA between features of the whole image and of the image with patches dropped (paper, Fig. 1).

For every block and every share of dropped patches (10 … 90 %), linear CKA between the features of
the whole images X and of the images with some patches dropped Y:

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),   K = X Xᵀ, L = Y Yᵀ.

HSIC is the unbiased estimator of Song et al. 2012, averaged over minibatches of n images as in
Nguyen et al. 2021 (Eq. 3): with the diagonals of K and L set to zero,

    HSIC(K, L) = [ tr(K L) + 1ᵀK1 1ᵀL1 / ((n-1)(n-2)) - 2/(n-2) 1ᵀK L 1 ] / (n (n-3)).

`--pool mean_patch`: the mean of the patch tokens that both encodings have; `--pool cls`: the class
token. A high CKA at a large share says that the features do not mind the occlusion.

    python eval/cka.py --encoder runs/rmae --val data/shards/val
"""

import argparse
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from eval.shared.cli import (
    autocast,
    join_ranks,
    output_path,
    parser,
    progress,
    run_command,
    seed_everything,
    used_precision,
    write_result,
)
from eval.shared.features import Timer, image_size, normalise, open_encoder
from pipeline.data.loader import eval_loader
from pipeline.distributed import Ranks
from pipeline.errors import UserError
from pipeline.method.metrics import gram, hsic, kept_patches
from shard_tools.manifest import read_manifest

RATIOS = tuple(n / 10 for n in range(1, 10))
POOLS = ("mean_patch", "cls")


def block_features(vit: VisionTransformer, pixels: Tensor, kept: Tensor | None) -> list[Tensor]:
    """Tokens [b, prefix + K, D] after every block; patches not kept are dropped before the first.

    kept: int64 [b, K] or None for all.
    """
    tokens = vit._pos_embed(vit.patch_embed(pixels))
    if kept is not None:
        prefix = vit.num_prefix_tokens
        index = (kept + prefix)[..., None].expand(-1, -1, tokens.shape[-1])
        tokens = torch.cat([tokens[:, :prefix], tokens.gather(1, index)], dim=1)
    tokens = vit.norm_pre(tokens)
    outputs = []
    for block in vit.blocks:
        tokens = block(tokens)
        outputs.append(tokens)
    return outputs


def pooled(tokens: list[Tensor], prefix: int, pool: str) -> Tensor:
    """Features [blocks, b, D] of a list of tokens [b, prefix + K, D], one per block."""
    if pool == "cls":
        return torch.stack([t[:, 0] for t in tokens]).float()
    return torch.stack([t[:, prefix:].mean(1) for t in tokens]).float()


@torch.no_grad()
def batch_hsic(
    vit: VisionTransformer, pixels: Tensor, sample: Tensor, args: argparse.Namespace
) -> Tensor:
    """HSIC of one minibatch, float64 [ratios, blocks, 3]: (K, L), (K, K), (L, L)."""
    prefix, length = vit.num_prefix_tokens, vit.patch_embed.num_patches
    with autocast(args.precision, pixels.device):
        whole = gram(pooled(block_features(vit, pixels, None), prefix, args.pool))
    own = hsic(whole, whole)
    result = []
    for ratio in args.mask_ratios:
        kept = kept_patches(sample, length, ratio, args.seed).to(pixels.device)
        with autocast(args.precision, pixels.device):
            part = gram(pooled(block_features(vit, pixels, kept), prefix, args.pool))
        result.append(torch.stack([hsic(whole, part), own, hsic(part, part)], dim=-1))
    return torch.stack(result)


def check_encoder(vit: VisionTransformer, arch: str, pool: str) -> None:
    """Refuse an encoder whose patches cannot be left out, or that lacks the class token."""
    if not isinstance(vit, VisionTransformer):
        raise UserError(
            f"{arch} is a {type(vit).__name__}, whose blocks know patches by their place in a "
            "whole image: none can be left out"
        )
    if pool == "cls" and not vit.has_class_token:
        raise UserError(f"{arch} has no class token: take --pool mean_patch")


def check(args: argparse.Namespace) -> int:
    """Refuse what cannot be computed; the number of images that are used."""
    images = read_manifest(args.val).samples
    if args.batch_size < 4:
        raise UserError("--batch-size: the unbiased estimator needs at least 4 images")
    if images < args.batch_size:
        raise UserError(f"{args.val} has {images} images, fewer than --batch-size")
    if not args.mask_ratios or not all(0 < ratio < 1 for ratio in args.mask_ratios):
        raise UserError("--mask-ratios: each must lie between 0 and 1")
    return min(images, args.images or images) // args.batch_size * args.batch_size


def evaluate(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """CKA for every ratio and block; the whole result, alike on every rank.

    Minibatches are fixed by the order of the images, and shared among the ranks as a whole, so
    the result does not depend on their number.
    """
    timer = Timer()
    images = check(args)
    seed_everything(args.seed)
    vit, info = open_encoder(args, ranks)
    check_encoder(vit, info["arch"], args.pool)
    loader = eval_loader(
        args.val,
        batch_size=args.batch_size,
        rank=ranks.rank,
        world=ranks.world,
        image_size=image_size(vit),
        workers=args.workers,
        interleave=True,
    )
    total = torch.zeros(len(args.mask_ratios), len(vit.blocks), 3, dtype=torch.float64)
    total = total.to(ranks.device)
    steps = images // args.batch_size
    mine = range(ranks.rank, steps, ranks.world)
    for _, batch in zip(mine, progress(loader, ranks, "CKA", len(mine)), strict=False):
        total += batch_hsic(vit, normalise(batch.image, info, ranks.device), batch.sample, args)
    total = ranks.sum(total) / steps
    cka = total[..., 0] / (total[..., 1].clamp_min(0) * total[..., 2].clamp_min(0)).sqrt()
    return {
        "protocol": "cka",
        "pool": args.pool,
        "ratios": list(args.mask_ratios),
        "cka": [[round(value, 5) for value in row] for row in cka.tolist()],
        "images": images,
        "settings": {
            "batch_size": args.batch_size,
            "estimator": "unbiased minibatch HSIC, linear kernel",
            "seed": args.seed,
            "val": args.val,
        },
        "precision": used_precision(args.precision, ranks.device),
        "encoder": info,
        "seconds": timer.seconds,
        "ranks": ranks.world,
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(str(__doc__).split("\n", 1)[0])
    result.add_argument("--val", required=True, help="shards with the images to compare")
    result.add_argument("--pool", choices=POOLS, default="mean_patch")
    result.add_argument(
        "--mask-ratios", type=float, nargs="+", default=RATIOS, help="shares dropped"
    )
    result.add_argument("--batch-size", type=int, default=256, help="n of a minibatch's HSIC")
    result.add_argument("--images", type=int, default=0, help="at most so many; 0 = all")
    return result


def main() -> None:
    args = build_parser().parse_args()
    ranks = join_ranks()
    result = evaluate(args, ranks)
    output = output_path(args, f"cka-{args.pool}")
    if ranks.first:
        write_result(output, result)
        last = ", ".join(
            f"{ratio:.0%} {row[-1]:.3f}"
            for ratio, row in zip(result["ratios"], result["cka"], strict=True)
        )
        print(f"CKA of the last block by share dropped: {last}  → {output}", flush=True)


if __name__ == "__main__":
    run_command(main)
