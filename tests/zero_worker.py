"""Two ranks: ten steps under every ZeRO stage, then the last five again from a checkpoint.

Started by test_engine.py through the deepspeed launcher; rank 0 writes the losses as JSON.
"""

import json
import sys
from pathlib import Path

import torch
from tiny import images, tiny_recipe

from pipeline.engine import Engine, init_ranks, make_plan
from pipeline.objective import build_objective, parameter_groups
from pipeline.ranks import barrier, close, mean_over_ranks
from pipeline.recipe import Recipe, learning_rate
from pipeline.runs import load_checkpoint, save_checkpoint

STEPS, BATCH = 10, 8
SCHEDULE = ("optimizer.base_lr=0.2", "optimizer.epochs=12", "optimizer.warmup_epochs=3")


def recipe_of(method: str) -> Recipe:
    return tiny_recipe(method, *SCHEDULE, "optimizer.gradient_clipping=0.5")


def start(method: str, stage: int, world: int):
    recipe = recipe_of(method)
    plan = make_plan(
        {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}, recipe, world
    )
    objective, teacher = build_objective(recipe)
    return Engine(objective, parameter_groups(objective), plan), objective, teacher, recipe


def steps(engine, objective, teacher, recipe, first, last, ranks):
    losses, norms = [], []
    per_rank = BATCH // ranks.world
    for step in range(first, last):
        image, sample = images(BATCH, seed=step), torch.arange(BATCH)
        total = torch.zeros(())
        for micro in range(per_rank // 2):
            low = ranks.rank * per_rank + micro * 2
            lr = learning_rate(recipe, step, 1)
            loss, _ = engine.micro_step(
                lr, image[low : low + 2], sample[low : low + 2], step, teacher
            )
            total += loss / (per_rank // 2)
        if teacher is not None:
            teacher.update(objective, 0.9, engine.gathered)
        losses.append(mean_over_ranks(total).item())
        norms.append(engine.gradient_norm())
    return losses, norms


def skips(engine, objective, teacher, recipe, ranks):
    """Step 10 with a gradient that is not finite on the last rank only, then a good one."""
    before = engine.full_state()
    last = list(objective.parameters())[-1]
    poison = last.register_hook(lambda g: g * float("nan") if ranks.rank == ranks.world - 1 else g)
    skipped = [False] * 5
    for step in (STEPS, STEPS + 1):
        steps(engine, objective, teacher, recipe, step, step + 1, ranks)
        skipped.append(engine.skipped)
        if step == STEPS:
            poison.remove()
            after = engine.full_state()
    end = engine.full_state()
    return {
        "skipped": skipped,
        "kept": all(torch.equal(before[k], after[k]) for k in before),
        "finite": all(v.isfinite().all().item() for v in end.values()),
    }


def main(output: Path) -> None:
    ranks = init_ranks()
    results = {}
    for method, stages in (("rmae", (0, 1, 2, 3)), ("cmae", (0, 2, 3))):
        for stage in stages:
            folder = output / f"{method}-{stage}"
            engine, objective, teacher, recipe = start(method, stage, ranks.world)
            losses, norms = steps(engine, objective, teacher, recipe, 0, 5, ranks)
            state = {"step": 5, "ranks": ranks.world, "stage": stage, "precision": "fp32"}
            save_checkpoint(folder, engine, teacher, "name: x\n", state, keep=1)
            rest, more = steps(engine, objective, teacher, recipe, 5, STEPS, ranks)
            whole = engine.full_state()
            engine.destroy()
            engine, objective, teacher, recipe = start(method, stage, ranks.world)
            load_checkpoint(folder / "checkpoints/step-00000005", engine, teacher, ranks.world)
            again, _ = steps(engine, objective, teacher, recipe, 5, STEPS, ranks)
            after = engine.full_state()
            skipping = skips(engine, objective, teacher, recipe, ranks)
            engine.destroy()
            results[f"{method}-{stage}"] = {
                "losses": losses + rest,
                "norms": norms + more,
                "again": again,
                "same_weights": all(torch.equal(whole[k], after[k]) for k in whole),
                "names": sorted(whole),
                **skipping,
            }
    if ranks.rank == 0:
        (output / "results.json").write_text(json.dumps(results))
    barrier()
    close()


if __name__ == "__main__":
    main(Path(next(a for a in sys.argv[1:] if not a.startswith("--"))))
