"""Probes of the encoder while it trains: occlusion invariance and a k-NN classifier."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pipeline.config.recipe import Recipe
from pipeline.data.fixed import Fixed, fixed_images
from pipeline.method.encoder import Encoder
from pipeline.method.measures import gather_keys
from pipeline.method.metrics import cka, kept_patches, vote
from pipeline.method.views import full_view
from pipeline.runtime.preflight import check_probes, probe_samples, probe_sets

RATIOS = (0.25, 0.5, 0.75)  # shares of dropped patches
K, TEMPERATURE = 20, 0.07


def share_of(
    folder: str | Path, count: int, size: int, rank: int, world: int, on_error: str = "fail"
) -> Fixed:
    """This rank's share of `count` images, evenly spaced in a shard folder and centre-cropped.

    Every rank gets the same number, so up to world - 1 images are left out.
    """
    manifest, chosen = probe_samples(folder, count, world)
    share = len(chosen) // world
    mine = chosen[rank * share : (rank + 1) * share].tolist()
    return fixed_images(manifest, mine, size, on_error)


class Probes:
    """The recipe's probes of the encoder while it trains (monitor.occlusion_steps, knn_steps)."""

    def __init__(self, recipe: Recipe, data: str, rank: int, world: int, batch: int) -> None:
        self.recipe, self.batch = recipe, batch
        size, skip = recipe.encoder.image_size, recipe.data.on_error
        check_probes(recipe, data, world)
        sets = [share_of(*one, size, rank, world, skip) for one in probe_sets(recipe, data)]
        self.held_out, self.training = (*sets, None, None)[:2]

    def due(self, step: int) -> bool:
        """Whether a probe is due after step `step` (counted from 1)."""
        m = self.recipe.monitor
        return any(every and step % every == 0 for every in (m.occlusion_steps, m.knn_steps))

    @torch.no_grad()
    def __call__(self, step: int, encoder: Encoder, device: torch.device) -> dict[str, float]:
        """The metrics that are due after step `step`, the same on every rank (collective)."""
        m, metrics = self.recipe.monitor, {}
        assert self.held_out is not None
        training = encoder.training
        encoder.eval()
        full = self._features(encoder, self.held_out, 0.0, device)
        if m.occlusion_steps and step % m.occlusion_steps == 0:
            for ratio in RATIOS:
                part = self._features(encoder, self.held_out, ratio, device)
                metrics[f"occlusion/cka_{ratio:g}"] = float(cka(full, part))
        if m.knn_steps and step % m.knn_steps == 0 and self.training is not None:
            reference = self._features(encoder, self.training, 0.0, device)
            metrics["probe/knn_top1"] = self._knn(full, reference)
        encoder.train(training)
        return metrics

    def _features(
        self, encoder: Encoder, fixed: Fixed, ratio: float, device: torch.device
    ) -> Tensor:
        """Mean patch token [n of all ranks, D], fp32, of images with a share of patches dropped."""
        parts = []
        for image, sample in zip(
            fixed.image.split(self.batch), fixed.sample.split(self.batch), strict=True
        ):
            view = full_view(image.to(device), encoder.patch)
            kept = kept_patches(sample, view.visible.shape[1], ratio, self.recipe.seed)
            tokens = encoder(view.image, kept.int().to(device), view.inverse, drop=True)
            parts.append(tokens[:, 1:].mean(dim=1).float())
        return gather_keys(torch.cat(parts))[0]

    def _knn(self, query: Tensor, reference: Tensor) -> float:
        """Accuracy in percent of a weighted k-NN vote for the held-out images."""
        assert self.held_out is not None
        assert self.training is not None
        truth, label = (
            gather_keys(f.label.to(query.device))[0] for f in (self.held_out, self.training)
        )
        classes = int(torch.maximum(truth.max(), label.max())) + 1
        k = min(K, len(reference))
        votes = vote(query, reference, label, classes, k=k, temperature=TEMPERATURE)
        return float((votes.argmax(dim=1) == truth).float().mean()) * 100
