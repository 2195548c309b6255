"""Our training loop against a bare DeepSpeed loop, and where the time of its steps goes.

    python tests/bench/bench_loop.py overhead [--rounds 5]
    deepspeed --num_accelerators 2 tests/bench/bench_loop.py phases --recipe FILE

overhead: one rank; seconds per step of `loop.train` (data, learning rate, monitor, checks) over
those of forward, backward and step of the same engine on one fixed batch, in alternation, minus 1.
phases: seconds of each phase of the real loop, what is nested counted once; pictures, saving and
probes, which come every some thousand steps, are left out of both. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from phases import ORDER, Phases, watching

from pipeline.config.recipe import RECIPES
from pipeline.data.loader import train_loader
from pipeline.distributed import Ranks, close
from pipeline.runtime import loop
from pipeline.runtime.engine import init_ranks
from pipeline.runtime.settings import Settings
from pipeline.runtime.setup import loader_config, setup
from pipeline.runtime.train_state import TrainState

ROOT = Path(__file__).parents[2]
COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "barrier", "all_gather_into_tensor",
    "reduce_scatter_tensor", "all_gather", "reduce_scatter",
)  # fmt: skip


class Run:
    """A run whose loop has no pictures, checkpoints and probes, and that notes when steps end."""

    def __init__(self, state: TrainState) -> None:
        self.state, self.ends = state, []
        loop.save = lambda run, step, must: 0.0
        loop.picture = lambda run, step, batch: None
        loop.probe = lambda run, step: self.ends.append(time.perf_counter())

    def slice(self, steps: int) -> list[float]:
        """Train some steps more; the seconds of all but the first, which starts the workers."""
        s, first = self.state, self.state.steps.first
        s.loader.close()
        config = loader_config(s.recipe, s.plan, s.data, s.ranks)
        chosen = range(first, first + steps)
        loader = train_loader(config, s.ranks.rank, s.ranks.world, chosen)
        self.ends.clear()
        now = replace(s, loader=loader, steps=replace(s.steps, last=chosen.stop))
        loop.train(now, stop)
        self.state = replace(now, steps=replace(now.steps, first=chosen.stop))
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]


stop = loop.StopSignal()


def make_run(args: argparse.Namespace, ranks: Ranks) -> Run:
    """A run of the recipe for long enough, in a folder that does not stay."""
    settings = Settings(
        ROOT / f"ds_configs/zero{args.stage}.json", args.recipe,
        (f"batch_size={args.batch}", "optimizer.epochs=1000", *args.overrides),
        data=str(args.data), output=args.output, resume="none",
    )  # fmt: skip
    return Run(setup(settings, ranks))


def bare(run: Run, steps: int) -> list[float]:
    """Seconds of forward, backward and step of the run's engine on one batch."""
    state = run.state
    micro, side = state.plan.micro_batch, state.recipe.encoder.image_size
    image = torch.zeros(micro, side, side, 3, dtype=torch.uint8)
    inputs = (image, torch.arange(micro), 0, state.model.teacher)
    engine, seconds = state.model.engine.engine, []
    for _ in range(steps):
        start = time.perf_counter()
        for _ in range(state.plan.accumulation):
            loss, _ = engine(*inputs)
            engine.backward(loss)
            engine.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def overhead(run: Run, rounds: int) -> dict[str, float]:
    """Median over rounds of (our loop / the bare loop) - 1."""
    bare(run, 1)
    ratios, ours, theirs = [], [], []
    for _ in range(rounds):
        ours.append(statistics.median(run.slice(3)))
        theirs.append(statistics.median(bare(run, 2)))
        ratios.append(ours[-1] / theirs[-1] - 1)
        print(f"our loop {ours[-1]:.3f} s, bare {theirs[-1]:.3f} s: {ratios[-1]:+.3%}", flush=True)
    return {"loop_overhead": round(statistics.median(ratios), 4)}


def phases(run: Run, steps: int) -> dict[str, float]:
    """Share of each phase in the seconds of `steps` steps of the real loop (this rank's)."""
    seconds, waited = Phases(time.perf_counter), []
    monitor, model = run.state.watch.monitor, run.state.model
    note = monitor.waited

    def wait(spent: float) -> None:
        waited.append(spent)
        note(spent)

    monitor.waited = wait  # type: ignore[method-assign]
    with ExitStack() as stack:
        stack.enter_context(watching(seconds, model.objective, model.teacher, model.engine.engine))
        for name in COLLECTIVES:
            stack.enter_context(seconds.watch("communication", torch.distributed, name))
        run.slice(2)
        waited.clear()
        start = time.perf_counter()
        seconds.restart()
        run.slice(steps)
        total = time.perf_counter() - start - waited[0]  # the first wait starts the workers
        sums = seconds.sums()
    sums["data wait"] = sum(waited[1:])
    sums["rest"] -= sum(waited)
    return {name: round(sums[name] / total, 4) for name in ORDER}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["overhead", "phases"])
    parser.add_argument("--recipe", type=Path, default=RECIPES / "mae.yaml")
    parser.add_argument("--data", type=Path, default=ROOT / "data/shards/train")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    ranks = init_ranks()
    args.overrides = [f"data.partitions={args.batch}", "data.workers=1", *args.overrides]
    with tempfile.TemporaryDirectory() as folder:
        args.output = folder
        run = make_run(args, ranks)
        try:
            result = (
                overhead(run, args.rounds) if args.what == "overhead" else phases(run, args.rounds)
            )
        finally:
            run.state.close()
    if ranks.rank == 0:
        print(json.dumps(result), flush=True)
    close()


if __name__ == "__main__":
    sys.exit(main())
