"""The training step against MAE's, written plainly: time, peak memory, FLOPs, and our loop.

Usage: python tests/bench/bench_step.py [--batch 32] [--rounds 5] [--mae CHECKOUT]. Behind `make
bench-step`; the last line is JSON. ViT-B/16 at 224 x 224, fp32, on one thread; a step is forward,
backward and torch's fused AdamW, the same for all. Times are medians of alternating steps, in
seconds of processor time, which on one thread is wall time less what other programs took. Peak
memory is that of a fresh process, weights and optimizer state included. --mae: a checkout of
facebookresearch/mae, whose own model is then a third party.

mae_vs_reference, memory_vs_reference: ours / the plain writing's (tests/bench/peer_mae.py).
rmae_flops_vs_mae, cmae_flops_vs_mae: FLOP per second of their steps / those of our MAE step.
loop_overhead: our training loop / a bare DeepSpeed loop - 1 (tests/bench/bench_loop.py).

--parts roads, behind `make bench-roads`: the steps of the cheaper roads; in JSON the time of each
over MAE's.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peer_mae import PlainMAE
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline import kernels
from pipeline.config.recipe import RECIPES, load_recipe
from pipeline.cost.dry_run import ATTENTION
from pipeline.method.objective import Objective, build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.method.teacher import Teacher
from pipeline.method.views import make_views
from pipeline.weights.interop import _ours, to_mae

METHODS = ("mae", "rmae", "cmae")
CROSS = ("measure.decoder.attention=cross", "views.predicted=0.3333")
ROADS = {
    "mae": ("mae", ()),
    "mae, cross": ("mae", CROSS),
    "mae, cross, 4 blocks": ("mae", (*CROSS, "measure.decoder.depth=4")),
    "mae, 1 block": ("mae", ("measure.decoder.depth=1",)),
    "mae, 90 % masked": ("mae", ("views.mask_ratio=0.9",)),
    "rmae": ("rmae", ()),
    "rmae, cross": ("rmae", CROSS),
}
Step = Callable[[], Tensor]


def images(batch: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, generator=generator)


def optimizer(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)


def our_step(
    name: str, batch: int, sets: Sequence[str] = ()
) -> tuple[Step, Objective, Teacher | None]:
    """One optimizer step of a recipe with overrides, EMA included, on a fixed batch."""
    objective, teacher = build_objective(load_recipe(RECIPES / f"{name}.yaml", sets))
    update = optimizer(parameter_groups(objective))
    image, sample = images(batch, objective.recipe.encoder.image_size), torch.arange(batch)

    def step() -> Tensor:
        loss, _ = objective(image, sample, 0, teacher)
        loss.backward()
        update.step()
        update.zero_grad(set_to_none=True)
        if teacher is not None:
            teacher.update(objective, 0.996)
        return loss.detach()

    return step, objective, teacher


def normalised(objective: Objective, image: Tensor) -> tuple[Tensor, Tensor]:
    """(images as MAE's loader gives them, float [B, 3, H, W]; noise that leaves our patches)."""
    data = objective.recipe.data
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    pixels = (image.permute(0, 3, 1, 2) / 255 - mean) / std
    sample = torch.arange(len(image))
    patch = objective.encoder.patch
    views = make_views(image, sample, recipe=objective.recipe, epoch=0, patch=patch)
    return pixels.contiguous(), views.first.inverse.float()


def peer_step(
    batch: int,
    model: torch.nn.Module,
    forward: Callable,
    objective: Objective,
    device: str = "cpu",
    autocast: bool = False,
) -> Step:
    """The same step of another model, with the objective's weights and masks.

    autocast: matrix products in bf16, weights and gradients in fp32, as our shipped ds_configs.
    """
    model.load_state_dict(to_mae(objective))
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05}]
    update = optimizer(
        [*decay, {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    )
    side = objective.recipe.encoder.image_size
    pixels, noise = (x.to(device) for x in normalised(objective, images(batch, side)))

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = forward(model, pixels, noise)
        loss.backward()
        update.step()
        update.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def facebook_mae(checkout: Path, **sizes: Any) -> torch.nn.Module:
    """The model of a facebookresearch/mae checkout, whose timm and numpy were older. sizes: of
    its MaskedAutoencoderViT, in place of ViT-B/16's."""
    import numpy
    import timm.models.vision_transformer as vit

    def block(*args: object, qk_scale: None = None, **keywords: object) -> torch.nn.Module:
        return vit.Block(*args, **keywords)  # type: ignore[arg-type]

    setattr(numpy, "float", float)  # noqa: B010 (gone from numpy)
    spec = importlib.util.spec_from_file_location("models_mae", checkout / "models_mae.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(checkout))  # it imports its util.pos_embed
    spec.loader.exec_module(module)
    sys.path.remove(str(checkout))
    module.Block = block  # type: ignore[attr-defined]
    make = module.MaskedAutoencoderViT if sizes else module.mae_vit_base_patch16
    model = make(norm_pix_loss=True, **sizes)
    # Its masks come from torch.rand inside; ours are given instead, to compare the losses.
    model.given = None
    masking = model.random_masking

    def given_masking(x: Tensor, ratio: float) -> tuple[Tensor, ...]:
        draw, torch.rand = torch.rand, lambda *_, **__: model.given  # type: ignore[assignment]
        try:
            return masking(x, ratio)
        finally:
            torch.rand = draw  # type: ignore[assignment]

    model.random_masking = given_masking
    return model


def run_facebook(model: torch.nn.Module, pixels: Tensor, noise: Tensor) -> Tensor:
    model.given = noise
    return model(pixels, mask_ratio=0.75)[0]


def run_plain(model: torch.nn.Module, pixels: Tensor, noise: Tensor) -> Tensor:
    return model(pixels, noise)


def peer(way: str, batch: int, objective: Objective, checkout: Path | None) -> Step:
    if way == "reference":
        return peer_step(batch, PlainMAE(), run_plain, objective)
    assert checkout is not None
    return peer_step(batch, facebook_mae(checkout), run_facebook, objective)


def flops(step: Step) -> int:
    """FLOPs of the matrix products and attentions of a step, 2 for a multiply-add."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        step()
    return counter.get_total_flops()


def seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def agreement(objective: Objective) -> float:
    """The largest difference of a gradient between ours and the plain writing, relative to its
    largest entry; the losses count as one more."""
    plain = PlainMAE()
    plain.load_state_dict(to_mae(objective))
    image = images(2, 224)
    ours, _ = objective(image, torch.arange(2), 0)
    theirs = plain(*normalised(objective, image))
    ours.backward()
    theirs.backward()
    worst = abs(float(ours.detach() / theirs.detach()) - 1)
    mine = dict(objective.named_parameters())
    for name, parameter in plain.named_parameters():
        gradient = mine[_ours(name)].grad.reshape(parameter.shape)
        apart = (gradient - parameter.grad).abs().max() / parameter.grad.abs().max()
        worst = max(worst, float(apart))
    objective.zero_grad(set_to_none=True)
    return worst


def peak_of(way: str, args: argparse.Namespace) -> float:
    """Peak MiB of a fresh process that makes two steps.

    Blocks of a megabyte and more go straight back to the system, as those of a GPU's tensors go
    back to its pool: otherwise the peak also measures how malloc cuts up its heap.
    """
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, __file__, "--measure", way, "--batch", str(args.batch)]
    command += ["--mae", str(args.mae)] if args.mae else []
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return float(done.stdout.splitlines()[-1])


def peak_mib() -> float:
    """The most memory that this program had resident (getrusage counts its parent's too)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure_peak(way: str, args: argparse.Namespace) -> None:
    before = peak_mib()
    step, objective, _ = our_step("mae", args.batch)
    if way != "ours":
        step = peer(way, args.batch, objective, args.mae)
        del objective
    for _ in range(2):
        step()
    print(peak_mib() - before)


def compare_mae(args: argparse.Namespace) -> dict[str, float]:
    """Ours against the peers: seconds, FLOPs, memory."""
    ours, objective, _ = our_step("mae", args.batch)
    apart = agreement(objective)
    peers = ["reference", *(["facebookresearch"] if args.mae else [])]
    steps = {"ours": ours} | {w: peer(w, args.batch, objective, args.mae) for w in peers}
    work = {way: flops(step) for way, step in steps.items()}  # warms up too
    times: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(args.rounds):
        for way, step in steps.items():
            times[way].append(seconds(step))
    memory = {way: peak_of(way, args) for way in steps}
    print(f"MAE, batch {args.batch}; loss and gradients agree within {apart:.1e}")
    print(f"{'':18}{'seconds':>9}{'TFLOP':>8}{'MiB':>8}   ours / it (least-most)")
    for way in steps:
        ratio = sorted(a / b for a, b in zip(times["ours"], times[way], strict=True))
        middle = statistics.median(times[way])
        print(
            f"{way:18}{middle:9.2f}{work[way] / 1e12:8.3f}{memory[way]:8.0f}   "
            f"{statistics.median(ratio):.3f} ({ratio[0]:.3f}-{ratio[-1]:.3f}) time, "
            f"{memory['ours'] / memory[way]:.3f} memory, {work['ours'] / work[way]:.4f} FLOPs"
        )
    result = {}
    for way in peers:
        key = "reference" if way == "reference" else way
        ratio = [a / b for a, b in zip(times["ours"], times[way], strict=True)]
        result[f"mae_vs_{key}"] = round(statistics.median(ratio), 4)
        result[f"memory_vs_{key}"] = round(memory["ours"] / memory[way], 4)
    return result | {"agreement": apart}


def compare_methods(args: argparse.Namespace) -> dict[str, float]:
    """FLOP per second of R-MAE's and C-MAE's steps over MAE's."""
    steps = {name: our_step(name, args.batch)[0] for name in METHODS}
    work = {name: flops(step) for name, step in steps.items()}
    rates: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(max(3, args.rounds // 2)):
        for name, step in steps.items():
            rates[name].append(work[name] / seconds(step))
    print(f"{'':18}{'TFLOP':>9}{'x MAE':>8}{'GFLOP/s':>9}   / MAE's (least-most)")
    result = {}
    for name in METHODS:
        ratio = sorted(a / b for a, b in zip(rates[name], rates["mae"], strict=True))
        result[f"{name}_flops_vs_mae"] = round(statistics.median(ratio), 4)
        print(
            f"{name:18}{work[name] / 1e12:9.3f}{work[name] / work['mae']:8.2f}"
            f"{statistics.median(rates[name]) / 1e9:9.1f}   "
            f"{statistics.median(ratio):.3f} ({ratio[0]:.3f}-{ratio[-1]:.3f})"
        )
    del result["mae_flops_vs_mae"]
    return result


def compare_roads(args: argparse.Namespace) -> dict[str, float]:
    """Time and FLOPs of the cheaper roads over MAE's."""
    steps = {road: our_step(name, args.batch, sets)[0] for road, (name, sets) in ROADS.items()}
    work = {road: flops(step) for road, step in steps.items()}
    times: dict[str, list[float]] = {road: [] for road in ROADS}
    for _ in range(args.rounds):
        for road, step in steps.items():
            times[road].append(seconds(step))
    head = f"{f'batch {args.batch}':22}{'seconds':>9}{'TFLOP':>8}{'x MAE':>8}"
    print(f"{head}   time / MAE's (least-most)")
    result = {}
    for road in ROADS:
        ratio = sorted(a / b for a, b in zip(times[road], times["mae"], strict=True))
        result[road] = round(statistics.median(ratio), 3)
        print(
            f"{road:22}{statistics.median(times[road]):9.2f}{work[road] / 1e12:8.3f}"
            f"{work[road] / work['mae']:8.2f}   {result[road]:.3f} ({ratio[0]:.3f}-{ratio[-1]:.3f})"
        )
    return result


def loop(args: argparse.Namespace) -> dict[str, float]:
    """Our loop over a bare one, and a table of phases on two ranks (tests/bench/bench_loop.py)."""
    here, script = Path(sys.executable).parent, str(Path(__file__).with_name("bench_loop.py"))
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    def last_object(*command: str) -> dict[str, float]:
        done = subprocess.run([*command, "--batch", str(args.batch)], env=env, check=True,
                              capture_output=True, text=True)  # fmt: skip
        return json.loads([row for row in done.stdout.splitlines() if row.startswith("{")][-1])

    shares = {}
    for name in METHODS:
        launch = [str(here / "deepspeed"), "--num_accelerators", "2", script, "phases"]
        recipe = str(RECIPES / f"{name}.yaml")
        shares[name] = last_object(*launch, "--recipe", recipe, "--rounds", "2")
    print("share of a step's time on 2 CPU ranks, ZeRO-2, fp32 (rank 0)")
    print(f"{'':15}" + "".join(f"{name:>8}" for name in METHODS))
    for phase in shares["mae"]:
        print(f"{phase:15}" + "".join(f"{shares[name][phase]:8.1%}" for name in METHODS))
    return last_object(sys.executable, script, "overhead", "--rounds", "3")


PARTS = {"mae": compare_mae, "methods": compare_methods, "loop": loop, "roads": compare_roads}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mae", type=Path, help="a checkout of facebookresearch/mae")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS)[:3])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kernels.use("reference")
    if args.measure:
        measure_peak(args.measure, args)
        return
    if len(args.parts) == 1:
        print(json.dumps(PARTS[args.parts[0]](args)))
        return
    result: dict[str, float] = {}
    for part in args.parts:  # each in a process of its own, which gives its memory back
        words = [*sys.argv[1:], "--parts", part]
        run = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)
        run.check_returncode()
        *rows, last = run.stdout.splitlines()
        print(*rows, sep="\n", flush=True)
        result |= json.loads(last)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
