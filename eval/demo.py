"""The whole way in minutes, on photographs that ship inside Python packages.

    make demo                      (SEEDS=3 for mean and spread over three seeds)

Builds demo shards, pretrains R-MAE and C-MAE through the deepspeed launcher on every device there
is, probes both and a random encoder of the same architecture, and writes one report.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

from pipeline.errors import UserError
from shard_tools.cores import cores

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("demo_rmae", "demo_cmae")
NAMES = {"demo_rmae": "R-MAE (RelaxMIM)", "demo_cmae": "C-MAE without mask tokens"}
PARTITIONS = 8  # of the demo recipes: the number of ranks must divide it


class DemoError(UserError):
    """A step of the demo that failed, in one sentence."""


@dataclass(frozen=True)
class Gain:
    """Linear-probe top-1 of a pretrained and of a random encoder, in percent."""

    recipe: str
    seed: int
    pretrained: float
    random: float


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Demo: shards, pretraining of R-MAE and C-MAE, linear probe, report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=1, help="run seeds 0 … N - 1")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the runs")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="folder of the images")
    parser.add_argument("--train", type=int, default=4096, help="training crops")
    parser.add_argument("--val", type=int, default=1024, help="validation crops")
    parser.add_argument("--ranks", type=int, default=device_count(), help="devices to use")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a recipe key"
    )
    return parser.parse_args(argv)


def device_count() -> int:
    """GPUs, or CPU cores where there is none: the most that divides the demo's partitions."""
    most = torch.cuda.device_count() or cores()
    return max(n for n in range(1, PARTITIONS + 1) if PARTITIONS % n == 0 and n <= most)


def call(what: str, command: list[str | Path], threads: int) -> float:
    """Run a command of this project and return its seconds. DemoError where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    print(f"\n== {what}", flush=True)
    start = time.perf_counter()
    code = subprocess.run([str(c) for c in command], env=environment, check=False).returncode
    if code:
        raise DemoError(f"{what} failed with exit code {code}: {' '.join(map(str, command))}")
    return time.perf_counter() - start


def make_shards(data: Path, train: int, val: int) -> None:
    """DATA/shards of `train` and `val` crops; nothing to do where they are there already."""
    done = data / "shards" / "done.json"
    wanted = {"train": train, "val": val}
    if done.is_file() and json.loads(done.read_text()) == wanted:
        print(f"demo shards are there: {data / 'shards'}")
        return
    for folder in ("images", "shards"):
        shutil.rmtree(data / folder, ignore_errors=True)
    tool = ROOT / "shard_tools"
    python = sys.executable
    counts = ["--train", str(train), "--val", str(val)]
    call(
        "photographs from scikit-image and scikit-learn",
        [python, tool / "demo_images.py", data / "images", *counts],
        1,
    )
    for part in ("train", "val"):
        source, shards = data / "images" / part, data / "shards" / part
        command: list[str | Path] = [python, tool / "make_shards.py", source, shards]
        command += ["--shard-size", "1MiB"]
        call(f"shards of {part}", command, 1)
    done.write_text(json.dumps(wanted))


def pretrain(args: argparse.Namespace, recipe: str, seed: int, run: Path) -> float:
    """One real run through the deepspeed launcher."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command: list[str | Path] = [
        Path(sys.executable).parent / "deepspeed", "-q",
        "--num_accelerators", str(args.ranks), "--master_port", str(port),
        ROOT / "pipeline" / "pretrain.py",
        "--ds_config", ROOT / "ds_configs" / "zero2.json",
        "--recipe", ROOT / "pipeline" / "recipes" / f"{recipe}.yaml",
        "--set", f"seed={seed}",
        "--data", args.data / "shards" / "train",
        "--output", run,
    ]  # fmt: skip
    for override in args.set:
        command += ["--set", override]
    threads = max(1, cores() // args.ranks)
    return call(f"pretrain {NAMES[recipe]}, seed {seed}, {args.ranks} ranks", command, threads)


def probe(args: argparse.Namespace, run: Path, seed: int, *, random: bool) -> float:
    """Cached linear probe of a run's encoder, or of a random one of its architecture: top-1 %."""
    result = run / "eval" / f"linprobe-cached{'-random' if random else ''}.json"
    command: list[str | Path] = [
        sys.executable, ROOT / "eval" / "linprobe.py", "--encoder", run,
        "--protocol", "cached", "--feature", "mean_patch", "--batch-size", "512",
        "--train", args.data / "shards" / "train", "--val", args.data / "shards" / "val",
        "--seed", str(seed), "--output", result,
    ]  # fmt: skip
    what = f"linear probe of {'a random encoder' if random else run.name}"
    call(what, command + (["--random"] if random else []), cores())
    return float(json.loads(result.read_text())["top1"])


def summary(gains: list[Gain]) -> list[str]:
    """A line for each method: mean and, over several seeds, standard deviation."""
    lines = []
    for recipe in RECIPES:
        mine = [g for g in gains if g.recipe == recipe]
        texts = []
        for values in (
            [g.pretrained for g in mine],
            [g.random for g in mine],
            [g.pretrained - g.random for g in mine],
        ):
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            texts.append(f"{mean(values):.1f}{spread}")
        lines.append(
            f"{NAMES[recipe]:<24} linear probe {texts[0]} %, random encoder {texts[1]} %, "
            f"gain {texts[2]} points"
        )
    return lines


def demo(args: argparse.Namespace) -> None:
    """All steps in order; prints the summary and where the report is."""
    start = time.perf_counter()
    make_shards(args.data, args.train, args.val)
    shutil.rmtree(args.output, ignore_errors=True)  # the demo's own folder
    runs, gains = [], []
    for seed in range(args.seeds):
        random = None
        for recipe in RECIPES:
            run = args.output / f"{recipe}-{seed}"
            pretrain(args, recipe, seed, run)
            score = probe(args, run, seed, random=False)
            if random is None:
                random = probe(args, run, seed, random=True)
            runs.append(run)
            gains.append(Gain(recipe, seed, score, random))
    report = args.output / "report.html"
    command = [sys.executable, ROOT / "eval" / "report.py", *runs, "--output", report]
    call("report", [*command, "--title", "relaxmim demo"], 1)
    print("\n" + "\n".join(summary(gains)))
    print(f"took {(time.perf_counter() - start) / 60:.1f} minutes on {args.ranks} ranks")
    print(f"report: {report.resolve()}")


def main() -> int:
    """Run it; returns the exit code."""
    args = parse_args()
    if args.seeds < 1 or args.ranks < 1 or PARTITIONS % args.ranks:
        print(
            f"error: --seeds must be at least 1 and --ranks a divisor of {PARTITIONS}",
            file=sys.stderr,
        )
        return 2
    try:
        demo(args)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
