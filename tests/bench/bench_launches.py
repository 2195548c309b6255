"""What a step costs the host: launches by phase and recipe, and its time beside plain torch's.

Usage: python tests/bench/bench_launches.py [--mae CHECKOUT] [--compiled] [--rounds 20]. Behind
`make bench-launches`; the last line is JSON. No GPU is needed, and none is used.

Launches: ViT-B's recipes at full size with torch_autocast in bf16 and ZeRO-2 on one rank, on the
stand-in of tests/helpers/null_gpu.c, which counts what torch's CUDA build and Triton send it. Where
it cannot be built the recipes' ops are counted on the CPU, at 64 x 64 pixels and small widths.
Beside them a plain torch loop (tests/bench/peer_mae.py) and, with --mae, a checkout of
facebookresearch/mae; with --compiled also the recipes whose blocks torch.compile has compiled for
CUDA, MAE's under ZeRO 0 to 2 (minutes).

Host time: ViT-B MAE with its 252 tensors at widths of 24 and 16, where the arithmetic is next to
nothing: our step under each ZeRO stage and a plain loop (torch.autocast, one foreach norm read by
the host, fused AdamW) in alternation, on one thread of the CPU. host_ratio: the median over rounds
of ours / theirs in seconds of processor time; seconds of the wall are in the table.

optimizer_launches, host_reads: of MAE's optimizer step. syncs: waits of the host in forward,
backward and EMA.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import null_gpu
import torch
from launches import device_counts

from pipeline import kernels
from pipeline.config.ds_config import read_ds_config
from pipeline.config.planning import plan_recipe, set_precision
from pipeline.config.recipe import RECIPES, Recipe, load_recipe
from pipeline.distributed import close
from pipeline.errors import UserError, check_range
from pipeline.method.objective import Objective, build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.method.views import make_views
from pipeline.runtime.engine import Engine, init_ranks

PAPER = ("mae", "rmae", "cmae")
STUDIED = (*PAPER, "rmae_dagger", "rmae_ddagger", "mae_strong", "mocov3")
SMALL = (
    "encoder.image_size=64",
    "encoder.options={patch_size: 16, embed_dim: 24, depth: 12, num_heads: 12}",
)
SMALL_HEADS = {
    True: "measure.decoder={width: 16, depth: 8, heads: 16}",
    False: "measure.heads={hidden: 24, out: 12}",
}
BATCH = 4


def recipe_of(name: str, small: bool, *overrides: str) -> Recipe:
    """A recipe with steps of one micro-batch; small: in its widths, with all its parts."""
    whole = load_recipe(RECIPES / f"{name}.yaml")
    size = (*SMALL, SMALL_HEADS[whole.measure.reconstructs]) if small else ()
    more = (f"batch_size={BATCH}", f"data.partitions={BATCH}", *size, *overrides)
    return load_recipe(RECIPES / f"{name}.yaml", list(more))


def engine_of(recipe: Recipe, stage: int, compiled: bool = False) -> tuple[Engine, Objective, Any]:
    """The shipped way to run under a ZeRO stage, in bf16 also on a CPU."""
    config = read_ds_config(f"zero{stage}") | {"compile": compiled}
    set_precision(config, "bf16")
    objective, teacher = build_objective(recipe)
    engine = Engine(objective, parameter_groups(objective), plan_recipe(config, recipe, 1))
    return engine, objective, teacher


def inputs_of(recipe: Recipe, device: str, teacher: Any) -> tuple[Any, ...]:
    side = recipe.encoder.image_size
    image = torch.zeros(BATCH, side, side, 3, dtype=torch.uint8, device=device)
    second = image.clone() if recipe.views.second == "crop" else None
    return image, torch.arange(BATCH, device=device), 0, teacher, second


INTERPRETED: list[None] = []  # one for each kernel that Triton's interpreter has run


def note_interpreted() -> None:
    """Count the interpreter's kernels from now on: no dispatch mode sees them."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def noted(self: Any, *args: Any, **keywords: Any) -> Any:
        INTERPRETED.append(None)
        return run(self, *args, **keywords)

    GridExecutor.__call__ = noted


def counts_of(call: Callable[[], Any], device: str) -> dict[str, int]:
    """Launches, copies and waits of one call."""
    before = len(INTERPRETED)
    found = vars(device_counts(call, device))
    return found | {"launches": found["launches"] + len(INTERPRETED) - before}


def phases(name: str, device: str, stage: int = 2, compiled: bool = False) -> dict[str, Any]:
    """{phase: launches, copies and waits} of one step of a recipe."""
    recipe = recipe_of(name, device == "cpu")
    engine, objective, teacher = engine_of(recipe, stage, compiled)
    if teacher is not None:
        teacher.to(device)
    inputs = inputs_of(recipe, device, teacher)
    loss: list[Any] = []

    def forward() -> None:
        loss[:] = engine.engine(*inputs)[:1]

    calls: dict[str, Callable[[], Any]] = {
        "masking": lambda: make_views(
            *inputs[:2], recipe=recipe, epoch=0, patch=objective.encoder.patch, crop=inputs[4]
        ),
        "forward": forward,
        "backward": lambda: engine.engine.backward(loss.pop()),
        "optimizer": lambda: engine.update(1e-4),
        "EMA": lambda: teacher and teacher.update(objective, 0.99, engine.masters),
    }
    for _ in range(2):  # tables that are kept, kernels that are compiled
        found = {phase: counts_of(call, device) for phase, call in calls.items()}
    engine.destroy()
    return found


def plain_optimizer(model: torch.nn.Module) -> Callable[[], None]:
    """One norm, read by the host, and a fused AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    update = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        if bool(
            torch.nn.utils.get_total_norm(
                [p.grad for p in trained if p.grad is not None]
            ).isfinite()
        ):
            update.step()
        update.zero_grad(set_to_none=True)

    return step


def peer_phases(device: str, checkout: Path | None) -> dict[str, Any]:
    """The same of MAE written plainly, or by a checkout of facebookresearch/mae."""
    from bench_step import facebook_mae, run_facebook
    from peer_mae import PlainMAE

    torch.backends.cudnn.enabled = False  # the stand-in has none; a few launches more
    model = (facebook_mae(checkout) if checkout else PlainMAE()).to(device)
    image = torch.zeros(BATCH, 3, 224, 224, device=device)
    noise = torch.zeros(BATCH, 196, device=device)
    loss: list[Any] = []

    def forward() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss[:] = [run_facebook(model, image, noise) if checkout else model(image, noise)]

    calls = {
        "forward": forward,
        "backward": lambda: loss.pop().backward(),
        "optimizer": plain_optimizer(model),
    }
    for _ in range(2):
        found = {phase: counts_of(call, device) for phase, call in calls.items()}
    return found


def count(args: argparse.Namespace) -> dict[str, Any]:
    """{who: phases}, in this process's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels.use("triton", device)
    if device == "cpu":
        note_interpreted()
    found = {name: phases(name, device) for name in STUDIED}
    if device == "cuda" and args.compiled:
        for stage in range(3):
            found[f"mae, compiled, ZeRO-{stage}"] = phases("mae", device, stage, compiled=True)
        found |= {f"{name}, compiled": phases(name, device, compiled=True) for name in PAPER[1:]}
    if device == "cuda":  # at full size, which holds no memory there
        found["plain torch"] = peer_phases(device, None)
        if args.mae:
            found["facebookresearch/mae"] = peer_phases(device, args.mae)
    return found


@dataclass
class Spent:
    """Seconds of processor time and of the wall."""

    cpu: list[float]
    wall: list[float]

    def add(self, call: Callable[[], None]) -> None:
        """Time one call."""
        cpu, wall = time.process_time(), time.perf_counter()
        call()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)

    def line(self) -> str:
        """Medians in milliseconds."""
        cpu, wall = statistics.median(self.cpu), statistics.median(self.wall)
        return f"{1e3 * cpu:10.1f}{1e3 * wall:10.1f}"


def host(args: argparse.Namespace) -> dict[str, Any]:
    """Our step under one ZeRO stage and the plain one, in alternation."""
    torch.set_num_threads(1)
    recipe = recipe_of("mae", True)
    engine, _, _ = engine_of(recipe, args.stage)
    plain, _ = build_objective(recipe)
    inputs, optimizer = inputs_of(recipe, "cpu", None), plain_optimizer(plain)

    def ours() -> None:
        engine.micro_step(1e-4, *inputs)

    def theirs() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = plain(*inputs)
        loss.backward()
        optimizer()

    spent = {step: Spent([], []) for step in (ours, theirs)}
    for number in range(args.rounds + 3):
        for step in (ours, theirs) if number % 2 else (theirs, ours):
            spent[step].add(step)
        if number < 3:  # tables, moments, caches
            spent = {step: Spent([], []) for step in spent}
    ratios = [a / b for a, b in zip(spent[ours].cpu, spent[theirs].cpu, strict=True)]
    ratio = statistics.median(ratios)
    tensors = sum(p.requires_grad for p in plain.parameters())
    print(f"{args.stage:5}{tensors:9}{spent[ours].line()}{spent[theirs].line()}{ratio:10.3f}")
    return {"ratio": round(ratio, 3)}


def child(words: list[str], env: dict[str, str]) -> dict[str, Any]:
    """The last line of this script with these words, in a process of its own; prints the rest."""
    run = subprocess.run(
        [sys.executable, __file__, *words], env=env, stdout=subprocess.PIPE, text=True
    )
    run.check_returncode()
    *rows, last = run.stdout.splitlines()
    print(*rows, sep="\n" if rows else "", end="\n" if rows else "", flush=True)
    return json.loads(last)


def counted(args: argparse.Namespace) -> dict[str, Any]:
    """`count` on the stand-in for a GPU, or on the CPU where that cannot be built."""
    words = ["--part", "count", *(["--mae", str(args.mae)] if args.mae else [])]
    words += ["--compiled"] * args.compiled
    with tempfile.TemporaryDirectory() as folder:
        try:
            return child(words, null_gpu.environment(Path(folder)))
        except null_gpu.NoCompilerError as error:
            print(f"ops are counted on the CPU: {error}")
            return child(words, without_gpu({"TRITON_INTERPRET": "1"}))


def without_gpu(more: dict[str, str]) -> dict[str, str]:
    """This environment and more, of a process that sees no GPU though there be one."""
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} | more


def show(found: dict[str, Any]) -> None:
    """Launches by phase as a table."""
    order = ("masking", "forward", "backward", "optimizer", "EMA")
    print(
        "launches (waits of the host) of a step: one micro-batch, ZeRO-2, one rank, bf16 autocast"
    )
    print(f"{'':24}" + "".join(f"{phase:>14}" for phase in order))
    for name, seen in found.items():
        cells = [f"{n['launches']} ({n['waits']})" if (n := seen.get(p)) else "" for p in order]
        print(f"{name:24}" + "".join(f"{cell:>14}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mae", type=Path, help="a checkout of facebookresearch/mae")
    parser.add_argument("--compiled", action="store_true", help="also under torch.compile")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--part", choices=["count", "host"], help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mae and not (args.mae / "models_mae.py").is_file():
        parser.error(f"--mae {args.mae}: has no models_mae.py; give a checkout of "
                     "github.com/facebookresearch/mae")  # fmt: skip
    try:
        check_range("--rounds", args.rounds, at_least=1)
    except UserError as error:
        parser.error(str(error))
    if args.part:
        init_ranks()
        print(json.dumps({"count": count, "host": host}[args.part](args)))
        close()
        return
    found = counted(args)
    show(found)
    print("milliseconds of a step of 252 small tensors, CPU and wall, ours and plain torch's")
    print(f"stage  tensors{'ours':>10}{'':10}{'plain':>10}{'':10}{'ours / plain':>10}")
    env = without_gpu({"OMP_NUM_THREADS": "1"})
    rounds = ["--rounds", str(args.rounds)]
    ratios = {
        str(stage): child(["--part", "host", "--stage", str(stage), *rounds], env)["ratio"]
        for stage in range(4)
    }
    waits = {
        name: sum(seen[p]["waits"] for p in ("forward", "backward", "EMA"))
        for name, seen in found.items()
        if name in STUDIED
    }
    print(json.dumps({
        "optimizer_launches": found["mae"]["optimizer"]["launches"],
        "host_reads": found["mae"]["optimizer"]["waits"],
        "host_ratio": ratios,
        "forward_launches": {name: found[name]["forward"]["launches"] for name in PAPER},
        "masking_launches": {name: found[name]["masking"]["launches"] for name in ("mae", "cmae")},
        "syncs": waits,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
