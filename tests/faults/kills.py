"""Random kill -9 of real runs: what is left at the end must be the undisturbed run's, bit for bit.

A kill is drawn from a seed: the phase (start, data, step, save, eval), how far into the run, and
how many milliseconds into the phase. The process is killed from outside, by its number.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from children import Config, differences, evaluation, pretraining, result, run_to_end

from eval import finetune, linprobe

CONFIGS = (
    Config("mae", 0, workers=1),
    Config("rmae", 2, micro=4),
    Config("cmae", 3, micro=4),
    Config("rmae", 3),
    Config("cmae", 1, ranks=2, micro=4),
)
# phase → what the run says when it begins, and the most seconds from there to the kill
PHASES = {
    "start": ("start", 1.5),
    "data": ("step {step}, waiting for data", 0.004),
    "step": ("step {step}, forward", 0.12),
    "save": ("saving step {save}", 0.15),
}


@dataclass
class Tally:
    """Kills by phase, and what was lost (one sentence each)."""

    kills: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    runs: int = 0


def kill_once(config: Config, data: Path, output: Path, rng: random.Random, tally: Tally) -> bool:
    """Start or go on, and kill one rank at a random moment; whether it was still alive then."""
    phase = rng.choice(list(PHASES))
    saved = sorted((output / "checkpoints").glob("step-*"))
    first = int(saved[-1].name.removeprefix("step-")) if saved else 0
    step = rng.randint(min(first + 1, 12), 12)
    text, most = PHASES[phase]
    text = text.format(step=step, save=min(12, -(-step // 3) * 3))
    victim = rng.randrange(config.ranks)
    children = pretraining(config, data, output)
    alive = children[victim].reached(text)
    code = children[victim].kill(rng.uniform(0, most)) if alive else children[victim].wait()
    for rank, child in enumerate(children):
        if rank != victim and child.wait(60) == 0 and code == -9 and first < 9:
            tally.lost.append(f"{config.name}: rank {rank} ended well without rank {victim}")
    if code == -9:
        tally.kills[phase] += 1
    elif code != 0:
        tally.lost.append(f"{config.name}: exit code {code} in {children[victim].log.name}")
    return code == -9


def pretraining_kills(
    data: Path, folder: Path, rng: random.Random, tally: Tally, kills: int
) -> None:
    """Kill pretraining runs four times each until there were `kills`, and compare each."""
    references: dict[str, dict[str, bytes]] = {}
    number = 0
    while sum(tally.kills.values()) < kills and not tally.lost:
        config = CONFIGS[number % len(CONFIGS)]
        number += 1
        if config.name not in references:
            reference = folder / f"reference-{number}"
            assert set(run_to_end(config, data, reference)) == {0}, reference
            references[config.name] = result(reference)
        output = folder / f"run-{number}"
        for _ in range(min(4, kills - sum(tally.kills.values()))):
            kill_once(config, data, output, rng, tally)
        if set(run_to_end(config, data, output)) != {0}:
            tally.lost.append(f"{config.name}: {output.name} did not go on")
            return
        odd = differences(output, references[config.name])
        if odd:
            tally.lost.append(f"{config.name}: {output.name} differs in {odd}")
        tally.runs += 1
        shutil.rmtree(output)


EVALS: dict[str, tuple[Any, list[str]]] = {
    "finetuning": (
        finetune,
        ["--ds_config", "ds_configs/zero2.json", "--epochs", "3", "--warmup-epochs", "1",
         "--batch-size", "16", "--workers", "0"],
    ),
    "linear probe": (
        linprobe,
        ["--epochs", "4", "--warmup-epochs", "1", "--batch-size", "32", "--workers", "0"],
    ),
}  # fmt: skip


def evaluation_kills(
    data: Path, run: Path, folder: Path, rng: random.Random, tally: Tally, kills: int
) -> None:
    """Kill evaluations of `run`, each four times, until there were `kills`; compare each."""
    references: dict[str, Any] = {}
    done = number = 0
    while done < kills and not tally.lost:
        name = list(EVALS)[number % len(EVALS)]
        number += 1
        module, words = EVALS[name]
        words = [*words, "--encoder", str(run), "--train", str(data)]
        words += ["--val", str(data.parent / "val")]
        if name not in references:
            output = folder / f"eval-reference-{number}.json"
            child = evaluation(
                module, [*words, "--output", str(output)], output.with_suffix(".log")
            )
            assert child.wait() == 0, child.log
            references[name] = outcome(output)
        output = folder / f"eval-{number}.json"
        log, words = output.with_suffix(".log"), [*words, "--output", str(output)]
        for _ in range(min(4, kills - done)):
            child = evaluation(module, words, log)
            alive = all(child.reached("") for _ in range(rng.randint(1, 7)))
            killed = child.kill(rng.uniform(0, 0.1)) == -9 if alive else child.wait() < 0
            done += killed
            tally.kills["eval"] += killed
            if not killed:  # it had ended before
                break
        code = evaluation(module, words, log).wait()
        if code:
            tally.lost.append(f"{name}: exit code {code}, {log.name}")
        elif outcome(output) != references[name]:
            tally.lost.append(f"{name}: {output.name} differs from the undisturbed one")
        tally.runs += 1


def outcome(output: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A result without times, and the weights beside it."""
    values = json.loads(output.read_text())
    values.pop("seconds")
    folder = output.with_suffix("")
    return values, {p.name: p.read_bytes() for p in folder.glob("classifier*")}
