"""The environment .venv itself: whether it can be used, how it is made, what pip puts into it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setup_run import ROOT, run

VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements.lock"


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


def remove_pillow() -> None:
    """Take away Pillow and pillow-simd, and what an interruption left of either."""
    remove_halves()
    run([PYTHON, "-m", "pip", "uninstall", "-y", "pillow", "pillow-simd"], 300)
    shutil.rmtree(site_packages() / "PIL", ignore_errors=True)


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
