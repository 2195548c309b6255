"""Whether a checkpoint can continue as this run: the recipe, and the data behind the schedule.

The step alone is a run's state: with it the order of the samples, the epoch, the learning
rate and the EMA momentum are functions of the recipe and of the data. So a checkpoint records the
data too, and other data under the same folder would bend all of them without a word.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.config.recipe import Recipe, RecipeError, differences, load_recipe
from pipeline.config.schedules import learning_rate, size_steps
from pipeline.data.crops import side_at
from pipeline.errors import UserError
from pipeline.runtime.checkpoint import read_state
from shard_tools.manifest import Manifest

ANYWAY = "--resume-changed"


def schedule_facts(manifest: Manifest, recipe: Recipe, per_epoch: int) -> dict[str, Any]:
    """What the schedule and the order of a run depend on, as JSON for state.json."""
    return {
        "images": manifest.samples,
        "data": data_identity(manifest),
        "batch_size": recipe.batch_size,
        "epochs": recipe.optimizer.epochs,
        "steps_per_epoch": per_epoch,
    }


def data_identity(manifest: Manifest) -> str:
    """sha256 of the shards in their order and of the index: the same for a copy anywhere."""
    content = [[shard.samples, shard.sha256] for shard in manifest.shards]
    return hashlib.sha256(json.dumps([content, manifest.index_sha256]).encode()).hexdigest()


def check_same(
    checkpoint: Path, recipe: Recipe, facts: dict[str, Any], anyway: bool = False
) -> list[str]:
    """UserError with all that differs where the checkpoint is of another recipe or other data.

    facts: `schedule_facts` of this run. anyway: return warnings instead, what differs and how the
    schedule moves. Nothing is known of the data of a checkpoint that did not record it.
    """
    try:
        theirs = load_recipe(checkpoint / "recipe.yaml")
    except RecipeError as error:
        raise UserError(f"{checkpoint}: its recipe cannot be read: {error}") from None
    state = read_state(checkpoint)
    before = state.get("schedule", facts)
    faults = []
    changed = differences(theirs, recipe)
    if changed:
        faults.append(f"of another recipe ({'; '.join(changed)})")
    if before["images"] != facts["images"]:
        faults.append(f"of other data ({before['images']} images, now {facts['images']})")
    elif before["data"] != facts["data"]:
        text = f"manifest {before['data'][:12]}, now {facts['data'][:12]}"
        faults.append(f"of other data (as many images, {text})")
    if not faults:
        return []
    fault = " and ".join(faults)
    if not anyway:
        raise UserError(
            f"{checkpoint}: a checkpoint {fault}; choose another --output, say {ANYWAY} to "
            f"continue from it all the same, or --init {checkpoint} with another --output to start "
            "a fresh run from its weights"
        )
    step, then, now = int(state["step"]), before["steps_per_epoch"], facts["steps_per_epoch"]
    rates = learning_rate(theirs, step, then), learning_rate(recipe, step, now)
    sizes = _size(theirs, step, then), _size(recipe, step, now)
    return [
        f"warning: a checkpoint {fault}; continuing all the same ({ANYWAY})",
        f"warning: step {step} was epoch {step / then:.2f} at lr {rates[0]:.2e}{sizes[0]}, "
        f"now epoch {step / now:.2f} at lr {rates[1]:.2e}{sizes[1]}",
    ]


def _size(recipe: Recipe, step: int, per_epoch: int) -> str:
    """The size of the images of a step, where it changes in the run."""
    sizes = size_steps(recipe, round(recipe.optimizer.epochs * per_epoch))
    return f" and {side_at(sizes, step)} pixels" if sizes else ""
