"""Reconstructions of a finished run: the one door through which eval reaches an objective.

PSNR and picture grids need the decoder, which belongs to the measure; every other evaluation
reads the exported encoder alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import kernels
from pipeline.errors import UserError
from pipeline.method.checks import visible_count
from pipeline.method.objective import Objective, build_objective
from pipeline.method.pictures import as_pixels, decode, paste, shown
from pipeline.method.views import View
from pipeline.weights.files import find_encoder, load_tensors
from pipeline.weights.foreign import exported_info, heads_of, imagenet
from pipeline.weights.interop import from_mae
from pipeline.weights.layouts import MAE, fixed_options, mae_decoder_heads
from pipeline.weights.run import load_run
from pipeline.weights.source import need_decoder, recipe_of_model
from shard_tools.home import expand_home


class Reconstructor:
    """A pretrained encoder with its decoder; images in, reconstructions out.

    size: side of the images in pixels; patch: of a patch; true_statistics: whether predictions
    are patch-normalised pixels, which get the true mean and deviation of each patch back.
    """

    def __init__(self, objective: Objective, source: str) -> None:
        need_decoder(objective.recipe, source)
        self.source = source
        self.objective, self.recipe = objective.eval().requires_grad_(False), objective.recipe
        self.size = self.recipe.encoder.image_size
        self.patch, self.grid = objective.encoder.patch, objective.encoder.grid
        self.true_statistics = objective.measure.recipe.norm_pix

    @property
    def info(self) -> dict[str, Any]:
        """What a result says about it."""
        encoder = self.recipe.encoder
        return {"recipe": self.recipe.name, "arch": encoder.arch, "options": encoder.options}

    def to(self, device: torch.device) -> Reconstructor:
        """Move the weights."""
        self.objective.to(device)
        return self

    def mask(self, sample: Tensor, ratio: float, seed: int) -> tuple[Tensor, Tensor]:
        """(visible int32 [B, K], inverse int32 [B, L]) of a random mask per sample number.

        Drawn by seed and sample number alone: the same for every model, batch and rank.
        """
        length = self.grid[0] * self.grid[1]
        counts = (visible_count(length, ratio), 0)
        masks = kernels.sample_masks(
            sample, seed=seed, epoch=0, length=length, visible=counts, policy="random"
        )
        return masks.visible1, masks.inverse1

    @torch.no_grad()
    def predict(self, image: Tensor, visible: Tensor, inverse: Tensor) -> Tensor:
        """uint8 [B, H, W, 3], of which the visible patches are seen → float32 [B, H, W, 3].

        Every patch as predicted, in the range of pixels 0 … 1, which it may leave.
        """
        return decode(self.objective, View(image, visible, inverse), image)

    def pictures(self, image: Tensor, visible: Tensor, inverse: Tensor) -> tuple[Tensor, ...]:
        """uint8 [B, H, W, 3] each: masked, reconstruction, reconstruction with visible patches.

        UserError where predictions are not finite.
        """
        view = View(image, visible, inverse)
        values = self.predict(image, visible, inverse)
        if not bool(values.isfinite().all()):
            raise UserError(f"{self.source}: its predictions are not finite, so none can be shown")
        whole = as_pixels(values)
        return (
            shown(view, self.grid, self.patch), whole, paste(whole, view, self.grid, self.patch),
        )  # fmt: skip


def load_reconstructor(
    path: str | Path, recipe: str = "", set_: Sequence[str] = ()
) -> Reconstructor:
    """From a run folder, or from a facebookresearch/mae checkpoint with its decoder (FILE).

    recipe, set_: the recipe file and overrides that a FILE fits. UserError.
    """
    path = Path(expand_home(str(path)))
    if not path.is_file():
        return Reconstructor(load_run(path), str(path))
    objective, _ = build_objective(recipe_of_model(path, recipe, set_))
    content = load_tensors(path)
    state = find_encoder(content, path).state
    if "decoder_embed.weight" not in state:
        raise UserError(f"{path}: not a facebookresearch/mae checkpoint with a decoder")
    _check_facts(objective, state, exported_info(path, content), path)
    from_mae(objective, state)
    return Reconstructor(objective, str(path))


def _check_facts(
    objective: Objective, state: dict[str, Tensor], written: dict[str, Any], path: Path
) -> None:
    """Refuse a recipe that contradicts what no shape shows: heads, mean and std of the pixels.

    written: what our own export says; else facebookresearch/mae's code says it.
    """
    recipe = objective.recipe
    pixels = written or imagenet()
    facts: dict[str, tuple[Any, Any]] = {
        "data.mean": (list(recipe.data.mean), list(pixels["mean"])),
        "data.std": (list(recipe.data.std), list(pixels["std"])),
    }
    own = written.get("options", {}) if written else fixed_options(MAE, state)
    if "num_heads" in own:
        facts["encoder.options.num_heads"] = (heads_of(objective.encoder), own["num_heads"])
    decoder_heads = written.get("decoder_heads") if written else mae_decoder_heads(state)
    if objective.reconstructs and decoder_heads:
        facts["measure.decoder.heads"] = (recipe.measure.decoder.heads, decoder_heads)
    for key, (mine, theirs) in facts.items():
        if mine != theirs:
            raise UserError(f"{path}: has {key} {theirs}, the recipe {mine}; set {key}={theirs}")
