"""k-NN: the label of a validation image from its nearest training images' features.

The k = 20 training images of highest cosine similarity s vote for their labels with weight
exp(s / T), T = 0.07. No training, no augmentation. Source: Wu et al. 2018, Eq. of Sect. 3.4.

    python eval/knn.py --encoder runs/rmae --train data/shards/train --val data/shards/val
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F

from eval.shared.cli import (
    as_percent,
    count_correct,
    join_ranks,
    output_path,
    parser,
    run_command,
    seed_everything,
    used_precision,
    write_result,
)
from eval.shared.features import FEATURES, Timer, class_count, extract, labelled, open_encoder
from pipeline.distributed import Ranks
from pipeline.errors import UserError
from pipeline.method.metrics import vote


def evaluate(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Accuracy of the k-NN classifier; the whole result, alike on every rank."""
    timer = Timer()
    train, val = labelled(args.train), labelled(args.val)
    if not 1 <= args.k <= train.samples:
        raise UserError(f"--k {args.k}: must lie between 1 and {train.samples} training images")
    classes = class_count(train, val)
    seed_everything(args.seed)
    vit, info = open_encoder(args, ranks)
    feature, label = extract(args.train, vit, info, ranks, args)
    query, truth = extract(args.val, vit, info, ranks, args)
    # Each rank classifies every world-th image; features are whole on every rank.
    count = torch.zeros(3, dtype=torch.int64, device=ranks.device)
    mine = torch.arange(ranks.rank, len(query), ranks.world, device=ranks.device)
    feature = F.normalize(feature, dim=1)
    for piece in mine.split(256):
        votes = vote(query[piece], feature, label, classes, k=args.k, temperature=args.temperature)
        count += count_correct(votes, truth[piece])
    top1, top5, images = ranks.sum(count).tolist()
    return {
        "protocol": "knn",
        "feature": args.feature,
        "top1": as_percent(top1, images),
        "top5": as_percent(top5, images),
        "images": images,
        "settings": {
            "k": args.k,
            "temperature": args.temperature,
            "precision": args.precision,
            "train": args.train,
            "val": args.val,
        },
        "precision": used_precision(args.precision, ranks.device),
        "encoder": info,
        "seconds": timer.seconds,
        "ranks": ranks.world,
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(str(__doc__).split("\n", 1)[0])
    result.add_argument("--train", required=True, help="training shards")
    result.add_argument("--val", required=True, help="validation shards")
    result.add_argument("--feature", choices=FEATURES, default="cls")
    result.add_argument("--k", type=int, default=20)
    result.add_argument("--temperature", type=float, default=0.07)
    result.add_argument("--micro-batch", type=int, default=256, help="images per forward pass")
    return result


def main() -> None:
    args = build_parser().parse_args()
    ranks = join_ranks()
    result = evaluate(args, ranks)
    output = output_path(args, "knn")
    if ranks.first:
        write_result(output, result)
        print(f"top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  → {output}", flush=True)


if __name__ == "__main__":
    run_command(main)
