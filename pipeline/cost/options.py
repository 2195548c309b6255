"""The options of pipeline/estimate.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.command import check_unused
from pipeline.config.peaks import MEMORY, PEAKS
from pipeline.config.recipe import RECIPES
from pipeline.config.schema import IMAGENET_IMAGES
from pipeline.cost.micro_batch import MARGIN
from pipeline.errors import UserError, check_range
from pipeline.help_text import HelpFormatter

# Images a second that a core decodes and crops: 200 files of ImageNet (106 KB), processor time on a
# virtual machine with AVX2. `make bench-data` measures the whole loader.
CORE_IMAGES = 1000.0
UTILISATION = 0.29  # of the peak: MAE's as shipped, 256 images, on an H100 (docs/gpu.md)
# Ways to run (docs/training.md): torch_autocast, as shipped; bf16 weights with gradients kept and
# summed in bf16 or in fp32; fp32.
PRECISIONS = ("autocast", "bf16", "bf16-fp32-grads", "fp32")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Predict memory, communication, FLOPs and hours of a pretraining run.",
        formatter_class=HelpFormatter,
    )
    _run_options(parser.add_argument_group("the run"))
    _machine_options(parser.add_argument_group("the machine"))
    _answer_options(parser.add_argument_group("what is answered (default: a plan for every stage)"))
    return parser


def _run_options(group: argparse._ArgumentGroup) -> None:
    a = group.add_argument
    a(
        "--recipe", default=RECIPES / "rmae.yaml", metavar="FILE",
        help="what is trained: a file, or a bundled name such as mae (default: rmae)",
    )  # fmt: skip
    a(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a recipe key; may be repeated",
    )  # fmt: skip
    a("--images", type=int, default=IMAGENET_IMAGES, help="images of the training set")
    a(
        "--micro-batch", type=int, default=0, metavar="N",
        help='images per GPU and pass; 0: as "auto", as many as leave '
        f"{MARGIN:.0%}% of its memory free, but with negatives or batch norm up to 128",
    )  # fmt: skip
    a(
        "--precision", choices=PRECISIONS, default=PRECISIONS[0],
        help="precision of weights, gradients and products: see docs/training.md",
    )  # fmt: skip
    a(
        "--checkpointing", action="store_true",
        help="predict with gradient_checkpointing true in the ds_config",
    )  # fmt: skip
    a("--no-graphs", action="store_true", help="predict with cuda_graphs false in the ds_config")


def _machine_options(group: argparse._ArgumentGroup) -> None:
    a = group.add_argument
    a("--gpus", type=int, default=8, help="GPUs of all nodes together")
    a(
        "--gpu", choices=PEAKS, default="h100",
        help="the GPU: its peak FLOP/s for the time, its memory for what fits",
    )  # fmt: skip
    a(
        "--gpu-memory", type=float, metavar="GB",
        help="memory of a GPU, in 10^9 bytes (default: the data sheet's; of an A100 80)",
    )  # fmt: skip
    a(
        "--utilisation", type=float, default=UTILISATION, metavar="SHARE",
        help="share of the peak FLOP/s that is reached; the default is MAE's on an H100 "
        "(docs/gpu.md)",
    )  # fmt: skip
    a(
        "--launch-ms", type=float, default=0, metavar="MS",
        help="host time per launch; 0: measured on this machine",
    )  # fmt: skip
    a("--cores", type=int, default=8, help="CPU cores per GPU that load images")
    a(
        "--core-images", type=float, default=CORE_IMAGES, metavar="N",
        help="images per second that a core loads (make bench-data)",
    )  # fmt: skip


def _answer_options(group: argparse._ArgumentGroup) -> None:
    a = group.add_argument
    a(
        "--fit", type=int, metavar="STAGE", choices=range(4),
        help="print only the largest micro-batch that fits under this ZeRO stage",
    )  # fmt: skip
    a(
        "--flops", action="store_true",
        help="print only the FLOPs of a step per image, with the negatives of --gpus and "
        "--micro-batch (default: up to 128); under data.sizes also of each size",
    )  # fmt: skip
    a("--json", type=Path, metavar="FILE", help="also write the plan there")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = build_parser()
    args = parser.parse_args(argv)
    plan_only = ("launch_ms", "cores", "core_images", "utilisation", "images", "json")
    fit_too = ("fit", "gpu", "gpu_memory", "precision", "checkpointing", "no_graphs")
    try:
        for flag in ("gpus", "images", "cores"):
            check_range(f"--{flag}", getattr(args, flag), at_least=1)
        check_range("--micro-batch", args.micro_batch, at_least=0)
        check_range("--utilisation", args.utilisation, above=0, at_most=1)
        if args.gpu_memory is not None:
            check_range("--gpu-memory", args.gpu_memory, above=0)
        check_range("--core-images", args.core_images, above=0)
        check_range("--launch-ms", args.launch_ms, at_least=0)
        if args.flops:
            check_unused(parser, args, (*plan_only, *fit_too), "with --flops")
        elif args.fit is not None:
            check_unused(parser, args, (*plan_only, "micro_batch"), "with --fit")
    except UserError as error:
        parser.error(str(error))
    if args.gpu_memory is None:
        args.gpu_memory = MEMORY[args.gpu]
    return args
