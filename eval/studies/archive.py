"""What a report needs of a folder of runs, in one small file: a tar.xz that a repository can hold.

Kept are the settings, the results, the logs (thinned) and the last pictures of the runs' first
seed; not their weights. Equal runs give equal bytes. A study can be continued from it elsewhere.
"""

import io
import json
import lzma
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eval.paper.commands import ROOT
from eval.reporting.run_records import read_json, read_lines
from pipeline.errors import UserError, naming
from shard_tools.atomic import fsync, write_atomic, write_json

LARGEST = 1_000_000  # bytes
STEPS = 60  # logged steps of a run that are kept, evenly spread
DIGITS = 5  # significant ones of a logged number; results keep theirs, since claims hang on them
PICTURE = 60_000  # bytes of a picture, at most
RATES = "rates.json"  # what was measured; a plan alone leaves it too
TOP = ("study.json", "facts.json", "tuning.json", RATES, "jobs.jsonl")
TRIALS = ("tune/lr-*/*/eval/*.json", "tune/finetune-*/*.json")  # see tuning.py
LOOK = "look"  # folder of eval/visualise.py's pictures
PCA = "pca.png"
STEP = re.compile(rb"\S+ \S+ step \d+/")  # of a line of log.txt
SETTINGS = ("recipe.yaml", "ds_config.json", "versions.json", "failure.txt")


def pack(output: Path, archive: Path) -> int:
    """Write the archive of a folder of runs, with as many pictures as there is room for; its bytes.
    UserError where it is over 1 MB without any."""
    data = compressed(selected(output))
    if len(data) > LARGEST:
        raise UserError(
            f"{archive}: {len(data):,} bytes of {output} are over {LARGEST:,}; judge fewer claims"
        )
    with naming(archive, "cannot be written"):
        write_atomic(archive, data)
    return len(data)


def selected(output: Path) -> dict[str, bytes]:
    """Name → bytes of what an archive of a folder of runs holds, without this checkout's path."""
    here = f"{ROOT}/".encode()
    files = {
        name: data if name.endswith(".png") else data.replace(here, b"")
        for name, data in sorted(kept(output))
    }
    chosen = {name: data for name, data in files.items() if not name.endswith(".png")}
    room = 0.97 * LARGEST - len(compressed(chosen))
    for name, picture in files.items():
        if name.endswith(".png") and len(picture) + 1024 <= room:
            chosen[name], room = picture, room - len(picture) - 1024
    return chosen


@contextmanager
def laid_out(output: Path) -> Iterator[Path]:
    """A folder of what an archive of OUTPUT holds, for as long as it is used: of which a page is
    drawn, so that one from the runs is the same as one from their archive."""
    with standing_for(output) as folder:
        for name, data in selected(output).items():
            path = folder / name
            with naming(path, "cannot be written"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        yield folder


@contextmanager
def standing_for(origin: Path) -> Iterator[Path]:
    """A temporary folder of what is in a folder or an archive. A UserError inside names the file of
    the origin, since this folder is gone when it is read."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        except UserError as error:
            raise UserError(str(error).replace(folder, str(origin))) from error


def compressed(files: dict[str, bytes]) -> bytes:
    """A tar.xz of files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def kept(output: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of what is kept of a folder of runs."""
    with naming(output, "cannot be read"):
        for name in TOP:
            if (output / name).is_file():
                yield name, (output / name).read_bytes()
        drawn = [output / LOOK / PCA, *sorted(output.glob(f"{LOOK}/*/{PCA}"), reverse=True)]
        for path in [path for path in drawn if path.is_file()][:1]:  # an archive's, or of most runs
            yield f"{LOOK}/{PCA}", path.read_bytes()
        for path in sorted(path for pattern in TRIALS for path in output.glob(pattern)):
            yield str(path.relative_to(output)), short_result(path)
        for run in made_runs(output):
            for name in SETTINGS:
                if (run / name).is_file():
                    yield f"{run.name}/{name}", (run / name).read_bytes()
            if (run / "log.txt").is_file():
                yield f"{run.name}/log.txt", short_log((run / "log.txt").read_bytes())
            steps = thinned(read_lines(run / "metrics.jsonl"), STEPS)
            if steps:
                lines = "".join(json.dumps(short(step)) + "\n" for step in steps)
                yield f"{run.name}/metrics.jsonl", lines.encode()
            for path in sorted((run / "eval").glob("*.json")):
                yield f"{run.name}/eval/{path.name}", short_result(path)
            last = sorted((run / "pictures").glob("*.png"))[-1:]
            if last and run.name.endswith("-0") and last[0].stat().st_size <= PICTURE:
                yield f"{run.name}/pictures/{last[0].name}", last[0].read_bytes()


def short_result(path: Path) -> bytes:
    """A result file with a thinned history."""
    result = read_json(path)
    if isinstance(result.get("history"), list):
        result["history"] = short(thinned(result["history"], STEPS))
    return json.dumps(result).encode()


def made_runs(output: Path) -> list[Path]:
    """The folders in OUTPUT that are runs, or have results."""
    return [
        folder
        for folder in sorted(output.iterdir())
        if folder.is_dir()
        and ((folder / "recipe.yaml").is_file() or any((folder / "eval").glob("*.json")))
    ]


def thinned(rows: list[Any], most: int) -> list[Any]:
    """At most so many of the rows, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[round(n * (len(rows) - 1) / (most - 1))] for n in range(most)]


def short_log(log: bytes) -> bytes:
    """A log without its steps, but for the last before each other line: metrics.jsonl has them."""
    lines = log.splitlines(keepends=True)
    steps = [STEP.match(line) is not None for line in lines]
    following = [*steps[1:], False]
    pairs = zip(lines, steps, following, strict=True)
    return b"".join(line for line, step, then in pairs if not (step and then))


def short(value: Any) -> Any:
    """The same with fewer digits; whole numbers keep theirs."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    return [short(item) for item in value] if isinstance(value, list) else value


@contextmanager
def unpacked(archive: Path) -> Iterator[Path]:
    """The folder of runs that an archive keeps, for as long as it is used."""
    with standing_for(archive) as folder:
        extract(archive, folder)
        yield folder


def extract(archive: Path, folder: Path) -> None:
    """Lay out what an archive keeps in a folder. UserError where it is none."""
    with naming(archive, "cannot be read"):
        data = archive.read_bytes()
    try:
        with (
            naming(archive, "cannot be unpacked"),
            tarfile.open(fileobj=io.BytesIO(data), mode="r:xz") as tar,
        ):
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{archive}: not an archive of runs, or damaged ({error})") from error


def check_empty(output: Path) -> None:
    """UserError where OUTPUT, to be made of an archive, holds something but measured rates."""
    with naming(output, "cannot be read"):
        if output.exists() and (
            not output.is_dir() or any(path.name != RATES for path in output.iterdir())
        ):
            raise UserError(
                f"--restore: {output} holds something already; name another --output, or leave "
                "--restore out to continue what is there"
            )


def restore(archive: Path, output: Path) -> None:
    """Make OUTPUT of what an archive keeps, so that its study is continued; rates that a plan has
    measured here stay beside the archive's. UserError where OUTPUT holds something else."""
    check_empty(output)
    output = output.resolve()  # where a link leads
    with naming(output, "cannot be written"):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".restore-") as folder:
            runs = Path(folder, "runs")
            extract(archive, runs)
            if measured := read_json(output / RATES):
                write_json(runs / RATES, read_json(runs / RATES) | measured)
            for path in (*runs.rglob("*"), runs):
                fsync(path)
            (output / RATES).unlink(missing_ok=True)
            os.replace(runs, output)
        fsync(output.parent)
