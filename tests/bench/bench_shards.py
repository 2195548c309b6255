"""Sharding speed against every writer that can be had, on the user's files or on made ones.

    python tests/bench/bench_shards.py [--images FOLDER]        (make bench-shards [IMAGES=FOLDER])

Everyone makes a data set of the same JPEG files, from disk to disk, in one process: make_shards as
it runs by default (it reads, checks every entropy-coded byte, hashes and fsyncs) and with headers
checked only, webdataset's ShardWriter, streaming's MDSWriter, litdata's optimize and FFCV's writer
(which check nothing), and GNU tar, the least that can be done. Beside them our tar writer alone
against ShardWriter alone, with samples in memory and no checksum. The contestants take turns, each
in a fresh process; CPU time of its process tree counts, imports and the first files excluded; a
round gives one ratio, the table shows medians with their range.

The last line is one JSON object: `vs_shardwriter` (writers alone), `vs_shardwriter_checked`
(make_shards against ShardWriter, from files), `vs_best_peer` (make_shards with headers checked
against the fastest peer but tar) and `check_cost` (the share of make_shards' time that the content
check takes).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import peer_envs
from bench_corpus import Corpus, read_corpus
from bench_data import FORMATS_FILE, run

# contestant: environment (of peer_envs; "" = this one)
HOME = {
    "make_shards": "", "make_shards, headers": "", "shardwriter": "webdataset",
    "streaming": "streaming", "litdata": "litdata", "ffcv": "ffcv", "tar": "",
    "our writer alone": "", "shardwriter alone": "webdataset",
}  # fmt: skip
PEERS = ("shardwriter", "streaming", "litdata", "ffcv")
Rates = dict[str, list[float]]


def contestants(only: list[str]) -> dict[str, tuple[str, str]]:
    """Name → (title, interpreter); prints why a peer is left out."""
    entries = {}
    for name, home in HOME.items():
        if only and name not in only:
            continue
        try:
            title = f"{name} {peer_envs.version_of(home)}" if home else name
            entries[name] = (title, str(peer_envs.python_of(home)) if home else sys.executable)
        except LookupError as reason:
            print(f"{name}: left out: {reason}", flush=True)
    return entries


def measure(entries: dict[str, tuple[str, str]], corpus: Corpus, images: int, rounds: int) -> Rates:
    """Images per CPU second by contestant and round; who fails is taken out of `entries`."""
    rates: Rates = {name: [] for name in entries}
    print("images per CPU second (and per second), in the order of the turns")
    for number in range(rounds):
        for name, (title, python) in list(entries.items()):
            out = corpus.folder / "out"
            command = [python, FORMATS_FILE, name, "--corpus", corpus.folder, "--out", out,
                       "--images", images, "--warm"]  # fmt: skip
            try:
                turn = json.loads(run(command, name).splitlines()[-1])
            except LookupError as reason:
                print(f"  {title}: left out: {reason}", flush=True)
                del entries[name], rates[name]
                continue
            finally:
                for left in (out, out.with_name("out.warm")):
                    shutil.rmtree(left, ignore_errors=True)
                os.sync()  # or the disk would write one's pages during the next one's turn
            rates[name].append(turn["images"] / turn["cpu"])
            per_second = turn["images"] / turn["wall"]
            print(f"  round {number + 1} {title:28}{rates[name][-1]:7.0f} ({per_second:.0f})",
                  flush=True)  # fmt: skip
    return rates


def table(entries: dict[str, tuple[str, str]], rates: Rates) -> None:
    base = rates.get("shardwriter")
    print(f"\n{'from files to data set':34}{'images/CPU s':>13}   x ShardWriter (range)")
    for name, (title, _) in entries.items():
        text = ""
        if base and "alone" not in name:
            ratio = [a / b for a, b in zip(rates[name], base, strict=True)]
            text = f"{statistics.median(ratio):.2f} ({min(ratio):.2f}-{max(ratio):.2f})"
        print(f"{title:34}{statistics.median(rates[name]):13.0f}   {text}")


def figures(rates: Rates) -> dict[str, float | None]:
    """The last line."""

    def ratio(name: str, other: str) -> float | None:
        if name not in rates or other not in rates:
            return None
        pairs = zip(rates[name], rates[other], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 2)

    peers = [ratio("make_shards, headers", peer) for peer in PEERS]
    slower = ratio("make_shards", "make_shards, headers")
    return {
        "vs_shardwriter": ratio("our writer alone", "shardwriter alone"),
        "vs_shardwriter_checked": ratio("make_shards", "shardwriter"),
        "vs_best_peer": min((peer for peer in peers if peer is not None), default=None),
        "check_cost": None if slower is None else round(1 - slower, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, metavar="FOLDER",
                        help="JPEGs to shard (default: made ones)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=int, default=1000, help="images per contestant and round")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME",
                        help=f"of {', '.join(HOME)}")  # fmt: skip
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-shards-", dir=args.folder) as name:
        corpus = read_corpus(args.images, Path(name))
        print(corpus, flush=True)
        entries = contestants(args.only)
        rates = measure(entries, corpus, args.turn, args.rounds)
        table(entries, rates)
        print(json.dumps(figures(rates)))


if __name__ == "__main__":
    main()
