"""A bundle for a node without a network that has torch: wheels, this checkout, install.sh.

    make bundle PYTHON_VERSION=3.12 TORCH=keep

Writes build/bundle-<python>.tar with the wheels of what requirements.lock pins for a run, without
torch and what only torch needs (TORCH=keep; TORCH=add takes them too), the files that git tracks,
and the decoder compiled for that Python where its headers are here. Run by .venv's python.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# What a node with torch has with it, and what stays behind with it.
TORCH = ("torch", "torchvision")
# Reads the devkit's meta.mat and gives an interval its quantile; 35 MB, so a bundle goes without.
LARGE = ("scipy",)
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "linux_x86_64",
)
LIMIT = 60_000_000  # bytes of a bundle without torch


class BundleError(RuntimeError):
    """A bundle that cannot be made; the message says why."""


def locked() -> dict[str, str]:
    """Versions in requirements.lock by canonical name."""
    lines = (ROOT / "requirements.lock").read_text().split()
    pairs = (line.split("==") for line in lines)
    return {canonicalize_name(name): version for name, version in pairs}


def needed(python: str, keep_torch: bool) -> list[str]:
    """`name==version` of everything that a run imports under that Python, sorted.

    keep_torch: without torch, torchvision and what they need, which came to the node with them.
    """
    versions = locked()
    there = closure(TORCH, python) if keep_torch else set()
    names = closure([*project_requirements(), "ninja", "setuptools"], python) - there - {*LARGE}
    missing = sorted(names - versions.keys())
    if missing:
        raise BundleError(f"requirements.lock: has no {missing[0]}, which a run needs; make lock")
    return sorted(f"{name}=={versions[name]}" for name in names)


def closure(texts: Iterable[str], python: str) -> set[str]:
    """Canonical names of requirements and of all that they require, by this environment's
    metadata."""
    seen = set[str]()
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    waiting = [Requirement(text) for text in texts]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen:
            continue
        seen.add(name)
        try:
            own = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:  # Pillow, in whose place pillow-simd is
            own = []
        extras = requirement.extras or {""}
        waiting += [r for r in own if any(applies(r, {**environment, "extra": e}) for e in extras)]
    return seen


def applies(requirement: Requirement, environment: dict[str, str]) -> bool:
    """Whether its marker holds, without extras."""
    return requirement.marker is None or requirement.marker.evaluate(environment)


def project_requirements() -> list[str]:
    """The dependencies of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [str(text) for text in project["dependencies"]]


def fetch(wanted: list[str], python: str, folder: Path) -> None:
    """The wheels of that Python; DeepSpeed, which has none, is built here (Python code only)."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    source = [item for item in wanted if item.startswith(("deepspeed==", "hjson=="))]
    wheels = [item for item in wanted if item not in source]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    run([*pip, "download", "--no-deps", "--only-binary", ":all:", "--python-version", python,
         "--implementation", "cp", *platforms, "-d", str(folder), *wheels])  # fmt: skip
    # Ops are compiled on the node, where its GPUs and its compiler are.
    environment = os.environ | {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    for item in source:
        run(
            [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), item],
            environment,
        )
    odd = [p.name for p in folder.glob("*.whl") if f"cp{sys.version_info.minor}" in p.name]
    foreign = f"{sys.version_info.major}.{sys.version_info.minor}" != python
    if foreign and any(name.startswith(("deepspeed", "hjson")) for name in odd):
        raise BundleError(f"{odd[0]}: was built for this Python, not for {python}")


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """A command, or its last line of complaint as a BundleError."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise BundleError(f"{' '.join(command[2:5])} failed: {last}")


def checkout(folder: Path) -> None:
    """The files that git tracks, as they are here."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split("\0")
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def decoder(folder: Path, python: str) -> str:
    """Compile the decoder into the checkout by that Python, and what sets restart markers, with
    libjpeg inside where it can be, and the check of JPEGs, which needs none; what became of the
    decoder."""
    interpreter = find_python(python)
    if interpreter is None:
        return f"not built: no python{python} with its headers here; the node takes simplejpeg"
    code = "import sysconfig as s; print(s.get_path('include'), s.get_config_var('EXT_SUFFIX'))"
    found = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True)
    include, suffix = found.stdout.split()

    def compiled(source: str, libraries: list[str]) -> bool:
        path = folder / source
        command = [os.environ.get("CC", "cc"), "-O3", "-shared", "-fPIC", f"-I{include}",
                   str(path), "-o", str(path.with_name(path.stem + suffix)),
                   *libraries]  # fmt: skip
        return subprocess.run(command, capture_output=True).returncode == 0

    compiled("shard_tools/image_file/_jpegcheck.c", [])
    target = Path(f"pipeline/data/_jpegcrop{suffix}")
    for library in (["-l:libjpeg.a", "-Wl,--exclude-libs,ALL"], ["-ljpeg"]):
        if compiled("pipeline/data/_jpegcrop.c", library):
            compiled("shard_tools/image_file/_jpegmarkers.c", library)
            shared = library == ["-ljpeg"]
            return f"built as {target.name}" + (", needs the node's libjpeg" if shared else "")
    return "not built: it does not compile here; the node takes simplejpeg"


def find_python(version: str) -> str | None:
    """An interpreter of that version with its headers: this one, of PATH, or of pyenv."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" == version:
        return sys.executable if Path(sysconfig.get_path("include"), "Python.h").is_file() else None
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [*pyenv.glob(f"versions/{version}.*/bin/python")]
    candidates += [Path(found)] if (found := shutil.which(f"python{version}")) else []
    code = (
        "import os, sys, sysconfig as s; v = '%d.%d' % sys.version_info[:2]; "
        "sys.exit(v != sys.argv[1] or not os.path.isfile(s.get_path('include') + '/Python.h'))"
    )
    for candidate in candidates:
        done = subprocess.run([candidate, "-c", code, version], capture_output=True)
        if done.returncode == 0:
            return str(candidate)
    return None


def build(python: str, keep_torch: bool, output: Path) -> str:
    """Write the bundle; a line about it."""
    wanted = needed(python, keep_torch)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as name:
        folder = Path(name, "relaxmim")
        (folder / "wheels").mkdir(parents=True)
        checkout(folder)
        fetch(wanted, python, folder / "wheels")
        built = decoder(folder, python)
        (folder / "wheels/requirements.txt").write_text("\n".join(wanted) + "\n")
        (folder / "wheels/python").write_text(f"{python}\n")
        shutil.copy2(ROOT / ".ci/install.sh", folder / "install.sh")
        partial = Path(name, "bundle.tar")
        with tarfile.open(partial, "w") as tar:
            tar.add(folder, "relaxmim")
        os.replace(partial, output)
    size = output.stat().st_size
    if keep_torch and size > LIMIT:
        raise BundleError(f"{output}: {size / 1e6:.0f} MB, more than {LIMIT / 1e6:.0f}")
    return f"{output}: {size / 1e6:.1f} MB, {len(wanted)} wheels; the decoder is {built}"


def main() -> int:
    """The command line; its exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--python", required=True, help="version of the node's Python: 3.12")
    parser.add_argument("--torch", choices=("keep", "add"), default="keep")
    args = parser.parse_args()
    major, _, minor = args.python.partition(".")
    if major != "3" or not minor.isdecimal() or int(minor) < 11:
        print(
            f"error: PYTHON_VERSION={args.python}: must be 3.11 or newer, as 3.12", file=sys.stderr
        )
        return 2
    output = ROOT / f"build/bundle-{args.python}.tar"
    try:
        print(build(args.python, args.torch == "keep", output))
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("on the node: tar xf bundle-….tar && relaxmim/install.sh [PYTHON]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
