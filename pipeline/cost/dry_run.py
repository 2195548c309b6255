"""What a recipe's step computes, by a dry run on tensors without data: FLOPs, what is kept for
backward, launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline import kernels
from pipeline.config.recipe import EncoderRecipe, Recipe
from pipeline.cost.launches import LaunchCounter
from pipeline.cost.micro_batch import BF16_WEIGHTS
from pipeline.method.checks import vit_options
from pipeline.method.measures import keys_as_of
from pipeline.method.objective import Objective, build_objective
from pipeline.method.teacher import Teacher
from pipeline.method.vit import build_vit


@dataclass(frozen=True)
class Work:
    """A micro-batch of `images` on one rank: FLOPs of forward and backward (2 per multiply-add,
    matrix products and attention), bytes of activations kept for backward, bytes of its own keys
    that a contrastive measure sends, ops that launch something on a device (with the kernels'
    references, so a few more than with the kernels)."""

    images: int
    flops: int
    activations: int
    keys: int
    launches: int = 0


def meta_objective(recipe: Recipe) -> tuple[Objective, Teacher | None]:
    """The objective and its teacher without data."""
    with torch.device("meta"):
        return build_objective(recipe)


def dry_run(
    recipe: Recipe, images: int, precision: str, checkpointing: bool = False, ranks: int = 1
) -> Work:
    """One micro-batch of the recipe's step on tensors without data, at encoder.image_size, with the
    keys of `ranks` ranks. Colour jitter, which has neither matrix products nor a backward, is left
    out."""
    return dry_runs(recipe, (images,), precision, checkpointing, ranks)[0]


def dry_runs(
    recipe: Recipe, sizes: Sequence[int], precision: str, checkpointing: bool, ranks: int
) -> list[Work]:
    """A dry run of each of these micro-batches."""
    still = recipe.views.model_copy(update={"jitter": type(recipe.views.jitter)()})
    recipe = recipe.model_copy(update={"views": still})
    objective, teacher = meta_objective(recipe)
    if precision in BF16_WEIGHTS:
        objective.bfloat16()
    for part in objective.modules():
        if checkpointing and hasattr(part, "grad_checkpointing"):
            part.grad_checkpointing = True  # type: ignore[assignment]
    kernels.use("reference")
    # As if on the CPU: the meta device knows neither autocast nor fused attention.
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective.to_empty(device="cpu")
        if teacher is not None:
            teacher.to_empty(device="cpu")
        return [
            _work(recipe, objective, teacher, images, precision == "autocast", ranks)
            for images in sizes
        ]


def _work(
    recipe: Recipe, objective: Objective, teacher: Teacher | None, images: int, autocast: bool,
    ranks: int,
) -> Work:  # fmt: skip
    """Of a micro-batch, under the FakeTensorMode of objective and teacher."""
    side = recipe.encoder.image_size
    image = torch.empty(images, side, side, 3, dtype=torch.uint8)
    sample = torch.empty(images, dtype=torch.int64)
    crop = image if recipe.views.second == "crop" else None
    kept = KeptForBackward(objective)
    objective.zero_grad()
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    with counter as work, LaunchCounter() as launches:
        cast = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        saved = torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor)
        with cast, saved, keys_as_of(ranks) as keys:
            loss, _ = objective(image, sample, 0, teacher, crop)
        loss.backward()
    gathered = sum(key.numel() * key.element_size() for key in keys)
    return Work(images, work.get_total_flops(), kept.bytes, gathered, launches.count)


def scaled(
    recipe: Recipe, precision: str, checkpointing: bool, ranks: int
) -> Callable[[int], Work]:
    """The work of a micro-batch of any size on one of `ranks` ranks, from dry runs of small ones:
    what a batch needs once (autocast's copies of the weights), what each image needs and, where
    negatives are other images, each pair of images."""
    sizes = (2, 4, 8) if recipe.measure.batch_negatives else (2, 4)
    runs = dry_runs(recipe, sizes, precision, checkpointing, ranks)
    flops, kept = (
        _polynomial([getattr(run, part) for run in runs]) for part in ("flops", "activations")
    )

    def work(images: int) -> Work:
        keys = runs[0].keys * images // 2
        return Work(images, flops(images), kept(images), keys, runs[0].launches)

    return work


def _polynomial(found: list[int]) -> Callable[[int], int]:
    """a + b n + c n², from its values at n = 2, 4 and, unless c is 0, 8."""
    slope = (found[1] - found[0]) / 2
    pair = ((found[2] - found[1]) / 4 - slope) / 6 if len(found) > 2 else 0.0
    image = slope - 6 * pair
    fixed = found[0] - 2 * image - 4 * pair
    return lambda n: round(fixed + n * image + n * n * pair)


def flops_per_image(recipe: Recipe, images: int, ranks: int) -> float:
    """Model FLOPs of an image, forward and backward, in micro-batches of `images` on `ranks` ranks,
    whatever the precision; what is computed again under gradient checkpointing does not count.
    Under data.sizes the mean over the run."""
    return sum(share * flops for share, flops in flops_of_phases(recipe, images, ranks))


def flops_of_phases(recipe: Recipe, images: int, ranks: int) -> list[tuple[float, float]]:
    """(share of the steps, FLOPs of an image) of every phase of data.sizes."""
    return [
        (share, scaled(phase, "fp32", False, ranks)(images).flops / images)
        for share, phase in recipe.phases
    ]


def encoder_flops(encoder: EncoderRecipe) -> int:
    """FLOPs of one full image's forward pass through the encoder, by a dry run."""
    with torch.device("meta"):
        vit = build_vit(encoder.arch, vit_options(encoder)).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        vit.to_empty(device="cpu")
        image = torch.empty(1, 3, encoder.image_size, encoder.image_size)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as work:
            vit(image)
    return int(work.get_total_flops())


def _attention(q: Any, k: Any, *_: Any, **__: Any) -> int:
    """FLOPs of q k' and of their product with v, from the shapes [B, heads, N, d]."""
    return int(4 * q[0] * q[1] * q[2] * k[2] * q[3])


def _attention_backward(gradient: Any, q: Any, k: Any, *_: Any, **__: Any) -> int:
    """Twice the forward: what a kernel computes again is not counted."""
    return 2 * _attention(q, k)


# torch's counter does not know the CPU's fused attention.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class KeptForBackward:
    """Sums the storages that autograd keeps, the weights apart."""

    def __init__(self, module: nn.Module) -> None:
        held = [*module.parameters(), *module.buffers()]
        self._seen = {t.untyped_storage()._cdata: t for t in held}
        self.bytes = 0

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor  # held, so that no other takes its address
            self.bytes += storage.nbytes()
        return tensor
