"""What commands cost on this machine: a few steps of each kind are measured, the rest is counted.

A command's seconds are a fixed start, and per image loading and computing. Computing is measured on
a micro-batch as the command has it: one core of a CPU (the commands run side by side, a core each),
or the GPU. Loading is measured on the training shards.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import ModuleType

from eval.paper.commands import forward_flops
from eval.paper.job_runner import Command
from pipeline.config.recipe import EncoderRecipe, Recipe, load_recipe
from pipeline.errors import UserError, check_range, naming
from shard_tools.atomic import write_json

START = 6.0  # CPU seconds until a command has imported torch and DeepSpeed and opened its data


@dataclass
class Rates:
    """Measured seconds per image by device and by what is measured, kept in a file."""

    path: Path
    train: str
    known: dict[str, float] = field(default_factory=dict)

    def seconds(self, command: Command, encoder: EncoderRecipe) -> float:
        """Of a command, on one core or GPU. encoder: the architecture that evaluations have."""
        if not command.images:
            return START
        if recipe := recipe_of(command):
            return START + command.images * self.of_pretraining(recipe)
        forward = forward_flops(encoder)
        training = Path(command.command[1]).stem == "finetune"
        kind = "finetune" if training else "encode"
        per_image = self.rate(
            f"{kind} {encoder.model_dump_json()}",
            lambda: measuring().encoding(encoder, training),
        )
        passes = command.flops / (3 * forward if training else forward)
        return START + passes * (per_image + self.loading(encoder.image_size))

    def of_pretraining(self, recipe: Recipe) -> float:
        """Of an image in a recipe's pretraining; under data.sizes the mean over the run."""
        return sum(share * self.of_phase(phase) for share, phase in recipe.phases)

    def of_phase(self, recipe: Recipe) -> float:
        """Of an image of a recipe whose images stay of one size."""
        per_image = self.rate(step_key(recipe), lambda: measuring().pretraining(recipe))
        crops = 2 if recipe.views.second == "crop" else 1
        return per_image + crops * self.loading(recipe.encoder.image_size)

    def loading(self, size: int) -> float:
        """Seconds to read, decode and crop a training image."""
        return self.rate(f"load {size}", lambda: measuring().load(self.train, size))

    def rate(self, key: str, measure: Callable[[], float]) -> float:
        """What is known under a key, or measured now and written down."""
        key = f"{measuring().device_name()}: {key}"
        if not self.known and self.path.is_file():
            self.known |= read_rates(self.path)
        if key not in self.known:
            self.known[key] = measure()
            with naming(self.path, "cannot be written"):
                write_json(self.path, self.known)
        return self.known[key]


def measuring() -> ModuleType:
    """The module that measures. It imports torch, for which no help or error should wait."""
    from eval.paper import measuring

    return measuring


def read_rates(path: Path) -> dict[str, float]:
    """The measurements of an earlier call. UserError where they are none."""
    with naming(path, "cannot be read"):
        text = path.read_bytes()
    try:
        found = {str(key): float(value) for key, value in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a file of measured rates; remove it to measure again"
        ) from error
    for key, value in found.items():
        check_range(f"{path}: {key}:", value, at_least=0)
    return found


def recipe_of(command: Command) -> Recipe | None:
    """The recipe of a pretraining, None for any other command."""
    words = command.command
    if "--recipe" not in words or not words[1].endswith("pretrain.py"):
        return None
    sets = [value for word, value in pairwise(words) if word == "--set"]
    return load_recipe(words[words.index("--recipe") + 1], sets)


def of_one_device(known: Mapping[str, float], recipes: Sequence[Recipe]) -> dict[str, float]:
    """What → seconds per image, of the device that has measured the steps of most of the recipes;
    of several the first. known: as read_rates has it, by device and what."""
    devices: dict[str, dict[str, float]] = {}
    for key, value in known.items():
        device, _, what = key.partition(": ")
        devices.setdefault(device, {})[what] = value

    def measured(rates: dict[str, float]) -> int:
        return sum(step_seconds(rates, recipe) is not None for recipe in recipes)

    return max(devices.values(), key=measured, default={})


def step_seconds(rates: Mapping[str, float], recipe: Recipe) -> float | None:
    """What is known of a recipe's step, in seconds of an image, without loading; None without.
    rates: of one device."""
    phases = [(share, rates.get(step_key(phase))) for share, phase in recipe.phases]
    if any(seconds is None for _, seconds in phases):
        return None
    return sum(share * seconds for share, seconds in phases if seconds is not None)


def step_key(recipe: Recipe) -> str:
    """Under which a step of a recipe whose images stay of one size is measured."""
    parts = recipe.model_dump_json(include={"encoder", "views", "measure"})
    return f"pretrain {recipe.batch_size} {parts}"


def within(
    jobs: Sequence[Command], seconds: Sequence[float], budget: float
) -> tuple[list[Command], list[Command]]:
    """(jobs that fit, jobs that are left out): in order, each whose seconds still fit into the
    budget and whose needs are not left out; what is done costs nothing and always fits."""
    kept, left = list[Command](), list[Command]()
    spent, missing = 0.0, set[str]()
    for job, cost in zip(jobs, seconds, strict=True):
        if job.done:
            kept.append(job)
        elif spent + cost > budget or missing & set(job.needs):
            missing.add(job.name)
            left.append(job)
        else:
            spent += cost
            kept.append(job)
    return kept, left
