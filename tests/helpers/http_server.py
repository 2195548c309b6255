"""An HTTP server on loopback whose next answers can be cut, flipped, stalled or refused."""

import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Server(ThreadingHTTPServer):
    """Files by path; `faults` says what to do to the next requests of a path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.delay = 0.0
        self.stopping = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def write(self, out: Any, data: bytes) -> None:
        """The body of an answer."""
        out.write(data)

    def put(self, folder: Path) -> None:
        self.files = {f"/{path.name}": path.read_bytes() for path in folder.iterdir()}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Server = self.server  # type: ignore[assignment]
        with server.lock:
            server.counts[self.path] += 1
            queue = server.faults.get(self.path)
            fault = queue.pop(0) if queue else ""
        time.sleep(server.delay)
        data = server.files.get(self.path)
        if data is None or fault == "busy":
            self.send_error(404 if data is None else 503)
            return
        if fault == "flip":
            data = data[:100] + bytes([data[100] ^ 4]) + data[101:]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)  # forked readers may hold it open too
            return
        if fault == "stall":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            server.stopping.wait(30)
            return
        server.write(self.wfile, data)

    def do_HEAD(self) -> None:
        data = self.server.files.get(self.path)  # type: ignore[attr-defined]
        self.send_response(404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass
