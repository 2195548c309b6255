"""PSNR from the masked image to the whole one (paper, Tab. 1).

    PSNR = 10 log10(1 / mean squared error),  pixels in [0, 1], predictions clipped to it.

`image` (the main figure) is of the prediction in hidden patches with the original in visible ones,
`hidden` of the hidden patches alone; both are the mean over images of each image's PSNR. Where
the recipe predicts patch-normalised pixels (norm_pix), each patch gets its true mean and deviation
back, and the result says so. The mask of an image is drawn by --seed and the image's number: the
same for every model.

    python eval/psnr.py --encoder runs/rmae --val data/shards/val
    python eval/psnr.py --encoder mae_visualize_vit_base.pth --recipe pipeline/recipes/mae.yaml \\
        --val data/shards/val --output psnr.json
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from eval.shared.cli import (
    World,
    base_parser,
    join_world,
    output_path,
    progress,
    run_command,
    write_result,
)
from eval.shared.features import Timer
from pipeline.data.loader import eval_loader
from pipeline.errors import UserError
from pipeline.method.reconstructor import Reconstructor, load_reconstructor

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


def measure(
    model: Reconstructor, world: World, args: argparse.Namespace
) -> tuple[list[float], int]:
    """(hidden, image) in dB and the number of images, each counted once over all ranks."""
    loader = eval_loader(
        args.val,
        batch_size=args.micro_batch,
        rank=world.rank,
        world=world.size,
        image_size=model.size,
        workers=args.workers,
        interleave=True,
    )
    total = torch.zeros(3, dtype=torch.float64, device=world.device)
    for batch in progress(loader, world, "PSNR"):
        image, sample = batch.image.to(world.device), batch.sample.to(world.device)
        visible, inverse = model.mask(sample, args.mask_ratio, args.seed)
        prediction = model.predict(image, visible, inverse)
        error = squared_errors(image, prediction, inverse, visible.shape[1], model.patch)
        total[:2] += decibel(error).sum(0)
        total[2] += len(image)
    hidden, whole, images = world.sum(total).tolist()
    return [hidden / images, whole / images], int(images)


def evaluate(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """PSNR of a run's reconstructions; the whole result, alike on every rank."""
    timer = Timer()
    model = load_reconstructor(args.encoder, args.recipe, args.overrides).to(world.device)
    length = model.grid[0] * model.grid[1]
    args.mask_ratio = model.recipe.views.mask_ratio if args.mask_ratio is None else args.mask_ratio
    if not 0 < args.mask_ratio < 1 or int(length * (1 - args.mask_ratio)) in (0, length):
        raise UserError(
            f"--mask-ratio {args.mask_ratio}: must leave some of {length} patches hidden and shown"
        )
    (hidden, whole), images = measure(model, world, args)
    statistics = TRUE_STATISTICS if model.true_statistics else "pixels are predicted as they are"
    return {
        "protocol": "psnr",
        "image": round(whole, 4),
        "hidden": round(hidden, 4),
        "images": images,
        "statistics": statistics,
        "settings": {"mask_ratio": args.mask_ratio, "seed": args.seed, "val": args.val},
        "encoder": {**model.info, "random": False, "source": args.encoder},
        "seconds": timer.seconds,
        "ranks": world.size,
    }


def add_model(result: argparse.ArgumentParser) -> None:
    """The options that name a model with its decoder."""
    add = result.add_argument
    add("--encoder", required=True, help="a run's folder, or a facebookresearch/mae FILE")
    add("--recipe", default="", help="of a FILE: the recipe that it fits")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    add("--mask-ratio", type=float, help="share of hidden patches (default: the recipe's)")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    result = base_parser(str(__doc__).split("\n", 1)[0])
    add_model(result)
    result.add_argument("--val", required=True, help="shards with the images")
    result.add_argument("--micro-batch", type=int, default=64, help="images per forward pass")
    result.add_argument("--output", help="result file (default: RUN/eval/psnr.json)")
    result.set_defaults(random=False)
    return result


def main() -> None:
    args = build_parser().parse_args()
    world = join_world()
    result = evaluate(args, world)
    output = output_path(args, "psnr")
    if world.first:
        write_result(output, result)
        figures = f"{result['image']:.2f} dB (hidden patches alone {result['hidden']:.2f} dB)"
        print(f"PSNR {figures}; {result['statistics']}  → {output}", flush=True)


if __name__ == "__main__":
    run_command(main)
