"""What the evaluations share: ranks, counting, results on disk.

Every evaluation runs alone (`python eval/linprobe.py …`) or on several ranks
(`deepspeed eval/linprobe.py …`, `torchrun eval/linprobe.py …`); the ranks are read from RANK,
WORLD_SIZE and LOCAL_RANK.
"""

import argparse
import os
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from pipeline.distributed import Ranks, bf16_units
from pipeline.errors import UserError, naming, refuse
from shard_tools.atomic import write_json
from shard_tools.cores import cores

T = TypeVar("T")


def join_ranks() -> Ranks:
    """Join the ranks named by the environment (nccl on CUDA, gloo on CPU), or run alone."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank, world, local_rank, local_world = (int(os.environ.get(k, v)) for k, v in names.items())
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world)
    return Ranks(rank, world, local_rank, local_world, device)


def run_command(main: Callable[[], None]) -> None:
    """Run a command line: bad input ends as `error: …` on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        sys.exit(refuse(error, f" (rank {rank})" if rank else ""))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def base_parser(description: str) -> argparse.ArgumentParser:
    """Argument parser with the options of every evaluation; DeepSpeed adds `--local_rank`."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--workers", type=int, default=min(8, cores()))
    result.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return result


def parser(description: str) -> argparse.ArgumentParser:
    """Argument parser of an evaluation of encoders, ours or others'."""
    result = base_parser(description)
    result.add_argument(
        "--encoder",
        required=True,
        help="a run's folder; a checkpoint FILE of timm, MAE, MoCo v3, DINO or BEiT, with --arch; "
        "timm:NAME; or random, with --arch",
    )
    result.add_argument("--arch", help="timm's name of what a FILE or random is")
    result.add_argument(
        "--options", default="{}", help="further keywords of that timm model, {img_size: 384}"
    )
    result.add_argument(
        "--random",
        action="store_true",
        help="take a randomly initialised encoder of the same architecture: the baseline",
    )
    result.add_argument("--output", help="result file (default: RUN/eval/<protocol>.json)")
    result.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    return result


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random, alike on every rank."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm's augmentations draw from the global generator
    torch.manual_seed(seed)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 autocast where `used_precision` is that; a context that does nothing elsewhere."""
    enabled = used_precision(precision, device) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def used_precision(precision: str, device: torch.device) -> str:
    """What --precision means on a device: `auto` is bf16 on a GPU with bf16 units, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and bf16_units() else "fp32"


def count_correct(logits: Tensor, label: Tensor) -> Tensor:
    """Hits of logits [..., b, C] for labels [b]: int64 [..., 3] = top-1, top-5, images."""
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    hit = best == label[:, None]
    images = torch.full(hit.shape[:-2], len(label), device=logits.device)
    return torch.stack([hit[..., :1].sum((-1, -2)), hit.sum((-1, -2)), images], dim=-1)


def progress(items: Iterable[T], ranks: Ranks, text: str, total: int | None = None) -> Iterable[T]:
    """A progress bar with the time left, on the first rank and in a terminal only."""
    return tqdm(items, desc=text, total=total, disable=None if ranks.first else True, leave=False)


def output_path(args: argparse.Namespace, name: str) -> Path:
    """Where a result goes: --output, or RUN/eval/NAME.json, with the seed of a random encoder.

    An encoder that is no run of ours has the folder runs/<its name>.
    """
    if args.output:
        return Path(args.output)
    place = Path(args.encoder)
    if place.is_file():
        place = Path("runs") / place.stem
    elif args.encoder == "random" or args.encoder.startswith("timm:"):
        place = Path("runs") / args.encoder.replace(":", "-")
    elif place.name == "encoder":
        place = place.parent
    is_random = args.random or args.encoder == "random"
    return place / "eval" / f"{name}{f'-random-{args.seed}' if is_random else ''}.json"


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, atomically. UserError where the path cannot be written."""
    with naming(path, "cannot be written"):
        write_json(Path(path), result, indent=1)


def as_percent(count: float, images: float) -> float:
    """Accuracy in percent, to a thousandth."""
    return round(100.0 * float(count) / float(images), 3)
