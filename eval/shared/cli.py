"""What the command lines of the evaluations share: ranks, options, seeds, progress.

Every evaluation runs alone (`python eval/linprobe.py …`) or on several ranks
(`deepspeed eval/linprobe.py …`, `torchrun eval/linprobe.py …`); the ranks are read from RANK,
WORLD_SIZE and LOCAL_RANK.
"""

import argparse
import math
import os
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from pipeline import progress as status
from pipeline.distributed import (
    Ranks,
    check_environment,
    close,
    device_of,
    joining,
    untried_device,
)
from pipeline.errors import UserError, refuse
from pipeline.help_text import HelpFormatter, expand_home
from pipeline.runtime.memory import explaining_memory
from shard_tools.cores import cores

T = TypeVar("T")


def join_ranks() -> Ranks:
    """Join the ranks named by the environment (nccl on CUDA, gloo on CPU), or run alone.

    UserError where the environment is no rank's, or the ranks do not meet.
    """
    check_environment()
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank, world, local_rank, local_world = (int(os.environ.get(k, v)) for k, v in names.items())
    device = device_of(local_rank)
    if rank == 0 and (line := untried_device()):
        print(line, flush=True)
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        with joining():
            dist.init_process_group(backend, rank=rank, world_size=world)
    return Ranks(rank, world, local_rank, local_world, device)


def run_command(main: Callable[[], None]) -> None:
    """Run a command line: bad input ends as `error: …` on stderr and exit code 2, and so does
    running out of memory, on the device, in this process or in a worker."""
    sys.argv[1:] = expand_home(sys.argv[1:])
    joined = dist.is_initialized()  # before, by whoever calls it in a process of theirs
    try:
        with explaining_memory():
            main()
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        sys.exit(refuse(error, f" (rank {rank})" if rank else ""))
    finally:
        if dist.is_initialized() and not joined:
            close()


def seed_number(text: str) -> int:
    """A seed that every generator takes. argparse turns the error into a sentence."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text}: must be between 0 and {2**32 - 1}")
    return number


def base_parser(description: str) -> argparse.ArgumentParser:
    """Argument parser with the options of every evaluation; DeepSpeed adds `--local_rank`."""
    result = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    result.add_argument("--seed", type=seed_number, default=0, help="of every draw")
    result.add_argument(
        "--workers",
        type=int,
        default=min(8, cores()),
        help="processes of a rank that decode images",
    )
    result.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return result


def parser(description: str) -> argparse.ArgumentParser:
    """Argument parser of an evaluation of encoders, ours or others'."""
    result = base_parser(description)
    result.add_argument(
        "--encoder",
        required=True,
        help="a run's folder; a checkpoint FILE of timm, MAE, MoCo v3, DINO, I-JEPA or BEiT, with "
        "--arch; timm:NAME; or random, with --arch",
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
    result.add_argument(
        "--ema",
        action="store_true",
        help="take the average that a FILE keeps beside its weights (state_dict_ema, model_ema), "
        "or the EMA teacher of a run",
    )
    result.add_argument(
        "--resize",
        type=int,
        default=0,
        help="pixels of the shorter side before an evaluation's centre crop (0: 256/224 of the "
        "image size up to 224, above it the image size)",
    )
    result.add_argument("--output", help="result file (default: RUN/eval/<protocol>.json)")
    result.add_argument(
        "--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="auto: bf16 on a GPU with bf16 units, else fp32",
    )  # fmt: skip
    return result


def settings_of(kind: type[T], args: argparse.Namespace) -> T:
    """The settings (a dataclass) that a command line names; its lists become tuples.

    UserError for a number that is not finite.
    """
    values = {field.name: getattr(args, field.name) for field in fields(kind)}  # type: ignore[arg-type]
    for name, value in values.items():
        numbers = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be finite")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random, alike on every rank."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm's augmentations draw from the global generator
    torch.manual_seed(seed)


def progress(
    items: Iterable[T], ranks: Ranks, text: str, total: int | None = None, images: int = 0
) -> Iterable[T]:
    """The items, followed by a line with speed and time left, on the first rank's terminal only.

    total: their number, where they do not have a length. images: of one item, on one rank.
    """
    return status.progress(items, text, total, images * ranks.world, shown=ranks.first)
