"""k-NN: the label of a validation image from its nearest training images' features.

The k = 20 training images of highest cosine similarity s vote for their labels with weight
exp(s / T), T = 0.07. No training, no augmentation. Source: Wu et al. 2018, Eq. of Sect. 3.4.

    python eval/knn.py --encoder runs/rmae --train data/shards/train --val data/shards/val
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.shared.command import run_command
from eval.shared.labels import class_count, content_of, labelled
from eval.shared.options import FEATURES, parser, settings_of
from eval.shared.results import Timer, check_other_settings, result_of, write_accuracy
from pipeline.command import early
from pipeline.errors import UserError, check_range


@dataclass(frozen=True)
class Settings:
    """What the vote depends on. train, val: shards; micro_batch: images of a forward pass."""

    train: str
    val: str
    feature: str = "cls"
    k: int = 20
    temperature: float = 0.07
    micro_batch: int = 256


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    result, d = parser(str(__doc__).split("\n", 1)[0]), Settings
    result.add_argument("--train", required=True, help="training shards")
    result.add_argument("--val", required=True, help="validation shards")
    result.add_argument(
        "--feature", choices=FEATURES, default=d.feature,
        help="the feature that is compared; own: the encoder's own pooling",
    )  # fmt: skip
    result.add_argument("--k", type=int, default=d.k, help="neighbours that vote")
    result.add_argument("--temperature", type=float, default=d.temperature, help="of their votes")
    result.add_argument(
        "--micro-batch", type=int, default=d.micro_batch, help="images per forward pass"
    )
    return result


def check(s: Settings) -> int:
    """Refuse what cannot be computed; the number of classes."""
    train, val = labelled(s.train), labelled(s.val)
    if not 1 <= s.k <= train.samples:
        raise UserError(f"--k {s.k}: must be between 1 and {train.samples} training images")
    check_range("--temperature", s.temperature, above=0)
    check_range("--micro-batch", s.micro_batch, at_least=1)
    return class_count(train, val)


def prepare(args: argparse.Namespace) -> tuple[Settings, Path]:
    """The settings and the path of the result. UserError."""
    settings, output = settings_of(Settings, args), result_of(args, "knn")
    check(settings)
    check_other_settings(output, args)
    return settings, output


if __name__ == "__main__":  # the help, and what is seen to be wrong without torch
    early(build_parser().parse_args, prepare, ranks=True)

import torch
import torch.nn.functional as F

from eval.shared.cli import join_ranks
from eval.shared.metrics import accuracy, count_correct
from eval.shared.session import EvalSession, session_of
from pipeline.method.metrics import vote


def evaluate(s: Settings, session: EvalSession) -> dict[str, Any]:
    """Accuracy of the k-NN classifier; the full result, alike on every rank."""
    timer, classes, ranks = Timer(), check(s), session.ranks
    feature, label = session.extract(s.train, s.feature, s.micro_batch)
    query, truth = session.extract(s.val, s.feature, s.micro_batch)
    # Each rank classifies every world-th image; every rank has all features.
    count = torch.zeros(3, dtype=torch.int64, device=ranks.device)
    mine = torch.arange(len(query), device=ranks.device)[ranks.rank :: ranks.world]
    feature = F.normalize(feature, dim=1)
    for piece in mine.split(256):
        votes = vote(query[piece], feature, label, classes, k=s.k, temperature=s.temperature)
        voted = votes.gather(1, truth[piece, None])[:, 0] > 0
        # A class without a vote is no answer, although one is fifth where few have votes.
        count += count_correct(votes, truth[piece].where(voted, -1))
    record = asdict(s) | {"precision": session.precision}
    return {
        "protocol": "knn",
        "feature": s.feature,
        **accuracy(ranks.sum(count)),
        "settings": {key: record[key] for key in ("k", "temperature", "precision", "train", "val")},
        "content": content_of(s),
        **session.facts(timer),
    }


def main() -> None:
    args = build_parser().parse_args()
    ranks = join_ranks()
    settings, output = ranks.agree(lambda: prepare(args))
    result = evaluate(settings, session_of(args, ranks, settings.feature))
    if ranks.first:
        write_accuracy(output, result, args)


if __name__ == "__main__":
    run_command(main)
