"""The source of packages, read as text because importing them takes seconds."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path


@cache
def source(package: str, pattern: str) -> str:
    """The text of a package's files that match a pattern, "" if none does; imports nothing."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or ()
    paths = sorted(path for folder in folders for path in Path(folder).glob(pattern))
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def keys_of(file: str, name: str) -> tuple[str, ...]:
    """The keys of a dictionary literal in a file of the pipeline, () if they cannot be read."""
    text = source("pipeline", file)
    found = re.search(rf"^{name}\b[^={{]*= {{([^}}]*)}}", text, re.MULTILINE)
    return tuple(re.findall(r"""["'](\w+)["']:""", found[1])) if found else ()
