"""Environments of the peers that the benches measure, one below build/bench for each.

    python tests/bench/peer_envs.py [NAME …]            (make bench-peers)

Each holds the peer's current release from the package index and sees this environment's packages
behind its own (a .pth line), so torch is there once. A peer that cannot be installed leaves its
reason in a file `missing`; `--retry` tries those again, deleting a folder brings the newest
release.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).parents[2] / "build" / "bench"
_LIMIT = 1800  # seconds for one installation
_TAIL = 300  # characters of an error that are kept

_PILLOW = "pillow"  # every peer that decodes by Pillow has the stock one, not pillow-simd


@dataclass(frozen=True)
class Peer:
    """packages: what pip installs; module: what must be importable; distribution: whose version
    counts. Without `wheels`, pip may compile."""

    packages: tuple[str, ...]
    module: str
    distribution: str
    wheels: bool = True


PEERS = {
    "pillow": Peer((_PILLOW,), "PIL", "pillow"),
    "torchvision": Peer((), "torchvision", "torchvision"),
    "webdataset": Peer(("webdataset", _PILLOW), "webdataset", "webdataset"),
    "streaming": Peer(
        ("mosaicml-streaming", _PILLOW), "streaming", "mosaicml-streaming", wheels=False
    ),
    "dali": Peer(("nvidia-dali-cuda130",), "nvidia.dali", "nvidia-dali-cuda130"),
    "spdl": Peer(("spdl",), "spdl.io", "spdl-io"),
    "torchcodec": Peer(("torchcodec",), "torchcodec", "torchcodec"),
    "kornia-rs": Peer(("kornia-rs",), "kornia_rs", "kornia-rs"),
    "litdata": Peer(("litdata", _PILLOW), "litdata", "litdata"),
    "nvimgcodec": Peer(("nvidia-nvimgcodec-cu13",), "nvidia.nvimgcodec", "nvidia-nvimgcodec-cu13"),
    "energon": Peer(("megatron-energon", _PILLOW), "megatron.energon", "megatron-energon"),
    "ffcv": Peer(("ffcv", "numba"), "ffcv", "ffcv", wheels=False),
}


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment (which may not be there)."""
    return CACHE / name / "bin" / "python"


def version_of(name: str) -> str:
    """The version of a peer that is installed and importable. Raises LookupError with the reason
    why it is not."""
    missing, python = CACHE / name / "missing", python_of(name)
    if missing.is_file():
        raise LookupError(missing.read_text().strip())
    if not python.is_file():
        raise LookupError("not installed; make bench-peers does it")
    peer = PEERS[name]
    code = f"import importlib.metadata as m, {peer.module}; print(m.version('{peer.distribution}'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LookupError(last_line(done.stderr))
    return done.stdout.split()[-1]


def install(name: str) -> str:
    """Make the environment of a peer unless it is there; the reason if it cannot be had, or ""."""
    home, peer = CACHE / name, PEERS[name]
    if (home / "missing").is_file():
        return (home / "missing").read_text().strip()
    if (home / "ready").is_file():
        return ""
    shutil.rmtree(home, ignore_errors=True)
    venv.create(home, with_pip=False, symlinks=True)
    paths = {"base": str(home), "platbase": str(home)}
    own = Path(sysconfig.get_path("purelib", vars=paths))
    (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    reason = _pip(home, peer) if peer.packages else ""
    if not reason:
        try:
            version_of(name)
        except LookupError as error:
            reason = f"installed, but: {error}"
    (home / ("missing" if reason else "ready")).write_text(reason + "\n")
    return reason


def _pip(home: Path, peer: Peer) -> str:
    """Install; the reason why not, or ""."""
    command = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "-q"]
    only = ["--only-binary", ":all:"] if peer.wheels else ["--no-build-isolation"]
    try:
        done = subprocess.run(
            [*command, "--disable-pip-version-check", *only, *peer.packages],
            capture_output=True, text=True, check=False, timeout=_LIMIT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"pip took more than {_LIMIT} s"
    (home / "pip.log").write_text(done.stdout + done.stderr)
    return last_line(done.stderr) if done.returncode else ""


def last_line(text: str) -> str:
    """The line of an error output that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return ([*lines[-1:], *errors[-1:]] or ["no reason given"])[-1][:_TAIL]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--retry", action="store_true", help="try again what could not be had")
    options = parser.parse_args()
    unknown = set(options.names) - set(PEERS)
    if unknown:
        parser.error(f"no peer {sorted(unknown)[0]!r}; there are {', '.join(PEERS)}")
    for name in options.names or PEERS:
        if options.retry:
            (CACHE / name / "missing").unlink(missing_ok=True)
        reason = install(name)
        if reason:
            print(f"{name}: {reason}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
