"""From photographs to a report in minutes, on photographs that ship inside Python packages.

    make demo                      (SEEDS=3 for mean and spread over three seeds)

Builds demo shards, pretrains R-MAE and C-MAE through the deepspeed launcher on every device there
is, probes both and a random encoder of the same architecture, and writes one report.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from eval.protocols import metric_of
from eval.report import write_report
from eval.reporting.run_records import read_result, with_beside
from eval.reporting.tables import spread_text
from eval.shared.command import run_command
from eval.shared.demo_shards import DONE, make_demo_shards
from eval.shared.processes import call, stop_on_sigterm
from pipeline.config.recipe import load_recipe
from pipeline.errors import UserError, check_range, naming
from pipeline.help_text import HelpFormatter
from pipeline.method.checks import check_objective
from shard_tools.atomic import check_writable
from shard_tools.cli import counted
from shard_tools.cores import cores
from shard_tools.demo_images import check_counts

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("demo_rmae", "demo_cmae")
NAMES = {"demo_rmae": "R-MAE (RelaxMIM)", "demo_cmae": "C-MAE without mask tokens"}
PARTITIONS = 8  # of the demo recipes: the number of ranks must divide it
REPORTS = ("report.html", "report.md")


@dataclass(frozen=True)
class Settings:
    """Seeds 0 … seeds - 1, folders, numbers of crops, ranks, and recipe keys to change."""

    seeds: int
    output: Path
    data: Path
    train: int
    val: int
    ranks: int
    overrides: tuple[str, ...] = ()

    @property
    def shards(self) -> Path:
        return self.data / "shards"


@dataclass(frozen=True)
class Gain:
    """Linear-probe top-1 of a pretrained and of a random encoder, in percent: of the mean of the
    patches, and of the cls token where its probe has not diverged."""

    recipe: str
    seed: int
    pretrained: float
    random: float
    cls: float | None = None
    random_cls: float | None = None


def parse_args(argv: Sequence[str] | None = None) -> Settings:
    """The command line. UserError for seeds or ranks that cannot be."""
    parser = argparse.ArgumentParser(
        description="Demo: shards, pretraining of R-MAE and C-MAE, linear probe, report.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=1, help="run seeds 0 … N - 1")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the runs")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="folder of the images")
    parser.add_argument("--train", type=int, default=8192, help="training crops")
    parser.add_argument("--val", type=int, default=4096, help="validation crops")
    parser.add_argument(
        "--ranks", type=int, default=argparse.SUPPRESS,
        help=f"devices to use, a divisor of {PARTITIONS} (default: the most GPUs, or else cores)",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a recipe key"
    )
    args = parser.parse_args(argv)
    ranks = getattr(args, "ranks", 1)
    check_range("--seeds", args.seeds, at_least=1)
    if ranks < 1 or PARTITIONS % ranks:
        raise UserError(f"--ranks {ranks}: must be a divisor of {PARTITIONS}")
    check_counts(args.train, args.val)
    for recipe in RECIPES:
        check_objective(load_recipe(recipe, args.set))
    check_writable(args.output, folder=True, advice="; choose another --output")
    if not (args.data / DONE).is_file():
        check_writable(args.data, folder=True, advice="; choose another --data")
    return Settings(
        args.seeds,
        args.output,
        args.data,
        args.train,
        args.val,
        ranks if "ranks" in args else device_count(),
        tuple(args.set),
    )


def device_count() -> int:
    """GPUs, or CPU cores where there is none: the most that divides the demo's partitions."""
    import torch

    most = torch.cuda.device_count() or cores()
    return max(n for n in range(1, PARTITIONS + 1) if PARTITIONS % n == 0 and n <= most)


def clear(output: Path) -> None:
    """Remove an earlier demo's folder. UserError where it has anything that no demo wrote."""
    if not output.exists():
        return
    with naming(output, "cannot be read"):
        names = sorted(path.name for path in output.iterdir())
    other = [n for n in names if n not in REPORTS and not _is_run(n)]
    if other:
        raise UserError(
            f"{output}: has {other[0]}, which no demo wrote, and the demo would remove it; "
            "choose another --output"
        )
    with naming(output, "cannot be removed"):
        shutil.rmtree(output)


def _is_run(name: str) -> bool:
    recipe, _, seed = name.rpartition("-")
    return recipe in RECIPES and seed.isdigit()


def pretrain(settings: Settings, recipe: str, seed: int, run: Path) -> float:
    """One real run through the deepspeed launcher."""
    from pipeline.distributed import free_port  # imports torch

    command: list[str | Path] = [
        Path(sys.executable).parent / "deepspeed", "-q",
        "--num_accelerators", str(settings.ranks), "--master_port", str(free_port()),
        ROOT / "pipeline" / "pretrain.py",
        "--ds_config", ROOT / "ds_configs" / "zero2.json",
        "--recipe", ROOT / "pipeline" / "recipes" / f"{recipe}.yaml",
        "--set", f"seed={seed}",
        "--data", settings.shards / "train",
        "--output", run,
    ]  # fmt: skip
    for override in settings.overrides:
        command += ["--set", override]
    threads, ranks = max(1, cores() // settings.ranks), counted(settings.ranks, "rank")
    return call(f"pretrain {NAMES[recipe]}, seed {seed}, {ranks}", command, threads)


def probe(settings: Settings, run: Path, seed: int, *, random: bool) -> dict[str, float]:
    """Cached linear probe of a run's encoder, or of a random one of its architecture: feature →
    top-1 %."""
    result = run / "eval" / f"linprobe-cached{'-random' if random else ''}.json"
    command: list[str | Path] = [
        sys.executable, ROOT / "eval" / "linprobe.py", "--encoder", run,
        "--protocol", "cached", "--feature", "mean_patch", "--also", "cls",
        "--batch-size", "512",
        "--train", settings.shards / "train", "--val", settings.shards / "val",
        "--seed", str(seed), "--output", result,
    ]  # fmt: skip
    what = f"linear probe of {'a random encoder' if random else run.name}"
    call(what, command + (["--random"] if random else []), cores())
    return {one["feature"]: metric_of(one, result) for one in with_beside(read_result(result))}


def summary(gains: list[Gain]) -> list[str]:
    """A line for each method: mean and, over several seeds, standard deviation."""
    lines = []
    for recipe in RECIPES:
        mine = [g for g in gains if g.recipe == recipe]
        gain = [g.pretrained - g.random for g in mine]
        columns = ([g.pretrained for g in mine], [g.random for g in mine], gain)
        texts = [spread_text(values, 1) for values in columns]
        lines.append(
            f"{NAMES[recipe]:<24} linear probe {texts[0]} %, random encoder {texts[1]} %, "
            f"gain {texts[2]} points"
        )
    return lines


def cls_summary(gains: list[Gain]) -> str:
    """What the probes read, and what they find in the cls token."""
    parts = {NAMES[r]: [g.cls for g in gains if g.recipe == r] for r in RECIPES}
    parts["random encoder"] = [g.random_cls for g in gains]
    texts = []
    for name, values in parts.items():
        found = [value for value in values if value is not None]
        texts.append(f"{name} {mean(found):.1f} %" if found else f"{name} -")
    return f"these probes read the mean of the patch tokens; the cls token: {', '.join(texts)}"


def demo(settings: Settings) -> None:
    """All steps in order; prints the summary and where the report is."""
    start = time.perf_counter()
    clear(settings.output)
    make_demo_shards(settings.data, settings.train, settings.val)
    runs, gains = [], []
    for seed in range(settings.seeds):
        random = None
        for recipe in RECIPES:
            run = settings.output / f"{recipe}-{seed}"
            pretrain(settings, recipe, seed, run)
            score = probe(settings, run, seed, random=False)
            if random is None:
                random = probe(settings, run, seed, random=True)
            runs.append(run)
            means = score["mean_patch"], random["mean_patch"]
            gains.append(Gain(recipe, seed, *means, score.get("cls"), random.get("cls")))
    page, _ = write_report(runs, settings.output / REPORTS[0], "relaxmim demo")
    print("\n" + "\n".join([*summary(gains), cls_summary(gains)]))
    minutes, ranks = (time.perf_counter() - start) / 60, counted(settings.ranks, "rank")
    print(f"took {minutes:.1f} minutes on {ranks}")
    print(f"report: {page.resolve()}")


def main() -> None:
    settings = parse_args()
    stop_on_sigterm()
    demo(settings)


if __name__ == "__main__":
    run_command(main)
