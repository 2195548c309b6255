"""Ctrl-C in tests."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT is a KeyboardInterrupt here and in children that are started inside; where the suite
    runs in the background it is ignored, which they would inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
