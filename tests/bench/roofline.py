"""A prediction, not a measurement: the time of a training step on GPUs that are not here.

Usage: python tests/bench/roofline.py [--batch 128] [--launch-ms MS]. Behind `make roofline`; the
last line is JSON. Every op of a step in bf16 takes max(FLOPs / peak, bytes / bandwidth), its inputs
read and its outputs written once; caches and communication are left out, so the truth is slower.
The host takes --launch-ms for each op (default: measured on this machine, a lower bound); the
longer of the two is the step's. Ops are counted as they run on tensors without data: MAE written
plainly in eager PyTorch (tests/bench/peer_mae.py), and our methods with each masking kernel as one
launch.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from kernels_traffic import CountBytes
from peer_mae import PlainMAE
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from pipeline import kernels
from pipeline.config.peaks import PEAKS
from pipeline.config.recipe import RECIPES, load_recipe
from pipeline.cost.dry_run import ATTENTION, meta_objective
from pipeline.cost.launches import OPTIMIZER_LAUNCHES, measured_launch_ms
from pipeline.kernels.cases import ops
from pipeline.method import objective

# Memory bandwidth in 10^12 bytes/s (makers' data sheets: A100 SXM 80 GB, H100 SXM, HGX B200).
BANDWIDTH = {"a100": 2.039, "h100": 3.35, "b200": 8.0}
METHODS = ("mae", "rmae", "cmae")
PHASES = (
    "masks + embed", "encoder", "teacher", "decoder", "heads", "loss", "backward", "optimizer",
    "EMA",
)  # fmt: skip
ADAMW, EMA = 28, 10  # bytes per parameter: bf16 weight and gradient, fp32 weight and moments


class Book(CountBytes):
    """FLOPs and bytes of every op, and its time on each GPU, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.flops_of = flop_registry | {op: shape_wrapper(f) for op, f in ATTENTION.items()}
        self.phase, self.closed = "rest", False
        self.flops: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.seconds: dict[str, Counter[str]] = {gpu: Counter() for gpu in BANDWIDTH}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.closed:
            return func(*args, **(kwargs or {}))
        before = self.total
        out = super().__torch_dispatch__(func, types, args, kwargs)
        count = self.flops_of.get(func.overloadpacket)
        work = count(*args, **(kwargs or {}), out_val=out) if count else 0
        self.add(work, self.total - before)
        return out

    def add(self, flops: int, moved: int, launches: int = 1) -> None:
        """One launch, or some, in the phase that is open; none where nothing is moved (a view)."""
        self.launches[self.phase] += launches * (moved > 0)
        self.flops[self.phase] += flops
        self.bytes[self.phase] += moved
        for gpu, bandwidth in BANDWIDTH.items():
            time = max(flops / PEAKS[gpu]["bf16"], moved / bandwidth) / 1e12
            self.seconds[gpu][self.phase] += time

    @contextmanager
    def within(self, phase: str):
        """Whatever runs inside belongs to the phase, unless an inner one claims it."""
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    def watch(self, phase: str, module: nn.Module) -> None:
        """The module's forward belongs to the phase."""
        forward = module.forward

        def counted(*args: Any, **keywords: Any) -> Any:
            with self.within(phase):
                return forward(*args, **keywords)

        module.forward = counted  # type: ignore[method-assign]


def fused_ops(book: Book) -> dict[str, Callable]:
    """Our ops as single launches: what each reads and writes, once."""
    return {
        name: module.as_launch(book, getattr(kernels, name))
        for name, module in ops().items()
        if hasattr(module, "as_launch")
    }


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def peer(batch: int) -> Book:
    """MAE written plainly, eager, from the images as its loader gives them."""
    book = Book()
    with torch.device("meta"):
        model = PlainMAE().bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        for phase, module in (
            ("masks + embed", model.patch_embed),
            ("encoder", model.blocks),
            ("decoder", model.decoder_blocks),
            ("decoder", model.decoder_pred),
        ):
            book.watch(phase, module)
        image = torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16)
        noise = torch.empty(batch, 196)
        with book:
            with book.within("loss"):  # and the gathers and norms between the parts
                loss = model(image, noise)
            with book.within("backward"):
                loss.backward()
            with book.within("optimizer"):
                book.add(0, ADAMW * parameters(model), OPTIMIZER_LAUNCHES)
    return book


def ours(name: str, batch: int) -> Book:
    """A method's step with the masking kernels."""
    book, recipe = Book(), load_recipe(RECIPES / f"{name}.yaml")
    model, teacher = meta_objective(recipe)
    model.bfloat16()
    before = {op: getattr(kernels, op) for op in fused_ops(book)}
    views = objective.make_views
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        book.watch("encoder", model.encoder)
        book.watch("masks + embed", model.encoder.patch_embed["proj"])
        for phase, part in (("decoder", "decoder"), ("heads", "projector"), ("heads", "predictor")):
            if hasattr(model.measure, part):
                book.watch(phase, getattr(model.measure, part))
        if teacher is not None:
            teacher.to_empty(device="cpu")
            book.watch("teacher", teacher)
        image = torch.empty(batch, 224, 224, 3, dtype=torch.uint8)
        sample = torch.empty(batch, dtype=torch.int64)

        def counted_views(*args: Any, **keywords: Any) -> Any:
            with book.within("masks + embed"):
                return views(*args, **keywords)

        objective.make_views = counted_views
        for op, launch in fused_ops(book).items():
            setattr(kernels, op, launch)
        try:
            with book:
                with book.within("loss"):
                    loss, _ = model(image, sample, 0, teacher)
                with book.within("backward"):
                    loss.backward()
                with book.within("optimizer"):
                    book.add(0, ADAMW * parameters(model), OPTIMIZER_LAUNCHES)
                if teacher is not None:
                    with book.within("EMA"):
                        book.add(0, EMA * parameters(teacher))
        finally:
            objective.make_views = views
            for op, function in before.items():
                setattr(kernels, op, function)
    return book


def show(books: dict[str, Book], batch: int, launch_ms: float) -> None:
    """Work, then predicted milliseconds, by phase."""
    names = list(books)
    host = {name: book.launches.total() * launch_ms for name, book in books.items()}
    print(f"ViT-B/16, 224 x 224, bf16, batch {batch}; a prediction (roofline), nothing measured")
    head = f"{'':14}" + "".join(f"{name:>18}" for name in names)
    print("\nTFLOP / GB" + head[10:])
    for phase in PHASES:
        cells = (
            f"{books[n].flops[phase] / 1e12:.3f} / {books[n].bytes[phase] / 1e9:.3f}" for n in names
        )
        print(f"{phase:14}" + "".join(f"{cell:>18}" for cell in cells))
    print(f"{'launches':14}" + "".join(f"{books[n].launches.total():18}" for n in names))
    print(f"{'host, ms':14}" + "".join(f"{host[n]:18.3f}" for n in names))
    print(f"(at {launch_ms * 1e3:.1f} µs per launch)")
    for gpu in BANDWIDTH:
        print(f"\n{gpu.upper()}, ms" + head[len(gpu) + 4 :])
        for phase in PHASES:
            times = (1e3 * books[n].seconds[gpu][phase] for n in names)
            print(f"{phase:14}" + "".join(f"{t:18.3f}" for t in times))
        step = {name: 1e3 * book.seconds[gpu].total() for name, book in books.items()}
        print(f"{'step':14}" + "".join(f"{step[n]:18.3f}" for n in names))
        bound = ("host" if host[n] > step[n] else "GPU" for n in names)
        print(f"{'bound by the':14}" + "".join(f"{side:>18}" for side in bound))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=128, help="images on one GPU")
    parser.add_argument("--launch-ms", type=float, help="of the host per op (default: measured)")
    args = parser.parse_args()
    launch_ms = args.launch_ms or measured_launch_ms()
    kernels.use("reference")
    books = {"plain MAE": peer(args.batch)} | {name: ours(name, args.batch) for name in METHODS}
    show(books, args.batch, launch_ms)
    ratios = {
        gpu: round(books["mae"].seconds[gpu].total() / books["plain MAE"].seconds[gpu].total(), 3)
        for gpu in BANDWIDTH
    }
    print(json.dumps({"predicted_mae_vs_plain": ratios}))


if __name__ == "__main__":
    main()
