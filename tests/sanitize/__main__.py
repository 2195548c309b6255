"""The C extensions under AddressSanitizer and UndefinedBehaviorSanitizer. `make test-sanitize`.

    python tests/sanitize

Builds them with both sanitizers into build/sanitize and gives them the whole image corpus, also
the files that shard_tools/image_file would keep from them, and thousands of damaged ones. Exit
code 0: no report; 1: a sanitizer stopped it; 2: it cannot be built here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
SOURCES = (
    ROOT / "pipeline/data/_jpegcrop.c",
    ROOT / "shard_tools/image_file/_jpegcheck.c",
    ROOT / "shard_tools/image_file/_jpegmarkers.c",
)
BUILT = ROOT / "build" / "sanitize"
CC = shlex.split(os.environ.get("CC", "cc"))
FLAGS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
         "-fno-omit-frame-pointer", "-shared", "-fPIC", "-Wall", "-Wextra")  # fmt: skip
DAMAGED = 6000  # files


def build() -> str:
    """Compile what has changed; what LD_PRELOAD needs. Raises OSError or CalledProcessError."""
    BUILT.mkdir(parents=True, exist_ok=True)
    include = f"-I{sysconfig.get_path('include')}"
    for source in SOURCES:
        built = BUILT / f"{source.stem}.so"
        parts = (source, Path(__file__), *source.parent.glob("*.h"))
        if built.exists() and built.stat().st_mtime > max(p.stat().st_mtime for p in parts):
            continue
        subprocess.run([*CC, *FLAGS, include, source, "-ljpeg", "-lm", "-o", built], check=True)
    names = ("libasan.so", "libubsan.so")
    found = [
        subprocess.run([*CC, f"-print-file-name={n}"], capture_output=True, text=True, check=True)
        for n in names
    ]
    return " ".join(str(Path(done.stdout.strip()).resolve()) for done in found)


def main() -> int:
    try:
        preload = build()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: no C extension can be built with sanitizers ({error})", file=sys.stderr)
        return 2
    environment = os.environ | {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # Python itself frees little at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # so that reads behind the bytes of a file are seen
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}",
    }
    command = [sys.executable, __file__, "--inside"]
    return 1 if subprocess.run(command, env=environment, check=False).returncode else 0


def load(name: str) -> ModuleType:
    """An extension that `build` made."""
    spec = importlib.util.spec_from_file_location(name, BUILT / f"{name}.so")
    assert spec is not None
    assert spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension


def inside() -> None:
    """In a process with the sanitizers: every file, several rectangles, both kinds of loops."""
    import numpy as np
    from image_corpus import corpus
    from PIL import Image
    from shard_samples import encode

    def noisy(number: int) -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (40, 130, 3), np.uint8)
        return encode(Image.fromarray(pixels), quality=30, subsampling=number)

    extension, check, markers = load("_jpegcrop"), load("_jpegcheck"), load("_jpegmarkers")
    rng, calls = np.random.default_rng(0), 0
    recent: list[bytes] = []  # files that are walked together

    def feed(data: bytes) -> None:
        nonlocal calls
        recent.append(data)
        if len(recent) == 7:
            check.sound_until(recent)
            recent.clear()
        markers.cut(data, int(len(data) * rng.choice([0.5, 1, 1.03])))
        check.next_marker(data, int(rng.integers(0, len(data) + 2)))
        try:
            width, height = extension.size(data)
        except (ValueError, OverflowError):
            width, height = 61, 45
        width, height = min(width, 3000), min(height, 3000)
        left, top = rng.integers(0, width), rng.integers(0, height)
        inner = (left, top, rng.integers(left, width) + 1, rng.integers(top, height) + 1)
        thin = rng.uniform(0, 1, 2) * (width, height)
        boxes = [(0, 0, width, height), inner, (*thin, *(thin + rng.uniform(0.1, 9, 2)))]
        for box in boxes:
            size = int(rng.choice([1, 3, 8, 33, 64]))
            out = np.zeros((size, size, 3), np.uint8)
            inside, flip, cubic, entropy = (bool(n) for n in rng.integers(0, 2, 4))
            simd = int(rng.integers(0, 3))
            whole = [int(n) for n in box] if inside else [float(n) for n in box]
            with contextlib.suppress(ValueError, OverflowError):
                extension.decode(data, out, size, *whole, inside, flip, cubic, simd, entropy)
            calls += 1

    files = [data for data, _ in corpus().values()]
    for data in files:
        for _ in range(4):
            feed(data)
    jpegs = [data for data in files if data[:2] == b"\xff\xd8" and len(data) < 4000]
    jpegs += [markers.cut(data, 2 * len(data))[0] for data in (noisy(n) for n in range(3))] * 10
    for _ in range(DAMAGED):
        damaged = bytearray(jpegs[rng.integers(len(jpegs))])
        marks = [at + 1 for at in range(len(damaged) - 1) if damaged[at : at + 1] == b"\xff"]
        for _ in range(rng.integers(1, 5)):
            at = int(len(damaged) * rng.random() ** 2)
            at = int(rng.choice(marks)) if rng.random() < 0.3 else at
            damaged[at] = rng.choice([rng.integers(256), 0xD0 + rng.integers(10)])
        feed(bytes(damaged[: len(damaged) - rng.integers(0, 2) * rng.integers(len(damaged) // 2)]))
    print(f"{calls} calls on {len(files)} files and {DAMAGED} damaged ones: no report")


if __name__ == "__main__":
    sys.exit(inside() if sys.argv[1:] == ["--inside"] else main())
