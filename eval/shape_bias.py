"""Shape bias: does a classifier go by the shape or by the texture of an object?

Cue-conflict images have the shape of one category and the texture of another. Among the decisions
for either, the share of the shape's category, as model-vs-human defines it (Geirhos et al. 2021):

    shape bias = shape / (shape + texture),  over images whose shape and texture differ.

A decision is one of 16 categories; a classifier of ImageNet's 1000 classes decides for the category
with the highest mean probability over the category's classes.

    python eval/shape_bias.py --classifier runs/rmae/eval/finetune --images cue-conflict/
    python eval/shape_bias.py --decisions raw-data/cue-conflict/*subject*.csv

The images are in a folder per shape: cue-conflict/cat/cat1-elephant2.png. The CSV files are
model-vs-human's, with the columns object_response, category and imagename.
"""

import argparse
import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.shared.command import run_command
from eval.shared.options import settings_of
from eval.shared.results import (
    Timer,
    check_classifier,
    check_other_settings,
    check_output,
    named_json,
    write_result,
)
from pipeline.command import check_unused, early
from pipeline.errors import UserError, check_range, naming
from pipeline.help_text import HelpFormatter
from shard_tools.sharding.found import is_image, is_system_file

# category → its classes among ImageNet's 1000, as ranges (first, last). Source: model-vs-human,
# human_categories.py, after Geirhos et al. 2018, Tab. of the 16 entry-level categories.
CATEGORIES: dict[str, tuple[int | tuple[int, int], ...]] = {
    "airplane": (404,),
    "bear": ((294, 297),),
    "bicycle": (444, 671),
    "bird": (
        8, (10, 16), (18, 20), (22, 24), (80, 83), (87, 96), (98, 100), (127, 133), (135, 145),
    ),
    "boat": (472, 554, 625, 814, 914),
    "bottle": (440, 720, 737, (898, 899), 901, 907),
    "car": (436, 511, 817),
    "cat": ((281, 286),),
    "chair": (423, 559, 765, 857),
    "clock": (409, 530, 892),
    "dog": (
        (152, 191), (193, 203), (205, 226), (228, 241), (243, 250), (252, 257), 259, (261, 263),
        (265, 268),
    ),
    "elephant": ((385, 386),),
    "keyboard": (508, 878),
    "knife": (499,),
    "oven": (766,),
    "truck": (555, 569, 656, 675, 717, 734, 864, 867),
}  # fmt: skip

ENDS = ("n01440764", "n15075141")  # the first and the last of ImageNet's 1000 synsets
COLUMNS = ("category", "imagename", "object_response")  # of model-vs-human's CSV files


@dataclass(frozen=True)
class Settings:
    """Whose decisions: of a classifier (folder of finetune.py, or timm:NAME) on a folder of
    images, or of model-vs-human's CSV files."""

    classifier: str | None = None
    images: str | None = None
    decisions: tuple[str, ...] | None = None
    batch_size: int = 64


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=str(__doc__).split("\n", 1)[0], formatter_class=HelpFormatter
    )
    result.add_argument("--classifier", help="folder that finetune.py wrote, or timm:NAME")
    result.add_argument("--images", help="folder of cue-conflict images")
    result.add_argument("--decisions", nargs="+", help="CSV files of model-vs-human")
    result.add_argument("--batch-size", type=int, default=64, help="images per forward pass")
    result.add_argument("--output", help="result file (default: beside the classifier)")
    result.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return result


def texture_of(image_name: str) -> str:
    """The texture in an image's name: `…_cat1-elephant2.png` → elephant."""
    stem = image_name.rsplit("_", 1)[-1].split(".", 1)[0]
    texture = "".join(c for c in stem.rsplit("-", 1)[-1] if not c.isdigit())
    if texture not in CATEGORIES or "-" not in stem:
        raise UserError(
            f"{image_name}: the name should end in <shape><n>-<texture><m>, such as "
            "cat1-elephant2.png"
        )
    return texture


def read_decisions(paths: Sequence[str | Path]) -> list[tuple[str, str, str]]:
    """Trials (decision, shape, texture) of model-vs-human's CSV files."""
    trials = []
    for path in paths:
        with naming(path, "cannot be read"):
            try:
                rows = list(csv.DictReader(Path(path).read_text("utf-8-sig").splitlines()))
            except (UnicodeDecodeError, csv.Error) as error:
                raise UserError(f"{path}: cannot be read as a CSV file ({error})") from error
        for number, row in enumerate(rows, start=2):
            missing = [name for name in COLUMNS if row.get(name) is None]
            if missing:
                raise UserError(f"{path}, line {number}: the column {missing[0]} is missing")
            if row["category"] not in CATEGORIES:
                raise UserError(
                    f"{path}, line {number}: category {row['category']!r} is none of the 16"
                )
            texture = texture_of(row["imagename"])
            trials.append((row["object_response"], row["category"], texture))
    if not trials:
        raise UserError(f"{', '.join(map(str, paths))}: no decisions in it")
    return trials


def find_images(folder: str | Path) -> list[tuple[Path, str, str]]:
    """(path, shape, texture) of the images in FOLDER/<shape>/, sorted."""
    found = []
    for path in sorted(Path(folder).glob("*/*")):
        if is_image(path.name) and not is_system_file(path.name):
            if path.parent.name not in CATEGORIES:
                raise UserError(f"{path.parent}: not one of the 16 categories")
            found.append((path, path.parent.name, texture_of(path.name)))
    if not found:
        raise UserError(f"{folder}: has no images in folders named by shape")
    return found


def check(s: Settings) -> None:
    """Refuse what cannot be computed."""
    if bool(s.classifier) != bool(s.images) or bool(s.classifier) == bool(s.decisions):
        raise UserError("give either --classifier with --images, or --decisions")
    check_range("--batch-size", s.batch_size, at_least=1)


def prepare(args: argparse.Namespace) -> tuple[Settings, Path | None]:
    """The settings and the path of the result, if it is written. UserError."""
    settings = settings_of(Settings, args)
    if args.decisions:
        check_unused(build_parser(), args, ["batch_size"], "with --decisions")
    output = named_json(args.output) if args.output else None
    if output is None and args.classifier and not args.classifier.startswith("timm:"):
        folder = Path(args.classifier)
        output = folder.with_name(f"shape-bias-{folder.name}.json")
    if output is not None:
        check_output(output, protocol="shape-bias")
    check(settings)
    if settings.decisions:
        read_decisions(settings.decisions)
    if settings.classifier:
        check_classifier(settings.classifier)
    if settings.images:
        find_images(settings.images)
    if output is not None:
        check_other_settings(output, args)
    return settings, output


if __name__ == "__main__":  # the help, and what is seen to be wrong without torch
    early(build_parser().parse_args, prepare, ranks=True)

import numpy as np
import torch
from torch import Tensor

from eval.shared.classifier import classify, read_classifier
from eval.shared.cli import join_ranks, progress
from eval.shared.features import normalise
from eval.shared.image_sets import read_crop
from eval.shared.metrics import as_percent
from pipeline.data.crops import CentreCrop, shorter_side
from pipeline.distributed import Ranks


def classes_of(category: str) -> list[int]:
    """The ImageNet classes of a category, ascending."""
    numbers: list[int] = []
    for part in CATEGORIES[category]:
        first, last = part if isinstance(part, tuple) else (part, part)
        numbers += range(first, last + 1)
    return numbers


def check_classes(classifier: str, names: Sequence[str]) -> None:
    """UserError where a classifier's classes are not ImageNet's 1000 in the order of their synsets,
    by whose numbers the categories are made, as far as names show it."""
    if len(names) != 1000:
        raise UserError(
            f"{classifier} knows {len(names)} classes; the 16 categories are made of ImageNet's "
            "1000"
        )
    synsets = (names[0], names[-1]) == ENDS and list(names) == sorted(names)
    if not synsets and list(names) != [str(number) for number in range(1000)]:
        raise UserError(
            f"{classifier} has other classes than ImageNet's, or another order (from {names[0]} to "
            f"{names[-1]}): the 16 categories are made of its synsets in their order, "
            f"{ENDS[0]} to {ENDS[1]}"
        )


def decide(probability: Tensor) -> list[str]:
    """Categories of probabilities [b, 1000]: the highest mean probability over a category's
    classes."""
    means = [probability[:, classes_of(name)].mean(dim=1) for name in CATEGORIES]
    names = list(CATEGORIES)
    return [names[number] for number in torch.stack(means, dim=1).argmax(dim=1).tolist()]


def shape_bias(trials: Iterable[tuple[str, str, str]]) -> dict[str, Any]:
    """Shape bias of trials (decision, shape, texture), overall and for each shape.

    Trials whose shape is the texture are left out. The bias is None where nothing was decided for
    either.
    """
    count: Counter[tuple[str, str]] = Counter()
    conflicts = 0
    for decision, shape, texture in trials:
        if shape == texture:
            continue
        conflicts += 1
        count[shape, "shape"] += decision == shape
        count[shape, "texture"] += decision == texture

    def ratio(shape: int, texture: int) -> float | None:
        return round(shape / (shape + texture), 5) if shape + texture else None

    shapes = sum(n for (_, cue), n in count.items() if cue == "shape")
    textures = sum(n for (_, cue), n in count.items() if cue == "texture")
    names = sorted({name for name, _ in count})
    return {
        "shape_bias": ratio(shapes, textures),
        "shape": shapes,
        "texture": textures,
        "trials": conflicts,
        "either": as_percent(shapes + textures, conflicts) if conflicts else None,
        "by_shape": {n: ratio(count[n, "shape"], count[n, "texture"]) for n in names},
    }


def classifier_trials(
    classifier: str, folder: str, batch_size: int, ranks: Ranks
) -> tuple[list[tuple[str, str, str]], dict[str, Any]]:
    """Trials of the classifier on all images, alike on every rank, and the classifier's info."""
    model, info = read_classifier(classifier)
    check_classes(classifier, info["classes"])
    model.to(ranks.device)
    images = find_images(folder)
    mine = range(ranks.rank, len(images), ranks.world)
    choice = torch.zeros(len(images), dtype=torch.int64, device=ranks.device)
    names, size = list(CATEGORIES), int(info["options"]["img_size"])
    crop = CentreCrop(size, shorter_side(size))
    pieces = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    for piece in progress(pieces, ranks, "shape bias", images=batch_size):
        crops = np.stack([read_crop(images[n][0], crop) for n in piece])
        pixels = normalise(torch.from_numpy(crops), info["mean"], info["std"], ranks.device)
        for number, decision in zip(piece, decide(classify(model, pixels)), strict=True):
            choice[number] = names.index(decision)
    choice = ranks.sum(choice)  # each rank has left 0 where others decide
    trials = [(names[c], s, t) for c, (_, s, t) in zip(choice.tolist(), images, strict=True)]
    return trials, {key: value for key, value in info.items() if key != "classes"}


def evaluate(s: Settings, ranks: Ranks) -> dict[str, Any]:
    """Shape bias of a classifier or of recorded decisions; the full result."""
    timer = Timer()
    check(s)
    if s.classifier and s.images:
        trials, info = classifier_trials(s.classifier, s.images, s.batch_size, ranks)
    else:
        decisions = s.decisions or ()
        trials, info = read_decisions(decisions), {"source": list(decisions)}
    return {
        "protocol": "shape-bias",
        **shape_bias(trials),
        "settings": {"classifier": s.classifier, "images": s.images}
        | ({"decisions": list(s.decisions)} if s.decisions else {}),
        "encoder": info,
        "seconds": timer.seconds,
        "ranks": ranks.world,
    }


def main() -> None:
    args = build_parser().parse_args()
    ranks = join_ranks()
    settings, output = ranks.agree(lambda: prepare(args))
    result = evaluate(settings, ranks)
    if ranks.first:
        if output is not None:
            write_result(output, result, args)
        bias = result["shape_bias"]
        text = "undecided" if bias is None else f"{bias:.3f}"
        counts = f"{result['shape']} shape, {result['texture']} texture"
        print(f"shape bias {text} ({counts} of {result['trials']} trials)", flush=True)


if __name__ == "__main__":
    run_command(main)
