"""Bytes per rank by ZeRO stage on 1, 2 and 4 ranks, measured and as the planner predicts them.

Usage: python tests/bench/bench_memory.py [--ranks 1 2 4] [--recipe FILE]. Behind `make
bench-memory`; the last line is JSON. fp32 on the CPU, R-MAE with a ViT-S unless told otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.config.recipe import RECIPES

PARTS = ("weights", "gradients", "optimizer")


def measured(ranks: int, args: argparse.Namespace) -> list[dict]:
    """What every rank reports: {stage: {part: {measured, predicted}}}."""
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    worker = str(Path(__file__).with_name("memory_worker.py"))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "memory.json"
        command = [deepspeed, "--num_accelerators", str(ranks), worker, str(output)]
        command += ["--recipe", str(args.recipe), "--set", "batch_size=8"]
        command += ["--set", "data.partitions=8", "--set", f"encoder.arch={args.arch}"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        return json.loads(output.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--recipe", type=Path, default=RECIPES / "rmae.yaml")
    parser.add_argument("--arch", default="vit_small_patch16_224")
    args = parser.parse_args()
    print("MB on the fullest rank, fp32, measured (predicted)")
    print(f"ranks stage{'':4}" + "".join(f"{part:>22}" for part in PARTS))
    worst = 0
    for ranks in args.ranks:
        everyone = measured(ranks, args)
        for stage in everyone[0]:
            row = f"{ranks:5}{stage:>6}{'':4}"
            for part in PARTS:
                found = max(rank[stage][part]["measured"] for rank in everyone)
                predicted = everyone[0][stage][part]["predicted"]
                worst = max(worst, abs(found - predicted))
                row += f"{f'{found / 1e6:.3f} ({predicted / 1e6:.3f})':>22}"
            print(row, flush=True)
    print(json.dumps({"largest_difference_bytes": worst}))


if __name__ == "__main__":
    main()
