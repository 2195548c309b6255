"""A store on loopback with a bandwidth and a latency: files over HTTP, all connections together."""

from __future__ import annotations

import threading
import time

from http_server import Server

_PIECE = 16 << 10  # bytes between two looks at the clock


class SlowStore(Server):
    """Serves `files` at `bandwidth` bytes per second in all, each answer `delay` seconds late."""

    def __init__(self, bandwidth: float, latency: float) -> None:
        super().__init__()
        self.bandwidth, self.delay = bandwidth, latency
        self.free_at, self.sent, self.pace = 0.0, 0, threading.Lock()

    def write(self, out: object, data: bytes) -> None:
        """Each piece takes its turn on the one line that all connections share."""
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            with self.pace:
                begin = max(self.free_at, time.monotonic())
                self.free_at = begin + len(piece) / self.bandwidth
                self.sent += len(piece)
                until = self.free_at
            time.sleep(max(0.0, until - time.monotonic()))
            out.write(piece)  # type: ignore[attr-defined]
