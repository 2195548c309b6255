"""A grid of recipe overrides: its cells, their commands, and what they were made with."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from shlex import split
from typing import Any

from eval.paper.commands import ROOT, cost, pretrain_flops
from eval.paper.job_runner import Command, diverged
from eval.paper.made_with import check_recipe
from eval.protocols import by_key, keys
from eval.shared.labels import images_of, set_of
from pipeline.config.ds_config import open_ds_config
from pipeline.config.recipe import Recipe, dump_recipe, load_recipe
from pipeline.errors import UserError, naming
from pipeline.method.checks import check_objective
from pipeline.runtime.settings import total_steps
from shard_tools.atomic import write_json
from shard_tools.manifest import read_manifest

LAUNCH = ROOT / "launch.sh"
RECORD = "sweep.json"
CELLS = "cells"  # what the tasks of an array keep of themselves
OPEN, CLOSE = "[{(", "]})"


@dataclass(frozen=True)
class Sweep:
    """A grid: recipe key → values (as words of a command line), seeds 0 … seeds - 1, evaluations
    with further options, overrides of every cell, and where."""

    recipe: str
    grid: dict[str, tuple[str, ...]]
    seeds: int
    evals: tuple[str, ...]
    output: Path
    train: str
    val: str
    overrides: tuple[str, ...] = ()
    eval_args: dict[str, tuple[str, ...]] = field(default_factory=dict)
    pretrain_args: tuple[str, ...] = ()

    @property
    def cells(self) -> list["Cell"]:
        """Every point of the grid with every seed, seeds innermost."""
        points = product(*(zip([k] * len(v), v, strict=True) for k, v in self.grid.items()))
        return [Cell(point, seed) for point in points for seed in range(self.seeds)]


@dataclass(frozen=True)
class Cell:
    """One pretraining: (key, value) of the grid, and a seed."""

    point: tuple[tuple[str, str], ...]
    seed: int

    @property
    def sets(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.point]

    @property
    def label(self) -> str:
        """The point in words, without the seed."""
        return ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in self.point)

    @property
    def name(self) -> str:
        """The folder of its run."""
        words = [f"{key.rsplit('.', 1)[-1]}-{value}" for key, value in self.point]
        text = "-".join([*words, str(self.seed)])
        kept = "".join(c if c.isalnum() or c in "._+-" else " " for c in text)
        return "-".join(kept.split())


def read_grid(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`KEY=V1,V2` → key and values; a comma inside brackets does not part them."""
    grid: dict[str, tuple[str, ...]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        values = tuple(v.strip() for v in parts(text))
        if not key or not equals or not all(values):
            raise UserError(f"--grid {word!r}: should be KEY=VALUE,VALUE,…")
        if key in grid or len(set(values)) < len(values):
            raise UserError(f"--grid {word!r}: {key if key in grid else 'a value'} is there twice")
        if key == "seed":
            raise UserError("--grid seed: seeds are what --seeds N says")
        grid[key] = values
    return grid


def check_overrides(overrides: Sequence[str], grid: Sequence[str]) -> None:
    """UserError for a `--set` that every cell would change again."""
    for text in overrides:
        key = text.partition("=")[0]
        if key == "seed":
            raise UserError(f"--set {text}: seeds are what --seeds N says")
        for other in grid:
            if key == other or key.startswith(f"{other}."):
                raise UserError(f"--set {text}: {other} is what --grid says; leave one of them out")


def parts(text: str) -> Iterator[str]:
    """The text cut at its commas outside brackets."""
    depth, start = 0, 0
    for n, char in enumerate(text):
        depth += (char in OPEN) - (char in CLOSE)
        if char == "," and not depth:
            yield text[start:n]
            start = n + 1
    yield text[start:]


def read_evals(text: str) -> tuple[str, ...]:
    """`knn,linprobe` → protocols. UserError lists those that there are."""
    found = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for name in found:
        if name not in keys():
            raise UserError(f"--eval {name}: should be one of {', '.join(keys())}")
    if not found:
        raise UserError(f"--eval {text!r}: names no evaluation; there are {', '.join(keys())}")
    return found


def shell_words(option: str, text: str) -> tuple[str, ...]:
    """The words of an option's value, parted as by a shell. UserError where a quote is open."""
    try:
        return tuple(split(text))
    except ValueError as error:
        raise UserError(f"{option} {text!r}: cannot be parted into words ({error})") from None


def read_eval_args(words: Sequence[str], evals: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`PROTOCOL=OPTIONS` → protocol and the words of its options, of all that name it."""
    found: dict[str, tuple[str, ...]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in evals:
            raise UserError(f"--eval-args {word!r}: should be PROTOCOL=OPTIONS of one of --eval")
        found[name] = found.get(name, ()) + shell_words(f"--eval-args {name}", text)
    return found


def recipe_of(sweep: Sweep, cell: Cell) -> Recipe:
    """A cell's recipe. UserError where an override cannot be used."""
    return load_recipe(sweep.recipe, (*sweep.overrides, *cell.sets, f"seed={cell.seed}"))


def check_cells(sweep: Sweep) -> None:
    """UserError for a pretraining that could not run to its end, or would be another one's."""
    samples = read_manifest(sweep.train).samples
    read_manifest(sweep.val)
    if sweep.pretrain_args:
        open_ds_config(sweep.pretrain_args[-1])
    names: dict[str, Cell] = {}
    recipes: dict[str, Cell] = {}
    for cell in sweep.cells:
        recipe = recipe_of(sweep, cell)
        check_objective(recipe)
        total_steps(sweep.train, samples, recipe)
        check_recipe(sweep.output / cell.name, recipe)  # of another key of the same last word
        other = names.setdefault(cell.name, cell)
        if other != cell:
            raise UserError(f"--grid: {other.sets} and {cell.sets} would share {cell.name}")
        other = recipes.setdefault(dump_recipe(recipe), cell)
        if other != cell:
            raise UserError(
                f"--grid: {other.label} and {cell.label} are the same settings; leave one out"
            )


def plan(sweep: Sweep) -> dict[Cell, list[Command]]:
    """Cell → its commands, pretraining first. What check_cells refuses is not looked for again."""
    samples, held_out = (read_manifest(shards).samples for shards in (sweep.train, sweep.val))
    return {cell: cell_commands(sweep, cell, samples, held_out) for cell in sweep.cells}


def cell_commands(sweep: Sweep, cell: Cell, samples: int, held_out: int) -> list[Command]:
    """Pretraining and evaluations of a cell on `samples` training and `held_out` other images."""
    recipe, run = recipe_of(sweep, cell), sweep.output / cell.name
    total = total_steps(sweep.train, samples, recipe)
    words: list[object] = ["--recipe", sweep.recipe, "--data", sweep.train, "--output", run]
    for text in (*sweep.overrides, *cell.sets, f"seed={cell.seed}"):
        words += ["--set", text]
    images = total * recipe.batch_size
    pretrain = Command(
        f"{cell.name} pretrain",
        launched("pipeline/pretrain.py", *words, *sweep.pretrain_args),
        run / "encoder" / "encoder.json",
        step=total,
        images=images,
        count=lambda: images * pretrain_flops(recipe),
    )
    commands = [pretrain]
    for protocol in sweep.evals:
        how, made = by_key(protocol), result_path(sweep, cell, protocol)
        own: list[object] = ["--encoder", run, "--val", sweep.val, "--seed", cell.seed]
        own += ["--train", sweep.train] if how.train else []
        own += [*how.words(cell.seed), *sweep.eval_args.get(protocol, ()), "--output", made]
        seen, count = cost(how, recipe, samples, held_out, tuple(map(str, own)))
        line = launched(f"eval/{how.script}.py", *own)
        name = f"{cell.name} {protocol}"
        commands.append(Command(name, line, made, (pretrain.name,), 0, seen, count=count))
    return commands


def lost(sweep: Sweep) -> set[str]:
    """Names of the commands that diverged, here or as tasks of an array, in runs that are there."""
    folders = (sweep.output, *sorted((sweep.output / CELLS).glob("*")))
    names = set[str]().union(*map(diverged, folders))
    there = [c.name for c in sweep.cells if (sweep.output / c.name / "recipe.yaml").is_file()]
    return {name for name in names if name.rpartition(" ")[0] in there}


def without_lost(jobs: Sequence[Command], gone: set[str]) -> list[Command]:
    """Commands without those that diverged, which would again, and what needs them."""
    return [job for job in jobs if job.done or not gone & {job.name, *job.needs}]


def launched(script: str, *words: object) -> tuple[str, ...]:
    """A script of this project over every device, by launch.sh."""
    return (str(LAUNCH), "--script", script, "--", *map(str, words))


def result_path(sweep: Sweep, cell: Cell, protocol: str) -> Path:
    """The result file of a cell."""
    return sweep.output / cell.name / "eval" / f"{protocol}.json"


def claim_output(sweep: Sweep) -> None:
    """Note in OUTPUT/sweep.json what every cell shares. UserError of `record_of`."""
    record, path = record_of(sweep), sweep.output / RECORD
    with naming(path, "cannot be written"):
        write_json(path, record)


def record_of(sweep: Sweep) -> dict[str, Any]:
    """What every cell shares, with the evaluations that OUTPUT/sweep.json has already. UserError
    where that was made with other settings, whose runs would pass for this sweep's; grid, seeds and
    evaluations may grow."""
    path = sweep.output / RECORD
    train, val = read_manifest(sweep.train), read_manifest(sweep.val)
    images = images_of(train, val)
    record = {
        "recipe": dump_recipe(load_recipe(sweep.recipe, sweep.overrides)),
        "train": train.index_sha256,  # by whatever path
        "val": val.index_sha256,
        "pretrain_args": list(sweep.pretrain_args),
    }
    args = {name: list(words) for name, words in sweep.eval_args.items()}
    if path.is_file():
        with naming(path, "cannot be read"):
            text = path.read_bytes()
        try:
            before = json.loads(text)
            former = before["eval_args"]
            differs = [key for key in record if before[key] != record[key]]
            known = [key for key in images if key in before]  # earlier ones have none
            differs += [set_of(key) for key in known if before[key] != images[key]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a record of a sweep; choose another --output") from error
        differs += [
            f"--eval-args of {name}"
            for name in sweep.evals
            if name in before["evals"] and former.get(name, []) != args.get(name, [])
        ]
        if differs:
            raise UserError(
                f"{sweep.output}: made with another {', '.join(dict.fromkeys(differs))}; choose "
                "another --output"
            )
        args = former | args
        evals = list(dict.fromkeys([*before["evals"], *sweep.evals]))
    else:
        evals = list(sweep.evals)
    return record | images | {"evals": evals, "eval_args": args}


def as_number(value: str) -> float | None:
    """A grid value as a finite number, None where it is none."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
