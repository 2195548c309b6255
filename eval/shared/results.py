"""Result files: their path and how they are written."""

import time
from pathlib import Path
from typing import Any

from eval.shared.encoders import EncoderChoice
from pipeline.errors import naming
from shard_tools.atomic import write_json


class Timer:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self.start, 2)


def output_path(output: str | None, encoder: EncoderChoice, name: str) -> Path:
    """Where a result is written: `output`, or RUN/eval/NAME.json, with the seed of a random
    encoder.

    An encoder that is no run of ours has the folder runs/<its name>.
    """
    if output:
        return Path(output)
    run = Path(encoder.source)
    if run.is_file():
        run = Path("runs") / run.stem
    elif encoder.source == "random" or encoder.source.startswith("timm:"):
        run = Path("runs") / encoder.source.replace(":", "-")
    elif run.name == "encoder":
        run = run.parent
    is_random = encoder.random or encoder.source == "random"
    name += f"-random-{encoder.seed}" if is_random else "-ema" * encoder.ema
    return run / "eval" / f"{name}.json"


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, atomically. UserError where the path cannot be written."""
    with naming(path, "cannot be written"):
        write_json(Path(path), result, indent=1)


def write_accuracy(path: Path, result: dict[str, Any]) -> None:
    """Write a result that has top1 and top5, and print them."""
    write_result(path, result)
    print(f"top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  → {path}", flush=True)
