"""Seconds per image of what the paper's commands do, measured on this machine."""

import time
from collections.abc import Callable
from typing import Any

import torch

from pipeline.config.planning import auto_micro_batch
from pipeline.config.recipe import EncoderRecipe, Recipe
from pipeline.data.batch import LoaderConfig
from pipeline.data.crops import Crop
from pipeline.data.loader import train_loader
from pipeline.method.checks import vit_options
from pipeline.method.objective import build_objective
from pipeline.method.vit import build_vit
from pipeline.processor import processor

LOADED = 256  # images


def device_name() -> str:
    """What the seconds are of: a GPU, or a core of a processor whose kernels are torch's for it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = processor()
    capability = torch.backends.cpu.get_cpu_capability()
    return " ".join(filter(None, (found.name, found.number, capability, "core"))).replace(": ", " ")


def pretraining(recipe: Recipe) -> float:
    """Seconds per image of the recipe's step: views, forward, backward, AdamW."""
    micro = auto_micro_batch(recipe.batch_size, recipe.encoder.patches)
    objective, teacher = build_objective(recipe)
    device = _device()
    objective.to(device)
    if teacher is not None:
        teacher.to(device)
    optimizer = torch.optim.AdamW(objective.parameters())
    side = recipe.encoder.image_size
    image = torch.randint(0, 256, (micro, side, side, 3), dtype=torch.uint8, device=device)
    sample = torch.arange(micro, device=device)
    crop = image if recipe.views.second == "crop" else None

    def step() -> None:
        loss, _ = objective(image, sample, 0, teacher, crop)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step) / micro


def encoding(encoder: EncoderRecipe, training: bool) -> float:
    """Seconds per image of an encoder's forward pass, with training of its backward too."""
    vit = build_vit(encoder.arch, vit_options(encoder)).to(_device())
    micro = auto_micro_batch(128, encoder.patches)
    pixels = torch.randn(micro, 3, encoder.image_size, encoder.image_size, device=_device())

    def step() -> None:
        with torch.set_grad_enabled(training):
            mean = vit.forward_features(pixels).mean()
            if training:
                mean.backward()

    return timed(step) / micro


def load(shards: str, size: int) -> float:
    """Seconds to read, decode and crop a training image."""
    config = LoaderConfig(shards, batch_size=32, micro_batch=32, crop=Crop(image_size=size),
                          partitions=1, samples_per_epoch=LOADED)  # fmt: skip
    loader = train_loader(config, 0, 1, range(LOADED // 32))
    begun = time.process_time()
    for _ in loader:
        pass
    return (time.process_time() - begun) / LOADED


def timed(step: Callable[[], Any]) -> float:
    """Seconds of a step: of the fastest of four after the first, on one core (CPU time) or on the
    GPU. Other work on the machine makes single steps slower, and never faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step()
        taken = []
        for _ in range(4):
            begun = _now()
            step()
            taken.append(_now() - begun)
        return min(taken)
    finally:
        torch.set_num_threads(threads)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _now() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
