"""What a compiler adds to .venv: pillow-simd, relaxmim's own C and DeepSpeed's fused ops.

Each is built within a time limit, and only where a compiler and the headers are; without them the
wheels work.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

from setup_run import BUILD, ROOT, Failed, run, tail
from setup_venv import LOCK, PYTHON, VENV, ask, pip, remove_halves, remove_pillow

PILLOW_SIMD = "pillow-simd==12.1.1.post0"
# What pillow-simd must read before it replaces Pillow: the formats of the shard tools.
FORMATS = ("jpg", "zlib", "webp", "libtiff")
# A header, and the Debian package it is in.
HEADERS = {
    "Python.h": "python3-dev",
    "jpeglib.h": "libjpeg-dev",
    "zlib.h": "zlib1g-dev",
    "tiffio.h": "libtiff-dev",
    "webp/decode.h": "libwebp-dev",
}


class NotBuilt(RuntimeError):
    """What was to be compiled is not, and .venv works without it; the reason."""


@dataclass(frozen=True)
class Tools:
    """The compilers and the headers (keys of HEADERS) of this machine."""

    cc: bool
    cxx: bool
    headers: frozenset[str]

    def pillow(self) -> bool:
        """Whether a pillow-simd with every format of FORMATS can be built."""
        return self.cc and self.headers >= set(HEADERS)

    def decoder(self) -> bool:
        """Whether relaxmim's own C can be built."""
        return self.cc and self.headers >= {"Python.h", "jpeglib.h"}

    def ops(self) -> bool:
        """Whether DeepSpeed's fused ops can be built."""
        return self.cxx and "Python.h" in self.headers

    def missing(self) -> list[str]:
        """Debian packages that would let everything be built."""
        compiler = [] if self.cc and self.cxx else ["build-essential"]
        return compiler + [p for h, p in HEADERS.items() if h not in self.headers]


def look() -> Tools:
    """Ask the C preprocessor which headers there are (it knows the distribution's folders)."""
    cc, cxx = (os.environ.get(k, d).split() for k, d in (("CC", "cc"), ("CXX", "c++")))
    asked = "".join(f"#if __has_include(<{h}>)\n<{h}>\n#endif\n" for h in HEADERS)
    include = ["-I", sysconfig.get_path("include"), "-I", sysconfig.get_path("platinclude")]
    found = ""
    with contextlib.suppress(OSError):
        command = [*cc, "-E", "-P", *include, "-"]
        found = subprocess.run(command, input=asked, capture_output=True, text=True).stdout
    headers = frozenset(h for h in HEADERS if f"<{h}>" in found)
    return Tools(bool(shutil.which(cc[0])), bool(shutil.which(cxx[0])), headers)


def advice(tools: Tools) -> str:
    """The line that says what is not built here and which packages would change that, or ''."""
    packages = tools.missing()
    if not packages:
        return ""
    less = [
        name
        for name, possible in (
            ("pillow-simd (plain Pillow instead)", tools.pillow()),
            ("the cropping JPEG decoder (simplejpeg)", tools.decoder()),
            ("DeepSpeed's fused ops (torch's)", tools.ops()),
        )
        if not possible
    ]
    return f"not built here: {', '.join(less)}; for more: apt install {' '.join(packages)}"


def pillow(possible: bool, folder: Path, avx2: bool) -> str:
    """pillow-simd in the place of Pillow where it can be built; otherwise the locked Pillow."""
    if not possible:
        plain_pillow()
        return ""
    try:
        wheel = pillow_wheel(folder, avx2)
        remove_pillow()
        pip("--no-index", wheel)
    except Failed as error:
        why = "".join(tail(1))
        plain_pillow()
        raise NotBuilt(f"{error}: {why}") from None
    return "pillow-simd" + (" (AVX2)" if avx2 else "")


def pillow_wheel(folder: Path, avx2: bool) -> Path:
    """The wheel of pillow-simd in `folder`, built if not there. Failed if it lacks a format."""
    for kept in folder.glob(f"{PILLOW_SIMD.replace('-', '_').replace('==', '-')}-*.whl"):
        with contextlib.suppress(Failed):  # its libraries may have gone since
            check_formats(kept)
            return kept
    made = BUILD / "tmp" / "wheel"
    # Its setup.py finds Debian's folder of the architecture (tiff.h) by pkg-config or by this.
    architecture = f"/usr/include/{sysconfig.get_config_var('MULTIARCH') or ''}"
    include = ":".join(filter(None, (os.environ.get("C_INCLUDE_PATH"), architecture)))
    run(
        [PYTHON, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir",
         "--no-binary", "pillow-simd", "-w", made, PILLOW_SIMD],
        600, CC=os.environ.get("CC", "cc") + (" -mavx2" if avx2 else ""), C_INCLUDE_PATH=include,
    )  # fmt: skip
    wheel = next(made.glob("pillow_simd-*.whl"))
    check_formats(wheel)
    folder.mkdir(parents=True, exist_ok=True)
    return wheel.replace(folder / wheel.name)


def check_formats(wheel: Path) -> None:
    """Failed where the Pillow in a wheel lacks one of FORMATS, or cannot be imported."""
    scratch = BUILD / "tmp" / "pillow"
    shutil.rmtree(scratch, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch)
    check = f"""import sys; sys.path.insert(0, {str(scratch)!r}); from PIL import features
lacking = [f for f in {FORMATS} if not features.check(f)]
sys.exit("built without " + ", ".join(lacking) if lacking else 0)"""
    run([PYTHON, "-I", "-c", check], 60)


def plain_pillow() -> None:
    """The locked Pillow, if it is not what Python imports already."""
    locked = re.findall("^pillow==(.*)$", LOCK.read_text(), re.MULTILINE)[0]
    with contextlib.suppress(subprocess.CalledProcessError):
        if ask("-I", "-c", "from PIL import Image; print(Image.__version__)") == locked:
            return
    remove_pillow()
    pip("--only-binary", ":all:", f"pillow=={locked}")


def c_sources(kind: str = "c") -> list[Path]:
    """The C files: the cropping JPEG decoder, the check of JPEGs and what puts restart markers into
    them; libraries are built beside them."""
    rooms = ROOT / "pipeline", ROOT / "shard_tools"
    return sorted(path for room in rooms for path in room.rglob(f"_*.{kind}"))


def relaxmim(decoder: bool) -> str:
    """This checkout, editable, with its compiled parts where there is a compiler."""
    remove_halves()
    suffix = ask("-I", "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
    libraries = [source.with_name(f"{source.stem}{suffix}") for source in c_sources()]
    for library in libraries:
        library.unlink(missing_ok=True)  # of other sources
    pip("--no-build-isolation", "--no-index", "-e", ROOT, limit=600)
    absent = [source.name for source, lib in zip(c_sources(), libraries, strict=True)
              if not lib.exists()]  # fmt: skip
    if decoder and absent:
        raise NotBuilt(
            f"{' and '.join(absent)} {'was' if len(absent) == 1 else 'were'} not compiled"
        )
    return "the JPEG decoder" if decoder else ""


def fused_ops(possible: bool) -> str:
    """DeepSpeed's fused ops; where they fail cannot_build() of pipeline/distributed.py says so."""
    failed = VENV / "torch_extensions" / "failed"
    failed.unlink(missing_ok=True)
    if not possible:
        return ""
    try:
        run(
            [PYTHON, "-c", "from pipeline.runtime.engine import build_ops; print(*build_ops())"],
            1200,
        )
    except Failed as error:
        failed.parent.mkdir(exist_ok=True)
        failed.write_text(f"{error}\n")
        raise NotBuilt(f"{error}: {''.join(tail(1))}") from None
    return "DeepSpeed's fused ops"
