"""Attentive probe: how much a learned query reads from a frozen encoder's patch tokens.

A linear probe sees one vector per image; masked-image models keep much of what they know in the
patch tokens, and methods that pool them by attention find it. Every head has a learned query that
attends over the patch tokens, in heads of 64 channels where they fit:

    k, v = tokens W_kv + b_kv
    pooled = softmax(query k / sqrt(channels)) v        per head
    logits = pooled W + b

Many heads, one per pair of learning rate and weight decay, are trained at once by AdamW on random
crops and flips of the training images (the encoder sees each crop once); the pair is chosen on a
held-out tenth of the training images (`--select held-out`, the default), and that head is
reported, beside the full grid. Defaults (12,500 steps of batch 128, a tenth of them warm-up,
cosine to 0, ten learning rates, three weight decays, initial weights N(0, 0.02) truncated):
facebookresearch/capi, `eval_classification.py`. The gradient is that of the global batch, and so
the result does not depend on the number of ranks. It is not resumed: at the defaults it is a few
epochs of forward passes.

    python eval/attentive.py --encoder runs/rmae --train data/shards/train --val data/shards/val
"""

import argparse
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.shared.batches import check_batch, micro_batch_of, partitions_of
from eval.shared.command import run_command
from eval.shared.labels import class_count, content_of, labelled
from eval.shared.options import parser, settings_of
from eval.shared.results import Timer, check_other_settings, result_of, write_accuracy
from eval.shared.subsets import held_out_count, keep_subset
from pipeline.command import early
from pipeline.errors import UserError, check_range
from shard_tools.manifest import Manifest, read_manifest

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
DECAYS = (5e-4, 1e-3, 5e-2)
LARGEST_RATE, LARGEST_DECAY = 1e30, 1e6  # whose product, times 10, a float32 still holds


@dataclass(frozen=True)
class Settings:
    """What the result depends on; see --help."""

    train: str
    val: str
    steps: int = 12_500
    batch_size: int = 128
    warmup: float = 0.1
    rates: tuple[float, ...] = RATES
    decays: tuple[float, ...] = DECAYS
    select: str = "held-out"
    seed: int = 0
    micro_batch: int = 256  # of validation

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """(learning rate, weight decay) of every head."""
        return list(itertools.product(self.rates, self.decays))


def build_parser() -> argparse.ArgumentParser:
    """The command line; its defaults are capi's protocol."""
    result = parser(str(__doc__).split("\n", 1)[0])
    add = result.add_argument
    add("--train", required=True, help="training shards")
    add("--val", required=True, help="validation shards")
    add("--steps", type=int, default=Settings.steps, help="updates")
    add("--batch-size", type=int, default=Settings.batch_size, help="global, over all ranks")
    add("--warmup", type=float, default=Settings.warmup, help="share of the steps")
    add("--rates", type=float, nargs="+", default=RATES, help="learning rates to try")
    add("--decays", type=float, nargs="+", default=DECAYS, help="weight decays to try")
    add("--select", choices=["held-out", "validation"], default="held-out",
        help="images by which the pair is chosen; validation is optimistic")  # fmt: skip
    add("--micro-batch", type=int, default=256, help="images per forward pass at most")
    return result


def check(s: Settings, world: int = 1) -> int:
    """Everything that can be wrong with the settings, before the first step; the classes."""
    train, val = labelled(s.train), labelled(s.val)
    for name in ("steps", "batch_size", "micro_batch"):
        check_range(f"--{name.replace('_', '-')}", getattr(s, name), at_least=1)
    check_range("--warmup", s.warmup, at_least=0, below=1)
    for rate in s.rates:
        check_range("--rates", rate, above=0, at_most=LARGEST_RATE)
    for decay in s.decays:
        check_range("--decays", decay, at_least=0, at_most=LARGEST_DECAY)
    check_batch(s.batch_size, world)
    kept = train.samples
    if s.select == "held-out":
        kept -= held_out_count(kept)
    if kept < s.batch_size:
        raise UserError(
            f"{s.train}: {kept} training images are fewer than --batch-size {s.batch_size}; "
            "choose a smaller one"
        )
    return class_count(train, val)


def prepare(args: argparse.Namespace, world: int = 1) -> tuple[Settings, Path]:
    """The settings and the path of the result. UserError."""
    settings, output = settings_of(Settings, args), result_of(args, "attentive-probe", folder=True)
    check(settings, world)
    check_other_settings(output, args)
    return settings, output


if __name__ == "__main__":  # the help, and what is seen to be wrong without torch
    early(build_parser().parse_args, prepare, ranks=True)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.shared.cli import join_ranks, progress
from eval.shared.metrics import as_percent, count_correct
from eval.shared.session import EvalSession, session_of
from pipeline.data.batch import LoaderConfig
from pipeline.data.crops import Crop
from pipeline.data.loader import train_loader
from pipeline.distributed import Ranks


class AttentiveProbe(nn.Module):
    """Attention pooling and a linear layer: tokens [b, L, D] → logits [b, classes]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.heads = width // 64 if width % 64 == 0 else 1
        self.query = nn.Parameter(torch.empty(width))
        self.kv = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, classes)
        for weight in (self.query, self.kv.weight, self.head.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.kv.bias)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        shape = (batch, length, 2, self.heads, width // self.heads)
        key, value = self.kv(tokens).view(shape).permute(2, 0, 3, 1, 4).unbind()  # [b, h, L, d]
        query = self.query.view(1, self.heads, 1, -1).expand(batch, -1, -1, -1)
        pooled = F.scaled_dot_product_attention(query, key, value)
        return self.head(pooled.reshape(batch, width))


def learning_rate(peak: float, step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of the steps, then half a cosine to 0."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class Heads:
    """Probes that start alike, each with its own AdamW; one `step` per global batch."""

    def __init__(self, width: int, classes: int, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        torch.manual_seed(settings.seed)
        first = AttentiveProbe(width, classes)
        self.probes = []
        for _ in settings.pairs:
            probe = AttentiveProbe(width, classes)
            probe.load_state_dict(first.state_dict())
            self.probes.append(probe.to(device))
        self.optimizers = [
            torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=decay)
            for probe, (rate, decay) in zip(self.probes, settings.pairs, strict=True)
        ]

    def step(self, step: int, micro: Iterable[tuple[Tensor, Tensor]], ranks: Ranks) -> Tensor:
        """One update on this rank's (tokens, labels) of the global batch; this rank's losses."""
        s, losses = self.settings, torch.zeros(len(self.probes), device=ranks.device)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for tokens, label in micro:
            for number, probe in enumerate(self.probes):
                loss = F.cross_entropy(probe(tokens), label, reduction="sum") / s.batch_size
                loss.backward()
                losses[number] += loss.detach()
        for probe, optimizer, (rate, _) in zip(self.probes, self.optimizers, s.pairs, strict=True):
            for parameter in probe.parameters():
                assert parameter.grad is not None
                parameter.grad = ranks.sum(parameter.grad)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(rate, step, s.steps, s.warmup)
            optimizer.step()
        return losses

    def finite(self, losses: Tensor) -> list[bool]:
        """Which heads have finite losses [heads] and weights; the others have diverged."""
        weights = [all(bool(w.isfinite().all()) for w in p.parameters()) for p in self.probes]
        return [ok and bool(loss.isfinite()) for ok, loss in zip(weights, losses, strict=True)]


def training_tokens(
    session: EvalSession, s: Settings, train: str
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Tokens and labels of this rank's crops, step by step, a list of micro-batches each."""
    ranks = session.ranks
    micro = micro_batch_of(s.batch_size, ranks.world, s.micro_batch)
    config = LoaderConfig(
        train,
        batch_size=s.batch_size,
        micro_batch=micro,
        crop=Crop(image_size=session.image_size, scale=(0.08, 1.0)),
        seed=s.seed,
        partitions=partitions_of(s.batch_size, ranks.world),
        workers=session.workers,
        pin_memory=session.ranks.pins_memory,
    )
    loader = train_loader(config, ranks.rank, ranks.world, range(s.steps))
    parts: list[tuple[Tensor, Tensor]] = []
    with loader.explaining():
        for batch in loader:
            tokens = session.patch_tokens(session.normalise(batch.image))
            parts.append((tokens, batch.label.to(session.device, non_blocking=True)))
            if len(parts) * micro * ranks.world == s.batch_size:
                yield parts
                parts = []


@torch.no_grad()
def accuracies(
    heads: Heads, folder: str, session: EvalSession, micro_batch: int
) -> tuple[list[tuple[float, float]], int]:
    """((top-1, top-5) in percent of every head, images): each image once over all ranks. UserError
    where the encoder's features are not finite, whose answers would be class 0."""
    count = torch.zeros(len(heads.probes), 3, dtype=torch.int64, device=session.device)
    finite = torch.ones((), dtype=torch.bool, device=session.device)
    for pixels, label, _ in session.batches(folder, micro_batch):
        tokens = session.patch_tokens(pixels)
        count += count_correct(torch.stack([probe(tokens) for probe in heads.probes]), label)
        finite &= tokens.isfinite().all()
    session.need_finite(finite, folder)
    total = session.ranks.sum(count)
    rows = [(as_percent(a, n), as_percent(b, n)) for a, b, n in total.tolist()]
    return rows, int(total[0, 2])


def split(manifest: Manifest, folder: Path, seed: int, ranks: Ranks) -> tuple[str, str]:
    """Folders of a small index each: the training images that are kept, and those held out."""
    order = np.random.default_rng(seed).permutation(manifest.samples)
    cut = held_out_count(manifest.samples)
    tag = f"{seed}-{manifest.index_sha256[:12]}"  # of these images, never of an earlier set
    parts = {"kept": order[cut:], "held-out": order[:cut]}

    def write() -> None:
        for name, samples in parts.items():
            record = {"part": name, "seed": seed}
            keep_subset(manifest, folder / f"{name}-{tag}", np.sort(samples), record)

    ranks.agree(write)
    kept, held_out = (str(folder / f"{name}-{tag}") for name in parts)
    return kept, held_out


def train_heads(heads: Heads, session: EvalSession, s: Settings, train: str) -> Tensor:
    """Train all heads on the shards `train`; the losses [heads] of the last step."""
    ranks = session.ranks
    losses = torch.zeros(len(s.pairs), device=session.device)
    stream = enumerate(training_tokens(session, s, train))
    images = s.batch_size // ranks.world
    for step, micro in progress(stream, ranks, "attentive probe", s.steps, images):
        if step == 0:
            session.need_finite(torch.stack([x.isfinite().all() for x, _ in micro]).all(), s.train)
        losses = heads.step(step, micro, ranks)
    return ranks.sum(losses)


def evaluate(s: Settings, session: EvalSession, folder: Path) -> dict[str, Any]:
    """Train the heads, choose one, score it; the full result, alike on every rank.

    folder: where the indices of the kept and the held-out images go.
    """
    timer, ranks = Timer(), session.ranks
    classes = check(s, ranks.world)
    session.check_readable(s.val, s.micro_batch)
    train, chosen_on = s.train, s.val
    if s.select == "held-out":
        train, chosen_on = split(read_manifest(s.train), folder, s.seed, ranks)
    heads = Heads(session.vit.num_features, classes, s, session.device)
    losses = train_heads(heads, session, s, train)
    finite = heads.finite(losses)
    if not any(finite):
        raise UserError(
            "no head of the attentive probe has a finite loss: lower --rates, or take an encoder "
            "with finite features"
        )
    selection, count = accuracies(heads, chosen_on, session, s.micro_batch)
    best = max(range(len(selection)), key=lambda n: selection[n][0] if finite[n] else -1)
    final, images = selection, count
    if s.select == "held-out":
        final, images = accuracies(heads, s.val, session, s.micro_batch)
    what = "held-out training images" if s.select == "held-out" else "the validation set"
    grid = [
        {"lr": lr, "weight_decay": wd}
        | ({"selection": a[0], "validation": b[0]} if ok else {"diverged": True})
        for (lr, wd), a, b, ok in zip(s.pairs, selection, final, finite, strict=True)
    ]
    lost = finite.count(False)
    rates = f"{len(grid)}, of which {lost} diverged" if lost else str(len(grid))
    more = {"precision": session.precision, "workers": session.workers}
    return {
        "protocol": "attentive-probe",
        "top1": final[best][0],
        "top5": final[best][1],
        "images": images,
        "lr": s.pairs[best][0],
        "weight_decay": s.pairs[best][1],
        "base_lr_chosen_on": f"{count} images of {what} (best of {rates})",
        "train_loss": round(float(losses[best]), 5),
        "grid": grid,
        "settings": asdict(s) | more | {"optimizer": "AdamW", "classes": classes},
        "content": content_of(s),
        **session.facts(timer),
    }


def main() -> None:
    args = build_parser().parse_args()
    ranks = join_ranks()
    settings, output = ranks.agree(lambda: prepare(args, ranks.world))
    result = evaluate(settings, session_of(args, ranks), output.with_suffix(""))
    if ranks.first:
        write_accuracy(output, result, args)


if __name__ == "__main__":
    run_command(main)
