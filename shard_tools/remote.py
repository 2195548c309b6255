"""Files at URLs (any of fsspec), read as long as bytes come and in spite of faults that pass."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import UserError, reason

log = logging.getLogger(__name__)
T = TypeVar("T")
STALL = 60.0  # seconds without a byte after which a connection is given up
TRIES = 6  # pauses of about 0.5, 1, 2, 4 and 8 s pass between them
PAUSE = 0.5


def read_url(url: str) -> bytes:
    """The content of the file at `url`."""

    def read() -> bytes:
        filesystem, where = _open(url)
        return filesystem.cat_file(where)

    return _persistently(url, read)


def fetch_url(url: str, path: Path) -> None:
    """Copy the file at `url` into the local file `path`."""
    _persistently(url, lambda: copy_file(url, path))


def copy_file(url: str, path: Path) -> None:
    """Copy the file at `url` into the local file `path`, in one try, however long it takes while
    bytes come."""
    filesystem, where = _open(url)
    filesystem.get_file(where, str(path))


def pause_before(attempt: int, pause: float) -> None:
    """Wait before try number `attempt` (the second is 1), each time twice as long; not all ranks of
    a run for the same time."""
    time.sleep(pause * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # only remote folders need it

    options = {}
    if url.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        # By default a download may last five minutes however fast it is; S3 and GCS have limits
        # per read of their own.
        timeout = ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)
        options = {"client_kwargs": {"timeout": timeout}}
    return url_to_fs(url, **options)


def _persistently(url: str, attempt: Callable[[], T]) -> T:
    for tries in range(1, TRIES):
        try:
            return attempt()
        except Exception as error:
            if not _passes(error):
                raise
            log.warning("%s: %s; trying again", url, reason(error, url))
        pause_before(tries, PAUSE)
    return attempt()


def _passes(error: Exception) -> bool:
    """Whether another try may help: a server that is overloaded, or from which nothing comes any
    more. Not where none was met, whose name is wrong more often than it is down. S3's and GCS's
    backends try again by themselves."""
    if isinstance(error, UserError):
        return False
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status in (408, 425, 429) or status >= 500
    name = type(error).__name__
    if isinstance(error, TimeoutError | asyncio.TimeoutError | ConnectionResetError):
        return name != "ConnectionTimeoutError"
    return name in ("ClientPayloadError", "ServerDisconnectedError")
