"""Embeddings of images: shards, a folder, a tar, a table or a list → embeddings.npy or .parquet.

    python eval/embed.py --encoder runs/rmae --images ~/photographs --output embeddings
    deepspeed eval/embed.py --encoder runs/rmae --images data/shards/val --feature patches

Row i is image i of the set; names.txt says its key, label and path (of a parquet the columns do).
The same command resumes where a killed run stopped.

--feature cls and mean_patch give [N, D], patches [N, L, D], after the encoder's last norm;
block:N gives the mean of the patches after block N, counted from 1, before that norm; so do
block:N:cls and block:N:patches. The crop is that of every evaluation, without augmentation.
"""

import argparse
import hashlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from eval.shared.command import run_command
from eval.shared.embeddings import INFO, Writer, damaged_rows, finish
from eval.shared.embeddings import prepare as prepare_folder
from eval.shared.labels import check_images
from eval.shared.options import check_encoder, encoder_of, parser, settings_of
from eval.shared.results import Timer, digest, output_path
from pipeline.command import early
from pipeline.errors import UserError, check_range, naming
from shard_tools.atomic import check_writable
from shard_tools.manifest import Manifest
from shard_tools.sharding.found import naming_skip

POOLS = ("cls", "mean_patch", "patches")
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class Settings:
    """What is embedded and how. images: see open_images; root: where a list's paths start;
    micro_batch: images of a forward pass; on_error: fail, or skip (a row of NaN)."""

    images: str
    feature: str = "mean_patch"
    dtype: str = "float32"
    format: str = "npy"
    root: str | None = None
    micro_batch: int = 64
    on_error: str = "fail"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    result, d = parser(str(__doc__).split("\n", 1)[0]), Settings
    result.add_argument(
        "--images", required=True,
        help="shards, a folder of images, a tar, a CSV or JSONL, or a .txt with a path per line",
    )  # fmt: skip
    result.add_argument(
        "--root", metavar="FOLDER", help="where a list's relative paths start (default: its folder)"
    )
    result.add_argument(
        "--feature", default=d.feature, help="cls, mean_patch, patches, or block:N[:cls|:patches]"
    )
    result.add_argument("--dtype", choices=DTYPES, default=d.dtype, help="of the numbers written")
    result.add_argument(
        "--format", choices=("npy", "parquet"), default=d.format,
        help="npy: numpy, memory-mappable, and names.txt; parquet: columns (needs pyarrow)",
    )  # fmt: skip
    result.add_argument(
        "--micro-batch", type=int, default=d.micro_batch, help="images per forward pass"
    )
    result.add_argument(
        "--on-error", choices=("fail", "skip"), default=d.on_error,
        help="an image that will not decode: stop, or a row of NaN, listed in embeddings.json",
    )  # fmt: skip
    for action in result._actions:
        if action.dest == "output":
            action.help = "folder to write (default: RUN/eval/embeddings-SET-FEATURE)"
    return result


def parse_feature(feature: str) -> tuple[int, str]:
    """`block:3:cls` → (3, "cls"); block 0 stands for the tokens after the last norm."""
    block, pool = 0, feature
    if feature.startswith("block:"):
        number, _, pool = feature.removeprefix("block:").partition(":")
        block, pool = int(number) if number.isdecimal() else 0, pool or "mean_patch"
        pool = pool if block else ""
    if pool not in POOLS:
        raise UserError(
            f"--feature {feature}: must be cls, mean_patch, patches, or block:N, block:N:cls or "
            "block:N:patches with N from 1"
        )
    return block, pool


def _pyarrow() -> ModuleType:
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise UserError(
            "--format parquet needs pyarrow, which is not installed: pip install pyarrow, or take "
            "--format npy"
        ) from None


def default_output(args: argparse.Namespace) -> Path:
    """--output, or a folder in the run's eval/ that has the set and the feature in its name."""
    if args.output:
        return Path(args.output)
    images = f"{Path(args.images).stem}-{digest(str(Path(args.images).absolute()))}"
    name = f"embeddings-{images}-{args.feature.replace(':', '-')}"
    return output_path(None, encoder_of(args), name).with_suffix("")


def prepare(args: argparse.Namespace) -> tuple[Settings, Path]:
    """The settings and the folder to write. UserError."""
    settings, choice = settings_of(Settings, args), encoder_of(args)
    parse_feature(settings.feature)
    check_range("--micro-batch", settings.micro_batch, at_least=1)
    if settings.format == "parquet":
        _pyarrow()
    check_encoder(choice)
    check_images(settings.images, settings.root)
    output = default_output(args)
    check_writable(output, folder=True, advice="; choose another --output")
    return settings, output


if __name__ == "__main__":  # the help, and what is seen to be wrong without torch
    early(build_parser().parse_args, prepare, ranks=True)

import torch
from torch import Tensor, nn

from eval.shared import image_sets
from eval.shared.cli import join_ranks, progress
from eval.shared.features import autocast
from eval.shared.image_sets import FileManifest
from eval.shared.session import EvalSession, session_of
from pipeline.data.batch import Batch
from pipeline.data.loader import Loader
from pipeline.data.reader import SampleError
from pipeline.runtime.same_run import data_identity


def check_feature(session: EvalSession, feature: str) -> None:
    """Refuse a block or a cls token that this encoder does not have."""
    block, pool = parse_feature(feature)
    if block > len(session.vit.blocks):
        raise UserError(f"--feature {feature}: this encoder has {len(session.vit.blocks)} blocks")
    if pool == "cls" and getattr(session.vit, "cls_token", None) is None:
        raise UserError(f"--feature {feature}: this encoder has no cls token; take mean_patch")


@torch.no_grad()
def block_tokens(session: EvalSession, pixels: Tensor, block: int) -> Tensor:
    """Tokens [b, prefix + L, D], float32, after block number `block`, counted from 1."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept.append(output.flatten(1, 2) if output.ndim == 4 else output)

    hook = session.vit.blocks[block - 1].register_forward_hook(keep)
    try:
        with autocast(session.precision, session.device):
            session.vit.forward_features(pixels)
    finally:
        hook.remove()
    return kept[0].float()


def embed(session: EvalSession, pixels: Tensor, feature: str) -> Tensor:
    """Features of normalised pixels [b, 3, H, W]: float32 [b, D], or [b, L, D] of `patches`."""
    block, pool = parse_feature(feature)
    if not block:
        if pool == "patches":
            return session.patch_tokens(pixels)
        return session.features(pixels, pool)
    tokens, prefix = block_tokens(session, pixels, block), session.vit.num_prefix_tokens
    if pool == "cls":
        return tokens[:, 0]
    return tokens[:, prefix:] if pool == "patches" else tokens[:, prefix:].mean(dim=1)


def weights_digest(session: EvalSession) -> str:
    """What stands for the encoder's weights: another encoder has another one."""
    weights = hashlib.sha256()
    for name, value in session.vit.state_dict().items():
        weights.update(name.encode())
        weights.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return weights.hexdigest()[:16]


def images_digest(manifest: Manifest) -> str:
    """What stands for the list of images: their names, labels and sizes, and where they are."""
    images = hashlib.sha256(manifest.index.tobytes())
    images.update("\n".join((*image_sets.keys(manifest), manifest.folder)).encode())
    return images.hexdigest()[:16]


def content_digest(manifest: Manifest) -> str:
    """What stands for the images themselves: of shards their sha256, of files when they were
    modified, since names and sizes are alike where others replaced them."""
    if isinstance(manifest, FileManifest):
        return str(manifest.made[image_sets.MODIFIED])[:16]
    return data_identity(manifest)[:16]


def to_rows(feature: Tensor, dtype: str, damaged: Tensor, where: str) -> np.ndarray:
    """Finite features as numpy; rows of damaged images (bool [b]) NaN. UserError for one that is
    too large."""
    with np.errstate(over="ignore"):  # said below
        rows = feature.cpu().numpy().astype(dtype)
    if not np.isfinite(rows).all():
        raise UserError(f"{where}: features beyond the range of float16; take --dtype float32")
    rows[damaged.numpy()] = np.nan
    return rows


def write_rows(s: Settings, session: EvalSession, manifest: Manifest, writer: Writer) -> int:
    """Embed this rank's share of the batches that are not there; their number on all ranks."""
    ranks = session.ranks
    todo = ranks.agree(writer.todo)
    loader = image_sets.load_batches(
        manifest, session.crop, todo[ranks.rank :: ranks.world], s.micro_batch, session.workers,
        skip=s.on_error == "skip", pin_memory=ranks.pins_memory,
    )  # fmt: skip
    text = f"embeddings of {s.images}"
    for batch in progress(_hinted(loader), ranks, text, len(loader), images=s.micro_batch):
        feature = embed(session, session.normalise(batch.image), s.feature)
        session.check_finite(feature)
        damaged = batch.key < 0
        rows = to_rows(feature, s.dtype, damaged, str(session.info.record["source"]))
        with naming(writer.folder, "cannot be written"):
            writer.write(batch.step, int(batch.sample[0]), rows, bool(damaged.any()))
    return len(todo)


def _hinted(loader: Loader) -> Iterator[Batch]:
    """The batches; an image that will not decode is an error that says what can be done."""
    try:
        yield from loader
    except SampleError as error:
        raise UserError(f"{error}; --on-error skip makes it a row of NaN") from error


def run(s: Settings, session: EvalSession, output: Path) -> dict[str, Any]:
    """Write the folder `output` (collective); its embeddings.json."""
    timer, ranks = Timer(), session.ranks
    check_feature(session, s.feature)
    arrow = _pyarrow() if s.format == "parquet" else None
    skip = s.on_error == "skip"
    with naming_skip():
        manifest = image_sets.open_images(s.images, Path(s.root) if s.root else None, skip)
    names = ranks.agree(lambda: _names(manifest))
    size = session.image_size
    blank = torch.zeros(1, 3, size, size, device=session.device)
    first = embed(session, blank, s.feature)
    session.check_finite(first)  # before a folder is made
    shape = (manifest.samples, *first.shape[1:])
    settings = {
        "feature": s.feature, "dtype": s.dtype, "format": s.format,
        "precision": session.facts(timer)["precision"], "micro_batch": s.micro_batch,
        "on_error": s.on_error, "image size": size, "resize": session.crop.resize,
        "weights": weights_digest(session), "list of images": images_digest(manifest),
        "content of images": content_digest(manifest),
    }  # fmt: skip
    if not ranks.agree(lambda: prepare_folder(output, settings, shape, s.dtype)):
        return {}
    writer = Writer(output)
    ranks.agree(writer.hold if ranks.first else lambda: None)
    written = write_rows(s, session, manifest, writer)
    writer.close()  # before they are moved and removed, which NFS does not do with open files
    ranks.sum(torch.zeros(1, device=ranks.device))  # every rank has written
    info = {
        "settings": settings, "images": image_sets.absolute(s.images),
        "root": s.root and image_sets.absolute(s.root),
        "shape": list(shape), "classes": manifest.classes,
        "folder": manifest.folder, "batches_of_this_start": written, **session.facts(timer),
        "left_out": manifest.made["left_out"] if isinstance(manifest, FileManifest) else {},
    }  # fmt: skip
    source = info["encoder"]["source"]
    info["encoder_path"] = image_sets.absolute(source) if Path(source).exists() else source
    result: dict[str, Any] = ranks.agree(lambda: _complete(output, names, info, arrow))
    return result


def _complete(
    output: Path, names: list[tuple[str, int, str]], info: dict[str, Any], arrow: ModuleType | None
) -> dict[str, Any]:
    rows = damaged_rows(output, info["settings"]["micro_batch"])
    info["damaged"] = [names[row][0] for row in rows]
    info["file"] = str(finish(output, names, info, arrow))
    return info


def _names(manifest: Manifest) -> list[tuple[str, int, str]]:
    """Key, label and path of each row. UserError where one would break a line of names.txt."""
    labels = manifest.index["label"].tolist()
    names = list(zip(image_sets.keys(manifest), labels, image_sets.paths(manifest), strict=True))
    for key, _, path in names:
        if any(sign in key + path for sign in "\t\n\r"):
            raise UserError(f"{path}: has a tab or a line end in its name; rename it")
    return names


def main() -> None:
    args = build_parser().parse_args()
    ranks = join_ranks()
    settings, output = ranks.agree(lambda: prepare(args))
    trained = settings.feature == "cls"  # the last one, which some encoders do not normalise
    session = session_of(args, ranks, "cls" if trained else "mean_patch")
    info = run(settings, session, output)
    if ranks.first and not info:
        print(f"all embeddings are there: {output / INFO}", flush=True)
    elif ranks.first:
        shape = " × ".join(map(str, info["shape"]))
        damaged, left = len(info["damaged"]), len(info["left_out"])
        note = f"; {damaged} would not decode: rows of NaN, listed in {INFO}" if damaged else ""
        note += f"; {left} left out, listed in {INFO}" if left else ""
        print(f"{shape} {settings.dtype} → {info['file']}{note}", flush=True)


if __name__ == "__main__":
    run_command(main)
