"""The stages of gpu_check.py: one function each, in a process of its own.

A stage takes Where and returns what it found, as JSON takes it. It raises Skip where it has nothing
to do here, and Fault where what it found is wrong; what it has told `where.note` before is kept.
Each module is imported with the stage that needs it.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from typing import Any

from gpu_stages.common import Fault, Skip, Where

__all__ = ["STAGES", "Fault", "Skip", "Where", "become", "run"]

# Stage → module and function.
STAGES = {
    "ops": ("ops", "build"),
    "kernels": ("kernels", "kernel_tests"),
    "numerics": ("kernels", "numerics"),
    "recipes": ("training", "recipes"),
    "resume": ("loading", "resume"),
    "evaluation": ("evaluation", "evaluate"),
    "compile": ("warm", "compile_all"),
    "step": ("steps", "step_speed"),
    "pretrain": ("loading", "pretrain"),
    "loader": ("loading", "loader"),
    "kernel_speed": ("kernels", "kernel_speed"),
    "ncu": ("kernels", "profile_slowest"),
}


def run(where: Where) -> dict[str, Any]:
    """Run the stage that `where` names; what it found."""
    module, function = STAGES[where.stage]
    stage: Callable[[Where], dict[str, Any]] = getattr(
        importlib.import_module(f"gpu_stages.{module}"), function
    )
    return stage(where)


def become(where: Where) -> dict[str, Any]:
    """Run it; what it found with its status, whatever happens."""
    try:
        return run(where) | {"status": "passed"}
    except Skip as reason:
        return {"status": f"skipped: {reason}"}
    except Fault as fault:
        return {"status": f"failed: {fault}"}
    except Exception as error:
        traceback.print_exc()
        return {"status": f"failed: {type(error).__name__}: {error}"}
