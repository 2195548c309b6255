"""Loading speed against every peer that can be had, on the user's files or on made ones.

    python tests/bench/bench_data.py [--images FOLDER]            (make bench-data [IMAGES=FOLDER])

Contestants (data_peers.py) take turns, each in a fresh process, on one core with one worker and
then on two cores with several; a peer that has threads instead of workers gets as many of them.
What counts is the CPU time of the whole process tree, start-up and first batches excluded: a round
gives one ratio, the table shows medians with their range. The last line is one JSON object for one
core and one worker; null for a peer that cannot be had. `markers`: the same for shards that
make_shards wrote with --restart-markers; the peers read the same files without them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import peer_envs
from bench_corpus import Corpus, read_corpus, shard

PEERS_FILE = Path(__file__).with_name("data_peers.py")
FORMATS_FILE = Path(__file__).with_name("peer_formats.py")
OURS, DECODER, MARKERS = "ours", "our decoder", ", markers"
# contestant: environment (of peer_envs; "" = this one)
HOME = {
    "ours": "", "ours, markers": "", "our decoder": "", "our decoder, markers": "",
    "ours, simplejpeg": "", "imagefolder": "pillow", "torchvision": "torchvision",
    "webdataset": "webdataset", "streaming": "streaming", "litdata": "litdata",
    "energon": "energon", "torchcodec": "torchcodec", "kornia-rs": "kornia-rs", "dali": "dali",
    "dali tar": "dali", "spdl": "spdl", "nvimgcodec": "nvimgcodec", "ffcv": "ffcv",
}  # fmt: skip
OWN_FORMAT = ("streaming", "litdata", "energon", "ffcv")
_TURN_LIMIT = 600  # seconds


@dataclass
class Entry:
    """A contestant and its images per CPU second and per second, by round."""

    name: str
    title: str
    python: str
    rates: list[float] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    cores: int
    workers: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.cores} core{'s' * (self.cores > 1)}, {self.workers} worker" + "s" * (
            self.workers > 1
        )


def has_markers() -> bool:
    """Whether make_shards can write restart markers."""
    command = [sys.executable, "-m", "shard_tools.make_shards", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return "--restart-markers" in done.stdout


def contestants(corpus: Corpus, only: list[str]) -> list[Entry]:
    """Who takes part, with what it reads written; prints why a peer is left out."""
    entries = []
    for name, home in HOME.items():
        if only and name not in only:
            continue
        if name.endswith(MARKERS) and not (corpus.folder / "markers").is_dir():
            continue
        title, python = name, sys.executable
        try:
            if home:
                title = f"{name} {peer_envs.version_of(home)}"
                python = str(peer_envs.python_of(home))
            if name in OWN_FORMAT:
                out = corpus.folder / name
                run([python, FORMATS_FILE, name, "--corpus", corpus.folder, "--out", out], name)
        except LookupError as reason:
            print(f"{name}: left out: {reason}", flush=True)
            continue
        if name == "imagefolder":
            title = title.replace("imagefolder", "ImageFolder, Pillow")
        entries.append(Entry(name, title, python))
    return entries


def run(command: list[object], name: str) -> str:
    """The output of a command. Raises LookupError with the reason why it failed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [str(word) for word in command], env=environment, capture_output=True, text=True,
            check=False, timeout=_TURN_LIMIT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise LookupError(f"{name} took more than {_TURN_LIMIT} s") from None
    if done.returncode:
        raise LookupError(peer_envs.last_line(done.stderr))
    return done.stdout


def measure(entries: list[Entry], setting: Setting, corpus: Corpus, images: int) -> None:
    """Fill in the rates, round by round; a contestant that fails is taken out of `entries`."""
    cores = sorted(os.sched_getaffinity(0))[-setting.cores :]
    bound = ["taskset", "-c", ",".join(map(str, cores))]
    print(f"\n{setting}; images per CPU second (and per second), in the order of the turns")
    for number in range(setting.rounds):
        for entry in list(entries):
            turn = [entry.python, PEERS_FILE, entry.name, "--corpus", corpus.folder,
                    "--images", images, "--workers", setting.workers]  # fmt: skip
            try:
                found = json.loads(run([*bound, *turn], entry.name).splitlines()[-1])
            except LookupError as reason:
                print(f"  {entry.title}: left out: {reason}", flush=True)
                entries.remove(entry)
                continue
            entry.rates.append(found["images"] / found["cpu"])
            entry.walls.append(found["images"] / found["wall"])
            print(f"  round {number + 1} {entry.title:34}{entry.rates[-1]:6.0f} "
                  f"({entry.walls[-1]:.0f})", flush=True)  # fmt: skip


def ratios(own: Entry, other: Entry) -> list[float]:
    return [a / b for a, b in zip(own.rates, other.rates, strict=True)]


def table(entries: list[Entry], setting: Setting) -> None:
    """Medians, and how often the images of each contestant ours serves."""
    own = next((entry for entry in entries if entry.name == OURS), None)
    print(f"\n{setting!s:34}{'images/CPU s':>13}{'images/s':>10}   ours is ahead by (range)")
    for entry in entries:
        figures = f"{statistics.median(entry.rates):13.0f}{statistics.median(entry.walls):10.0f}"
        ahead = ratios(own, entry) if own else []
        text = (
            f"{statistics.median(ahead):.2f} ({min(ahead):.2f}-{max(ahead):.2f})" if ahead else ""
        )
        print(f"{entry.title:34}{figures}   {text}", flush=True)


def figures(entries: list[Entry], own: str, decoder: str, psnr: float | None) -> dict[str, object]:
    """The keys of the last line for the contestant `own`."""
    found = {entry.name: entry for entry in entries}

    def ahead(name: str) -> float | None:
        if own not in found or name not in found:
            return None
        return round(statistics.median(ratios(found[own], found[name])), 2)

    dali = [value for name in ("dali", "dali tar") if (value := ahead(name)) is not None]
    ours = {name for name in HOME if name.startswith("our")}
    rest = {
        entry.title: value
        for entry in entries
        if entry.name not in {"imagefolder", "dali", "dali tar", *ours}
        and (value := ahead(entry.name)) is not None
    }
    best = min(rest, key=lambda title: rest[title], default=None)
    return {
        "vs_imagefolder": ahead("imagefolder"),
        "vs_dali": min(dali, default=None),
        "vs_best_peer": rest[best] if best else None,
        "best_peer": best,
        "of_decoder": ahead(decoder),
        "psnr_db": psnr,
    }


def median_psnr(corpus: Corpus, shards: str) -> float:
    """Our decoder on what was stored against Pillow on the file itself, the same crops, dB."""
    import numpy as np

    from pipeline.data.crops import Crop
    from pipeline.data.jpeg import decoder
    from shard_tools.manifest import read_manifest

    manifest, rng, found = read_manifest(corpus.folder / shards), np.random.default_rng(0), []
    for number in range(0, manifest.samples, max(1, manifest.samples // 128)):
        name, row = manifest.names[number], manifest.index[number]
        tar = int(np.searchsorted(manifest.starts, number, "right")) - 1
        with open(manifest.path(tar), "rb") as file:
            file.seek(int(row["offset"]))
            stored = file.read(int(row["length"]))
        choose = Crop(224, (0.2, 1.0), (3 / 4, 4 / 3)).choose(rng.random(Crop.UNIFORMS).tolist())
        pair = np.zeros((2, 224, 224, 3), np.uint8)
        decoder()[1](stored, choose, pair[0], "bicubic")
        decoder("pillow")[1]((corpus.folder / "images" / name).read_bytes(), choose, pair[1],
                             "bicubic")  # fmt: skip
        error = np.mean((pair[0].astype(float) - pair[1]) ** 2)
        found.append(10 * np.log10(255**2 / max(error, 1e-6)))
    return round(float(np.median(found)), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, metavar="FOLDER",
                        help="JPEGs to load (default: made ones)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="on one core; 2 on two")
    parser.add_argument("--turn", type=int, default=1536, help="images per contestant and round")
    parser.add_argument("--several", type=int, default=4, help="workers on two cores")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME",
                        help=f"of {', '.join(HOME)}")  # fmt: skip
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        corpus = read_corpus(args.images, Path(name))
        shard(corpus)
        markers = has_markers()
        if markers:
            shard(corpus, "markers", "--restart-markers")
        print(corpus, flush=True)
        entries = contestants(corpus, args.only)
        one = Setting(1, 1, args.rounds)
        measure(entries, one, corpus, args.turn)
        table(entries, one)
        if len(os.sched_getaffinity(0)) > 1 and args.several:
            several = Setting(2, args.several, min(2, args.rounds))
            others = [Entry(entry.name, entry.title, entry.python) for entry in entries]
            others = [entry for entry in others if not entry.name.startswith("our decoder")]
            measure(others, several, corpus, args.turn)
            table(others, several)
        last = figures(entries, OURS, DECODER, median_psnr(corpus, "shards"))
        psnr = median_psnr(corpus, "markers") if markers else None
        last["markers"] = figures(entries, OURS + MARKERS, DECODER + MARKERS, psnr)
        print(json.dumps({**last, "files": corpus.files}))


if __name__ == "__main__":
    main()
