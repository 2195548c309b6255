"""Why libraries cannot be loaded where a process may have few addresses or files."""

from __future__ import annotations

import errno
import re
import resource
import sys
from types import TracebackType

from pipeline.errors import UserError, refuse

# The dynamic linker's words; of a mount without execution it says "Operation not permitted" too.
_NO_ROOM = re.compile(r"failed to map segment(?!.*not permitted)|annot allocate memory")


def limit_reached(error: BaseException) -> str:
    """The limit of this process (`ulimit -v`, `ulimit -n`) for which an import failed, and what to
    do; "" where it was none."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError) and behind.errno == errno.EMFILE:
            files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            return (
                f"a process may open only {files} files here, too few to load what training needs: "
                "raise the limit (ulimit -n 1024)"
            )
        room = resource.getrlimit(resource.RLIMIT_AS)[0]
        short = isinstance(behind, MemoryError) or _NO_ROOM.search(str(behind))
        if short and isinstance(behind, MemoryError | ImportError | OSError) and room != -1:
            return (
                f"a process may have only {room / 2**30:.3g} GiB of addresses here (ulimit -v), "
                "too few to load torch: raise the limit or lift it (ulimit -v unlimited; of a "
                "batch system's job its request for memory, such as h_vmem)"
            )
        behind = behind.__cause__ or behind.__context__
    return ""


def explain_limits() -> None:
    """From here on an import that ends this process because of such a limit is one sentence, with
    exit code 2."""
    sys.excepthook = _hook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if limit := limit_reached(error):
        sys.exit(refuse(UserError(limit)))
    sys.__excepthook__(kind, error, trace)
