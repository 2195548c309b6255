"""The tars below a folder."""

from __future__ import annotations

import os
from pathlib import Path

from shard_tools.sharding.archives import is_tar
from shard_tools.sharding.folders import walk_once
from shard_tools.sharding.found import is_system_folder


def tar_files(top: Path) -> list[str]:
    """Names, relative to `top` and sorted, of all tars below it, also compressed ones; no hidden
    files and no system folders. Links are followed, each folder is listed once. OSError where a
    folder cannot be read."""
    found: list[str] = []
    for here, folders, files in walk_once(top):
        folders[:] = sorted(name for name in folders if not is_system_folder(name))
        found += [
            os.path.relpath(os.path.join(here, name), top)
            for name in files
            if is_tar(name) and not name.startswith(".")
        ]
    return sorted(found)
