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

The protocol `mae` resumes from its last checkpoint when rerun; SIGTERM, SIGUSR1, SIGHUP and Ctrl-C
save and exit with 85.

    python eval/linprobe.py --encoder runs/rmae --train data/shards/train --val data/shards/val
    deepspeed eval/linprobe.py --protocol cached --encoder runs/rmae --train … --val …
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eval.shared.command import run_command
from eval.shared.labels import content_of
from eval.shared.linprobe_plan import Plan, Settings, identity, make_plan, record
from eval.shared.options import FEATURES, parser, settings_of
from eval.shared.results import (
    Timer,
    check_finished,
    check_other_settings,
    result_of,
    write_accuracy,
)
from eval.shared.subsets import held_out_count
from pipeline.command import early
from pipeline.errors import Diverged
from shard_tools.manifest import read_manifest


def build_parser() -> argparse.ArgumentParser:
    """The command line; its defaults are MAE's protocol."""
    result, d = parser(str(__doc__).split("\n", 1)[0]), Settings
    add = result.add_argument
    add("--train", required=True, help="training shards")
    add("--val", required=True, help="validation shards")
    add("--protocol", choices=["mae", "cached"], default=d.protocol,
        help="mae: LARS on augmented images; cached: features once, then nine rates")  # fmt: skip
    add("--feature", choices=FEATURES, default=d.feature,
        help="the feature that is classified; own: the encoder's own pooling")  # fmt: skip
    add("--also", nargs="*", choices=FEATURES, default=d.also, metavar="FEATURE",
        help="probe these features too, in the same passes: %(choices)s")  # fmt: skip
    add("--epochs", type=int, default=d.epochs, help="over the training set")
    add("--warmup-epochs", type=float, default=d.warmup_epochs, help="below --epochs")
    add("--batch-size", type=int, default=d.batch_size, help="global, over all ranks")
    add(
        "--micro-batch",
        type=int,
        default=d.micro_batch,
        help="images per forward pass at most",
    )
    add("--base-lr", type=float, default=d.base_lr, help="learning rate per 256 images; mae only")
    add("--grid", type=float, nargs="+", default=d.grid, help="learning rates to try; cached only")
    add("--select", choices=["held-out", "validation"], default=d.select,
        help="on which images the rate is chosen; cached only")  # fmt: skip
    add("--max-steps", type=int, help="stop after N steps: a trial run")
    return result


def prepare(args: argparse.Namespace, world: int = 1) -> tuple[Settings, Path]:
    """The settings and the path of the result. UserError."""
    settings = settings_of(Settings, args)
    output = result_of(args, f"linprobe-{settings.protocol}", folder=True)
    make_plan(settings, world)
    if settings.protocol == "cached":
        check_other_settings(output, args)
    else:
        check_finished(output, args)
    return settings, output


if __name__ == "__main__":  # the help, and what is seen to be wrong without torch
    early(build_parser().parse_args, prepare, ranks=True)

import torch
from torch import Tensor

from eval.shared.checkpoints import Checkpoints, hold, leave
from eval.shared.cli import join_ranks, progress
from eval.shared.encoders import check_feature
from eval.shared.lars_probe import Probe, Training, read_all, write_all
from eval.shared.metrics import accuracy, as_percent, count_correct
from eval.shared.session import EvalSession, session_of
from pipeline.data.batch import LoaderConfig
from pipeline.data.crops import Box, Crop
from pipeline.data.loader import train_loader
from pipeline.distributed import Ranks, StopSignal


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
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Augmented training features, [B, D] for each of `features_of`, and labels [B], one global
    batch after the other."""
    ranks, names = session.ranks, features_of(s)
    config = LoaderConfig(
        s.train,
        batch_size=s.batch_size,
        micro_batch=plan.micro_batch,
        crop=ProbeCrop(image_size=session.image_size, scale=(0.08, 1.0)),
        seed=s.seed,
        partitions=plan.partitions,
        workers=session.workers,
        pin_memory=session.ranks.pins_memory,
    )
    loader = train_loader(config, ranks.rank, ranks.world, range(start, plan.total))
    parts: list[tuple[Tensor, ...]] = []
    with loader.explaining():
        for batch in loader:
            features = session.all_features(session.normalise(batch.image), names)
            parts.append((batch.label.to(session.device, non_blocking=True), *features))
            if len(parts) * plan.micro_batch * ranks.world == s.batch_size:
                columns = zip(*parts, strict=True)
                label, *found = (ranks.gather(torch.cat(column)) for column in columns)
                yield found, label
                parts.clear()


def features_of(s: Settings) -> tuple[str, ...]:
    """Every feature that is probed, the chosen one first."""
    return (s.feature, *s.also)


def score(probes: dict[str, Probe], session: EvalSession, s: Settings) -> dict[str, Any]:
    """Accuracy on the validation set by feature, each image counted once over all ranks. UserError
    where a feature is not finite."""
    ranks = session.ranks
    count = torch.zeros(len(probes), 3, dtype=torch.int64, device=session.device)
    finite = torch.ones((), dtype=torch.bool, device=session.device)
    batches = -(-read_manifest(s.val).samples // (s.micro_batch * ranks.world))
    stream = progress(
        session.batches(s.val, s.micro_batch), ranks, "validation", batches, s.micro_batch
    )
    with torch.no_grad():
        for pixels, label, _ in stream:
            features = session.all_features(pixels, tuple(probes))
            for row, probe, feature in zip(count, probes.values(), features, strict=True):
                row += count_correct(probe.eval()(feature), label)[0]
                finite &= feature.isfinite().all()
    session.need_finite(finite, s.val)
    return dict(zip(probes, map(accuracy, ranks.sum(count)), strict=True))


def start_probes(session: EvalSession, s: Settings, plan: Plan) -> dict[str, Training]:
    """A probe and its optimizer for each feature."""
    trainings = {}
    for feature in features_of(s):
        probe = Probe(session.vit.num_features, plan.classes, seed=s.seed).to(session.device)
        session.ranks.broadcast(probe.state_dict().values())
        trainings[feature] = Training(
            probe, (s.base_lr,), batch=s.batch_size, steps=plan.steps, epochs=s.epochs,
            warmup=s.warmup_epochs, name="probe" if feature == s.feature else f"probe-{feature}",
        )  # fmt: skip
    return trainings


def probe_mae(
    session: EvalSession, s: Settings, plan: Plan, folder: Path, timer: Timer
) -> dict[str, Any]:
    """MAE's protocol on augmented images; the result's accuracy fields. Resumes from the last
    checkpoint in `folder`, of which there is one per epoch."""
    ranks, held = session.ranks, hold(folder, session.ranks)
    trainings = start_probes(session, s, plan)
    main = trainings[s.feature]
    checkpoints = Checkpoints(folder, identity(s, plan, session), held)
    latest = checkpoints.load(partial(read_all, list(trainings.values())))
    first, loss = latest.get("step", 0), latest.get("loss", float("nan"))
    timer.resume(latest.get("seconds", 0.0))
    checkpoints.announce(first, plan.total, ranks)
    write = partial(write_all, list(trainings.values()), ranks.first)
    stream = global_features(session, s, plan, first)
    with StopSignal() as stop:
        images, todo = s.batch_size // ranks.world, plan.total - first
        for step, (features, label) in enumerate(
            progress(stream, ranks, "linear probe", todo, images), first
        ):
            both = zip(trainings.values(), features, strict=True)
            losses = [training.step(step, x, label) for training, x in both]
            if not bool(losses[0].isfinite().all() and main.finite.all()):
                raise diverged([s.base_lr], f"in step {step + 1}")
            ended, last = (step + 1) % plan.steps == 0, step + 1 == plan.total
            stopping = ranks.any(bool(stop.name)) and not last
            if ended or last or stopping:
                loss = losses[0].item()
                checkpoints.save(step + 1, write, loss=loss, seconds=timer.seconds)
            if ended and ranks.first:
                announce(step, main, loss)
            if stopping:
                leave(stop, step + 1, plan.total, ranks)
    held.clear()
    scores = score({feature: t.probe for feature, t in trainings.items()}, session, s)
    rows = [
        {"feature": f, **(scores[f] if bool(trainings[f].finite.all()) else {"diverged": True})}
        for f in s.also
    ]
    return {**scores[s.feature], "train_loss": round(loss, 5), **beside(rows)}


def beside(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The results of --also as the field that a result has for them."""
    return {"also": rows} if rows else {}


def diverged(rates: list[float], where: str) -> Diverged:
    """What to say of a probe whose loss or weights are not finite: it has no accuracy."""
    return Diverged(
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


def held_out(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sample numbers (kept, held out), a random split fixed by the seed, both in order."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    cut = held_out_count(samples)
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

    A head that is not finite has {base_lr, diverged: true} instead. Diverged where none is finite.
    """
    mine = s.grid[ranks.rank :: ranks.world]
    rows = torch.zeros(len(s.grid), 2 * len(tests), dtype=torch.float64)
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


def probe_cached(session: EvalSession, s: Settings, plan: Plan) -> dict[str, Any]:
    """The cached protocol, too short to resume; the accuracy fields and the full grid."""
    names = features_of(s)
    features, label = session.extract_all(s.train, names, s.micro_batch)
    val, truth = session.extract_all(s.val, names, s.micro_batch)
    rows = []
    for name, train, test in zip(names, features, val, strict=True):
        row: dict[str, Any] = {} if name == s.feature else {"feature": name}
        try:
            row |= best_of_grid((train, label), (test, truth), session.ranks, s, plan.classes)
        except Diverged:
            if name == s.feature:
                raise
            row["diverged"] = True
        rows.append(row)
    return rows[0] | beside(rows[1:])


def best_of_grid(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    ranks: Ranks,
    s: Settings,
    classes: int,
) -> dict[str, Any]:
    """The accuracy fields of the best of the grid, and the full grid, from features [N, D] and
    labels [N]."""
    feature, label = train
    if s.select == "validation":
        tests, criterion = {"validation": val}, "validation"
        chosen_on = "the validation set (best of {}, an optimistic result)"
    else:
        kept, out = (part.to(label.device) for part in held_out(len(label), s.seed))
        train = (feature[kept], label[kept])
        tests = {"held_out": (feature[out], label[out]), "validation": val}
        criterion = "held_out"
        chosen_on = f"{len(out)} held-out training images (best of {{}})"
    grid = grid_scores(train, tests, ranks, s, classes)
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


def evaluate(s: Settings, session: EvalSession, folder: Path) -> dict[str, Any]:
    """Run the protocol that the settings name; the full result, alike on every rank.

    folder: where checkpoints are kept.
    """
    timer, plan = Timer(), make_plan(s, session.ranks.world)
    session.check_readable(s.val, s.micro_batch)
    for feature in s.also:
        check_feature(session.vit, feature)
    if s.protocol == "mae":
        found = probe_mae(session, s, plan, folder, timer)
    else:
        found = probe_cached(session, s, plan)
    return {
        "protocol": f"linprobe-{s.protocol}",
        "feature": s.feature,
        **found,
        "settings": record(s, plan, session),
        "content": content_of(s),
        **session.facts(timer),
    }


def main() -> None:
    args = build_parser().parse_args()
    ranks = join_ranks()
    settings, output = ranks.agree(lambda: prepare(args, ranks.world))
    session = session_of(args, ranks, settings.feature)
    result = evaluate(settings, session, output.with_suffix(""))
    if ranks.first:
        write_accuracy(output, result, args if settings.protocol == "cached" else None)


if __name__ == "__main__":
    run_command(main)
