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

from pipeline.command import alone, check_environment
from pipeline.config.recipe import RECIPES
from pipeline.errors import PREEMPTED, UserError, mend_streams, reachable, refuse
from pipeline.help_text import HelpFormatter
from pipeline.interrupts import interrupt_quietly
from pipeline.late import uncollected
from pipeline.loading import explain_limits
from pipeline.runtime import startup
from pipeline.runtime.preflight import preflight
from pipeline.runtime.settings import Settings
from shard_tools.home import expand_words

ROOT = Path(__file__).resolve().parent.parent


def build_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        description="Pretrain a masked-image model (MAE, R-MAE, C-MAE) from shards with DeepSpeed.",
        formatter_class=HelpFormatter,
    )
    _what_options(parser.add_argument_group("what, from where, to where"))
    _start_options(parser.add_argument_group("start and resume"))
    _other_options(parser.add_argument_group("others"))
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _what_options(group: argparse._ArgumentGroup) -> None:
    a = group.add_argument
    a(
        "--ds_config", "--ds-config", default=ROOT / "ds_configs" / "zero2.json", metavar="FILE",
        help="how it runs (ZeRO stage, bf16, buckets, micro-batch): a file, or a bundled name such "
        "as zero1 (default: zero2)",
    )  # fmt: skip
    a(
        "--recipe", default=RECIPES / "rmae.yaml", metavar="FILE",
        help="what is trained: a file, or a bundled name such as mae (default: rmae)",
    )  # fmt: skip
    a(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a recipe key, e.g. --set optimizer.epochs=400; may be repeated",
    )  # fmt: skip
    a("--data", default="data/shards/train", metavar="FOLDER", help="folder of shards")
    a(
        "--output", metavar="FOLDER", help="the run's folder (default: runs/<recipe>-<date>)",
        default=argparse.SUPPRESS,
    )  # fmt: skip
    a(
        "--max-steps", type=int, default=argparse.SUPPRESS, metavar="N",
        help="stop after optimizer step N; the learning rate schedule keeps the recipe's length "
        "(default: the recipe's epochs)",
    )  # fmt: skip


def _start_options(group: argparse._ArgumentGroup) -> None:
    a = group.add_argument
    a(
        "--resume", default="auto", metavar="auto|PATH|none",
        help="auto: from the newest valid checkpoint of --output; PATH: begin at another run or "
        "checkpoint (rerunning the command continues the new run); none: start from scratch",
    )  # fmt: skip
    a(
        "--resume-changed", action="store_true",
        help="resume although data or recipe differ from the checkpoint's; the log says what "
        "differs and how the schedule moves",
    )  # fmt: skip
    a(
        "--init", metavar="PATH", default=argparse.SUPPRESS,
        help="start a fresh run from weights: a run, an export, a file of facebookresearch/mae, "
        "MoCo v3, DINO or timm, or timm:NAME (same as --set init.weights=PATH; --set init.ema=true "
        "takes the average that the file keeps, or the run's EMA teacher)",
    )  # fmt: skip


def _other_options(group: argparse._ArgumentGroup) -> None:
    a = group.add_argument
    a(
        "--no-lock", action="store_false", dest="lock",
        help="allow an --output whose file system has no locks (a second run on the same folder "
        "is then not noticed)",
    )  # fmt: skip
    a(
        "--peak-tflops", type=float, default=argparse.SUPPRESS, metavar="N",
        help="peak of one device in 10^12 FLOP/s, for the MFU (default: the data sheet's, for "
        "known GPUs)",
    )  # fmt: skip
    a(
        "-v", "--verbose", action="store_true",
        help="log how long each phase until the first step took",
    )  # fmt: skip


def parse_args(argv: list[str] | None = None) -> Settings:
    """The settings of a command line (None: of this process)."""
    parser = build_parser()
    args = vars(parser.parse_args(expand_words(sys.argv[1:] if argv is None else argv)))
    args.pop("local_rank")  # DeepSpeed's launcher passes it; ranks read the environment
    if "init" in args:
        weights = args.pop("init")
        source = weights if weights.startswith("timm:") else os.path.abspath(weights)
        args["overrides"].append(f"init.weights={json.dumps(source)}")
    steps = args.get("max_steps")
    if steps is not None and steps < 1:
        parser.error(f"--max-steps {steps}: must be at least 1")
    if not 0 < args.get("peak_tflops", 1) < math.inf:
        parser.error(f"--peak-tflops {args['peak_tflops']:g}: must be above 0")
    return Settings(**args | {"overrides": tuple(args["overrides"])})


def main(argv: list[str] | None = None) -> int:
    """Pretrain; returns the exit code.

    0 done, 1 lost contact with another rank, or a bug, 2 bad input or a full disk, 75 no progress
    (from the watchdog), 76 gradients not finite, 85 stopped by a signal after saving.
    """
    startup.begin()
    try:
        settings = parse_args(argv)
        check_environment()
        if alone():  # several ranks check their input together, in setup
            with reachable():
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
    explain_limits()
    code = main()
    if code in (0, PREEMPTED):
        from pipeline.distributed import close

        close()
    # os._exit waits for no rank that may be gone and skips the interpreter's own end, during which
    # the threads of ZeRO 3's process group could abort it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
