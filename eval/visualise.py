"""Look inside encoders, side by side: PCA of patches as colours, attention heads, similarity maps.

    python eval/visualise.py --encoder runs/rmae random --images ~/photographs --output look
    python eval/visualise.py --encoder runs/rmae runs/cmae --files cat.jpg dog.jpg --size 448

The folder --output gets index.html, which needs no network, and its pictures as PNG:

    pca.png          the first three principal components of the patch tokens as red, green, blue
    pca-object.png   the same of what a threshold of the first component takes for the object
    cosine-N.png     similarity of every patch with the one under the N-th --point
    attention-N.png  where each head of encoder N's last block looks from the cls token

`random` without --arch has the architecture of the first encoder: what is seen there too was not
learned.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.shared.command import run_command
from eval.shared.labels import check_files, check_images
from eval.shared.options import EncoderChoice, base_parser, check_encoder, read_options
from pipeline.command import check_unused, early
from pipeline.errors import UserError, check_range, naming
from shard_tools.atomic import check_writable, write_atomic
from shard_tools.manifest import Manifest

PAGE, TITLE = "index.html", "Inside the encoder"  # by which a page of ours is known
PICTURES = ("pca.png", "pca-object.png", "cosine-[0-9]*.png", "attention-[0-9]*.png")


@dataclass(frozen=True)
class Settings:
    """encoders, archs: see load_encoder; points: (x, y), shares of the width and height."""

    encoders: tuple[str, ...]
    archs: tuple[str, ...]
    options: str
    images: Manifest
    output: Path
    count: int = 6
    size: int | None = None
    points: tuple[tuple[float, float], ...] = ((0.5, 0.5),)
    seed: int = 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    result = base_parser(str(__doc__).split("\n", 1)[0])
    result.add_argument(
        "--encoder", nargs="+", required=True, metavar="ENCODER",
        help="runs, checkpoint files, timm:NAME, random: a column each",
    )  # fmt: skip
    result.add_argument(
        "--arch", nargs="+", default=[], metavar="NAME",
        help="timm's name of what the files and random are: one for all, or one for each of them",
    )  # fmt: skip
    result.add_argument("--options", default="{}", help="further keywords of the timm models")
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", help="shards, a folder, a tar, a table or a .txt of paths")
    source.add_argument("--files", nargs="+", metavar="FILE", help="image files")
    result.add_argument(
        "--count", type=int, default=Settings.count, help="rows, spread over --images"
    )
    result.add_argument(
        "--size", type=int, help="pixels of the images, such as 448 for finer maps (default: the "
        "encoder's own)",
    )  # fmt: skip
    result.add_argument(
        "--point", nargs=2, type=float, action="append", metavar=("X", "Y"),
        help="patch that the others are compared with: shares of the width and height, may be "
        "repeated (default: 0.5 0.5)",
    )  # fmt: skip
    result.add_argument("--output", type=Path, default=Path("runs/inside"), help="folder to write")
    return result


def choices(
    encoders: Sequence[str], names: Sequence[str], options_text: str, size: int | None, seed: int
) -> list[EncoderChoice]:
    """The encoders that a command line names; `random` takes the first one's architecture."""
    result: list[EncoderChoice] = []
    archs = list(names)
    for source in encoders:
        options = read_options(options_text)
        if size is not None and options.setdefault("img_size", size) != size:
            raise UserError(
                f"--size {size}: --options say img_size {options['img_size']}; give one of them"
            )
        needs = source == "random" or Path(source).is_file()
        arch = (archs.pop(0) if len(archs) > 1 else archs[0]) if needs and archs else None
        if source == "random" and arch is None:
            if not result:
                raise UserError("--encoder random: needs --arch where it is the first encoder")
            first = result[0]
            result.append(EncoderChoice(first.source, first.arch, options, True, seed))
        else:
            result.append(EncoderChoice(source, arch, options, False, seed))
    return result


def check_own(folder: Path) -> None:
    """UserError where a page or picture that this command did not write would be overwritten."""
    page, theirs = folder / PAGE, [p for name in PICTURES for p in sorted(folder.glob(name))]
    if page.exists():
        with naming(page, "cannot be read"), open(page, "rb") as file:
            theirs = [] if f"<title>{TITLE}</title>".encode() in file.read(1000) else [page]
    if theirs:
        raise UserError(
            f"{theirs[0]}: not written by eval/visualise.py; move it away or choose another "
            "--output"
        )


def prepare(args: argparse.Namespace) -> tuple[tuple[float, float], ...]:
    """The points of a command line. UserError for one that cannot be followed."""
    points = tuple((x, y) for x, y in args.point or [[0.5, 0.5]])
    for x, y in points:
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise UserError(f"--point {x:g} {y:g}: must be shares from 0 to 1")
    check_range("--count", args.count, at_least=1)
    if args.files:
        check_unused(build_parser(), args, ["count"], "with --files")
    needed = sum(name == "random" or Path(name).is_file() for name in args.encoder)
    if not needed:
        check_unused(build_parser(), args, ["arch"], "without a checkpoint file or random")
    if len(args.arch) > 1 and len(args.arch) != needed:
        raise UserError(
            f"--arch: {len(args.arch)} names for {needed} files and random encoders; give one for "
            "all or one for each"
        )
    for choice in choices(args.encoder, args.arch, args.options, args.size, args.seed):
        check_encoder(choice)
    check_writable(args.output, folder=True, advice="; choose another --output")
    check_own(args.output)
    if args.files:
        check_files(args.files)
    else:
        check_images(args.images)
    return points


if __name__ == "__main__":  # the help, and what is seen to be wrong without torch
    early(build_parser().parse_args, prepare)

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from eval.reporting.gallery import Section, encoded, render_gallery, sheet
from eval.reporting.run_records import short_names
from eval.shared import image_sets
from eval.shared.inside import cosine_map, foreground, last_attention, pca_colours
from eval.shared.session import EvalSession, open_session
from pipeline.data.crops import CentreCrop
from pipeline.distributed import Ranks

CELL, MARGIN, LINE, FONT = 224, 6, 22, 14  # pixels: a picture, between them, a line of text
BATCH = 8  # images of a forward pass

Pictures = Sequence[Image.Image]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Look:
    """What one encoder made of the images: patch tokens float32 [n, L, D], attention [n, H, L]
    and whether it is the cls token's."""

    name: str
    tokens: Tensor
    attention: Tensor
    from_cls: bool
    grid: tuple[int, int]


def names_of(chosen: Sequence[EncoderChoice]) -> list[str]:
    """What columns are called: `random`, or what of the path tells it from the others."""
    pairs = zip(chosen, short_names([choice.source for choice in chosen]), strict=True)
    return ["random" if c.random or c.source == "random" else name for c, name in pairs]


def numbers(s: Settings) -> list[int]:
    """Which images are shown: `count`, evenly spread over the set."""
    total = s.images.samples
    count = min(s.count, total)
    return [row * total // count for row in range(count)]


def crops(s: Settings, size: int) -> Tensor:
    """The images that are shown, uint8 [n, size, size, 3]: the same part of each at any size,
    unlike the crop of the other evaluations."""
    source, crop = image_sets.reader(s.images, size), CentreCrop(size, round(size * 256 / 224))
    chosen = numbers(s)
    image = source.empty(len(chosen))
    for row, sample in enumerate(chosen):
        source.decode(sample, crop, image.numpy()[row])
    source.close()
    return image


def look(s: Settings, session: EvalSession, name: str) -> Look:
    """One encoder's view of the images."""
    tokens, attention, from_cls = [], [], True
    for piece in crops(s, session.image_size).split(BATCH):
        pixels = session.normalise(piece)
        tokens.append(session.patch_tokens(pixels))
        session.check_finite(tokens[-1])
        weights, from_cls = last_attention(session.vit, pixels)
        attention.append(weights)
    height, width = session.vit.patch_embed.grid_size
    return Look(name, torch.cat(tokens), torch.cat(attention), from_cls, (height, width))


def enlarge(pixels: np.ndarray) -> Image.Image:
    """A map uint8 [h, w, 3] as a picture of CELL pixels that keeps its squares."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return picture.resize((CELL, CELL), Image.Resampling.NEAREST)


def heat(values: Tensor) -> np.ndarray:
    """A map float [h, w] from its lowest (dark) to its highest value (yellow), uint8 [h, w, 3]."""
    from matplotlib import colormaps

    low, high = values.min(), values.max()
    share = (values - low) / (high - low).clamp_min(1e-12)
    colours: np.ndarray = colormaps["inferno"](share.numpy())[..., :3]
    return (colours * 255).round().astype(np.uint8)


def compose(
    names: Sequence[str], rows: Sequence[Sequence[Image.Image]], notes: Sequence[Sequence[str]] = ()
) -> Image.Image:
    """Rows of pictures of CELL pixels under the names of their columns; notes: a line below each
    picture."""
    below = LINE if notes else 0
    width, height = (CELL + MARGIN) * len(names) + MARGIN, CELL + MARGIN + below
    page = Image.new("RGB", (width, LINE + MARGIN + height * len(rows)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(FONT)
    for column, name in enumerate(names):
        left = MARGIN + column * (CELL + MARGIN)
        pen.text((left, 3), _fit(name, pen, font), "black", font)
        for row, pictures in enumerate(rows):
            top = LINE + MARGIN + row * height
            page.paste(pictures[column], (left, top))
            if notes:
                pen.text((left, top + CELL + 3), notes[row][column], "#444444", font)
    return page


def _fit(name: str, pen: ImageDraw.ImageDraw, font: Font) -> str:
    """The end of a name that is wider than its column."""
    while pen.textlength(name, font) > CELL:
        name = "…" + name.lstrip("…")[1:]
    return name


def pca_sheet(photographs: Pictures, looks: Sequence[Look], objects: bool) -> Image.Image:
    """original | encoder | encoder …; objects: without the background."""
    columns = []
    for one in looks:
        everything = torch.ones(one.tokens.shape[:2], dtype=torch.bool, device=one.tokens.device)
        mask = foreground(one.tokens, one.grid) if objects else everything
        columns.append(pca_colours(one.tokens, one.grid, mask).numpy())
    rows = [
        [photograph, *(enlarge(column[row]) for column in columns)]
        for row, photograph in enumerate(photographs)
    ]
    return compose(["original", *(one.name for one in looks)], rows)


def patch_at(point: tuple[float, float], grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the patch under (x, y), shares of the width and height."""
    return min(int(point[1] * grid[0]), grid[0] - 1), min(int(point[0] * grid[1]), grid[1] - 1)


def mark(picture: Image.Image, patch: tuple[int, int], grid: tuple[int, int]) -> Image.Image:
    """A frame around a patch."""
    picture = picture.copy()
    high, wide = CELL / grid[0], CELL / grid[1]
    left, top = patch[1] * wide, patch[0] * high
    box, pen = (left - 1, top - 1, left + wide, top + high), ImageDraw.Draw(picture)
    pen.rectangle((box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2), outline="black", width=2)
    pen.rectangle(box, outline="#ffdd00", width=2)
    return picture


def cosine_sheet(
    photographs: Pictures, looks: Sequence[Look], point: tuple[float, float]
) -> Image.Image:
    """original with the patch framed | encoder | encoder …, the range of each map below it."""
    finest = max(looks, key=lambda one: one.grid[0])
    rows = [[mark(p, patch_at(point, finest.grid), finest.grid)] for p in photographs]
    notes = [[""] for _ in rows]
    for one in looks:
        maps = cosine_map(one.tokens, one.grid, patch_at(point, one.grid))
        for row, values in enumerate(maps):
            rows[row].append(enlarge(heat(values)))
            notes[row].append(f"{float(values.min()):.2f} … {float(values.max()):.2f}")
    return compose(["original", *(one.name for one in looks)], rows, notes)


def attention_sheet(photographs: Pictures, one: Look) -> Image.Image:
    """original | mean of the heads | head 1 | …"""
    rows = []
    for row, photograph in enumerate(photographs):
        maps = one.attention[row].view(-1, *one.grid)
        pictures = [enlarge(heat(values)) for values in (maps.mean(0), *maps)]
        rows.append([photograph, *pictures])
    heads = [f"head {number + 1}" for number in range(one.attention.shape[1])]
    return compose(["original", "mean of the heads", *heads], rows)


def build_sections(
    photographs: Pictures, looks: Sequence[Look], points: Sequence[tuple[float, float]]
) -> list[tuple[str, Image.Image, str, str]]:
    """(file name, picture, title, text) of everything that is shown."""
    result = [
        (
            "pca.png", pca_sheet(photographs, looks, False), "Principal components of the patches",
            "Red, green and blue are the first three components over all images, one basis per "
            "encoder. Colours of different encoders do not correspond.",
        ),
        (
            "pca-object.png", pca_sheet(photographs, looks, True), "The same of the object alone",
            "Black is what a threshold (Otsu's, of the first component of the image) takes for "
            "background; the components are those of the rest.",
        ),
    ]  # fmt: skip
    for number, (x, y) in enumerate(points):
        title = f"Similarity with the framed patch, at {x:g} of the width and {y:g} of the height"
        text = "Cosine similarity, dark to yellow over the range given below each map."
        picture = cosine_sheet(photographs, looks, (x, y))
        result.append((f"cosine-{number + 1}.png", picture, title, text))
    for number, one in enumerate(looks):
        who = "the cls token" if one.from_cls else "the mean of the patches (it has no cls token)"
        text = f"Last block, from {who} to each patch; dark to yellow over the range of each map."
        picture = attention_sheet(photographs, one)
        result.append((f"attention-{number + 1}.png", picture, f"Attention of {one.name}", text))
    return result


def draw(s: Settings) -> list[str]:
    """Write all pictures and the page into the output folder; their names."""
    looks, facts = [], []
    chosen = choices(s.encoders, s.archs, s.options, s.size, s.seed)
    for choice, name in zip(chosen, names_of(chosen), strict=True):
        session = open_session(choice, Ranks.alone(), precision="fp32")
        looks.append(look(s, session, name))
        height, width = looks[-1].grid
        facts.append(
            f"{name}: {session.info.arch} of {choice.source}, {session.image_size} "
            f"pixels, {height} × {width} patches."
        )
    photographs = [Image.fromarray(pixels) for pixels in crops(s, CELL).numpy()]
    pictures = build_sections(photographs, looks, s.points)
    names = [image_sets.keys(s.images)[number] for number in numbers(s)]
    sections = [
        Section(title, (sheet(picture, f"{title}; rows: {', '.join(names)}"),), (text,), True)
        for _, picture, title, text in pictures
    ]
    facts.append(f"Rows: {', '.join(names)}.")
    with naming(s.output, "cannot be written"):
        write_atomic(s.output / PAGE, render_gallery(TITLE, facts, sections))  # first: check_own
        for name, picture, *_ in pictures:
            write_atomic(s.output / name, encoded(picture, "png"))
    return [name for name, *_ in pictures]


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of a command line. UserError where one cannot be."""
    points = prepare(args)
    images = image_sets.of_files(args.files) if args.files else image_sets.open_images(args.images)
    count = images.samples if args.files else args.count
    return Settings(
        tuple(args.encoder), tuple(args.arch), args.options, images, args.output, count, args.size,
        points, args.seed,
    )  # fmt: skip


def main() -> None:
    s = settings_of(build_parser().parse_args())
    names = draw(s)
    print(f"{s.output}/index.html and {', '.join(names)}", flush=True)


if __name__ == "__main__":
    run_command(main)
