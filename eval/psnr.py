"""PSNR from the masked image to the full one (paper, Tab. 1).

    PSNR = 10 log10(1 / mean squared error),  pixels in [0, 1], predictions clipped to it.

`image` (the main metric) is of the prediction in hidden patches with the original in visible ones,
`hidden` of the hidden patches alone; both are the mean over images of each image's PSNR. Where
the recipe predicts patch-normalised pixels (norm_pix), each patch gets its true mean and deviation
back, and the result says so. The mask of an image is drawn by --seed and the image's number: the
same for every model.

    python eval/psnr.py --encoder runs/rmae --val data/shards/val
    python eval/psnr.py --encoder mae_visualize_vit_base.pth --recipe pipeline/recipes/mae.yaml \\
        --val data/shards/val --output psnr.json
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.shared.command import run_command
from eval.shared.labels import content_of, with_images
from eval.shared.options import (
    EncoderChoice,
    add_model,
    add_workers,
    base_parser,
    check_model,
    check_ratio,
    settings_of,
)
from eval.shared.results import Timer, check_other_settings, check_output, output_path, write_result
from pipeline.command import early
from pipeline.errors import UserError, check_range


@dataclass(frozen=True)
class Settings:
    """What PSNR depends on. encoder: a run, or a FILE, which needs the recipe (and overrides) that
    it fits; val: shards; mask_ratio: share of hidden patches, None for the recipe's; resize: pixels
    of the shorter side before the centre crop, 0 for those of `shorter_side`."""

    encoder: str
    val: str
    recipe: str = ""
    overrides: tuple[str, ...] = ()
    mask_ratio: float | None = None
    seed: int = 0
    micro_batch: int = 64
    resize: int = 0
    workers: int = 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    result = base_parser(str(__doc__).split("\n", 1)[0])
    add_workers(result)
    add_model(result)
    result.add_argument("--val", required=True, help="shards with the images")
    result.add_argument("--micro-batch", type=int, default=64, help="images per forward pass")
    result.add_argument(
        "--resize", type=int, default=0,
        help="pixels of the shorter side before the centre crop (0: as in the other evaluations)",
    )  # fmt: skip
    result.add_argument(
        "--output",
        help="result file (default: RUN/eval/psnr.json; --mask-ratio and --resize are in its name)",
    )
    return result


def check(s: Settings) -> None:
    """Refuse what cannot be computed."""
    with_images(s.val)
    check_range("--micro-batch", s.micro_batch, at_least=1)


def prepare(args: argparse.Namespace) -> tuple[Settings, Path]:
    """The settings and the path of the result. UserError."""
    settings = settings_of(Settings, args)
    name = "psnr" if args.mask_ratio is None else f"psnr-mask{args.mask_ratio:g}"
    output = output_path(args.output, EncoderChoice(args.encoder, resize=args.resize), name)
    check_output(output, protocol="psnr")
    args.mask_ratio = check_model(
        args.encoder, args.recipe, args.overrides, args.mask_ratio, args.resize
    )
    check(settings)
    check_other_settings(output, args)
    return settings, output


if __name__ == "__main__":  # the help, and what is seen to be wrong without torch
    early(build_parser().parse_args, prepare, ranks=True)

import torch
from torch import Tensor

from eval.shared.cli import join_ranks, progress
from pipeline.data.loader import eval_loader
from pipeline.distributed import Ranks
from pipeline.weights.reconstructor import Reconstructor, load_reconstructor

TRUE_STATISTICS = "true mean and deviation of each patch given back (norm_pix)"
SMALLEST = 1e-10  # mean squared error of what counts as perfect: 100 dB


def squared_errors(
    image: Tensor, prediction: Tensor, inverse: Tensor, visible: int, patch: int
) -> Tensor:
    """Mean squared errors float64 [b, 2] of each image: over hidden patches, over the image.

    image: uint8 [b, H, W, 3]; prediction: float [b, H, W, 3], pixels 0 … 1; inverse: int32 [b, L],
    below `visible` where a patch is visible. Visible patches are the original: no error.
    """
    rows, columns = (side // patch for side in image.shape[1:3])
    hidden = (inverse >= visible).view(-1, rows, columns)
    hidden = hidden.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    error = (prediction.double().clamp(0, 1) - image.double() / 255).square().mean(-1)
    total = (error * hidden).sum((1, 2))
    counts = hidden.sum((1, 2)), torch.full_like(total, hidden[0].numel())
    return torch.stack([total / count for count in counts], dim=1)


def decibel(error: Tensor) -> Tensor:
    """PSNR of mean squared errors of pixels in [0, 1]."""
    return -10 * error.clamp_min(SMALLEST).log10()


def mask_ratio_of(model: Reconstructor, wanted: float | None) -> float:
    """The share of hidden patches: `wanted`, or the recipe's. UserError where it leaves none
    hidden or none visible."""
    ratio = model.recipe.views.mask_ratio if wanted is None else wanted
    return check_ratio(ratio, model.grid[0] * model.grid[1])


def measure(
    model: Reconstructor, ranks: Ranks, s: Settings, mask_ratio: float
) -> tuple[list[float], int]:
    """(hidden, image) in dB and the number of images, each counted once over all ranks."""
    loader = eval_loader(
        s.val,
        batch_size=s.micro_batch,
        rank=ranks.rank,
        world=ranks.world,
        image_size=model.size,
        workers=s.workers,
        resize=s.resize or None,
        interleave=True,
        pin_memory=ranks.pins_memory,
    )
    total = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    for batch in progress(loader, ranks, "PSNR", images=s.micro_batch):
        image, sample = (
            part.to(ranks.device, non_blocking=True) for part in (batch.image, batch.sample)
        )
        visible, inverse = model.mask(sample, mask_ratio, s.seed)
        prediction = model.predict(image, visible, inverse)
        error = squared_errors(image, prediction, inverse, visible.shape[1], model.patch)
        total[:2] += decibel(error).sum(0)
        total[2] += len(image)
    total = ranks.sum(total)
    if not bool(total.isfinite().all()):
        raise UserError(f"{s.encoder}: its predictions are not finite, so they have no PSNR")
    hidden, full, images = total.tolist()
    return [hidden / images, full / images], int(images)


def evaluate(s: Settings, ranks: Ranks) -> dict[str, Any]:
    """PSNR of a run's reconstructions; the full result, alike on every rank."""
    timer = Timer()
    check(s)
    model = load_reconstructor(s.encoder, s.recipe, s.overrides).to(ranks.device)
    mask_ratio = mask_ratio_of(model, s.mask_ratio)
    (hidden, full), images = measure(model, ranks, s, mask_ratio)
    statistics = TRUE_STATISTICS if model.true_statistics else "pixels are predicted as they are"
    return {
        "protocol": "psnr",
        "image": round(full, 4),
        "hidden": round(hidden, 4),
        "images": images,
        "statistics": statistics,
        "settings": {"mask_ratio": mask_ratio, "seed": s.seed, "val": s.val}
        | ({"resize": s.resize} if s.resize else {})
        | ({"recipe": s.recipe, "overrides": list(s.overrides)} if s.recipe else {}),
        "content": content_of(s),
        "encoder": {**model.info, "random": False, "source": s.encoder},
        "seconds": timer.seconds,
        "ranks": ranks.world,
    }


def main() -> None:
    args = build_parser().parse_args()
    ranks = join_ranks()
    settings, output = ranks.agree(lambda: prepare(args))
    result = evaluate(settings, ranks)
    if ranks.first:
        write_result(output, result, args)
        metrics = f"{result['image']:.2f} dB (masked patches alone {result['hidden']:.2f} dB)"
        print(f"PSNR {metrics}; {result['statistics']}  → {output}", flush=True)


if __name__ == "__main__":
    run_command(main)
