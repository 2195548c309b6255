"""Six steps under every ZeRO stage, then the last three again from a checkpoint.

Started by test_engine.py on two ranks through the deepspeed launcher; rank 0 writes the losses as
JSON. The last three also resume from a checkpoint of one rank under another stage.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from tiny import images, tiny_recipe

from pipeline.config.ds_config import read_ds_config
from pipeline.config.planning import plan_recipe
from pipeline.config.recipe import Recipe
from pipeline.config.schedules import learning_rate
from pipeline.distributed import barrier, close, mean_over_ranks
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime.checkpoint import CheckpointStore
from pipeline.runtime.engine import Engine, init_ranks
from pipeline.runtime.run_folder import load_checkpoint, save_checkpoint

STEPS, SAVED, BATCH = 6, 3, 8
MICRO = ([0, 1, 4, 5], [2, 3, 6, 7])  # images of the two micro-batches of all ranks
# stage → stage
ELASTIC = {
    "rmae": {0: 1, 1: 3, 2: 0, 3: 1},
    "cmae": {0: 2, 2: 0, 3: 2},
    "muon": {0: 1, 1: 2, 2: 0},
}
# Layers with learning rates of their own, under every stage and for both optimizers.
LAYERS = {
    "rmae": ("optimizer.layer_decay=0.8", "optimizer.layer_anneal=0.6"),
    "cmae": (),
    "muon": ("optimizer.layer_anneal=0.5",),
}
# Parameters lie in another order than the model's.
ROUND_ROBIN = (("rmae", 1), ("cmae", 2))
SCHEDULE = ("optimizer.base_lr=0.2", "optimizer.epochs=12", "optimizer.warmup_epochs=3")


def recipe_of(method: str) -> Recipe:
    more = ("optimizer.kind=muon", "optimizer.base_lr=0.4") if method == "muon" else ()
    more += LAYERS[method]
    name = "rmae" if method == "muon" else method
    return tiny_recipe(name, *SCHEDULE, "optimizer.gradient_clipping=0.5", *more)


def start(method: str, stage: int, world: int):
    recipe = recipe_of(method)
    config = read_ds_config(f"zero{stage}") | {"train_micro_batch_size_per_gpu": 4 // world}
    if (method, stage) in ROUND_ROBIN:
        config["zero_optimization"]["round_robin_gradients"] = True
    plan = plan_recipe(config, recipe, world)
    objective, teacher = build_objective(recipe)
    return Engine(objective, parameter_groups(objective), plan), objective, teacher, recipe


def steps(engine, objective, teacher, recipe, first, last, ranks):
    losses, norms = [], []
    for step in range(first, last):
        image = images(BATCH, seed=step)
        total = torch.zeros(())
        for micro in MICRO:  # negatives come from the micro-batch of all ranks
            mine = torch.tensor(micro).chunk(ranks.world)[ranks.rank]
            lr = partial(learning_rate, recipe, step, 1)
            loss, _ = engine.micro_step(lr, image[mine], mine, step, teacher)
            total += loss / len(MICRO)
        if teacher is not None:
            teacher.update(objective, 0.9, engine.masters)
        losses.append(mean_over_ranks(total).item())
        norms.append(engine.gradient_norm())
    return losses, norms


def skips(engine, objective, teacher, recipe, ranks):
    """The next step with a gradient that is not finite on the last rank only, then a good one."""
    before = engine.full_state()
    last = list(objective.parameters())[-1]
    poison = last.register_hook(lambda g: g * float("nan") if ranks.rank == ranks.world - 1 else g)
    skipped = []
    for step in (STEPS, STEPS + 1):
        steps(engine, objective, teacher, recipe, step, step + 1, ranks)
        skipped.append(engine.step_skipped)
        if step == STEPS:
            poison.remove()
            after = engine.full_state()
    end = engine.full_state()
    return {
        "skipped": skipped,
        "kept": all(torch.equal(before[k], after[k]) for k in before),
        "finite": all(v.isfinite().all().item() for v in end.values()),
    }


def go_on(folder, method, stage, ranks, extra=None):
    """Load folder's checkpoint and take the steps after it: losses and weights."""
    engine, objective, teacher, recipe = start(method, stage, ranks.world)
    load_checkpoint(folder / f"checkpoints/step-{SAVED:08}", engine, teacher)
    losses, _ = steps(engine, objective, teacher, recipe, SAVED, STEPS, ranks)
    whole = engine.full_state()
    more = extra(engine, objective, teacher, recipe, ranks) if extra else {}
    engine.destroy()
    return losses, whole, more


def train(folder, method, stage, ranks):
    """All steps with a checkpoint after half of them: losses, gradient norms, weights."""
    engine, objective, teacher, recipe = start(method, stage, ranks.world)
    losses, norms = steps(engine, objective, teacher, recipe, 0, SAVED, ranks)
    state = {"step": SAVED, "precision": "fp32"}
    save_checkpoint(CheckpointStore(folder), engine, teacher, "name: x\n", state)
    rest, more = steps(engine, objective, teacher, recipe, SAVED, STEPS, ranks)
    whole = engine.full_state()
    engine.destroy()
    return losses + rest, norms + more, whole


def main(output: Path, single: Path) -> None:
    ranks = init_ranks()
    results = {}
    for method, stages in ELASTIC.items():
        for stage, other in stages.items():
            folder = output / f"{method}-{stage}"
            losses, norms, whole = train(folder, method, stage, ranks)
            again, after, skipping = go_on(folder, method, stage, ranks, skips)
            results[folder.name] = {
                "losses": losses,
                "norms": norms,
                "again": again,
                "same_weights": all(torch.equal(whole[k], after[k]) for k in whole),
                "from_one_rank": go_on(single / folder.name, method, other, ranks)[0],
                "names": sorted(whole),
                **skipping,
            }
    if ranks.rank == 0:
        (output / "results.json").write_text(json.dumps(results))
    barrier()
    close()


if __name__ == "__main__":
    main(*(Path(a) for a in sys.argv[1:] if not a.startswith("--")))
