"""What the runs of a folder were made with: those of other settings must not pass for these."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from eval.paper.commands import ROOT, Workspace
from eval.paper.cost import recipe_of
from eval.paper.job_runner import Command
from eval.paper.published import PaperRow
from eval.protocols import by_key, option
from eval.reporting.run_records import NO_METHOD, read_json
from eval.shared.labels import images_of, set_of
from pipeline.config.recipe import Recipe, differences, load_recipe
from pipeline.errors import UserError, naming
from shard_tools.atomic import file_sha256, write_json
from shard_tools.manifest import read_manifest

RECORD = "reproduction.json"


def portable(value: Any) -> Any:
    """A value as JSON has it, without the path of this checkout, which may be moved."""
    return json.loads(json.dumps(value).replace(f"{ROOT}/", ""))


def made_with(
    workspace: Workspace, rows: Sequence[tuple[PaperRow, Sequence[str]]]
) -> dict[str, Any]:
    """Option → what rows, each with its protocols, are made with, but for their recipes: see
    check_recipes. Options that these rows do not take are left out."""
    scale = workspace.scale
    sizes = asdict(replace(scale, train="", val="", hours=None, tried="", last=()))
    train, val = read_manifest(scale.train), read_manifest(scale.val)
    made = {
        "scale": {key: value for key, value in portable(sizes).items() if value},
        "set": [text for text in scale.last if not text.startswith(NO_METHOD)],
        "train": train.index_sha256,  # by whatever path
        "val": val.index_sha256,
        **images_of(train, val),
    }
    if any(by_key(protocol).fraction < 1 for _, protocols in rows for protocol in protocols):
        few = workspace.few_labels
        made["few-labels"] = file_sha256(Path(few)) if few else ""
    if scale.name == "full" and any(row.classes is not None for row, _ in rows):
        made["classes"] = file_sha256(Path(workspace.classes))
    return made


def claim_output(output: Path, made: dict[str, Any], write: bool = True) -> None:
    """Note in OUTPUT what its runs are made with. UserError where it was made otherwise."""
    path = output / RECORD
    with naming(path, "cannot be read"):
        before = read_json(path)
    others = [f"--{set_of(key)}" for key in made if before.get(key, made[key]) != made[key]]
    if others:
        raise UserError(
            f"{output}: was made with another {', '.join(dict.fromkeys(others))}; choose another "
            "--output"
        )
    if write and before != before | made:
        with naming(path, "cannot be written"):
            write_json(path, before | made)


def check_recipe(run: Path, recipe: Recipe) -> None:
    """UserError where a run that is there, or its results, is of another recipe."""
    if not (run / "recipe.yaml").is_file():
        return
    if changed := differences(load_recipe(run / "recipe.yaml"), recipe):
        raise UserError(
            f"{run}: was made with another recipe ({'; '.join(changed)}); choose another --output"
        )


def check_recipes(jobs: Sequence[Command]) -> None:
    """UserError where a pretraining would have no step; and where a run that is there, or its
    results, is of another recipe than the one that would be trained now."""
    for job in jobs:
        recipe = recipe_of(job)
        if recipe is None:
            continue
        if job.images == 0:
            raise UserError(
                f"{job.name}: has no step with batch_size {recipe.batch_size}; set it lower"
            )
        check_recipe(Path(option(job.command, "--output", "")), recipe)
