"""Linear probe: how much a linear classifier reads from a frozen encoder.

Two protocols (`--protocol`):

mae     MAE's: every epoch sees new random crops and flips; BatchNorm without affine parameters,
        then one linear layer, trained with LARS; base learning rate 0.1 per 256 images, batch
        16384, 90 epochs of which 10 warm up, cosine to 0, no weight decay.
        Source: He et al. 2022, Tab. 10; facebookresearch/mae, `main_linprobe.py`.
cached  the same classifier, optimizer and schedule on features that are extracted once, without
        augmentation, for a full grid of learning rates at once. The learning rate is chosen on a
        held-out tenth of the training set (`--select held-out`, the default; the classifiers
        train on the rest), and the classifier that it chooses is the one reported, beside the
        full grid. `--select validation` trains on everything and reports the best of the grid
        on the validation set itself, and says so: an optimistic result. A learning rate at which
        the classifier diverges has no accuracy and is not chosen.

The statistics of BatchNorm and the gradients are those of the global batch: every rank encodes
its part, the features are gathered, and every rank makes the same update. The result so does not
depend on the number of ranks (MAE's original normalises over the 512 images of each GPU).

The protocol `mae` resumes from its last checkpoint when rerun; SIGTERM and SIGUSR1 save and
exit with 85.

    python eval/linprobe.py --encoder runs/rmae --train data/shards/train --val data/shards/val
    deepspeed eval/linprobe.py --protocol cached --encoder runs/rmae --train … --val …
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.shared.batches import check_batch, micro_batch_of, partitions_of
from eval.shared.checkpoints import Checkpoints
from eval.shared.cli import join_ranks, parser, progress, run_command, settings_of
from eval.shared.features import FEATURES
from eval.shared.labels import class_count, labelled
from eval.shared.lars_probe import Probe, Training
from eval.shared.metrics import accuracy, as_percent, count_correct
from eval.shared.results import Timer, check_output, output_path, write_accuracy
from eval.shared.session import EvalSession, encoder_of, session_of
from pipeline.data.crops import Box, Crop
from pipeline.data.loader import LoaderConfig, train_loader
from pipeline.data.order import steps_per_epoch
from pipeline.distributed import PREEMPTED, Ranks, StopSignal
from pipeline.errors import UserError

HELD_OUT = 0.1  # share of the training images on which cached chooses its learning rate
GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class Settings:
    """How a probe is trained; its defaults are MAE's protocol.

    train, val: shards. protocol: mae or cached. feature: one of FEATURES. batch_size: global.
    micro_batch: images of a forward pass, at most. base_lr: per 256 images, of mae; grid: those of
    cached, and select: where its best is chosen. max_steps: of a trial.
    """

    train: str
    val: str
    protocol: str = "mae"
    feature: str = "cls"
    epochs: int = 90
    warmup_epochs: float = 10
    batch_size: int = 16384
    micro_batch: int = 256
    base_lr: float = 0.1
    grid: tuple[float, ...] = GRID
    select: str = "held-out"
    max_steps: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """What the settings come to with these data and ranks; of cached the classes alone.

    train_sha256, val_sha256: of the index of the sets. steps: of an epoch. total: of all.
    micro_batch: images of this rank's forward pass.
    """

    classes: int
    train_sha256: str
    val_sha256: str
    steps: int = 0
    total: int = 0
    micro_batch: int = 0
    partitions: int = 1


class ProbeCrop(Crop):
    """RandomResizedCrop as in TensorFlow, which MAE's probe uses: one try, cut off at the border.

    torchvision's draws up to ten times until the rectangle fits; here a side that is too long
    becomes the picture's. Source: facebookresearch/mae, `util/crop.py`.
    """

    def choose(self, uniform: Sequence[float]) -> Callable[[int, int], tuple[Box, bool]]:
        """The crop for `uniform` in [0, 1): share of the area, aspect ratio, corner, flip."""

        def box(width: int, height: int) -> tuple[Box, bool]:
            area = width * height * (self.scale[0] + (self.scale[1] - self.scale[0]) * uniform[0])
            low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
            aspect = math.exp(low + (high - low) * uniform[1])
            w = min(width, max(1, round(math.sqrt(area * aspect))))
            h = min(height, max(1, round(math.sqrt(area / aspect))))
            left, top = int(uniform[20] * (width - w + 1)), int(uniform[21] * (height - h + 1))
            return Box(left, top, left + w, top + h), self.flip and uniform[22] < 0.5

        return box


# ------------------------------------------------------------------ MAE's protocol


def global_features(
    session: EvalSession, s: Settings, plan: Plan, start: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented training features [B, D] and labels [B], one global batch after the other."""
    ranks = session.ranks
    config = LoaderConfig(
        s.train,
        batch_size=s.batch_size,
        micro_batch=plan.micro_batch,
        crop=ProbeCrop(image_size=session.image_size, scale=(0.08, 1.0)),
        seed=s.seed,
        partitions=plan.partitions,
        workers=session.workers,
    )
    loader = train_loader(config, ranks.rank, ranks.world, range(start, plan.total))
    parts: list[tuple[Tensor, Tensor]] = []
    for batch in loader:
        feature = session.features(session.normalise(batch.image), s.feature)
        parts.append((feature, batch.label.to(session.device)))
        if len(parts) * plan.micro_batch * ranks.world == s.batch_size:
            feature, label = (torch.cat(column) for column in zip(*parts, strict=True))
            yield ranks.gather(feature), ranks.gather(label)
            parts.clear()


def score(probe: Probe, session: EvalSession, s: Settings) -> dict[str, Any]:
    """Accuracy on the validation set, each image counted once whatever the number of ranks."""
    probe.eval()
    ranks = session.ranks
    count = torch.zeros(len(probe.bias), 3, dtype=torch.int64, device=session.device)
    with torch.no_grad():
        for pixels, label, _ in progress(
            session.batches(s.val, s.micro_batch), ranks, "validation"
        ):
            count += count_correct(probe(session.features(pixels, s.feature)), label)
    return accuracy(ranks.sum(count)[0])


def probe_mae(session: EvalSession, s: Settings, plan: Plan, folder: Path) -> dict[str, Any]:
    """MAE's protocol on augmented images; the result's accuracy fields. Resumes from the last
    checkpoint in `folder`, of which there is one per epoch."""
    ranks = session.ranks
    probe = Probe(session.vit.num_features, plan.classes, seed=s.seed).to(session.device)
    ranks.broadcast(probe.state_dict().values())
    training = Training(
        probe, (s.base_lr,), batch=s.batch_size, steps=plan.steps, epochs=s.epochs,
        warmup=s.warmup_epochs,
    )  # fmt: skip
    known = record(s, plan, session) | {"encoder": session.identity(), "feature": s.feature}
    known |= {"train": plan.train_sha256, "val": plan.val_sha256}
    checkpoints = Checkpoints(folder, known)
    latest, stop = checkpoints.load(training.read), StopSignal()
    first, loss = latest.get("step", 0), latest.get("loss", float("nan"))
    stream = global_features(session, s, plan, first)
    for step, batch in enumerate(
        progress(stream, ranks, "linear probe", plan.total - first), first
    ):
        losses = training.step(step, *batch)
        if not bool(losses.isfinite().all() and training.finite.all()):
            raise diverged([s.base_lr], f"in step {step + 1}")
        ended, last = (step + 1) % plan.steps == 0, step + 1 == plan.total
        stopping = ranks.any(bool(stop.name)) and not last
        if ended or last or stopping:
            loss = losses.item()
            checkpoints.save(step + 1, partial(training.write, ranks.first), loss=loss)
        if ended and ranks.first:
            announce(step, training, loss)
        if stopping:
            sys.exit(PREEMPTED)
    return {**score(probe, session, s), "train_loss": round(loss, 5)}


def diverged(rates: list[float], where: str) -> UserError:
    """What to say of a probe whose loss or weights are not finite: it has no accuracy."""
    return UserError(
        f"the loss or the weights of the probe are not finite {where} at base learning rate "
        f"{', '.join(f'{rate:g}' for rate in rates)}; use a lower one, or an encoder with finite "
        "features"
    )


def announce(step: int, training: Training, loss: float) -> None:
    """A line per tenth of the epochs."""
    epoch, epochs = (step + 1) // training.steps, training.epochs
    if epoch % max(1, epochs // 10) == 0:
        lr = f"lr {training.rate(step):.4g}"
        print(f"epoch {epoch}/{epochs}  loss {loss:.4f}  {lr}", flush=True)


# ------------------------------------------------------------------ cached features


def train_heads(
    feature: Tensor, label: Tensor, rates: tuple[float, ...], s: Settings, classes: int
) -> tuple[Probe, Tensor]:
    """Heads, one per learning rate, trained on features [N, D] and labels [N] for all epochs;
    and which of them have finite weights, bool [heads]."""
    batch = min(s.batch_size, len(feature))
    steps = len(feature) // batch
    probe = Probe(feature.shape[1], classes, len(rates), s.seed).to(feature.device)
    training = Training(
        probe, rates, batch=batch, steps=steps, epochs=s.epochs, warmup=s.warmup_epochs
    )
    generator = torch.Generator().manual_seed(s.seed)
    total = steps * s.epochs if s.max_steps is None else min(s.max_steps, steps * s.epochs)
    order = torch.empty(0)
    for step in range(total):
        if step % steps == 0:
            order = torch.randperm(len(feature), generator=generator).to(feature.device)
        chosen = order[step % steps * batch :][:batch]
        training.step(step, feature[chosen], label[chosen])
    return probe.eval(), training.finite


@torch.no_grad()
def accuracies(probe: Probe, feature: Tensor, label: Tensor) -> list[tuple[float, float]]:
    """(top-1, top-5) in percent of every head on features [N, D], labels [N]."""
    count = torch.zeros(len(probe.bias), 3, dtype=torch.int64, device=feature.device)
    for piece in torch.arange(len(feature), device=feature.device).split(4096):
        count += count_correct(probe(feature[piece]), label[piece])
    return [(as_percent(a, n), as_percent(b, n)) for a, b, n in count.tolist()]


def held_out_count(samples: int, share: float) -> int:
    """How many of the training images the learning rate is chosen on."""
    return max(1, round(samples * share))


def held_out(samples: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sample numbers (kept, held out), a random split fixed by the seed, both in order."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    cut = held_out_count(samples, share)
    return order[cut:].sort().values, order[:cut].sort().values


def grid_scores(
    train: tuple[Tensor, Tensor],
    tests: dict[str, tuple[Tensor, Tensor]],
    ranks: Ranks,
    s: Settings,
    classes: int,
) -> list[dict[str, Any]]:
    """Train a head per learning rate of the grid, the rates shared among the ranks; score each on
    every named test set: [{base_lr, <name>: top-1, <name>_top5: top-5}, …] in the grid's order.

    A head that is not finite has {base_lr, diverged: true} instead. UserError where none is finite.
    """
    mine = s.grid[ranks.rank :: ranks.world]
    rows = torch.full((len(s.grid), 2 * len(tests)), 0.0, dtype=torch.float64)
    if mine:
        probe, finite = train_heads(*train, mine, s, classes)
        for column, (feature, label) in enumerate(tests.values()):
            rows[ranks.rank :: ranks.world, 2 * column : 2 * column + 2] = torch.tensor(
                accuracies(probe, feature, label), dtype=torch.float64
            )
        rows[ranks.rank :: ranks.world][~finite.cpu()] = math.nan
    rows = ranks.sum(rows).cpu()
    lost = rows.isnan().any(dim=1).tolist()  # known to every rank only now
    if all(lost):
        raise diverged(list(s.grid), "at the end")
    names = [part for name in tests for part in (name, f"{name}_top5")]
    return [
        {"base_lr": rate, "diverged": True}
        if gone
        else {"base_lr": rate, **{n: round(v, 3) for n, v in zip(names, row, strict=True)}}
        for rate, row, gone in zip(s.grid, rows.tolist(), lost, strict=True)
    ]


def probe_cached(session: EvalSession, s: Settings, plan: Plan, _: Path) -> dict[str, Any]:
    """The cached protocol, too short to resume; the accuracy fields and the full grid."""
    feature, label = session.extract(s.train, s.feature, s.micro_batch)
    val = session.extract(s.val, s.feature, s.micro_batch)
    if s.select == "validation":
        train, tests, criterion = (feature, label), {"validation": val}, "validation"
        chosen_on = "the validation set (best of {}, an optimistic result)"
    else:
        kept, out = (part.to(label.device) for part in held_out(len(label), HELD_OUT, s.seed))
        train = (feature[kept], label[kept])
        tests = {"held_out": (feature[out], label[out]), "validation": val}
        criterion = "held_out"
        chosen_on = f"{len(out)} held-out training images (best of {{}})"
    grid = grid_scores(train, tests, session.ranks, s, plan.classes)
    finite = [row for row in grid if "diverged" not in row]
    best = max(finite, key=lambda row: row[criterion])
    lost = len(grid) - len(finite)
    rates = f"{len(grid)}, of which {lost} diverged" if lost else str(len(grid))
    return {
        "top1": best["validation"],
        "top5": best["validation_top5"],
        "images": len(val[1]),
        "base_lr": best["base_lr"],
        "base_lr_chosen_on": chosen_on.format(rates),
        "grid": grid,
    }


# ------------------------------------------------------------------ command line


def build_parser() -> argparse.ArgumentParser:
    """The command line; its defaults are MAE's protocol."""
    result, d = parser(str(__doc__).split("\n", 1)[0]), Settings
    add = result.add_argument
    add("--train", required=True, help="training shards")
    add("--val", required=True, help="validation shards")
    add("--protocol", choices=["mae", "cached"], default=d.protocol)
    add("--feature", choices=FEATURES, default=d.feature)
    add("--epochs", type=int, default=d.epochs)
    add("--warmup-epochs", type=float, default=d.warmup_epochs)
    add("--batch-size", type=int, default=d.batch_size, help="global, over all ranks")
    add("--micro-batch", type=int, default=d.micro_batch, help="at most; per rank")
    add("--base-lr", type=float, default=d.base_lr, help="per 256 images; mae only")
    add("--grid", type=float, nargs="+", default=d.grid, help="cached only")
    add("--select", choices=["held-out", "validation"], default=d.select)
    add("--max-steps", type=int, help="stop after N steps: a trial run")
    return result


def make_plan(s: Settings, ranks: Ranks) -> Plan:
    """Check the settings against the data and these ranks; what they come to."""
    train, val = labelled(s.train), labelled(s.val)
    classes, sets = class_count(train, val), (train.index_sha256, val.index_sha256)
    if min(s.epochs, s.batch_size, s.micro_batch) < 1:
        raise UserError("--epochs, --batch-size and --micro-batch must be at least 1")
    if s.max_steps is not None and s.max_steps < 1:
        raise UserError("--max-steps must be at least 1")
    if s.warmup_epochs < 0:
        raise UserError("--warmup-epochs must be at least 0")
    if min(s.base_lr, *s.grid) <= 0:
        raise UserError("--base-lr and every rate of --grid must be above 0")
    if s.batch_size < 2:
        raise UserError(f"--batch-size {s.batch_size}: the batch norm needs at least 2 images")
    if s.protocol == "cached":
        check_cached(s, train.samples)
        return Plan(classes, *sets)
    check_batch(s.batch_size, ranks.world)
    micro_batch = micro_batch_of(s.batch_size, ranks.world, s.micro_batch)
    partitions = partitions_of(s.batch_size, ranks.world)
    steps = steps_per_epoch(train.samples, s.batch_size, partitions)
    if steps < 1:
        raise UserError(
            f"{s.train} has {train.samples} samples, too few for --batch-size "
            f"{s.batch_size}; choose a smaller one"
        )
    total = steps * s.epochs if s.max_steps is None else min(steps * s.epochs, s.max_steps)
    return Plan(classes, *sets, steps, total, micro_batch, partitions)


def check_cached(s: Settings, samples: int) -> None:
    """UserError where too few images are left to train on."""
    out = held_out_count(samples, HELD_OUT) if s.select == "held-out" else 0
    if samples - out < 2:
        raise UserError(
            f"{s.train}: {samples} training images, of which {out} are held out, leave "
            f"{samples - out}; the batch norm needs at least 2 (--select validation holds out none)"
        )


def record(s: Settings, plan: Plan, session: EvalSession) -> dict[str, Any]:
    """What the result depends on, for the result file."""
    names = ["epochs", "warmup_epochs", "batch_size", "seed", "train", "val", "max_steps"]
    names += ["base_lr"] if s.protocol == "mae" else ["grid", "select"]
    chosen = {name: getattr(s, name) for name in names}
    fixed = {"optimizer": "LARS", "momentum": 0.9, "trust": 0.001, "weight_decay": 0.0}
    return {**chosen, **fixed, "precision": session.precision, "classes": plan.classes}


def evaluate(s: Settings, session: EvalSession, folder: Path) -> dict[str, Any]:
    """Run the protocol that the settings name; the full result, alike on every rank.

    folder: where checkpoints are kept.
    """
    timer, plan = Timer(), make_plan(s, session.ranks)
    session.check_readable(s.val, s.micro_batch)
    run: Callable[..., dict[str, Any]] = probe_mae if s.protocol == "mae" else probe_cached
    return {
        "protocol": f"linprobe-{s.protocol}",
        "feature": s.feature,
        **run(session, s, plan, folder),
        "settings": record(s, plan, session),
        **session.facts(timer),
    }


def main() -> None:
    args = build_parser().parse_args()
    ranks, settings = join_ranks(), settings_of(Settings, args)
    output = output_path(args.output, encoder_of(args), f"linprobe-{args.protocol}")
    folder = output.with_suffix("")
    check_output(output, ranks, folder)
    session = session_of(args, ranks, settings.feature)
    result = evaluate(settings, session, folder)
    if ranks.first:
        write_accuracy(output, result)


if __name__ == "__main__":
    run_command(main)
