"""Ctrl-C, and a terminal that goes away, in tests."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT is a KeyboardInterrupt here and in children that are started inside, and SIGHUP ends
    them; where the suite runs in the background they are ignored, which children would inherit."""
    before = [
        signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.signal(signal.SIGHUP, signal.SIG_DFL),
    ]
    try:
        yield
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)
