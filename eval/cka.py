"""CKA between features of the full image and of the image with patches dropped (paper, Fig. 1).

For every block and every share of dropped patches (10 … 90 %), linear CKA between the features of
the full images X and of the images with some patches dropped Y:

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),   K = X Xᵀ, L = Y Yᵀ.

The features of an image are (`--pool`)

kept-in-both  the mean of the patch tokens that both encodings have: X leaves out, at every
              block, the tokens of the patches that Y never saw
all-kept      the mean of all patch tokens in X, of those that are left in Y
cls           the cls token

HSIC (`--hsic`) is averaged over minibatches of n images as in Nguyen et al. 2021 (Eq. 3). unbiased
is the estimator of Song et al. 2012: with the diagonals of K and L set to zero,

    HSIC(K, L) = [ tr(K L) + 1ᵀK1 1ᵀL1 / ((n-1)(n-2)) - 2/(n-2) 1ᵀK L 1 ] / (n (n-3));

biased is that of Gretton et al. 2005, tr(K H L H) / (n-1)² with H = 1 - 11ᵀ/n, whose CKA of
features that have nothing in common is above 0, the more the smaller n. The paper says neither how
it pools nor how it estimates, so a result has all of them (`variants`); the two options choose
which one `cka` is. A high CKA at a large share says that the features do not mind the occlusion.

    python eval/cka.py --encoder runs/rmae --val data/shards/val
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.shared.command import run_command
from eval.shared.labels import content_of, with_images
from eval.shared.options import parser, settings_of
from eval.shared.results import Timer, check_other_settings, result_of, write_result
from pipeline.command import early
from pipeline.errors import UserError, check_range

RATIOS = tuple(n / 10 for n in range(1, 10))
POOLS = ("kept-in-both", "all-kept", "cls")
HSIC = ("unbiased", "biased")


@dataclass(frozen=True)
class Settings:
    """What CKA depends on. val: shards; batch_size: n of a minibatch's HSIC; images: at most
    (0 = all)."""

    val: str
    pool: str = "kept-in-both"
    hsic: str = "unbiased"
    mask_ratios: tuple[float, ...] = RATIOS
    batch_size: int = 256
    images: int = 0
    seed: int = 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    result, d = parser(str(__doc__).split("\n", 1)[0]), Settings
    add = result.add_argument
    add("--val", required=True, help="shards with the images to compare")
    add("--pool", choices=POOLS, default=d.pool,
        help="tokens whose CKA is printed; the result has all")  # fmt: skip
    add("--hsic", choices=HSIC, default=d.hsic,
        help="estimator whose CKA is printed; the result has both")  # fmt: skip
    add("--mask-ratios", type=float, nargs="+", default=RATIOS, help="shares of patches dropped")
    add("--batch-size", type=int, default=d.batch_size, help="n of a minibatch's HSIC")
    add("--images", type=int, default=d.images, help="compare at most N; 0 = all")
    return result


def check(s: Settings) -> int:
    """Refuse what cannot be computed; the number of images that are used."""
    samples = with_images(s.val).samples
    images = min(samples, s.images or samples)
    check_range("--batch-size", s.batch_size, at_least=4)  # for the unbiased estimator
    if s.images < 0 or images < s.batch_size:
        which = f"--images {s.images} are" if s.images else f"{s.val} has {samples} images,"
        raise UserError(f"{which} fewer than --batch-size {s.batch_size}")
    if not s.mask_ratios or not all(0 < ratio < 1 for ratio in s.mask_ratios):
        given = " ".join(f"{ratio:g}" for ratio in s.mask_ratios)
        raise UserError(f"--mask-ratios {given}: each must be above 0 and below 1")
    return images // s.batch_size * s.batch_size


def prepare(args: argparse.Namespace) -> tuple[Settings, Path]:
    """The settings and the path of the result. UserError."""
    settings = settings_of(Settings, args)
    name = f"cka-{settings.pool}" + ("" if settings.hsic == "unbiased" else f"-{settings.hsic}")
    output = result_of(args, name, protocol="cka")
    check(settings)
    check_other_settings(output, args)
    return settings, output


if __name__ == "__main__":  # the help, and what is seen to be wrong without torch
    early(build_parser().parse_args, prepare, ranks=True)

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from eval.shared.cli import join_ranks, progress
from eval.shared.features import autocast, to_device
from eval.shared.session import EvalSession, session_of
from pipeline.method.metrics import biased_hsic, gram, hsic, kept_patches
from pipeline.weights.families import block_features, drops_patches

ESTIMATORS = dict(zip(HSIC, (hsic, biased_hsic), strict=True))


def tokens_at(tokens: Tensor, kept: Tensor) -> Tensor:
    """The tokens [b, K, D] at positions int64 [b, K] of patch tokens [b, L, D]."""
    return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))


def pooled(tokens: Tensor, prefix: int, kept: Tensor | None = None) -> Tensor:
    """Mean float32 [b, D] of the patch tokens among [b, prefix + L, D], or of those kept."""
    patches = tokens[:, prefix:].float()
    return (patches if kept is None else tokens_at(patches, kept)).mean(1)


@torch.no_grad()
def features(
    session: EvalSession, pixels: Tensor, masks: Sequence[Tensor]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Pool → (X, Y), float32 [blocks, b, D] each, for every mask (kept positions, int64 [b, K])."""
    vit, prefix = session.vit, session.vit.num_prefix_tokens
    full: list[list[Tensor]] = []  # per block: all patches, cls token, the patches of each mask
    with autocast(session.precision, pixels.device):
        for tokens in block_features(vit, pixels):
            first = [pooled(tokens, prefix), tokens[:, 0].float()]
            full.append(first + [pooled(tokens, prefix, kept) for kept in masks])
        every, cls, *both = (torch.stack(column) for column in zip(*full, strict=True))
        found: dict[str, list[tuple[Tensor, Tensor]]] = {pool: [] for pool in pools_of(vit)}
        for kept, same in zip(masks, both, strict=True):
            part = [(pooled(t, prefix), t[:, 0].float()) for t in block_features(vit, pixels, kept)]
            mean, token = (torch.stack(column) for column in zip(*part, strict=True))
            pairs = {"kept-in-both": (same, mean), "all-kept": (every, mean), "cls": (cls, token)}
            for pool, pair_list in found.items():
                pair_list.append(pairs[pool])
    return found


def batch_hsic(session: EvalSession, pixels: Tensor, sample: Tensor, s: Settings) -> Tensor:
    """HSIC of one minibatch, float64 [pools, estimators, ratios, blocks, 3]: (K, L), (K, K),
    (L, L)."""
    length = session.vit.patch_embed.num_patches
    masks = [
        to_device(kept_patches(sample, length, r, s.seed), pixels.device) for r in s.mask_ratios
    ]
    rows = []
    for pairs in features(session, pixels, masks).values():
        for x, y in pairs:
            k, m = gram(x), gram(y)
            for estimate in ESTIMATORS.values():
                rows.append(torch.stack([estimate(k, m), estimate(k, k), estimate(m, m)], dim=-1))
    shape = (-1, len(s.mask_ratios), len(ESTIMATORS), *rows[0].shape)
    return torch.stack(rows).view(shape).transpose(1, 2)


def pools_of(vit: VisionTransformer) -> list[str]:
    """The ways to pool that an encoder has."""
    return [pool for pool in POOLS if pool != "cls" or vit.cls_token is not None]


def check_encoder(vit: VisionTransformer, arch: str, pool: str) -> None:
    """Refuse an encoder whose patches cannot be left out, or that lacks the cls token."""
    if not drops_patches(vit):
        raise UserError(
            f"{arch} is a {type(vit).__name__}, whose blocks know patches by their position "
            "in a full image: none can be left out"
        )
    if pool == "cls" and vit.cls_token is None:
        raise UserError(f"{arch} has no cls token: take --pool kept-in-both")


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
    steps = images // s.batch_size
    mine = range(ranks.rank, steps, ranks.world)
    loader = session.loader(s.val, s.batch_size)
    pools = pools_of(vit)
    shape = (len(pools), len(ESTIMATORS), len(s.mask_ratios), len(vit.blocks), 3)
    total = torch.zeros(shape, dtype=torch.float64, device=session.device)
    batches = progress(loader, ranks, "CKA", len(mine), s.batch_size)
    for _, batch in zip(mine, batches, strict=False):
        total += batch_hsic(session, session.normalise(batch.image), batch.sample, s)
    total = ranks.sum(total) / steps
    if not bool(total.isfinite().all()):
        raise UserError("the features of the encoder are not finite, so they have no CKA")
    size = total[..., 1].clamp_min(0) * total[..., 2].clamp_min(0)
    # Where the features do not differ between images (an estimate at or below 0) there is none: 0.
    cka = torch.where(size > 0, total[..., 0] / size.sqrt(), 0.0)
    variants = [
        {"pool": pool, "hsic": name, "cka": rounded(cka[p, e])}
        for p, pool in enumerate(pools)
        for e, name in enumerate(ESTIMATORS)
    ]
    chosen = next(v for v in variants if (v["pool"], v["hsic"]) == (s.pool, s.hsic))
    return {
        "protocol": "cka",
        **chosen,
        "ratios": list(s.mask_ratios),
        "images": images,
        "variants": variants,
        "settings": {
            "batch_size": s.batch_size,
            "estimator": f"{s.hsic} minibatch HSIC, linear kernel",
            "seed": s.seed,
            "val": s.val,
        },
        "content": content_of(s),
        **session.facts(timer),
    }


def rounded(cka: Tensor) -> list[list[float]]:
    """[ratios, blocks] as a result has it."""
    return [[round(value, 5) for value in row] for row in cka.tolist()]


def main() -> None:
    args = build_parser().parse_args()
    ranks = join_ranks()
    settings, output = ranks.agree(lambda: prepare(args))
    result = evaluate(settings, session_of(args, ranks))
    if ranks.first:
        write_result(output, result, args)
        last = ", ".join(
            f"{ratio:.0%} {row[-1]:.3f}"
            for ratio, row in zip(result["ratios"], result["cka"], strict=True)
        )
        print(f"CKA of the last block by share dropped: {last}  → {output}", flush=True)


if __name__ == "__main__":
    run_command(main)
