"""Who takes a step: our methods by the engine, a plain MAE, and facebookresearch/mae's model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from bench_step import facebook_mae, flops, peer_step, run_facebook, run_plain
from peer_mae import PlainMAE
from phases import Phases, watching
from torch._subclasses.fake_tensor import FakeTensorMode

from gpu_stages.common import ROOT, Fault, Where
from pipeline import kernels
from pipeline.config.ds_config import read_ds_config
from pipeline.config.planning import plan_recipe
from pipeline.cost.dry_run import dry_run
from pipeline.method.objective import Objective, build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.method.teacher import Teacher
from pipeline.runtime import engine as engines

SMALL: dict[str, Any] = {"side": 16, "patch": 4, "encoder": (16, 2, 2), "decoder": (8, 1, 2)}


@dataclass(frozen=True)
class Way:
    """How a recipe is run: its ds_config, compiled blocks, CUDA graphs."""

    recipe: str
    config: str = "zero2"
    compile: bool = False
    cuda_graphs: bool = False


FAST = {"compile": True, "cuda_graphs": True}
OURS = {
    "mae": Way("mae"),
    "rmae": Way("rmae"),
    "cmae": Way("cmae"),
    "mae, graphs": Way("mae", cuda_graphs=True),
    "mae, compiled": Way("mae", compile=True),
    "mae, compiled, graphs": Way("mae", **FAST),
    "rmae, compiled, graphs": Way("rmae", **FAST),
    "cmae, compiled, graphs": Way("cmae", **FAST),
    "mae, bf16, compiled, graphs": Way("mae", "zero2-bf16", **FAST),
}
# MAE of others: AdamW of torch, autocast, no DeepSpeed.
FACEBOOK = "facebookresearch/mae"
PEERS = ("plain MAE", "plain MAE, compiled", FACEBOOK)


@dataclass(frozen=True)
class Contestant:
    """A step of a batch; one of the first images of it; what to watch of its phases; FLOPs per
    image; how it is ended."""

    step: Callable[[], Any]
    few: Callable[[], Any] | None
    watching: Callable[[Phases], AbstractContextManager[Any]]
    flops: float
    close: Callable[[], None] = lambda: None


def contestant(title: str, where: Where, batch: int, few: int) -> Contestant:
    """The step of one of OURS or PEERS."""
    if title in OURS:
        return ours(where, OURS[title], batch, few)
    return peer(where, title, batch, few)


def ours(where: Where, way: Way, batch: int, few: int) -> Contestant:
    """A recipe's step by the engine."""
    work = flops_per_image(where, way.recipe, batch)  # by the reference kernels
    kernels.use("auto", where.device)
    recipe = where.recipe(way.recipe, f"batch_size={batch}", "data.partitions=4")
    objective, teacher = copy.deepcopy(built(where, way.recipe))
    settings = read_ds_config(ROOT / f"ds_configs/{way.config}.json")
    settings |= {"train_micro_batch_size_per_gpu": batch, "compile": way.compile,
                 "cuda_graphs": way.cuda_graphs}  # fmt: skip
    plan = plan_recipe(settings, recipe, 1)
    engine = engines.Engine(objective, parameter_groups(objective), plan)
    if teacher is not None:
        engine.adopt(teacher)
    image, sample = where.images(recipe, batch), where.numbers(0, batch)

    def step(count: int) -> None:
        engine.micro_step(1e-4, image[:count], sample[:count], 0, teacher)
        if teacher is not None:
            teacher.update(objective, 0.996, engine.masters)

    @contextmanager
    def watched(phases: Phases) -> Iterator[None]:
        with watching(phases, objective, teacher, engine.engine):
            yield

    fixed = way.compile or way.cuda_graphs  # to one shape
    return Contestant(partial(step, batch), None if fixed else partial(step, few), watched,
                      work, engine.destroy)  # fmt: skip


@cache
def built(where: Where, name: str) -> tuple[Objective, Teacher | None]:
    """A recipe's objective and teacher, to be copied: weights take seconds to draw."""
    return build_objective(where.recipe(name))


@cache
def flops_per_image(where: Where, name: str, batch: int) -> float:
    """Of a recipe's step, forward and backward, on tensors without data."""
    return dry_run(where.recipe(name), batch, "autocast").flops / batch


def peer(where: Where, title: str, batch: int, few: int) -> Contestant:
    """MAE written plainly, or facebookresearch/mae's, with our weights and masks."""
    objective, _ = built(where, "mae")
    work = peer_flops(where.tiny)
    kernels.use("reference")  # masks of its images, once

    def step_of(count: int, model: torch.nn.Module) -> Callable[[], Any]:
        forward = run_facebook if title == FACEBOOK else run_plain
        return peer_step(count, model, forward, objective, where.device, autocast=True)

    def model() -> torch.nn.Module:
        if title == FACEBOOK:
            if where.mae is None:
                raise Fault("no checkout is given (MAE=…)")
            return facebook_mae(where.mae, **(small_facebook() if where.tiny else {}))
        return PlainMAE(**(SMALL if where.tiny else {}))

    one = model()
    if title.endswith("compiled"):
        one.compile(dynamic=False, backend="inductor" if where.gpu else "eager")
    small = None if title.endswith("compiled") else step_of(few, one)
    return Contestant(step_of(batch, one), small, lambda phases: nullcontext(), work)


@cache
def peer_flops(tiny: bool) -> float:
    """FLOPs of an image of the plain writing: it predicts every patch."""
    with FakeTensorMode():
        model = PlainMAE(**(SMALL if tiny else {}))
        side = SMALL["side"] if tiny else 224
        image, noise = torch.empty(2, 3, side, side), torch.empty(2, (side // model.patch) ** 2)
        return flops(lambda: model(image, noise).backward()) / 2


def small_facebook() -> dict[str, Any]:
    """SMALL in the words of MaskedAutoencoderViT."""
    (width, depth, heads), (narrow, blocks, few) = SMALL["encoder"], SMALL["decoder"]
    return {
        "img_size": SMALL["side"], "patch_size": SMALL["patch"], "mlp_ratio": 4,
        "embed_dim": width, "depth": depth, "num_heads": heads, "decoder_embed_dim": narrow,
        "decoder_depth": blocks, "decoder_num_heads": few,
        "norm_layer": partial(torch.nn.LayerNorm, eps=1e-6),
    }  # fmt: skip
