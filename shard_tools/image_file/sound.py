"""The entropy-coded data of a JPEG, checked without a decode by _jpegcheck.c."""

from __future__ import annotations

try:  # built at set-up where a compiler is
    import shard_tools.image_file._jpegcheck as _jpegcheck
except ImportError:
    _jpegcheck = None  # type: ignore[assignment]


def sound_until(data: bytes) -> int:
    """Index of the end marker of a baseline JPEG of one scan which, if `read_header` accepts it,
    libjpeg decodes without an error or a warning; -1 if it is not one, or only libjpeg can say."""
    return _jpegcheck.sound_until(data) if _jpegcheck is not None else -1
