"""Subsets that an evaluation trains on, which it keeps beside its result."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError, naming
from shard_tools.atomic import remove_own
from shard_tools.manifest import INDEX, MANIFEST, NAMES, SHARDS, Manifest, is_remote, read_manifest
from shard_tools.subset import kept_shards, take, write_subset

HELD_OUT = 0.1  # share of the training images on which a learning rate is chosen


def held_out_count(samples: int) -> int:
    """How many of the training images those are."""
    return max(1, round(HELD_OUT * samples))


def keep_subset(
    manifest: Manifest, path: Path, samples: np.ndarray, record: dict[str, Any]
) -> None:
    """`write_subset`, unless the folder is that subset already; one of other shards or samples, or
    an incomplete one, is replaced. UserError where the folder holds anything else."""
    if path.exists() and not _is_subset(manifest, path, samples, record):
        with naming(path, "cannot be written"):
            remove_own(
                path, (MANIFEST, INDEX, NAMES, SHARDS), "; move it, or choose another --output"
            )
    if not path.exists():
        write_subset(manifest, path, samples, record)


def _is_subset(manifest: Manifest, path: Path, samples: np.ndarray, record: dict[str, Any]) -> bool:
    """Whether the folder holds what `write_subset` would write, all of it."""
    wanted = take(manifest, samples, record, "subset")
    try:
        known = read_manifest(path, check_shards=False)
        rows, names = known.index, known.names
    except UserError:
        return False
    return (
        all(known.made.get(key) == wanted.made[key] for key in ("of", "options"))
        and list(known.shards) == kept_shards(manifest, wanted.shard)
        and np.array_equal(rows, wanted.rows)
        and names == wanted.names
        and _folder(known) == _folder(manifest)
    )


def _folder(manifest: Manifest) -> str:
    """Where the shards are."""
    where = manifest.folder
    return where if is_remote(where) else str(Path(where).resolve())
