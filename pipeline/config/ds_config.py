"""A file of ds_configs/: how a recipe is run, read and checked key by key.

The recipe owns what changes the result, the ds_config how it is run; a key in the wrong file is an
error that names the right one. The plan that both make together: planning.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config.deepspeed_keys import check_section, check_words, model_of
from pipeline.config.plan import asks_for
from pipeline.config.suggest import bundled, choices
from pipeline.config.texts import is_number, read_json
from pipeline.errors import UserError
from shard_tools.home import expand_values

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
# Keys with a value that DeepSpeed takes or ignores as it is.
_FREE = (
    "aio", "communication_data_type", "comms_logger", "disable_python_gc", "dump_state",
    "flops_profiler", "memory_breakdown", "prescale_gradients", "gradient_predivide_factor",
    "steps_per_print", "gradient_checkpointing", "compile", "timers",
    "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "watchdog_seconds",
    "zero_allow_untested_optimizer", "cuda_graphs",
)  # fmt: skip
_BOOLEANS = (
    "disable_python_gc", "dump_state", "memory_breakdown", "prescale_gradients",
    "wall_clock_breakdown", "zero_allow_untested_optimizer",
)  # fmt: skip
# Other plain values: what they must be.
_SWITCH = (lambda v: isinstance(v, bool) or v == "auto", 'true, false or "auto"')
_PLAIN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gradient_checkpointing": (lambda v: isinstance(v, bool), "true or false"),
    "compile": _SWITCH,
    "cuda_graphs": _SWITCH,
    "communication_data_type": (
        lambda v: v is None or str(v).lower() in ("fp16", "bf16", "fp32"), "fp16, bf16 or fp32"),
    "gradient_predivide_factor": (lambda v: is_number(v) and v > 0, "a number above 0"),
    "steps_per_print": (lambda v: v is None or _whole(v), "a whole number from 1 up"),
    "train_micro_batch_size_per_gpu": (
        lambda v: v == "auto" or (isinstance(v, int) and _whole(v)),
        'a whole number from 1 up, or "auto"'),
}  # fmt: skip
# Sections of DeepSpeed: its model of each (module and class), or the code that reads it.
_ZERO = ("runtime/zero/config", "DeepSpeedZeroConfig")
_MODELS = {"zero_optimization": _ZERO, "comms_logger": ("comm/config", "CommsLoggerConfig")}
_TIMER = ("utils/config", "DeepSpeedThroughputTimerConfig")
_CODE = {
    "aio": "runtime/swap_tensor/constants.py",
    "flops_profiler": "profiling/constants.py",
    "timers": "utils/config.py",
}
# Objects, and the keys inside them.
_OBJECTS = {
    "bf16": {"enabled", "immediate_grad_update", "check_grad_overflow"},
    "data_types": {"grad_accum_dtype"},
    "torch_autocast": {"enabled", "lower_precision_safe_modules"},
}
# What changes the result, and the recipe key that owns it.
_RECIPE_KEYS = {
    "optimizer": "optimizer",
    "scheduler": "optimizer.epochs, warmup_epochs and min_lr",
    "gradient_clipping": "optimizer.gradient_clipping",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "batch_size (accumulation is computed from it)",
    "lr": "optimizer.base_lr",
    "betas": "optimizer.betas",
    "weight_decay": "optimizer.weight_decay",
    "seed": "seed",
}
# What DeepSpeed reads and nothing here asks it for, and what does it.
_HALF = "bf16 or torch_autocast, which need no loss scale, or leave both out for fp32"
_LOGS = "the recipe's monitor.log_to (tensorboard, wandb, mlflow)"
_UNUSED = {
    "activation_checkpointing": "gradient_checkpointing: true",
    "fp16": _HALF, "amp": _HALF,
    "tensorboard": _LOGS, "wandb": _LOGS, "comet": _LOGS,
    "csv_monitor": f"{_LOGS}; the numbers are in the run's metrics.jsonl",
}  # fmt: skip

# Keys of `zero_optimization` that DeepSpeed ignores below a stage, beside those named stage3_.
_LEAST_STAGE = {
    "offload_optimizer": 1, "cpu_offload": 1, "offload_param": 3, "cpu_offload_param": 3,
    "zero_quantized_weights": 3, "zero_quantized_gradients": 3,
    "zero_quantized_nontrainable_weights": 3, "zero_hpz_partition_size": 3,
}  # fmt: skip

# Sections that turn bf16 on, and what a run under them is called.
PRECISIONS = {"bf16": "bf16", "torch_autocast": "autocast"}
# DeepSpeed's stage 0 under bf16 was 0.04 off plain torch's loss, the other stages 0.006.
STAGE_0_BF16 = "bf16 needs zero_optimization.stage 1, 2 or 3"


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """A file of ds_configs/, checked key by key (DeepSpeed would ignore a misspelt one).

    path: a file, or the bare name of a bundled one (`zero1`). Raises UserError naming the file and
    the key, and the recipe key where that one owns it.
    """
    config = open_ds_config(path)
    if "zero_optimization" in config:
        check_section(path, "zero_optimization", config["zero_optimization"], _zero_model())
    for name in config.get("torch_autocast", {}).get("lower_precision_safe_modules") or []:
        _check_class(path, name)
    return config


def open_ds_config(path: str | Path) -> dict[str, Any]:
    """As `read_ds_config`, but checked against DeepSpeed's source text, without importing torch."""
    path = bundled(path, DS_CONFIGS, ".json")
    if not path.exists():
        raise UserError(
            f"{path}: cannot be read (no such file){choices(path, DS_CONFIGS, '.json')}"
        )
    try:
        config = expand_values(read_json(path.read_text(encoding="utf-8-sig")))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: a DeepSpeed configuration is a JSON object")
    _check_keys(path, config)
    _check_plain(path, config)
    _check_values(path, config)
    for key, model in _MODELS.items():
        if key in config:
            check_section(path, key, config[key], model_of(*model))
    if "throughput" in config.get("timers", {}):
        check_section(path, "timers.throughput", config["timers"]["throughput"], model_of(*_TIMER))
    return config


def _check_class(path: str | Path, name: str) -> None:
    """UserError unless a name is that of a class where DeepSpeed looks for it."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError):
        found = None
    if not isinstance(found, type):
        raise UserError(
            f"{path}: 'torch_autocast.lower_precision_safe_modules': {name!r} is not a class; "
            "write it with its module, as torch.nn.Linear"
        )


def _zero_model() -> type:
    """DeepSpeed's own model of `zero_optimization`."""
    from pipeline.distributed import prepare_deepspeed

    prepare_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig


def _check_keys(path: Path, config: dict[str, Any]) -> None:
    for key, value in config.items():
        if key in _RECIPE_KEYS:
            raise UserError(f"{path}: {key!r} belongs to the recipe: {_RECIPE_KEYS[key]}")
        if key in _UNUSED:
            raise UserError(f"{path}: {key!r} is not used here; use {_UNUSED[key]}")
        if key in _FREE and key not in _CODE:
            continue
        if key not in _OBJECTS and key not in _CODE and key != "zero_optimization":
            valid = ", ".join(("zero_optimization", *_OBJECTS, *_FREE))
            raise UserError(f"{path}: unknown key {key!r}; valid: {valid}")
        if not isinstance(value, dict):
            raise UserError(f"{path}: {key!r} must be an object, not {value!r}")
        if key in _OBJECTS:
            _check_inner(path, key, value, _OBJECTS[key])
        if key in _CODE:
            check_words(path, key, value, _CODE[key])


def _check_plain(path: Path, config: dict[str, Any]) -> None:
    """Check plain values: DeepSpeed would take some for true whatever they are, or fail on them
    after minutes."""
    for key, value in config.items():
        if key in _BOOLEANS and value not in (True, False):
            raise UserError(f"{path}: {key!r} must be true or false, not {value!r}")
        takes, what = _PLAIN.get(key, (lambda _: True, ""))
        if not takes(value):
            raise UserError(f"{path}: {key!r} must be {what}, not {value!r}")
    for inner in ("immediate_grad_update", "check_grad_overflow"):
        value = config.get("bf16", {}).get(inner, False)
        if value not in (True, False):
            raise UserError(f"{path}: 'bf16.{inner}' must be true or false, not {value!r}")
    if config.get("bf16", {}).get("check_grad_overflow", True) is not True:
        raise UserError(
            f"{path}: bf16.check_grad_overflow must be true: it makes DeepSpeed skip a step whose "
            "gradient is not finite"
        )
    listed = config.get("torch_autocast", {}).get("lower_precision_safe_modules") or []
    if not (isinstance(listed, list) and all(isinstance(name, str) for name in listed)):
        raise UserError(
            f"{path}: 'torch_autocast.lower_precision_safe_modules' must be a list of class names, "
            f"not {listed!r}"
        )


def _whole(value: Any) -> bool:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return is_number(value) and whole and value > 0


def _check_inner(path: str | Path, key: str, value: dict[str, Any], known: set[str]) -> None:
    for inner in value:
        if inner not in known:
            valid = ", ".join(sorted(known))
            raise UserError(f"{path}: unknown key '{key}.{inner}'; valid: {valid}")


def _check_values(path: Path, config: dict[str, Any]) -> None:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}")
    _check_zero(path, config.get("zero_optimization", {}), stage)
    _check_scaling(path, config, stage)
    wanted = {name: config.get(name, {}).get("enabled", False) for name in PRECISIONS}
    for name, value in wanted.items():
        if not (isinstance(value, bool) or value == "auto"):
            raise UserError(f'{path}: {name}.enabled must be true, false or "auto", not {value!r}')
    if all(wanted.values()):
        raise UserError(f"{path}: bf16 and torch_autocast exclude each other: enable one of them")
    if stage == 0 and wanted["bf16"]:
        raise UserError(f"{path}: {STAGE_0_BF16}")
    summed = config.get("data_types", {}).get("grad_accum_dtype")
    if summed not in (None, "bf16", "fp32"):
        raise UserError(f"{path}: data_types.grad_accum_dtype must be bf16 or fp32, not {summed!r}")
    if summed == "bf16" and not wanted["bf16"]:
        raise UserError(f"{path}: data_types.grad_accum_dtype bf16 needs bf16.enabled")
    if stage == 1 and wanted["bf16"] and summed == "fp32":
        raise UserError(
            f"{path}: bf16 with data_types.grad_accum_dtype fp32 needs zero_optimization.stage 2 "
            "or 3 (under stage 1 DeepSpeed takes another optimizer, which never skips a step)"
        )
    patience = config.get("watchdog_seconds", 0)
    if not (is_number(patience) and (patience == 0 or 1 <= patience <= 10**9)):
        raise UserError(
            f"{path}: watchdog_seconds must be a number from 1 to 10^9, or 0 for none, "
            f"not {patience!r}"
        )
    if stage == 3 and config.get("compile") is True:
        raise UserError(f"{path}: compile needs zero_optimization.stage 0, 1 or 2")
    if config.get("cuda_graphs") is True and config.get("gradient_checkpointing"):
        raise UserError(f"{path}: cuda_graphs and gradient_checkpointing exclude each other")


def _check_zero(path: Path, zero: dict[str, Any], stage: int) -> None:
    """UserError for settings of `zero_optimization` that DeepSpeed accepts and a run cannot use."""
    for key in zero:
        least = 3 if key.startswith("stage3_") else _LEAST_STAGE.get(key, 0)
        if stage < least and _asked(zero, key):
            which = "3" if least == 3 else f"{least}, 2 or 3"
            raise UserError(
                f"{path}: zero_optimization.{key} needs zero_optimization.stage {which}: DeepSpeed "
                f"ignores it under stage {stage}"
            )
    if zero.get("legacy_stage1") is True:
        raise UserError(
            f"{path}: zero_optimization.legacy_stage1 is no longer in DeepSpeed: leave it out"
        )
    if zero.get("compute_grad_norm", True) not in (True, "auto"):
        raise UserError(
            f"{path}: zero_optimization.compute_grad_norm must be true: the norm shows that a "
            "gradient is not finite, and its step is then skipped"
        )


def _asked(zero: dict[str, Any], key: str) -> bool:
    """Whether a key that needs a stage asks for anything; what is no value of it is said later."""
    value = zero[key]
    if key.startswith("stage3_"):
        return value not in ("auto", False)
    if key == "zero_hpz_partition_size":
        return is_number(value) and value > 1
    return isinstance(value, dict | bool) and asks_for(zero, key)


def _check_scaling(path: Path, config: dict[str, Any], stage: int) -> None:
    """Scaling gradients before they are summed: DeepSpeed asserts that nothing is reduce-scattered,
    and under stage 3 has gradients too small by a factor that is the number of ranks."""
    scattered = config.get("zero_optimization", {}).get("reduce_scatter", True) is not False
    if stage < 2 or (stage == 2 and not scattered):
        return
    for key, without in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
        if config.get(key, without) != without:
            raise UserError(
                f"{path}: {key} needs zero_optimization.stage 0 or 1, or 2 with "
                f"zero_optimization.reduce_scatter false, not stage {stage}"
                + (" with reduce_scatter" if stage == 2 else "")
            )
