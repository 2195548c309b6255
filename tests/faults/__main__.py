"""Break real runs in every way known, and check that nothing is lost.

    PYTHONPATH=tests/helpers python tests/faults [--kills 50] [--seed 0] [--quick] [--write FILE]

The last line printed is JSON: {"kills": 50, "lost": 0, "faults": 15, "failed": 0, …}.
Exit code: 0 where nothing was lost and nothing failed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import children
import faults
from children import ROOT, Config, result, run_to_end
from kills import Tally, evaluation_kills, pretraining_kills


def make_shards(folder: Path) -> Path:
    """train/ and val/ shards of 96 and 48 photographs, by the real tools."""
    tools = ROOT / "shard_tools"
    photos = ["--train", "96", "--val", "48", "--size", "24"]
    commands = [[tools / "demo_images.py", folder / "images", *photos]]
    for part in ("train", "val"):
        images = folder / "images" / part
        commands.append([tools / "make_shards.py", images, folder / part, "--shard-size", "20KiB"])
    for command in commands:
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return folder / "train"


def all_kills(data: Path, folder: Path, args: argparse.Namespace) -> Tally:
    """Four kills of five hit pretraining, the others an evaluation."""
    tally, rng = Tally(), random.Random(args.seed)
    evals = args.kills // 5
    pretraining_kills(data, folder, rng, tally, args.kills - evals)
    if evals:
        run = folder / "encoder"
        assert run_to_end(Config(), data, run) == [0]
        evaluation_kills(data, run, folder, rng, tally, evals)
    return tally


def all_faults(data: Path, folder: Path, chosen: tuple) -> list[tuple[str, str, str]]:
    """(fault, outcome, what was seen) of each."""
    config = Config("mae", 0, workers=1)
    reference = folder / "reference"
    assert run_to_end(config, data, reference) == [0]
    rows = []
    for fault in chosen:
        place = folder / fault.__name__
        place.mkdir()
        try:
            seen = fault(faults.Place(place, data, config, result(reference)))
            outcome = "passed"
        except faults.SkippedError as reason:
            outcome, seen = "skipped", str(reason)
        except (AssertionError, TimeoutError, OSError) as error:
            outcome, seen = "FAILED", " ".join(str(error).split())[:500] or type(error).__name__
        rows.append((str(fault.__doc__), outcome, seen))
        print(f"{outcome}: {fault.__doc__}: {seen}", flush=True)
        if outcome != "FAILED":
            shutil.rmtree(place, ignore_errors=True)
    return rows


def table(tally: Tally, rows: list[tuple[str, str, str]], summary: dict) -> str:
    """docs/faults.md."""
    lines = [
        "# What was broken on purpose, and the results",
        "",
        "Written by `make test-faults`: the real trainer and evaluations, tiny models, one or",
        "two ranks on a CPU, fp32. `tests/faults/` has the code; random choices have a seed.",
        "",
        f"**Kill -9**: {summary['kills']} random kills over {tally.runs} runs (MAE, R-MAE, C-MAE;",
        "ZeRO 0 to 3; accumulation, EMA teacher, loader workers, two ranks; finetuning and linear",
        f"probe). Lost: {summary['lost']}. A run that was killed up to four times ends with the",
        "undisturbed run's weights, moments, teacher, encoder and logged losses, bit for bit.",
        "",
        "| killed while | kills |",
        "|---|---|",
        *(f"| {phase} | {count} |" for phase, count in sorted(tally.kills.items())),
        "",
        "| fault | outcome | seen |",
        "|---|---|---|",
        *(f"| {fault} | {outcome} | {seen} |" for fault, outcome, seen in rows),
        "",
        f"`{json.dumps(summary)}`",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few faults")
    parser.add_argument("--write", type=Path, help="the table")
    args = parser.parse_args()
    begun = time.monotonic()
    children.prepare()
    folder = Path(tempfile.mkdtemp(prefix="relaxmim-faults-"))
    data = make_shards(folder)
    tally = all_kills(data, folder, args)
    rows = all_faults(data, folder, faults.QUICK if args.quick else faults.FAULTS)
    outcomes = [outcome for _, outcome, _ in rows]
    summary = {
        "kills": sum(tally.kills.values()),
        "lost": len(tally.lost),
        "faults": len(rows),
        "failed": outcomes.count("FAILED"),
        "skipped": outcomes.count("skipped"),
        "minutes": round((time.monotonic() - begun) / 60, 1),
    }
    if args.write:
        args.write.write_text(table(tally, rows, summary))
    for sentence in tally.lost:
        print(f"lost: {sentence}")
    bad = summary["lost"] + summary["failed"] > 0
    print(f"logs: {folder}") if bad else shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(summary), flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
