"""Run folders as pretraining leaves them, and the results that evaluations put beside them."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from eval.protocols import by_key, by_name
from pipeline.config.measure_schema import measure_class
from pipeline.config.recipe import Recipe, check_run
from pipeline.config.texts import flatten, is_number, yaml_problem
from pipeline.errors import UserError

# Recipe keys that do not make two runs different methods.
NO_METHOD = ("seed", "monitor.", "kernels", "data.workers")

# Keys of metrics.jsonl that describe the run; every other number is a term of the loss.
NOT_TERMS = {
    "step", "epoch", "loss", "lr", "images_per_second", "data_wait", "grad_norm", "memory_gb",
    "ema", "bad_samples", "nonfinite_steps", "feature_std", "teacher_distance", "mfu",
    "image_size", "lr_first_layer",
    "skipped", "skipped_steps",  # of runs before these were called bad_samples, nonfinite_steps
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run folder: settings, logged steps, pictures, and results of evaluations."""

    folder: Path
    recipe: dict[str, Any]
    ds_config: dict[str, Any]
    versions: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    pictures: tuple[Path, ...]
    results: tuple[dict[str, Any], ...]
    flat: dict[str, Any] = field(repr=False, default_factory=dict)
    shown: str = ""  # among others whose folders are called alike

    @property
    def name(self) -> str:
        return self.shown or self.folder.name

    @property
    def recipe_name(self) -> str:
        return str(self.recipe.get("name", self.name))

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss's terms as first logged, without one that is the loss itself."""
        numbers = (k for m in self.metrics for k, v in m.items() if is_number(v))
        names = [k for k in dict.fromkeys(numbers) if k not in NOT_TERMS]
        return tuple(k for k in names if self.series(k) != self.series("loss"))

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one logged quantity."""
        rows = [(m["step"], m[key]) for m in self.metrics if is_number(m.get(key))]
        return [float(s) for s, _ in rows], [float(v) for _, v in rows]

    def typical(self, key: str) -> float | None:
        """Median of a logged quantity, without the first entry, which includes the start-up."""
        values = self.series(key)[1]
        values = values[1:] or values
        return median(values) if values else None

    @property
    def true_statistics(self) -> bool:
        """Whether its reconstructions use the true mean and deviation of each patch (norm_pix)."""
        return self.reconstructs and bool(self.flat.get("measure.norm_pix", False))

    @property
    def reconstructs(self) -> bool:
        """Whether the measure predicts pixels."""
        settings = measure_class(self.flat.get("measure.kind"))
        return settings is not None and settings.reconstructs


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ by their seed only; `label` distinguishes the groups."""

    label: str
    runs: tuple[Run, ...]

    @property
    def pretrained(self) -> bool:
        """Whether these are relaxmim runs, not results of an encoder from elsewhere."""
        return (self.runs[0].folder / "recipe.yaml").is_file()


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Run folders, see read_run, each with a name of its own."""
    runs = [read_run(folder) for folder in folders]
    names = short_names([run.folder for run in runs])
    return [replace(run, shown=name) for run, name in zip(runs, names, strict=True)]


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """The last part of each path, and of those that end alike as many as tell them apart."""
    full = [Path(os.path.abspath(path)).parts for path in paths]

    def name(parts: tuple[str, ...]) -> str:
        ends = (parts[-n:] for n in range(1, len(parts) + 1))
        alone = (end for end in ends if all(p == parts or p[-len(end) :] != end for p in full))
        return str(Path(*next(alone, parts)))

    return [name(parts) for parts in full]


def read_run(folder: str | Path) -> Run:
    """Read a run folder. UserError where a file cannot be used.

    Only recipe.yaml must be there; or, for an encoder that is no relaxmim run (timm's, MoCo v3's, a
    random one), results in eval/, whose name of the encoder is then the recipe's.
    """
    folder = Path(folder)
    paths = sorted((folder / "eval").glob("*.json"))
    results = tuple(one for path in paths for one in with_beside(read_result(path)))
    if not (folder / "recipe.yaml").is_file():
        if not results:
            check_run(folder)
        recipe = {"name": results[0].get("encoder", {}).get("recipe", folder.name)}
        return Run(folder.resolve(), recipe, {}, {}, (), (), results, recipe)
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'recipe.yaml'} is not YAML: {yaml_problem(error)}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{folder / 'recipe.yaml'} has no keys")
    return Run(
        folder=folder.resolve(),
        recipe=recipe,
        ds_config=read_json(folder / "ds_config.json"),
        versions=read_json(folder / "versions.json"),
        metrics=tuple(read_lines(folder / "metrics.jsonl")),
        pictures=tuple(sorted((folder / "pictures").glob("*.png"))),
        results=results,
        flat=flatten(filled(recipe)),
    )


def read_result(path: Path) -> dict[str, Any]:
    """The result of an evaluation and its `file`. UserError names a metric that is no number."""
    result = read_json(path) | {"file": str(path)}
    protocol = by_name(result.get("protocol"))
    if not is_ours(result) or (result.get("protocol") == "cka" and not has_tables(result)):
        raise UserError(f"{path}: no result of an evaluation of ours; move it out of eval/")
    if protocol is not None and protocol.metric and not is_undecided(result):
        value = result.get(protocol.metric)
        if not is_number(value) or not math.isfinite(float(value or 0)):
            raise UserError(f"{path}: {protocol.metric} is {value!r}, not a number; run it again")
    return result


def metric_in(path: Path, protocol: str) -> float | None:
    """A protocol's metric in its result file, None where that is not there. UserError."""
    if not path.is_file():
        return None
    metric = by_key(protocol).metric
    value = read_result(path).get(metric)
    if not isinstance(value, int | float):
        raise UserError(f"{path}: has no {metric}; remove it to run it again")
    return float(value)


def is_ours(result: dict[str, Any]) -> bool:
    """Whether what a report reads of every result is of the type that ours have, or not there."""
    also = result.get("also", [])
    return (
        all(isinstance(result.get(key, {}), dict) for key in ("settings", "encoder", "content"))
        and isinstance(result.get("encoder", {}).get("options", {}), dict)
        and isinstance(result.get("feature"), str | None)
        and isinstance(also, list)
        and all(isinstance(row, dict) for row in also)
    )


def has_tables(result: dict[str, Any]) -> bool:
    """Whether each table of a CKA has a row of as many numbers for each of its ratios."""
    ratios, variants = result.get("ratios"), result.get("variants") or []
    if not (isinstance(ratios, list) and ratios and all(map(is_number, ratios))):
        return False
    try:
        shapes = [np.array(table["cka"], float).shape for table in variants or [result]]
        named = all(isinstance(t["pool"] + t["hsic"], str) for t in variants)
    except (TypeError, ValueError, KeyError):
        return False
    return named and all(len(shape) == 2 and shape[0] == len(ratios) for shape in shapes)


def is_undecided(result: dict[str, Any]) -> bool:
    """Whether a result is a shape bias without a decision for shape or texture: it has no value."""
    return result.get("shape_bias", 0) is None


def with_beside(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A result, and a result of its own (marked `beside`) for each other feature that was probed
    with it and did not diverge."""
    main = {key: value for key, value in result.items() if key != "also"}
    also = [row for row in result.get("also", []) if "diverged" not in row]
    return [main, *(main | {"beside": True} | row for row in also)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an absent file counts as empty."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a .jsonl file; a last line that is still being written is left out.

    A run that resumed from a checkpoint repeats some steps: the last entry of each step counts.
    """
    if not path.is_file():
        return []
    rows: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except ValueError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not is_number(row["step"]) or not math.isfinite(row["step"]):
                raise ValueError(f"its step is {row['step']!r}")
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}, is not a logged step: {error}") from error
    return [rows[step] for step in sorted(rows)]


def filled(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with today's defaults for the keys of its sections that a version before them left
    out, so that runs of one method stay together."""
    given = {name: part for name, part in recipe.items() if isinstance(part, dict)}
    classes: dict[str, Any] = {name: Recipe.model_fields[name].annotation for name in
                               given.keys() & Recipe.model_fields.keys() - {"measure"}}  # fmt: skip
    defaults = {name: cls().model_dump(mode="json", by_alias=True) for name, cls in classes.items()}
    kind = given.get("measure", {}).get("kind")
    if (settings := measure_class(kind)) is not None:
        measure = settings(kind=str(kind))
        defaults["measure"] = measure.model_dump(mode="json", by_alias=True)
    return recipe | {name: _over(part, given[name]) for name, part in defaults.items()}


def _over(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What is given, and the defaults of what is not."""
    both = {key: value for key, value in given.items() if isinstance(value, dict)}
    inner = {k: _over(defaults[k], v) for k, v in both.items() if isinstance(defaults.get(k), dict)}
    return defaults | given | inner


def method_of(run: Run) -> dict[str, Any]:
    """The recipe without what does not make it another method."""
    return {k: v for k, v in run.flat.items() if not k.startswith(NO_METHOD)}


def differing(runs: Iterable[Run]) -> list[str]:
    """Recipe keys in which the runs differ, sorted."""
    methods = [method_of(run) for run in runs]
    keys = sorted({key for method in methods for key in method})
    return [k for k in keys if len({json.dumps(m.get(k), default=str) for m in methods}) > 1]


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Runs of the same method together, in the order of their first run.

    The label of groups that share a recipe name has the keys in which they differ.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(method_of(run), sort_keys=True, default=str), []).append(run)
    result = []
    for members in groups.values():
        name = members[0].recipe_name
        alike = [g[0] for g in groups.values() if g[0].recipe_name == name]
        keys = differing(alike)
        note = ", ".join(f"{k.rsplit('.', 1)[-1]} {members[0].flat.get(k)}" for k in keys)
        result.append(Group(f"{name} ({note})" if note else name, tuple(members)))
    return result
