"""CKA between features of the full image and of the image with patches dropped (paper, Fig. 1).

For every block and every share of dropped patches (10 … 90 %), linear CKA between the features of
the full images X and of the images with some patches dropped Y:

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),   K = X Xᵀ, L = Y Yᵀ.

HSIC is the unbiased estimator of Song et al. 2012, averaged over minibatches of n images as in
Nguyen et al. 2021 (Eq. 3): with the diagonals of K and L set to zero,

    HSIC(K, L) = [ tr(K L) + 1ᵀK1 1ᵀL1 / ((n-1)(n-2)) - 2/(n-2) 1ᵀK L 1 ] / (n (n-3)).

`--pool mean_patch`: the mean of the patch tokens that both encodings have; `--pool cls`: the cls
token. A high CKA at a large share says that the features do not mind the occlusion.

    python eval/cka.py --encoder runs/rmae --val data/shards/val
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from eval.shared.cli import join_ranks, parser, progress, run_command, settings_of
from eval.shared.features import autocast
from eval.shared.labels import with_images
from eval.shared.results import Timer, check_output, output_path, write_result
from eval.shared.session import EvalSession, encoder_of, session_of
from pipeline.errors import UserError
from pipeline.method.metrics import gram, hsic, kept_patches

RATIOS = tuple(n / 10 for n in range(1, 10))
POOLS = ("mean_patch", "cls")


@dataclass(frozen=True)
class Settings:
    """What CKA depends on. val: shards; batch_size: n of a minibatch's HSIC; images: at most
    (0 = all)."""

    val: str
    pool: str = "mean_patch"
    mask_ratios: tuple[float, ...] = RATIOS
    batch_size: int = 256
    images: int = 0
    seed: int = 0


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
def batch_hsic(session: EvalSession, pixels: Tensor, sample: Tensor, s: Settings) -> Tensor:
    """HSIC of one minibatch, float64 [ratios, blocks, 3]: (K, L), (K, K), (L, L)."""
    vit = session.vit
    prefix, length = vit.num_prefix_tokens, vit.patch_embed.num_patches
    with autocast(session.precision, pixels.device):
        full = gram(pooled(block_features(vit, pixels, None), prefix, s.pool))
    own = hsic(full, full)
    result = []
    for ratio in s.mask_ratios:
        kept = kept_patches(sample, length, ratio, s.seed).to(pixels.device)
        with autocast(session.precision, pixels.device):
            part = gram(pooled(block_features(vit, pixels, kept), prefix, s.pool))
        result.append(torch.stack([hsic(full, part), own, hsic(part, part)], dim=-1))
    return torch.stack(result)


def check_encoder(vit: VisionTransformer, arch: str, pool: str) -> None:
    """Refuse an encoder whose patches cannot be left out, or that lacks the cls token."""
    if not isinstance(vit, VisionTransformer):
        raise UserError(
            f"{arch} is a {type(vit).__name__}, whose blocks know patches by their position "
            "in a full image: none can be left out"
        )
    if pool == "cls" and not vit.has_class_token:
        raise UserError(f"{arch} has no cls token: take --pool mean_patch")


def check(s: Settings) -> int:
    """Refuse what cannot be computed; the number of images that are used."""
    samples = with_images(s.val).samples
    images = min(samples, s.images or samples)
    if s.batch_size < 4:
        raise UserError("--batch-size: the unbiased estimator needs at least 4 images")
    if s.images < 0 or images < s.batch_size:
        which = f"--images {s.images}: are" if s.images else f"{s.val} has {samples} images,"
        raise UserError(f"{which} fewer than --batch-size {s.batch_size}")
    if not s.mask_ratios or not all(0 < ratio < 1 for ratio in s.mask_ratios):
        raise UserError("--mask-ratios: each must lie between 0 and 1")
    return images // s.batch_size * s.batch_size


def evaluate(s: Settings, session: EvalSession) -> dict[str, Any]:
    """CKA for every ratio and block; the full result, alike on every rank.

    Minibatches are fixed by the order of the images and each is one rank's, so the result does
    not depend on the number of ranks.
    """
    timer, images = Timer(), check(s)
    vit, ranks = session.vit, session.ranks
    check_encoder(vit, session.info.arch, s.pool)
    length = vit.patch_embed.num_patches
    if round(length * max(s.mask_ratios)) >= length:
        raise UserError(f"--mask-ratios {max(s.mask_ratios)}: leaves none of {length} patches")
    total = torch.zeros(len(s.mask_ratios), len(vit.blocks), 3, dtype=torch.float64)
    total = total.to(session.device)
    steps = images // s.batch_size
    mine = range(ranks.rank, steps, ranks.world)
    loader = session.loader(s.val, s.batch_size)
    for _, batch in zip(mine, progress(loader, ranks, "CKA", len(mine)), strict=False):
        total += batch_hsic(session, session.normalise(batch.image), batch.sample, s)
    total = ranks.sum(total) / steps
    if not bool(total.isfinite().all()):
        raise UserError("the features of the encoder are not finite, so they have no CKA")
    cka = total[..., 0] / (total[..., 1].clamp_min(0) * total[..., 2].clamp_min(0)).sqrt()
    return {
        "protocol": "cka",
        "pool": s.pool,
        "ratios": list(s.mask_ratios),
        "cka": [[round(value, 5) for value in row] for row in cka.tolist()],
        "images": images,
        "settings": {
            "batch_size": s.batch_size,
            "estimator": "unbiased minibatch HSIC, linear kernel",
            "seed": s.seed,
            "val": s.val,
        },
        **session.facts(timer),
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    result, d = parser(str(__doc__).split("\n", 1)[0]), Settings
    add = result.add_argument
    add("--val", required=True, help="shards with the images to compare")
    add("--pool", choices=POOLS, default=d.pool)
    add("--mask-ratios", type=float, nargs="+", default=RATIOS, help="shares dropped")
    add("--batch-size", type=int, default=d.batch_size, help="n of a minibatch's HSIC")
    add("--images", type=int, default=d.images, help="at most N; 0 = all")
    return result


def main() -> None:
    args = build_parser().parse_args()
    ranks, settings = join_ranks(), settings_of(Settings, args)
    output = output_path(args.output, encoder_of(args), f"cka-{settings.pool}")
    check_output(output, ranks)
    result = evaluate(settings, session_of(args, ranks))
    if ranks.first:
        write_result(output, result)
        last = ", ".join(
            f"{ratio:.0%} {row[-1]:.3f}"
            for ratio, row in zip(result["ratios"], result["cka"], strict=True)
        )
        print(f"CKA of the last block by share dropped: {last}  → {output}", flush=True)


if __name__ == "__main__":
    run_command(main)
