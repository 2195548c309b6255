"""Linear probe: how much a linear classifier reads from a frozen encoder.

Two protocols (`--protocol`):

mae     MAE's: every epoch sees new random crops and flips; BatchNorm without affine parameters,
        then one linear layer, trained with LARS; base learning rate 0.1 per 256 images, batch
        16384, 90 epochs of which 10 warm up, cosine to 0, no weight decay.
        Source: He et al. 2022, Tab. 10; facebookresearch/mae, `main_linprobe.py`.
cached  the same classifier, optimizer and schedule on features that are extracted once, without
        augmentation, for a whole grid of learning rates at once. The learning rate is chosen on a
        held-out tenth of the training set (`--select held-out`, the default; the classifiers
        train on the rest), and the classifier that it chooses is the one reported, beside the
        whole grid. `--select validation` trains on everything and reports the best of the grid
        on the validation set itself, and says so: an optimistic figure.

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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from eval.shared.checkpoints import Checkpoints
from eval.shared.cli import (
    as_percent,
    count_correct,
    join_ranks,
    output_path,
    parser,
    progress,
    run_command,
    seed_everything,
    used_precision,
    write_result,
)
from eval.shared.features import (
    FEATURES,
    Timer,
    batches,
    class_count,
    extract,
    image_features,
    image_size,
    labelled,
    normalise,
    open_encoder,
)
from eval.shared.lars_probe import Probe, Training
from pipeline.data.crops import Box, Crop
from pipeline.data.loader import LoaderConfig, train_loader
from pipeline.data.order import steps_per_epoch
from pipeline.distributed import PREEMPTED, Ranks, StopSignal
from pipeline.errors import UserError

PARTITIONS = 64  # of the order of the samples; the ranks must share them evenly
GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class ProbeCrop(Crop):
    """RandomResizedCrop as in TensorFlow, which MAE's probe uses: one try, cut off at the border.

    torchvision's draws up to ten times until the rectangle fits; here a side that is too long
    becomes the picture's. Source: facebookresearch/mae, `util/crop.py`.
    """

    def choose(self, uniform: Sequence[float]) -> Callable[[int, int], tuple[Box, bool]]:
        """The crop for `uniform` in [0, 1): share of the area, aspect ratio, place, flip."""

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
    vit: VisionTransformer, info: dict, ranks: Ranks, args: argparse.Namespace, start: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented training features [B, D] and labels [B], one global batch after the other."""
    config = LoaderConfig(
        args.train,
        batch_size=args.batch_size,
        micro_batch=args.micro_batch,
        crop=ProbeCrop(image_size=image_size(vit), scale=(0.08, 1.0)),
        seed=args.seed,
        partitions=math.gcd(args.batch_size, PARTITIONS),
        workers=args.workers,
    )
    loader = train_loader(config, ranks.rank, ranks.world, range(start, args.total_steps))
    parts: list[tuple[Tensor, Tensor]] = []
    for batch in loader:
        pixels = normalise(batch.image, info, ranks.device)
        feature = image_features(vit, pixels, args.feature, args.precision)
        parts.append((feature, batch.label.to(ranks.device)))
        if len(parts) * args.micro_batch * ranks.world == args.batch_size:
            feature, label = (torch.cat(column) for column in zip(*parts, strict=True))
            yield ranks.gather(feature), ranks.gather(label)
            parts.clear()


def score(
    probe: Probe, vit: VisionTransformer, info: dict, ranks: Ranks, args: argparse.Namespace
) -> dict[str, Any]:
    """Accuracy on the validation set, each image counted once whatever the number of ranks."""
    probe.eval()
    count = torch.zeros(len(probe.bias), 3, dtype=torch.int64, device=ranks.device)
    with torch.no_grad():
        for pixels, label, _ in progress(
            batches(args.val, vit, info, ranks, args), ranks, "validation"
        ):
            feature = image_features(vit, pixels, args.feature, args.precision)
            count += count_correct(probe(feature), label)
    top1, top5, images = ranks.sum(count)[0].tolist()
    return {"top1": as_percent(top1, images), "top5": as_percent(top5, images), "images": images}


def probe_mae(
    vit: VisionTransformer, info: dict, ranks: Ranks, args: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """MAE's protocol on augmented images; the result's accuracy fields. Resumes from the last
    checkpoint in `folder`, of which there is one per epoch."""
    probe = Probe(vit.num_features, args.classes, seed=args.seed).to(ranks.device)
    ranks.broadcast(probe.state_dict().values())
    training = Training(
        probe, (args.base_lr,), batch=args.batch_size, steps=args.steps_per_epoch, args=args
    )
    known = settings(args) | {"encoder": info["source"], "random": info["random"]}
    checkpoints = Checkpoints(folder, known | {"feature": args.feature})
    latest, stop = checkpoints.load(training.read), StopSignal()
    first, loss = latest.get("step", 0), latest.get("loss", float("nan"))
    stream = global_features(vit, info, ranks, args, first)
    left = args.total_steps - first
    for step, batch in enumerate(progress(stream, ranks, "linear probe", left), first):
        losses = training.step(step, *batch)
        if not bool(losses.isfinite().all() and training.finite.all()):
            raise diverged([args.base_lr], f"in step {step + 1}")
        ended, last = (step + 1) % args.steps_per_epoch == 0, step + 1 == args.total_steps
        stopping = ranks.any(bool(stop.name)) and not last
        if ended or last or stopping:
            loss = losses.item()
            checkpoints.save(step + 1, partial(training.write, ranks.first), loss=loss)
        if ended:
            announce(step, training, loss, ranks, args)
        if stopping:
            sys.exit(PREEMPTED)
    return {**score(probe, vit, info, ranks, args), "train_loss": round(loss, 5)}


def diverged(rates: list[float], where: str) -> UserError:
    """What to say of a probe whose loss or weights are not finite: it has no accuracy."""
    return UserError(
        f"the loss or the weights of the probe are not finite {where} at base learning rate "
        f"{', '.join(f'{rate:g}' for rate in rates)}; use a lower one, or an encoder with finite "
        "features"
    )


def announce(
    step: int, training: Training, loss: float, ranks: Ranks, args: argparse.Namespace
) -> None:
    """A line per tenth of the epochs, on the first rank."""
    epoch = (step + 1) // args.steps_per_epoch
    if ranks.first and epoch % max(1, args.epochs // 10) == 0:
        lr = f"lr {training.rate(step):.4g}"
        print(f"epoch {epoch}/{args.epochs}  loss {loss:.4f}  {lr}", flush=True)


# ------------------------------------------------------------------ cached features


def train_heads(
    feature: Tensor, label: Tensor, rates: tuple[float, ...], args: argparse.Namespace
) -> tuple[Probe, Tensor]:
    """Heads, one per learning rate, trained on features [N, D] and labels [N] for all epochs;
    and which of them have finite weights, bool [heads]."""
    batch = min(args.batch_size, len(feature))
    steps = len(feature) // batch
    probe = Probe(feature.shape[1], args.classes, len(rates), args.seed).to(feature.device)
    training = Training(probe, rates, batch=batch, steps=steps, args=args)
    generator = torch.Generator().manual_seed(args.seed)
    total = steps * args.epochs if args.max_steps is None else args.max_steps
    order = torch.empty(0)
    for step in range(min(total, steps * args.epochs)):
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


def held_out(samples: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sample numbers (kept, held out), a random split fixed by the seed, both in order."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    cut = max(1, round(samples * share))
    return order[cut:].sort().values, order[:cut].sort().values


def grid_scores(
    train: tuple[Tensor, Tensor],
    tests: dict[str, tuple[Tensor, Tensor]],
    ranks: Ranks,
    args: argparse.Namespace,
) -> list[dict[str, float]]:
    """Train a head per learning rate of the grid, the rates shared among the ranks; score each on
    every named test set: [{base_lr, <name>: top-1, <name>_top5: top-5}, …] in the grid's order."""
    mine = tuple(args.grid[ranks.rank :: ranks.world])
    rows = torch.full((len(args.grid), 2 * len(tests)), 0.0, dtype=torch.float64)
    if mine:
        probe, finite = train_heads(*train, mine, args)
        for column, (feature, label) in enumerate(tests.values()):
            rows[ranks.rank :: ranks.world, 2 * column : 2 * column + 2] = torch.tensor(
                accuracies(probe, feature, label), dtype=torch.float64
            )
        rows[ranks.rank :: ranks.world][~finite.cpu()] = math.nan
    rows = ranks.sum(rows).cpu()
    lost = [rate for rate, row in zip(args.grid, rows, strict=True) if row.isnan().any()]
    if lost:  # known to every rank only now
        raise diverged(lost, "at the end")
    names = [part for name in tests for part in (name, f"{name}_top5")]
    return [
        {"base_lr": rate, **{n: round(v, 3) for n, v in zip(names, row, strict=True)}}
        for rate, row in zip(args.grid, rows.tolist(), strict=True)
    ]


def probe_cached(
    vit: VisionTransformer, info: dict, ranks: Ranks, args: argparse.Namespace, _: Path
) -> dict[str, Any]:
    """The cached protocol, too short to resume; the accuracy fields and the whole grid."""
    feature, label = extract(args.train, vit, info, ranks, args)
    val = extract(args.val, vit, info, ranks, args)
    images = len(val[1])
    if args.select == "validation":
        train, tests, criterion = (feature, label), {"validation": val}, "validation"
        chosen_on = f"the validation set (best of {len(args.grid)}, an optimistic figure)"
    else:
        kept, out = (part.to(label.device) for part in held_out(len(label), 0.1, args.seed))
        train = (feature[kept], label[kept])
        tests = {"held_out": (feature[out], label[out]), "validation": val}
        criterion = "held_out"
        chosen_on = f"{len(out)} held-out training images (best of {len(args.grid)})"
    grid = grid_scores(train, tests, ranks, args)
    best = max(grid, key=lambda row: row[criterion])
    return {
        "top1": best["validation"],
        "top5": best["validation_top5"],
        "images": images,
        "base_lr": best["base_lr"],
        "base_lr_chosen_on": chosen_on,
        "grid": grid,
    }


# ------------------------------------------------------------------ command line


def build_parser() -> argparse.ArgumentParser:
    """The command line; its defaults are MAE's protocol."""
    result = parser(str(__doc__).split("\n", 1)[0])
    result.add_argument("--train", required=True, help="training shards")
    result.add_argument("--val", required=True, help="validation shards")
    result.add_argument("--protocol", choices=["mae", "cached"], default="mae")
    result.add_argument("--feature", choices=FEATURES, default="cls")
    result.add_argument("--epochs", type=int, default=90)
    result.add_argument("--warmup-epochs", type=float, default=10)
    result.add_argument("--batch-size", type=int, default=16384, help="global, over all ranks")
    result.add_argument("--micro-batch", type=int, default=256, help="at most; per rank")
    result.add_argument("--base-lr", type=float, default=0.1, help="per 256 images; mae only")
    result.add_argument("--grid", type=float, nargs="+", default=GRID, help="cached only")
    result.add_argument("--select", choices=["held-out", "validation"], default="held-out")
    result.add_argument("--max-steps", type=int, help="stop after so many steps: a trial run")
    return result


def complete(args: argparse.Namespace, ranks: Ranks) -> None:
    """Check the arguments against the data and derive the rest from it."""
    train, val = labelled(args.train), labelled(args.val)
    args.classes = class_count(train, val)
    if min(args.epochs, args.batch_size, args.micro_batch) < 1:
        raise UserError("--epochs, --batch-size and --micro-batch must be at least 1")
    if args.max_steps is not None and args.max_steps < 1:
        raise UserError("--max-steps must be at least 1")
    if args.protocol == "cached":
        return
    if args.batch_size % ranks.world:
        raise UserError(f"--batch-size {args.batch_size} cannot be split over {ranks.world} ranks")
    share = args.batch_size // ranks.world
    args.micro_batch = max(n for n in range(1, min(share, args.micro_batch) + 1) if share % n == 0)
    partitions = math.gcd(args.batch_size, PARTITIONS)
    args.steps_per_epoch = steps_per_epoch(train.samples, args.batch_size, partitions)
    if args.steps_per_epoch < 1:
        raise UserError(
            f"{args.train} has {train.samples} samples, too few for --batch-size "
            f"{args.batch_size}; choose a smaller one"
        )
    total = args.steps_per_epoch * args.epochs
    args.total_steps = total if args.max_steps is None else min(total, args.max_steps)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the result depends on, for the result file."""
    names = ["epochs", "warmup_epochs", "batch_size", "seed", "precision", "train", "val"]
    names += ["base_lr"] if args.protocol == "mae" else ["grid", "select"]
    chosen = {name: getattr(args, name) for name in names}
    fixed = {"optimizer": "LARS", "momentum": 0.9, "trust": 0.001, "weight_decay": 0.0}
    return {**chosen, **fixed, "max_steps": args.max_steps, "classes": args.classes}


def evaluate(args: argparse.Namespace, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Run the protocol that the arguments name; the whole result, alike on every rank.

    folder: where checkpoints are kept.
    """
    timer = Timer()
    complete(args, ranks)
    seed_everything(args.seed)
    vit, info = open_encoder(args, ranks)
    run: Callable[..., dict[str, Any]] = probe_mae if args.protocol == "mae" else probe_cached
    accuracy = run(vit, info, ranks, args, folder)
    return {
        "protocol": f"linprobe-{args.protocol}",
        "feature": args.feature,
        **accuracy,
        "settings": settings(args),
        "precision": used_precision(args.precision, ranks.device),
        "encoder": info,
        "seconds": timer.seconds,
        "ranks": ranks.world,
    }


def main() -> None:
    args = build_parser().parse_args()
    ranks = join_ranks()
    output = output_path(args, f"linprobe-{args.protocol}")
    result = evaluate(args, ranks, output.with_suffix(""))
    if ranks.first:
        write_result(output, result)
        print(f"top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  → {output}", flush=True)


if __name__ == "__main__":
    run_command(main)
