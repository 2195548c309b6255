"""What Linux says of this machine's processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # units that multiply it


@dataclass(frozen=True)
class Processor:
    """The first processor: its maker's name, what it can do (`avx2`, …), and its number (family,
    model and stepping), empty where unknown."""

    name: str
    flags: frozenset[str]
    number: str = ""


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
