"""The nearest neighbours of images among embeddings, as one HTML page with their pictures.

    python eval/retrieve.py --embeddings embeddings
    python eval/retrieve.py cats/tom.jpg 17 ~/new.png --embeddings embeddings

A QUERY is a key of names.txt, the number of a row, or an image file, which the encoder of the
embeddings then embeds. Nearest is by cosine similarity.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from eval.shared.command import run_command
from eval.shared.embeddings import AGAIN, ROWS, Embeddings, read_embeddings
from eval.shared.labels import check_files, check_images
from eval.shared.options import EncoderChoice
from pipeline.command import check_unused, early
from pipeline.errors import UserError, check_range, naming
from pipeline.help_text import HelpFormatter
from shard_tools.atomic import check_writable, write_atomic
from shard_tools.cli import seed_number


@dataclass(frozen=True)
class Settings:
    """queries: keys, row numbers or files (none: `random` rows drawn by seed); k: neighbours."""

    queries: tuple[str, ...]
    embeddings: Path
    output: Path
    k: int = 7
    random: int = 8
    seed: int = 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    d = Settings
    result = argparse.ArgumentParser(
        description=str(__doc__).split("\n", 1)[0], formatter_class=HelpFormatter
    )
    result.add_argument(
        "queries", nargs="*", metavar="QUERY", help="a key, a row's number, or an image file"
    )
    result.add_argument(
        "--embeddings", type=Path, required=True, help="folder that eval/embed.py wrote"
    )
    result.add_argument(
        "--output", type=Path, help="page (default: neighbours.html in that folder)"
    )
    result.add_argument("--k", type=int, default=d.k, help="neighbours of a query")
    result.add_argument(
        "--random",
        type=int,
        default=d.random,
        help="rows drawn where no QUERY is given",
    )
    result.add_argument(
        "--seed", type=seed_number, metavar="N", default=d.seed, help="of that draw"
    )
    return result


def read_store(folder: Path) -> Embeddings:
    """The embeddings. UserError where they are not one row per image, or no row can be searched."""
    store = read_embeddings(folder)
    if store.rows.ndim != 2:
        raise UserError(f"{folder}: holds a row per patch; embed with --feature mean_patch")
    if not any(np.isfinite(row).all() for row in store.rows):
        raise UserError(f"{folder / ROWS}: no row is finite, so none can be searched{AGAIN}")
    return store


def rows_of(s: Settings, store: Embeddings) -> list[tuple[str, int]]:
    """(word, row) of each query of a command line, -1 of an image file; UserError for one that is
    nothing."""
    numbers = {key: row for row, key in enumerate(store.keys)}
    total, words = len(store.keys), s.queries
    if not words:
        order = np.random.default_rng(s.seed).permutation(total)
        usable = (row for row in order.tolist() if np.isfinite(store.rows[row]).all())
        words = tuple(store.keys[row] for row in sorted(islice(usable, min(s.random, total))))
    found = []
    for word in words:
        row = numbers.get(word, int(word) if word.isascii() and word.isdecimal() else -1)
        if 0 <= row < total:
            if not np.isfinite(store.rows[row]).all():
                raise UserError(
                    f"{store.keys[row]}: its row is not finite, as of an image that would not "
                    "decode, so it has no neighbours; give another QUERY"
                )
            found.append((word, row))
        elif Path(word).is_file():
            found.append((word, -1))
        else:
            raise UserError(
                f"{word}: no image file, no key of {store.folder}/names.txt, and no row from 0 to "
                f"{total - 1}"
            )
    return found


def prepare(args: argparse.Namespace) -> Settings:
    """The settings of a command line. UserError."""
    for name in ("k", "random"):
        check_range(f"--{name}", getattr(args, name), at_least=1)
    if args.queries:
        check_unused(build_parser(), args, ("random", "seed"), "with a QUERY")
    output = args.output or args.embeddings / "neighbours.html"
    if output.suffix not in (".html", ".htm"):  # not a query, nor a file of the embeddings
        raise UserError(f"--output {output}: must end in .html")
    s = Settings(tuple(args.queries), args.embeddings, output, args.k, args.random, args.seed)
    check_writable(output, advice="; choose another --output")
    store = read_store(s.embeddings)
    check_files(word for word, row in rows_of(s, store) if row < 0)
    check_images(store.info["images"], store.info["root"])
    return s


if __name__ == "__main__":  # the help, and what is seen to be wrong without torch
    early(build_parser().parse_args, prepare)

import torch
from PIL import Image
from torch import Tensor

from eval.embed import content_digest, embed, weights_digest
from eval.reporting.gallery import Section, render_gallery, tile
from eval.shared import image_sets
from eval.shared.session import EvalSession, open_session
from pipeline.data.crops import Box
from pipeline.data.jpeg import decoder
from pipeline.distributed import Ranks
from shard_tools.manifest import Manifest

PIXELS = 224  # side of a picture on the page
CHUNK = 1 << 16  # rows compared at a time


@dataclass(frozen=True)
class Query:
    """What is looked for: its name, its feature [D], and its row, -1 of an image from outside."""

    name: str
    feature: np.ndarray
    row: int = -1


def nearest(rows: np.ndarray, query: np.ndarray, k: int, leave_out: int = -1) -> list[tuple]:
    """The k rows [N, D] of highest cosine with a query [D], as (row, cosine), highest first; of
    equal ones the first. leave_out: a row that is no answer. Rows of NaN are none."""
    best: list[tuple[int, float]] = []
    query = query.astype(np.float64) / np.linalg.norm(query.astype(np.float64))
    for first in range(0, len(rows), CHUNK):
        piece = np.asarray(rows[first : first + CHUNK], np.float64)
        with np.errstate(invalid="ignore"):
            cosine = piece @ query / np.linalg.norm(piece, axis=1)
        cosine[np.isnan(cosine)] = -np.inf
        if first <= leave_out < first + CHUNK:
            cosine[leave_out - first] = -np.inf
        order = np.argsort(-cosine, kind="stable")[:k]
        best += [(first + int(n), float(cosine[n])) for n in order if cosine[n] > -np.inf]
        best = sorted(best, key=lambda found: -found[1])[:k]
    return best


def find_queries(s: Settings, store: Embeddings) -> list[Query]:
    """The queries of a command line; UserError for one that is nothing."""
    rows = rows_of(s, store)
    files = [word for word, row in rows if row < 0]
    features = dict(zip(files, _embed_files(store, files), strict=True)) if files else {}
    return [
        Query(word, features[word])
        if row < 0
        else Query(store.keys[row], np.array(store.rows[row]), row)
        for word, row in rows
    ]


def open_encoder_of(store: Embeddings) -> EvalSession:
    """The encoder that wrote the embeddings. UserError where its weights have changed since."""
    record, settings = store.info["encoder"], store.info["settings"]
    source = store.info.get("encoder_path", record["source"])
    own = Path(source).is_dir()  # a run says its own architecture
    options = record["options"] if not own else {"img_size": settings["image size"]}
    choice = EncoderChoice(
        source, None if own or source.startswith("timm:") else record["arch"], options,
        record["random"] and source != "random", record.get("random_seed", 0),
        record.get("ema", False), settings["resize"],
    )  # fmt: skip
    session = open_session(choice, Ranks.alone(), precision=settings["precision"])
    if weights_digest(session) != settings["weights"]:
        raise UserError(
            f"{source}: has other weights than those of {store.folder}; embed the images again"
        )
    return session


def _embed_files(store: Embeddings, files: Sequence[str]) -> list[np.ndarray]:
    session = open_encoder_of(store)
    images = [torch.from_numpy(image_sets.read_crop(file, session.crop)) for file in files]
    feature: Tensor = embed(
        session, session.normalise(torch.stack(images)), store.info["settings"]["feature"]
    )
    return list(feature.cpu().numpy())


def middle(width: int, height: int) -> tuple[Box, bool]:
    """The largest centred square, as `choose` of a decoder."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return Box(left, top, left + side, top + side, inside=False), False


def picture_of(data: bytes) -> Image.Image:
    """The middle of an image, PIXELS wide and high."""
    pixels = np.empty((PIXELS, PIXELS, 3), np.uint8)
    decoder()[1](data, middle, pixels, "bicubic")
    return Image.fromarray(pixels)


def section(query: Query, store: Embeddings, manifest: Manifest, k: int) -> Section:
    """A row of the page: the query and its neighbours."""
    source = image_sets.reader(manifest, PIXELS)
    if query.row < 0:
        tiles = [tile(picture_of(Path(query.name).read_bytes()), query.name, "query", True)]
    else:
        picture = picture_of(source.read(query.row))
        tiles = [tile(picture, _caption(store, query.row), "query", True)]
    for row, cosine in nearest(store.rows, query.feature, k, query.row):
        picture = picture_of(source.read(row))
        tiles.append(tile(picture, _caption(store, row), f"{cosine:.3f}"))
    source.close()
    return Section(query.name, tuple(tiles))


def _caption(store: Embeddings, row: int) -> str:
    label, classes = store.labels[row], store.info["classes"]
    named = classes[label] if 0 <= label < len(classes) else ""
    key = store.keys[row]
    return key if not named or key.startswith(f"{named}/") else f"{key} ({named})"


def hit_rate(store: Embeddings, queries: Sequence[Query], k: int) -> str:
    """How many neighbours share their query's label, where queries have one."""
    same = total = 0
    for query in queries:
        if query.row >= 0 and store.labels[query.row] >= 0:
            rows = [row for row, _ in nearest(store.rows, query.feature, k, query.row)]
            same += sum(store.labels[row] == store.labels[query.row] for row in rows)
            total += len(rows)
    return f"{same} of {total} neighbours have the label of their query." if total else ""


def build_page(s: Settings) -> str:
    """The page as one string."""
    store = read_store(s.embeddings)
    queries, info = find_queries(s, store), store.info
    root = Path(info["root"]) if info["root"] else None
    skip = info["settings"]["on_error"] == "skip"
    manifest = image_sets.open_images(info["images"], root, skip)
    if image_sets.keys(manifest) != store.keys:
        raise UserError(
            f"{info['images']}: no longer holds the images of {s.embeddings}; embed them again"
        )
    content = content_digest(manifest)
    if info["settings"].get("content of images", content) != content:  # earlier versions say none
        raise UserError(
            f"{info['images']}: its images were modified or replaced after {s.embeddings} was "
            "written; embed them again"
        )
    facts = [
        f"{len(store.rows)} images of {info['images']}, {info['settings']['feature']} of "
        f"{_encoder_name(info['encoder'])}, cosine similarity, highest first.",
        hit_rate(store, queries, s.k),
    ]
    sections = [section(query, store, manifest, s.k) for query in queries]
    return render_gallery("Nearest neighbours", [fact for fact in facts if fact], sections)


def _encoder_name(record: dict[str, Any]) -> str:
    return f"{record['source']} ({record['arch']}{', random' if record['random'] else ''})"


def main() -> None:
    s = prepare(build_parser().parse_args())
    page = build_page(s)
    with naming(s.output, "cannot be written"):
        write_atomic(s.output, page)
    print(f"neighbours: {s.output}", flush=True)


if __name__ == "__main__":
    run_command(main)
