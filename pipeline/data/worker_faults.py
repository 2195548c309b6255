"""Why a loader worker died, as one sentence instead of torch's tracebacks."""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Sequence

from pipeline.errors import UserError

SHARED = "/dev/shm"  # noqa: S108  (where batches pass from worker to main process)
PREFETCH = 2  # micro-batches that each worker keeps ready
_NO_SHARED_MEMORY = (
    "allocate shared memory", "unable to write to file </torch",
    "unable to resize file </torch", "unable to mmap",
)  # fmt: skip
_NO_FILES = ("ancdata", "Too many open files")


def shared_bytes(workers: int, images: int, image_size: int) -> int:
    """Bytes of shared memory that the workers of a rank need; images: of a micro-batch."""
    return workers * (PREFETCH + 1) * images * image_size**2 * 3


def worker_fault(
    error: BaseException, workers: int, images: int, image_size: int, codes: Sequence[int] = ()
) -> UserError | None:
    """The sentence for an error that a lost or starved worker raises here; None for any other.

    images: of a micro-batch, crops counted one by one. codes: exit codes of the workers that have
    ended, -N by signal N; torch's own error does not always name it.
    """
    text = str(error)
    ended = next((signal.strsignal(-code) for code in codes if code < 0), None)
    named = re.search(r"DataLoader worker \(pid \d+\) is killed by signal: ([^.]*)", text)
    broken = isinstance(error, ConnectionError | EOFError | FileNotFoundError)  # its pipe
    lost = bool(named) or "exited unexpectedly" in text or (broken and ended is not None)
    by = named[1].strip() if named else ended
    out = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    less = "use fewer workers (data.workers of the recipe, --workers) or a smaller micro-batch"
    if any(word in text for word in _NO_SHARED_MEMORY) or (lost and by == "Bus error"):
        what = f"{SHARED} is full"
        less += ", or start the container with a larger --shm-size or --ipc=host"
    elif any(word in text for word in _NO_FILES) or getattr(error, "errno", 0) == errno.EMFILE:
        what = "too many files are open"
        less += ", or raise the limit (ulimit -n)"
    elif lost and by == "Killed":
        what = "a loader worker was killed (the kernel does so where memory runs out)"
    elif lost:
        what = f"a loader worker ended by itself ({by or 'no signal'})"
    elif out or "Caught MemoryError in DataLoader" in text:
        what = "no memory is left for the loader"
    else:
        return None
    mebibytes = shared_bytes(workers, images, image_size) >> 20
    return UserError(
        f"{what}: {workers} workers keep {workers * (PREFETCH + 1)} micro-batches of {images} "
        f"images of {image_size} × {image_size} pixels in shared memory, {mebibytes} MiB; {less}"
    )
