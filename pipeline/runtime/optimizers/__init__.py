"""The optimizers, by `optimizer.kind` of a recipe: one module each, with the same five names.

MOST_STAGE: the last ZeRO stage that it works under
moments(group): names of what it keeps per parameter of a group
section(plan): its part of DeepSpeed's configuration
build(module, groups, plan): the optimizer of these parameter groups, None where DeepSpeed builds it
describe(): a line for the log
"""

from __future__ import annotations

from types import ModuleType

from pipeline.config.plan import RunPlan, check_stage
from pipeline.runtime.optimizers import adamw, muon

OPTIMIZERS: dict[str, ModuleType] = {"adamw": adamw, "muon": muon}


def optimizer_of(plan: RunPlan) -> ModuleType:
    """The plan's optimizer. UserError where it does not work under the plan's ZeRO stage."""
    kind = plan.optimizer.kind
    module = OPTIMIZERS[kind]
    check_stage(kind, plan.stage, module.MOST_STAGE)
    return module
