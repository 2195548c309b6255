"""The plan of a training: a recipe and a ds_config on so many ranks.

The precision that this machine has, the split of the batch over ranks and micro-batches, and what
the recipe owns of DeepSpeed's configuration filled in. What a plan then means: plan.py.
"""

from __future__ import annotations

import copy
from typing import Any

from pipeline.config.ds_config import PRECISIONS, STAGE_0_BF16
from pipeline.config.plan import RunPlan, settle
from pipeline.config.recipe import Recipe
from pipeline.config.schema import OptimizerRecipe
from pipeline.errors import UserError


def resolve_precision(wanted: bool | str, stage: int, section: str) -> tuple[str, str]:
    """(precision, why) for `enabled` of a section of PRECISIONS: true, false or "auto".

    precision: "fp32"; "autocast" (torch_autocast: matrix products in bf16; weights, gradients and
    their sums in fp32, as torch's AMP); "bf16" (bf16: weights and gradients too, beside fp32 master
    weights). "auto" is the section's on a GPU with bf16 units and fp32 elsewhere, so that a CPU
    run gives the same numbers whether or not the processor multiplies bf16 natively. true holds on
    every CPU (emulated where the processor lacks it). UserError where a GPU cannot do it.
    """
    import torch

    from pipeline.distributed import bf16_units

    gpu = torch.cuda.is_available()
    if wanted is True and gpu and not bf16_units():
        name = torch.cuda.get_device_name()
        raise UserError(f'{section}.enabled true: {name} has no bf16 units; use false or "auto"')
    if wanted is True and section == "bf16" and not stage:
        raise UserError(STAGE_0_BF16)
    if wanted is True or (wanted == "auto" and gpu and bf16_units()):
        emulated = "" if bf16_units() else "emulated: this processor has no bf16 units"
        return PRECISIONS[section], emulated
    return "fp32", "auto: bf16 on a GPU with bf16 units only" if wanted == "auto" else ""


def set_precision(config: dict[str, Any], precision: str) -> None:
    """Let a read ds_config run in "fp32", or in the bf16 way that it names (autocast if none)."""
    named = [name for name in PRECISIONS if name in config] or ["torch_autocast"]
    for name in named:
        config[name] = config.get(name, {}) | {"enabled": precision != "fp32"}


def _fill_in_precision(full: dict[str, Any], stage: int) -> tuple[str, str]:
    """Resolve both sections of PRECISIONS to what DeepSpeed takes; (precision, why)."""
    found = "fp32", ""
    for section in PRECISIONS:
        if section not in full:
            continue
        here = resolve_precision(full[section].get("enabled", False), stage, section)
        if here[0] == "fp32":
            full[section] = {"enabled": False}
            found = here if found == ("fp32", "") else found
            continue
        found = here
        if section == "bf16":  # a step that is not finite is never taken
            full["bf16"] |= {"enabled": True, "check_grad_overflow": True}
        else:  # gradients are reduced in fp32 too, but of the classes of modules that are listed
            more = {"lower_precision_safe_modules": []} | full[section]
            full[section] = more | {"enabled": True, "dtype": "bfloat16"}
    return found


# Images of an "auto" micro-batch at the most, and on a CPU tokens too: of 128 images of 64 patches,
# or of about 50 of 224 x 224. On a GPU a function of the recipe alone, since InfoNCE's negatives
# come from the micro-batch; a CPU may have fewer of them. Where the speed no longer rises was
# measured (make bench-micro-batch).
MOST_IMAGES, MOST_TOKENS_ON_CPU = 128, 10_000


def auto_micro_batch(per_rank: int, patches: int, multiple: int = 1) -> int:
    """The largest divisor of a rank's `per_rank` images per step within the limits above.

    multiple: of which it is one; it must divide per_rank.
    """
    import torch

    most = min(per_rank, MOST_IMAGES)
    if not torch.cuda.is_available():
        most = min(most, MOST_TOKENS_ON_CPU // (patches + 1))
    sizes = range(multiple, max(multiple, most) + 1, multiple)
    return max(m for m in sizes if per_rank % m == 0)


def split_batch(
    batch_size: int, partitions: int, world: int, micro: int | str, patches: int
) -> tuple[int, int]:
    """(images of a micro-batch, micro-batches of a step) on each of `world` ranks.

    micro: images, or "auto", for which the patches of an image are needed. UserError where the
    batch, or the partitions of the data's order, cannot be shared evenly.
    """
    per_rank, left = divmod(batch_size, world)
    if left or partitions % world:
        raise UserError(
            f"batch_size {batch_size} with data.partitions {partitions} cannot be split over "
            f"{world} ranks: both must be multiples of the number of ranks"
        )
    if micro == "auto":
        micro = auto_micro_batch(per_rank, patches)
    if not isinstance(micro, int) or micro < 1 or per_rank % micro:
        raise UserError(
            f"train_micro_batch_size_per_gpu {micro!r} does not divide the {per_rank} images per "
            f"rank of batch_size {batch_size} over {world} ranks"
        )
    return micro, per_rank // micro


def make_plan(
    ds_config: dict[str, Any], optimizer: OptimizerRecipe, *, batch_size: int, partitions: int,
    patches: int, world: int, negatives: bool = False, exchanges: bool = False, auto: bool = False,
) -> RunPlan:  # fmt: skip
    """Split a global batch over the ranks and fill in what the recipe owns.

    patches: of an image; they limit an "auto" micro-batch. auto: whether `compile` and
    `cuda_graphs` "auto" may come to true. UserError where the batch cannot be split or the
    precision is not to be had.
    """
    full = copy.deepcopy(ds_config)
    wanted = full.pop("train_micro_batch_size_per_gpu", "auto")
    micro, accumulation = split_batch(batch_size, partitions, world, wanted, patches)
    stage = full.get("zero_optimization", {}).get("stage", 0)
    precision, reason = _fill_in_precision(full, stage)
    if precision != "bf16":
        full.pop("data_types", None)  # fp32 all the same
    elif full.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        reason = "; ".join(filter(None, ("gradients are summed in fp32", reason)))
    checkpointing = full.pop("gradient_checkpointing", False)
    compiled, graphs = (full.pop(key, False) for key in ("compile", "cuda_graphs"))
    if not auto:
        compiled, graphs = compiled is True, graphs is True
    watchdog_seconds = float(full.pop("watchdog_seconds", 1800))
    full |= {
        "gradient_clipping": optimizer.gradient_clipping,
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }
    full.setdefault("steps_per_print", 10**9)
    plan = RunPlan(
        full, optimizer, optimizer.base_lr * batch_size / 256, stage, world, micro, accumulation,
        precision, reason, negatives, checkpointing, False, False, watchdog_seconds, exchanges,
    )  # fmt: skip
    return settle(plan, compiled, graphs)


def plan_recipe(ds_config: dict[str, Any], recipe: Recipe, world: int) -> RunPlan:
    """The plan of a pretraining. UserError also for micro-batches that are too small for the
    measure."""
    plan = make_plan(
        ds_config,
        recipe.optimizer,
        batch_size=recipe.batch_size,
        partitions=recipe.data.partitions,
        patches=recipe.encoder.patches,
        world=world,
        negatives=recipe.measure.batch_negatives,
        exchanges=recipe.measure.exchanges,
        auto=True,
    )
    if problem := why_too_few(recipe, plan.micro_batch, world):
        raise UserError(problem)
    return plan


def why_too_few(recipe: Recipe, micro: int, world: int) -> str:
    """Why micro-batches of `micro` images on each of `world` ranks are too small for a recipe; ""
    where they are not."""
    images, least = world * micro, recipe.measure.least_images
    if images < least:
        return (
            f"measure {recipe.measure.kind} compares the images of a micro-batch with each other: "
            f"over all ranks it has {images}, and at least {least} are needed; see batch_size and "
            "train_micro_batch_size_per_gpu"
        )
    if recipe.views.cutmix and micro == 1:
        return (
            "views.cutmix pastes from another image of a rank's micro-batch, which has only one "
            "image; see batch_size and train_micro_batch_size_per_gpu"
        )
    return ""
