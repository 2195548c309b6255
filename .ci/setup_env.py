"""Set-up in five stages: .venv from requirements.lock, and what a compiler adds. `make setup`.

The system's Python runs this before anything is installed, so it imports the standard library
only; it is here, beside the check that every change has to pass, because no package is it part
of. A stage that has ended leaves a stamp in .venv/setup with the hash of its inputs and is skipped
from then on, without the network; one that was interrupted starts again and keeps what is whole.
Source is compiled for pillow-simd, the JPEG decoder and DeepSpeed's fused ops only, within a time
limit, and only where a compiler and the headers are; without them the wheels work.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from setup_run import BUILD, LOG, ROOT, Failed, alone, hint, run, tail

VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements.lock"
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


class SetupError(RuntimeError):
    """Set-up cannot end in working order; one sentence."""


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
        """Whether pipeline/_jpegcrop.c can be built."""
        return self.cc and self.headers >= {"Python.h", "jpeglib.h"}

    def ops(self) -> bool:
        """Whether DeepSpeed's fused ops can be built."""
        return self.cxx and "Python.h" in self.headers

    def missing(self) -> list[str]:
        """Debian packages that would let everything be built."""
        compiler = [] if self.cc and self.cxx else ["build-essential"]
        return compiler + [p for h, p in HEADERS.items() if h not in self.headers]


@dataclass(frozen=True)
class Stage:
    """One step: its stamp's name, the line shown, what its result depends on, and its work.

    `work` returns what it made ("" where it took the way without a compiler) and `possible` says
    whether more than that could be made on this machine now.
    """

    name: str
    title: str
    key: str
    possible: bool
    work: Callable[[], str]


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


def stages(tools: Tools) -> list[Stage]:
    """The five stages on this machine."""
    lock = LOCK.read_text()
    cpu = Path("/proc/cpuinfo")
    avx2 = cpu.exists() and re.search(r"\bavx2\b", cpu.read_text()) is not None
    files = ROOT / "setup.py", ROOT / "pyproject.toml", *c_sources(), *c_sources("h")
    source = [path.read_text() for path in files]
    python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    simd, decoder, ops = tools.pillow(), tools.decoder(), tools.ops()
    wheel = BUILD / "wheels" / f"{sys.implementation.cache_tag}{'-avx2' if avx2 else ''}"
    return [
        Stage("venv", f"making .venv with {python} (seconds)", "", False, make_venv),
        Stage(
            "wheels",
            f"installing the {len(lock.split())} packages of requirements.lock "
            "(3 GB to fetch, 6 GB on disk; two minutes from a fast mirror)",
            digest(lock), False, install_wheels,
        ),
        Stage(
            "pillow",
            f"building {PILLOW_SIMD} from source (1 MB; one minute)" if simd
            else "pillow-simd: skipped, plain Pillow stays",
            digest(lock, PILLOW_SIMD, str(avx2)), simd, lambda: pillow(simd, wheel, avx2),
        ),
        Stage(
            "relaxmim",
            f"installing relaxmim itself{' and compiling its JPEG decoder' * decoder} (seconds)",
            digest(lock, *source), decoder, lambda: relaxmim(decoder),
        ),
        Stage(
            "ops",
            "compiling DeepSpeed's fused ops (two to three minutes)" if ops
            else "DeepSpeed's fused ops: skipped, torch's take over",
            digest(lock), ops, lambda: fused_ops(ops),
        ),
    ]  # fmt: skip


def digest(*parts: str) -> str:
    """A short hash of a stage's inputs."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def is_done(stage: Stage, *, retry: bool = False) -> bool:
    """Whether its stamp holds for these inputs. `retry`: a build that failed is tried again."""
    if stage.name == "venv":
        return venv_fault() is None
    try:
        key, made = (VENV / "setup" / stage.name).read_text().split("\n")[:2]
    except (OSError, ValueError):
        return False
    if made == "failed":
        return key == stage.key and not retry
    return key == stage.key and (made != "" or not stage.possible)


def stamp(stage: Stage, made: str) -> None:
    """Say that a stage has ended, and what it made; whole or not at all."""
    path = VENV / "setup" / stage.name
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w") as file:
        file.write(f"{stage.key}\n{made}\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


# ---------------------------------------------------------------- the stages' work


def venv_fault() -> str | None:
    """Why .venv cannot be used (None: it can): half made, of a Python that is gone, or moved."""
    probe = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        version = ask("-I", "-S", "-c", probe)
        config = (VENV / "pyvenv.cfg").read_text()
        script = (VENV / "bin" / "pip").read_text()
    except (OSError, subprocess.CalledProcessError):
        return "it is half made, or its Python is gone"
    if not re.search(rf"^version(_info)? = {re.escape(version)}\.", config, re.MULTILINE):
        return f"it was made by another Python than the {version} it now runs"
    made_in = re.search(r"(/.*)/bin/python", script)
    if made_in is None or not Path(made_in[1]).exists() or not VENV.samefile(made_in[1]):
        return "it was made elsewhere and moved here"
    # venv ends with pip, whose RECORD pip writes last, and then the activation scripts.
    record = (VENV / "lib" / f"python{version}" / "site-packages").glob("pip-*/RECORD")
    if not list(record) or not (VENV / "bin" / "activate").exists():
        return "it is half made"
    return None


def make_venv() -> str:
    """An empty .venv, whatever was left of an earlier one."""
    run([base_python(), "-m", "venv", "--clear", VENV], 300)
    return "made"


def base_python() -> str:
    """The interpreter to make .venv with: not the one inside it, which make has on its PATH."""
    python: str = getattr(sys, "_base_executable", None) or sys.executable
    return os.path.realpath(python) if VENV in Path(python).parents else python


def lacking() -> str:
    """Debian's packages without which .venv cannot be made, or torch not imported."""
    needed = {
        "python3-venv": "import ensurepip, venv",
        "libstdc++6": "import ctypes; ctypes.CDLL('libstdc++.so.6')",
    }
    runs = {
        package: subprocess.run([base_python(), "-c", code], stderr=subprocess.DEVNULL)
        for package, code in needed.items()
    }
    return " ".join(package for package, done in runs.items() if done.returncode)


def install_wheels() -> str:
    """Exactly requirements.lock: wheels, but for deepspeed, which is Python code."""
    remove_halves()
    if list(site_packages().glob("pillow_simd-*")):  # it shares a folder with pillow
        remove_pillow()
    wheels = ("--use-pep517", "--only-binary", ":all:", "--no-binary", "deepspeed")
    pip(*wheels, "-r", LOCK, limit=7200)
    run([PYTHON, "-c", "import torch, torchvision, timm, scipy, sklearn, matplotlib"], 300)
    return "wheels"


def remove_halves() -> None:
    """Forget packages whose installation or removal was cut off, so that pip does them again.

    pip writes a distribution's RECORD last, and renames what it removes to ~name first.
    """
    folder = site_packages()
    for info in folder.glob("*.dist-info"):
        if not (info / "RECORD").is_file():
            shutil.rmtree(info)
    for left in folder.glob("~*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


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


def remove_pillow() -> None:
    """Take away Pillow and pillow-simd, and what an interruption left of either."""
    remove_halves()
    run([PYTHON, "-m", "pip", "uninstall", "-y", "pillow", "pillow-simd"], 300)
    shutil.rmtree(site_packages() / "PIL", ignore_errors=True)


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
    """DeepSpeed's fused ops; can_build() of pipeline/distributed.py hears of it where they fail."""
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


def site_packages() -> Path:
    """The folder of .venv that packages are installed in."""
    return next((VENV / "lib").glob("python3.*")) / "site-packages"


def ask(*arguments: str) -> str:
    """What .venv's Python prints, without a look at the checkout."""
    command = [str(PYTHON), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def pip(*arguments: str | Path, limit: float = 300) -> None:
    """Install into .venv, without dependencies: the lock file names all of them."""
    quiet = ("--no-input", "--progress-bar", "off")
    run([PYTHON, "-m", "pip", "install", "--no-deps", *quiet, *arguments], limit)


# ---------------------------------------------------------------- the command


def do(number: int, stage: Stage, total: int) -> None:
    """One stage with its lines. SetupError where it fails; an optional build may, and is said."""
    line = f"[{number}/{total}] {stage.title}"
    print(line, flush=True)
    with LOG.open("a") as log:
        log.write(f"\n== {line}\n")
    begun = time.monotonic()
    try:
        made = stage.work()
    except NotBuilt as error:
        made = "failed"
        print(f"      not built: {error} (see {LOG}); `make setup` tries again", flush=True)
    except Failed as error:
        print("\n".join(f"      | {text[:160]}" for text in tail(15)), file=sys.stderr)
        why = hint() and f"\n       {hint()}"
        raise SetupError(f"{stage.title.split(' (')[0]}: {error} (see {LOG}){why}") from None
    stamp(stage, made)
    if time.monotonic() - begun > 1:
        print(f"      {time.monotonic() - begun:.0f} s", flush=True)


def set_up(*, retry: bool) -> None:
    """Whatever is not done yet; prints nothing where all is, unless it was asked to. SetupError."""
    tools = look()
    if all(is_done(stage, retry=retry) for stage in stages(tools)):
        if retry:
            print(f"set-up is complete; {advice(tools) or 'everything is built'}")
        return
    with alone():
        begun = time.monotonic()
        if advice(tools):
            print(advice(tools), flush=True)
        fault = venv_fault()
        if fault and lacking():
            raise SetupError(f"{base_python()} lacks what set-up needs: apt install {lacking()}")
        if fault and VENV.exists():
            print(f".venv is made again: {fault}", flush=True)
        todo = stages(tools)
        for number, stage in enumerate(todo, 1):
            if not is_done(stage, retry=retry):
                do(number, stage, len(todo))
        print(f"set-up done in {time.monotonic() - begun:.0f} s", flush=True)


def main() -> int:
    """The exit code: 0 in working order, 2 where the user can mend it, 130 when interrupted."""
    parser = argparse.ArgumentParser(description="Make .venv; see the head of this file.")
    parser.add_argument("--retry", action="store_true", help="try builds that failed again")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036
        have = ".".join(map(str, sys.version_info[:2]))
        print(
            f"error: Python >= 3.11 is needed, not {have}: set PYTHON=python3.11", file=sys.stderr
        )
        return 2
    inside = Path(sys.executable).parent.resolve() == PYTHON.parent.resolve()
    if not inside and venv_fault() is None:  # what is built is built for .venv's Python
        os.execv(PYTHON, [str(PYTHON), "-E", "-S", *sys.argv])  # noqa: S606
    try:
        set_up(retry=arguments.retry)
    except KeyboardInterrupt:
        print("set-up interrupted; the same command resumes it", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error.filename or 'set-up'}: {error.strerror}", file=sys.stderr)
        return 2
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def interrupt(number: int, _: object) -> None:
    """SIGTERM and SIGHUP end set-up as Ctrl-C does: with what it had started."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    sys.exit(main())
