"""The source of packages that take seconds to import, for what it says by itself."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path


@cache
def source(package: str, pattern: str) -> str:
    """The text of a package's files that match, "" where there are none; nothing is imported."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or ()
    paths = sorted(path for folder in folders for path in Path(folder).glob(pattern))
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
