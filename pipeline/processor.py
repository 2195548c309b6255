"""What Linux says of this machine's processor."""

from __future__ import annotations

import hashlib
import platform
import re
from dataclasses import dataclass
from pathlib import Path

# Of x86's flags those that a compiler makes use of (-march=native); others come and go with kernels
# and hypervisors. ARM's are all of this kind.
_INSTRUCTIONS = re.compile(
    r"(avx|sse|ssse|fma|amx|bmi|aes|vaes|sha|gfni|pclmul|vpclmul)|(abm|adx|f16c|movbe|popcnt|xop)$"
)
BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # units that multiply it


@dataclass(frozen=True)
class Processor:
    """The first processor: its maker's name, what it can do (`avx2`, …), and its number (family,
    model and stepping), empty where unknown."""

    name: str
    flags: frozenset[str]
    number: str = ""

    @property
    def instructions(self) -> str:
        """A short name of its instruction set: what is compiled for one may crash on another."""
        x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
        used = sorted(flag for flag in self.flags if not x86 or _INSTRUCTIONS.match(flag))
        return hashlib.sha256(" ".join(used).encode()).hexdigest()[:8]


def processor(proc: Path = Path("/proc")) -> Processor:
    """From proc/cpuinfo; torch 2.8 has no call for it."""
    try:
        lines = (proc / "cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    rows = [line.split(":", 1) for line in lines if ":" in line]

    def first(*titles: str) -> str:
        return next((text.strip() for key, text in rows if key.strip() in titles), "")

    numbers = (first(title) for title in ("cpu family", "model", "stepping"))
    return Processor(
        first("model name"),
        frozenset(first("flags", "Features").split()),
        "-".join(filter(None, numbers)),
    )
