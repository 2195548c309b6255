"""Pretrain MAE, R-MAE or C-MAE from shards with DeepSpeed.

deepspeed pipeline/pretrain.py --ds_config ds_configs/zero2.json

The command line. Nothing here imports torch before the arguments, the recipe and the manifest have
been read; the loop is in pipeline/runtime/loop.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

from pipeline.command import alone, check_environment, interrupt_quietly
from pipeline.config.recipe import RECIPES
from pipeline.errors import PREEMPTED, UserError, mend_streams, refuse
from pipeline.help_text import HelpFormatter
from pipeline.late import uncollected
from pipeline.runtime import startup
from pipeline.runtime.preflight import preflight
from pipeline.runtime.settings import Settings
from shard_tools.home import expand_words

ROOT = Path(__file__).resolve().parent.parent


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Pretrain a masked-image model (MAE, R-MAE, C-MAE) from shards with DeepSpeed.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--ds_config", "--ds-config", default=ROOT / "ds_configs" / "zero2.json", metavar="FILE",
        help="how it runs (ZeRO stage, bf16, buckets, micro-batch): a file, or a bundled name such "
        "as zero1 (default: zero2)",
    )  # fmt: skip
    parser.add_argument(
        "--recipe",
        default=RECIPES / "rmae.yaml",
        metavar="FILE",
        help="what is trained: a file, or a bundled name such as mae (default: rmae)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a recipe key, e.g. --set optimizer.epochs=400; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--data", default="data/shards/train", metavar="FOLDER", help="folder of shards"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="the run's folder (default: runs/<recipe>-<date>)",
        default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.add_argument(
        "--resume", default="auto", metavar="auto|PATH|none",
        help="resume from the newest valid checkpoint of --output, begin at another run or "
        "checkpoint (the same command continues what it began), or start from scratch",
    )  # fmt: skip
    parser.add_argument(
        "--init", metavar="PATH", default=argparse.SUPPRESS,
        help="start a fresh run from weights: a run, an export, a file of facebookresearch/mae, "
        "MoCo v3, DINO or timm, or timm:NAME (--set init.weights=PATH; --set init.ema=true takes "
        "the average in a file, or the run's EMA teacher)",
    )  # fmt: skip
    parser.add_argument(
        "--resume-changed", action="store_true",
        help="resume although the data or the recipe is not the checkpoint's; the log says what "
        "differs and how the schedule moves",
    )  # fmt: skip
    parser.add_argument(
        "--no-lock", action="store_false", dest="lock",
        help="start where the file system of --output has no locks (a second run on the same "
        "folder is then not noticed)",
    )  # fmt: skip
    parser.add_argument(
        "--max-steps", type=int, default=argparse.SUPPRESS, metavar="N",
        help="stop after optimizer step N; the learning rate follows the recipe's length all the "
        "same (default: the recipe's epochs)",
    )  # fmt: skip
    parser.add_argument(
        "--peak-tflops", type=float, default=argparse.SUPPRESS, metavar="N",
        help="10^12 FLOP/s that one device reaches at most, for the MFU (default: the data sheet's "
        "of a GPU that is known)",
    )  # fmt: skip
    parser.add_argument(
        "-v", "--verbose", action="store_true",
        help="log what the time until the first step went to",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def parse_args(argv: list[str] | None = None) -> Settings:
    """The settings that a command line names."""
    parser = build_parser()
    args = vars(parser.parse_args(expand_words(sys.argv[1:] if argv is None else argv)))
    args.pop("local_rank")  # of the launcher
    if "init" in args:
        weights = args.pop("init")
        place = weights if weights.startswith("timm:") else os.path.abspath(weights)
        args["overrides"].append(f"init.weights={json.dumps(place)}")
    steps = args.get("max_steps")
    if steps is not None and steps < 1:
        parser.error(f"--max-steps {steps}: must be at least 1")
    if not 0 < args.get("peak_tflops", 1) < math.inf:
        parser.error(f"--peak-tflops {args['peak_tflops']:g}: must be above 0")
    return Settings(**args | {"overrides": tuple(args["overrides"])})


def main(argv: list[str] | None = None) -> int:
    """Run it; returns the exit code.

    0 done, 1 another rank is gone or a bug, 2 bad input or a full disk, 75 (by the watchdog) no
    progress, 76 gradients that are not finite, 85 stopped by a signal and saved.
    """
    startup.begin()
    try:
        settings = parse_args(argv)
        check_environment()
        if alone():  # several ranks find faults together
            preflight(settings)
    except UserError as error:
        return refuse(error)
    startup.done("input")
    with uncollected():
        from pipeline.runtime.loop import pretrain  # torch and deepspeed: seconds
    startup.done("imports")

    return pretrain(settings)


if __name__ == "__main__":
    mend_streams()
    interrupt_quietly()  # until the first step
    code = main()
    if code in (0, PREEMPTED):
        from pipeline.distributed import close

        close()
    # Not waiting for ranks that may be gone, and with no thread at work while the interpreter ends:
    # ZeRO 3 keeps its process group, whose threads could abort it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
