from typing import Any

def size(data: bytes) -> tuple[int, int]: ...
def read_many(files: Any, buffer: Any) -> None: ...
def decode_many(
    files: Any, buffer: Any, boxes: Any, out: Any, done: Any, size: int, bicubic: bool
) -> None: ...
def decode(
    data: bytes,
    out: Any,  # writable buffer of size * size * 3 bytes
    size: int,
    left: float,
    top: float,
    right: float,
    bottom: float,
    inside: bool,
    flip: bool,
    bicubic: bool,
    simd: int = 2,
    entropy: bool = True,
) -> bool: ...
