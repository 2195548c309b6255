"""The source of packages that take seconds to import, for what it says by itself."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path


@cache
def source(package: str, pattern: str) -> str:
    """The text of a package's files that match, "" where there are none; nothing is imported."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or ()
    paths = sorted(path for folder in folders for path in Path(folder).glob(pattern))
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def keys_of(package: str, file: str, name: str) -> tuple[str, ...]:
    """The keys of the dictionary NAME that a module sets, () where it cannot be told."""
    text = source(package, file)
    found = re.search(rf"^{name}\b[^={{]*= {{([^}}]*)}}", text, re.MULTILINE)
    return tuple(re.findall(r"""["'](\w+)["']:""", found[1])) if found else ()
