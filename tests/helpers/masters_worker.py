"""Two ranks under bf16: the EMA teacher must average the fp32 master weights, at every ZeRO stage.

Rank 0 prints one line of JSON: per stage the largest error of the teacher against the average of
the weights that a checkpoint would hold, and its distance to the average of the rounded ones.
"""

import json

import torch
from tiny import images, tiny_recipe

from pipeline.config.planning import plan_recipe
from pipeline.distributed import barrier, close
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime.engine import Engine, init_ranks


def follow(stage: int, ranks) -> tuple[float, float]:
    """One small step and one update of the teacher: (error, distance to the rounded average)."""
    torch.manual_seed(0)
    recipe = tiny_recipe("cmae", "encoder.freeze_patch=true")
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    objective, teacher = build_objective(recipe)
    before = {k: v.clone() for k, v in teacher.named_parameters()}
    engine = Engine(
        objective, parameter_groups(objective), plan_recipe(config, recipe, ranks.world)
    )
    mine = torch.arange(8).chunk(ranks.world)[ranks.rank]
    engine.micro_step(6e-6, images(8)[mine], mine, 0, teacher)
    teacher.update(objective, 0.9, engine.masters)
    state = engine.full_state()
    engine.destroy()
    if ranks.rank:
        return 0.0, 0.0
    error = rounded = 0.0
    for name, value in teacher.named_parameters():
        online = state[name if name.startswith("encoder") else f"measure.{name}"]
        for source in ("master", "rounded"):
            weight = online if source == "master" else online.bfloat16().float()
            apart = float((value - before[name].lerp(weight, 0.1)).abs().max())
            if source == "master":
                error = max(error, apart)
            else:
                rounded = max(rounded, apart)
    return error, rounded


if __name__ == "__main__":
    ranks = init_ranks()
    found = {stage: follow(stage, ranks) for stage in (1, 2, 3)}
    if ranks.rank == 0:
        print(json.dumps(found))
    barrier()
    close()
