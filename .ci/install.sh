#!/usr/bin/env bash
# Install this bundle without a network: .venv here, beside the torch of PYTHON, which stays as it is.
#   ./install.sh [PYTHON]     (default: python3 of PATH)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${1:-python3}
wanted=$(<"$root/wheels/python")

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

type -P "$python" >/dev/null || fail "$python: no such command; give the Python that has torch"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[[ $version == "$wanted" ]] ||
  fail "$python is Python $version, the bundle is for $wanted: make bundle PYTHON_VERSION=$version"
kept=''
if ! ls "$root"/wheels/torch-*.whl >/dev/null 2>&1; then
  kept=$("$python" -c 'import torch; print(torch.__version__)' 2>/dev/null) ||
    fail "$python has no torch that can be imported; the bundle brings none (make bundle TORCH=add)"
  "$python" -c 'import torchvision' 2>/dev/null ||
    fail "$python has torch $kept and no torchvision that works, which timm needs: install the one of this torch"
fi

"$python" -m venv "$root/.venv"
"$root/.venv/bin/python" -m pip -q --disable-pip-version-check install --no-index --no-deps \
  --find-links "$root/wheels" -r "$root/wheels/requirements.txt"
# This checkout, installed as itself (its version goes into manifests), and behind the wheels what
# the given Python has: torch and what it needs.
folders=$("$python" -c 'import sys
print("\n".join(path for path in sys.path if path.endswith("-packages")))')
"$root/.venv/bin/python" - "$root" "$folders" <<'END'
import sys, sysconfig, tomllib
from pathlib import Path
root, folders = sys.argv[1:]
site = Path(sysconfig.get_path("purelib"))
version = tomllib.loads(Path(root, "pyproject.toml").read_text())["project"]["version"]
own = site / f"relaxmim-{version}.dist-info"
own.mkdir(exist_ok=True)
(own / "METADATA").write_text(f"Metadata-Version: 2.1\nName: relaxmim\nVersion: {version}\n")
(site / "relaxmim-bundle.pth").write_text(f"{root}\n{folders}\n")
END
now=$("$root/.venv/bin/python" -c 'import deepspeed, timm, torch, pipeline; print(torch.__version__)' | tail -n 1) ||
  fail "what was installed cannot be imported; see above"
[[ -z $kept || $now == "$kept" ]] || fail "torch is $now in $root/.venv, was $kept"
printf 'installed with torch %s; now: %s/launch.sh --check\n' "$now" "$root"
