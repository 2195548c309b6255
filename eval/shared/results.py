"""Result files: their path and how they are written."""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.reporting.run_records import read_json
from eval.shared.options import EncoderChoice, check_encoder, encoder_of
from pipeline.config.timm_names import check_hub
from pipeline.data.crops import shorter_side
from pipeline.errors import UserError, naming
from pipeline.runtime.checkpoint import CheckpointStore
from pipeline.weights.header import check_file
from pipeline.weights.source import check_source, read_classifier_info
from shard_tools.atomic import check_writable, write_json

# Settings on which no result depends.
SAME_RESULT = ("workers", "micro_batch")
_PIXELS = {"mean", "std"}
PATHS = {"train", "val", "encoder", "classifier", "images", "subset"}  # settings that may be one


class Timer:
    """Seconds since it was made, and before that where a training is resumed."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def resume(self, seconds: float) -> None:
        """Count what was spent before: the `seconds` of a checkpoint."""
        self.start -= seconds

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self.start, 2)


def output_path(output: str | None, encoder: EncoderChoice, name: str) -> Path:
    """Where a result is written: `output`, to which .json is added where it lacks that, or
    RUN/eval/NAME.json. NAME has --options, if there are any, and the seed of a random encoder.

    RUN of a FILE is runs/<its name>-<digest of its full path>, since files of several folders are
    named alike; of others runs/<source>, and of a random encoder runs/random-<architecture>.
    """
    if output:
        return named_json(output)
    run = Path(encoder.source)
    if run.is_file():
        run = Path("runs") / f"{run.stem}-{digest(str(run.resolve()))}"
    elif encoder.source == "random":
        run = Path("runs") / f"random-{encoder.arch}"
    elif encoder.source.startswith("timm:"):
        run = Path("runs") / encoder.source.replace(":", "-")
    elif run.name == "encoder":
        run = run.parent
    if encoder.options:
        name += f"-{in_a_name(json.dumps(encoder.options, sort_keys=True))}"
    if encoder.random or encoder.source == "random":
        name += f"-random-{encoder.seed}"
    name += "-ema" * encoder.ema
    name += f"-resize{encoder.resize}" if encoder.resize else ""
    return run / "eval" / f"{name}.json"


def named_json(output: str) -> Path:
    """The path of --output, which ends in .json: the report reads no other results."""
    path = Path(output)
    if path.name in ("", "..") or output.endswith("/"):
        raise UserError(f"--output {output}: must be a file, such as {path / 'result.json'}")
    return path if path.suffix == ".json" else path.with_name(f"{path.name}.json")


def check_output(path: Path, folder: Path | None = None, protocol: str = "") -> None:
    """UserError where the result at `path` or files in `folder` could not be written, `path` holds
    a result of another protocol than this one, or `folder` is that of a pretraining run: known
    before the work and not after it. Nothing is created."""
    if folder and (folder / "recipe.yaml").is_file():
        raise UserError(f"{path}: {folder} is the folder of a run; choose another --output")
    check_writable(path, advice="; choose another --output")
    if path.suffix == ".json" and path.is_file() and "protocol" not in read_json(path):
        raise UserError(f"{path}: is not a result of an evaluation; choose another --output")
    check_protocol(path, protocol)
    if folder and folder.exists() and not folder.is_dir():
        reason = f"{folder}: Not a directory"
        raise UserError(f"{path}: cannot be written ({reason}); choose another --output")
    if folder:
        check_writable(folder, folder=True, advice="; choose another --output")


def check_protocol(path: Path, protocol: str) -> None:
    """UserError where the result at `path` is one of another protocol ("": of any)."""
    theirs = read_json(path).get("protocol", protocol)
    if protocol and theirs != protocol:
        raise UserError(
            f"{path}: holds a result of {theirs}, this is {protocol}; remove it or choose another "
            "--output"
        )


def result_of(
    args: argparse.Namespace, name: str, folder: bool = False, protocol: str = ""
) -> Path:
    """Where the result of a command line is written; UserError where it cannot be, or where the
    encoder is not there. folder: files are written beside it too. protocol: of the result, where
    it is not `name`."""
    choice = encoder_of(args)
    if not args.output:  # its place is in the encoder's folder
        check_encoder(choice)
    path = output_path(args.output, choice, name)
    check_output(path, path.with_suffix("") if folder else None, protocol or name)
    if args.output:
        check_encoder(choice)
    return path


def difference(key: str, theirs: Any, ours: Any) -> str:
    """`key (theirs, now ours)`, without the values where they say nothing to a reader."""
    values = [json.dumps(value) for value in (theirs, ours)]
    if max(map(len, values)) > 30:
        return key
    return f"{key} ({values[0]}, now {values[1]})"


def check_finished(
    path: Path, args: argparse.Namespace, unsaid: Mapping[str, Any] | None = None
) -> None:
    """`check_other_settings` for what trains, where the checkpoints beside its result are gone:
    while they are there, they say what they belong to, whatever paths lead to it."""
    if not CheckpointStore(path.with_suffix("")).all():
        check_other_settings(path, args, unsaid)


def check_other_settings(
    path: Path, args: argparse.Namespace, unsaid: Mapping[str, Any] | None = None
) -> None:
    """UserError where the result at `path` is one of other settings than those of a command line,
    as a folder of checkpoints is refused. Nothing is known of settings that it does not record.

    unsaid: values of the settings that it records only where they are others.
    """
    theirs = read_json(path)
    told = {"feature": theirs.get("feature"), "mask_ratios": theirs.get("ratios")}
    if args.output:  # without it the path says the encoder, and goes where a run's folder is moved
        told["encoder"] = theirs.get("encoder", {}).get("source")
        told["random"] = told["encoder"] != "random" and theirs.get("encoder", {}).get("random")
    own = {k: v for k, v in theirs.get("settings", {}).items() if k not in ("encoder", "random")}
    told = {key: value for key, value in told.items() if value is not None}
    told |= {**(unsaid or {}), **own} if theirs else {}
    ours = json.loads(json.dumps({key: getattr(args, key, value) for key, value in told.items()}))
    for key in PATHS & told.keys():
        told[key], ours[key] = full_path(told[key]), full_path(ours[key])
    if args.output and theirs:
        for key, (before, now) in _reading(theirs, args).items():
            told[key], ours[key] = before, now
    changed = [
        difference(key, told[key], ours[key])
        for key in told
        if key not in SAME_RESULT and told[key] != ours[key]
    ]
    if changed:
        raise UserError(
            f"{path}: holds a result with another {', '.join(changed)}; remove it or choose "
            "another --output"
        )


def _reading(theirs: Mapping[str, Any], args: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """How a result's encoder was read and how a command line reads it, as far as both say it; in
    paths without --output the options are a part of the name."""
    encoder = theirs.get("encoder", {})
    own, found = encoder.get("options", {}), dict[str, tuple[Any, Any]]()
    if hasattr(args, "options"):
        choice = encoder_of(args)
        given = {k: v for k, v in choice.options.items() if k != "pretrained_cfg_overlay"}
        size = check_source(choice.source, choice.arch, choice.options, choice.ema, choice.random)
        given |= {"img_size": size} if size else {}
        found |= {key: (own.get(key), value) for key, value in given.items()}
        overlay = choice.options.get("pretrained_cfg_overlay", {})
        found |= {key: (encoder.get(key), list(overlay[key])) for key in _PIXELS & overlay.keys()}
        found["ema"] = (bool(encoder.get("ema")), choice.ema)
    elif hasattr(args, "resize"):  # psnr.py, which records what was given
        found["resize"] = (theirs.get("settings", {}).get("resize", 0), args.resize)
    size = found.get("img_size", (0, own.get("img_size")))[1]
    if "ema" in found and "resize" in theirs and isinstance(size, int):
        found["resize"] = (theirs["resize"], args.resize or shorter_side(size))
    return found


def full_path(value: Any) -> Any:
    """The absolute path that a word is; what is none as it is, and so is timm:NAME."""
    is_path = isinstance(value, str) and not value.startswith("timm:")
    return os.path.abspath(value) if is_path else value


def digest(text: str) -> str:
    """Eight hexadecimal digits of a text's sha256, for a file name."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def in_a_name(text: str) -> str:
    """A text as part of a file name: its words, or its digest if they have over 40 characters."""
    words = "-".join("".join(c if c.isalnum() or c in "._" else " " for c in text).split())
    return words if len(words) <= 40 else digest(text)


def write_result(
    path: str | Path, result: dict[str, Any], args: argparse.Namespace | None = None
) -> None:
    """Write a result as JSON, atomically. UserError where the path cannot be written, or where a
    command beside this one has written a result of another protocol or (args: of the command line)
    of other settings; the result, perhaps of hours, is then printed."""
    try:
        check_protocol(Path(path), str(result.get("protocol", "")))
        if args is not None:
            check_other_settings(Path(path), args)
            _check_pixels(Path(path), result, args)
        with naming(path, "cannot be written"):
            write_json(Path(path), result, indent=1)
    except UserError:
        print(f"not written: {json.dumps(result)}", flush=True)
        raise


def _check_pixels(path: Path, result: Mapping[str, Any], args: argparse.Namespace) -> None:
    """UserError where the result at `path` was made with another mean or std of the pixels, which
    a command line without them does not say (without --output they are in its name)."""
    theirs, ours = (found.get("encoder", {}) for found in (read_json(path), result))
    both = _PIXELS & theirs.keys() & ours.keys() if args.output else set[str]()
    changed = [difference(k, theirs[k], ours[k]) for k in sorted(both) if theirs[k] != ours[k]]
    if changed:
        raise UserError(
            f"{path}: holds a result with another {', '.join(changed)}; remove it or choose "
            "another --output"
        )


def write_accuracy(
    path: Path, result: dict[str, Any], args: argparse.Namespace | None = None
) -> None:
    """Write a result that has top1 and top5, as `write_result`, and print them."""
    write_result(path, result, args)
    print(f"top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  → {path}", flush=True)


def check_classifier(name: str) -> None:
    """UserError where a name is no classifier of eval/finetune.py or timm:NAME."""
    if name.startswith("timm:"):
        check_hub(name.removeprefix("timm:"), f"--classifier {name}")
        return
    read_classifier_info(name)
    check_file(Path(name) / "classifier.safetensors")
