"""A picture of reconstructions: original | masked | reconstruction | reconstruction + visible.

    python eval/reconstruct.py --encoder runs/rmae --data data/shards/val --output grid.png
    python eval/reconstruct.py --encoder runs/rmae --files cat.jpg dog.jpg --output grid.png

The picture and the command say whether the true mean and deviation of each patch were given back,
as they are where the recipe predicts patch-normalised pixels (norm_pix). The mask of a picture is
drawn by --seed and its number.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from eval.shared.command import run_command
from eval.shared.labels import check_files, with_images
from eval.shared.options import add_model, base_parser, check_model
from pipeline.command import check_unused, early
from pipeline.errors import UserError, check_range, naming
from shard_tools.atomic import check_writable, write_atomic
from shard_tools.cli import counted

COLUMNS = ("original", "masked", "reconstruction", "reconstruction + visible")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    result = base_parser(str(__doc__).split("\n", 1)[0])
    add_model(result)
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="shards: the first images")
    source.add_argument("--files", nargs="+", metavar="FILE", help="image files")
    result.add_argument("--images", type=int, default=8, help="the first N of --data")
    result.add_argument(
        "--columns", nargs="+", choices=COLUMNS, default=COLUMNS, help="which, in this order"
    )
    result.add_argument("--output", required=True, help="PNG to write")
    return result


def prepare(args: argparse.Namespace) -> None:
    """UserError for a command line that cannot be followed."""
    check_range("--images", args.images, at_least=1)
    if not str(args.output).endswith(".png"):
        raise UserError(f"--output {args.output}: must end in .png")
    if args.files:
        check_unused(build_parser(), args, ["images"], "with --files")
    if Path(args.output).resolve() in [Path(file).resolve() for file in args.files or ()]:
        raise UserError(f"--output {args.output}: is one of --files; choose another")
    if len(set(args.columns)) < len(args.columns):
        raise UserError(f"--columns {' '.join(args.columns)}: names one twice")
    check_writable(Path(args.output), advice="; choose another --output")
    check_model(args.encoder, args.recipe, args.overrides, args.mask_ratio)
    check_files(args.files or ())
    if args.data:
        with_images(args.data)


if __name__ == "__main__":  # the help, and what is seen to be wrong without torch
    early(build_parser().parse_args, prepare)

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from eval.psnr import TRUE_STATISTICS, mask_ratio_of
from eval.reporting.gallery import encoded
from eval.shared.image_sets import read_crop
from pipeline.data.crops import CentreCrop, shorter_side
from pipeline.data.loader import eval_loader
from pipeline.weights.reconstructor import Reconstructor, load_reconstructor

SMALLEST = 112  # side in pixels that a small picture is enlarged to at least
MARGIN, LINE = 4, 14  # pixels between pictures, and of a line of text


def first_images(data: str, count: int, size: int) -> tuple[Tensor, Tensor]:
    """The first centre crops of shards, uint8 [n, size, size, 3], and their numbers int64 [n]."""
    loader = eval_loader(data, batch_size=count, rank=0, world=1, image_size=size, workers=0)
    batch = next(iter(loader))
    return batch.image, batch.sample


def read_files(files: Sequence[str], size: int) -> tuple[Tensor, Tensor]:
    """Centre crops of picture files, uint8 [n, size, size, 3], and their numbers int64 [n]."""
    crop = CentreCrop(size, shorter_side(size))
    crops = np.stack([read_crop(Path(path), crop) for path in files])
    return torch.from_numpy(crops), torch.arange(len(crops))


def compose(columns: dict[str, Tensor], note: str) -> Image.Image:
    """Rows of pictures, uint8 [n, S, S, 3] per column, under their names, with a note below."""
    rows, size = next(iter(columns.values())).shape[:2]
    side = size * -(-SMALLEST // size)
    width = (side + MARGIN) * len(columns) + MARGIN
    sheet = Image.new("RGB", (width, LINE * 3 + (side + MARGIN) * rows), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (name, pictures) in enumerate(columns.items()):
        left = MARGIN + number * (side + MARGIN)
        pen.text((left, 1), name, "black", font_size=9)
        for row, pixels in enumerate(pictures.cpu().numpy()):
            picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, LINE + row * (side + MARGIN)))
    pen.text((MARGIN, LINE + (side + MARGIN) * rows), note, "black", font_size=9)
    return sheet


def draw(
    model: Reconstructor,
    image: Tensor,
    sample: Tensor,
    mask_ratio: float,
    seed: int,
    shown: Sequence[str] = COLUMNS,
) -> tuple[Image.Image, str]:
    """The sheet of images uint8 [n, S, S, 3], its columns `shown`, and its note."""
    note = f"{mask_ratio:.0%} masked; " + (
        f"{TRUE_STATISTICS}:\nbrightness and contrast of a patch are not predicted"
        if model.true_statistics
        else "pixels as predicted"
    )
    visible, inverse = model.mask(sample, mask_ratio, seed)
    every = (image, *model.pictures(image, visible, inverse))
    columns = dict(zip(COLUMNS, every, strict=True))
    return compose({name: columns[name] for name in shown}, note), note


def main() -> None:
    args = build_parser().parse_args()
    prepare(args)
    model = load_reconstructor(args.encoder, args.recipe, args.overrides)
    if args.files:
        image, sample = read_files(args.files, model.size)
    else:
        image, sample = first_images(args.data, args.images, model.size)
    mask_ratio = mask_ratio_of(model, args.mask_ratio)
    sheet, note = draw(model, image, sample, mask_ratio, args.seed, args.columns)
    with naming(args.output, "cannot be written"):
        write_atomic(Path(args.output), encoded(sheet, "png"))
    drawn = counted(len(image), "image")
    note = " ".join(note.split())
    print(f"{args.output}: {drawn}, {' | '.join(args.columns)}; {note}", flush=True)


if __name__ == "__main__":
    run_command(main)
