"""Loading speed on one core: ours, ImageFolder + Pillow (facebookresearch/mae's loader),
webdataset's own pipeline and DALI on the CPU, on 500x375 JPEGs of ~100 KB.

    python tests/bench/bench_data.py            (make bench-data)

The corpus is cut from photographs inside installed packages. Every contestant does
RandomResizedCrop(224, scale 0.2-1, bicubic) and a flip in batches of 64, with one worker; the
peers built on ToTensor + Normalize keep them, as there they are part of the loader. The
contestants take turns, each in a fresh process bound to one core; a round gives one ratio of CPU
time (main process and workers, start-up and first batches excluded). The last line is one JSON
object: medians over the rounds, null for a peer that is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

BATCH, SIZE, WARM = 64, 224, 6
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# The photographs with most detail: their JPEGs come nearest to ImageNet's average of 110 KB.
DETAILED = ("galaxies", "grass", "gravel", "motorcycle", "pagoda", "tissue")


# ---------------------------------------------------------------- contestants: endless batches


def ours(folder: Path, decode: str) -> Iterator[int]:
    import torch

    from pipeline.data.crops import Crop
    from pipeline.data.loader import LoaderConfig, train_loader

    torch.set_num_threads(1)
    config = LoaderConfig(
        folder / "shards", batch_size=BATCH, micro_batch=BATCH, crop=Crop(SIZE, SCALE, RATIO),
        workers=1, partitions=BATCH, decode=decode,
    )  # fmt: skip
    for batch in train_loader(config, 0, 1, range(10**6)):
        yield len(batch.image)


def mae_transform() -> Callable:
    from torchvision import transforms as T

    bicubic = T.InterpolationMode.BICUBIC
    crop = T.RandomResizedCrop(SIZE, scale=SCALE, interpolation=bicubic)
    return T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])


def imagefolder(folder: Path) -> Iterator[int]:
    import torch
    from torchvision.datasets import ImageFolder

    torch.set_num_threads(1)
    data = ImageFolder(str(folder / "images"), mae_transform())
    loader = torch.utils.data.DataLoader(
        data, BATCH, shuffle=True, num_workers=1, drop_last=True, persistent_workers=True
    )
    while True:
        for images, _ in loader:
            yield len(images)


def webdataset(folder: Path) -> Iterator[int]:
    import torch
    import webdataset as wds

    torch.set_num_threads(1)
    shards = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    transform = mae_transform()
    data = wds.WebDataset(shards, resampled=True, shardshuffle=False).shuffle(200).decode("pil")
    data = data.to_tuple("jpg", "cls").map_tuple(transform).batched(BATCH)
    for images, _ in wds.WebLoader(data, batch_size=None, num_workers=1):
        yield len(images)


def dali(folder: Path) -> Iterator[int]:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, seed=0)
    def pipeline():
        encoded, label = fn.readers.file(file_root=str(folder / "images"), random_shuffle=True)
        images = fn.decoders.image_random_crop(
            encoded, device="cpu", output_type=types.RGB, random_area=SCALE,
            random_aspect_ratio=RATIO,
        )  # fmt: skip
        images = fn.resize(images, size=(SIZE, SIZE), interp_type=types.INTERP_CUBIC)
        return fn.flip(images, horizontal=fn.random.coin_flip()), label

    pipe = pipeline()
    pipe.build()
    while True:
        images, _ = pipe.run()
        array = images.as_tensor()
        assert tuple(array.shape()) == (BATCH, SIZE, SIZE, 3)
        yield BATCH


def take_turn(batches: Iterator[int], images: int) -> dict[str, float]:
    """CPU and wall seconds for `images` images once the pipeline is full."""
    for _ in range(WARM):
        next(batches)
    cpu, wall, done = tree_seconds(), time.perf_counter(), 0
    while done < images:
        done += next(batches)
    return {"images": done, "cpu": tree_seconds() - cpu, "wall": time.perf_counter() - wall}


def tree_seconds() -> float:
    """CPU seconds of this process and its living children."""
    total, tick = time.process_time(), os.sysconf("SC_CLK_TCK")
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


# ---------------------------------------------------------------- the bench


def make_corpus(folder: Path, count: int) -> float:
    """images/<class>/*.jpg and the same in shards; returns the mean size in bytes."""
    import numpy as np

    from shard_tools.demo_images import PHOTOGRAPHS, photograph

    rng, sizes = np.random.default_rng(0), []
    pictures = [photograph(*PHOTOGRAPHS[name]) for name in DETAILED]
    for number in range(count):
        picture = pictures[number % len(pictures)]
        home = folder / "images" / DETAILED[number % len(pictures)]
        home.mkdir(parents=True, exist_ok=True)
        high = min(picture.height, picture.width * 3 / 4) * rng.uniform(0.9, 1.0)
        wide = high * 4 / 3
        left, top = rng.uniform(0, picture.width - wide), rng.uniform(0, picture.height - high)
        path = home / f"{number:06d}.jpg"
        picture.resize((500, 375), 3, (left, top, left + wide, top + high)).save(path, quality=95)
        sizes.append(path.stat().st_size)
    command = [
        sys.executable,
        "-m",
        "shard_tools.make_shards",
        folder / "images",
        folder / "shards",
    ]
    subprocess.run([*command, "--shard-size", "8MiB"], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)  # fmt: skip
    return statistics.mean(sizes)


def median_psnr(folder: Path) -> float:
    """Our decoder against Pillow, the same rectangles, dB."""
    import numpy as np

    from pipeline.data.crops import Crop
    from pipeline.data.jpeg import decoder

    rng, figures = np.random.default_rng(0), []
    for path in sorted((folder / "images").rglob("*.jpg"))[:128]:
        choose = Crop(SIZE, SCALE, RATIO).choose(rng.random(Crop.UNIFORMS).tolist())
        pair = np.zeros((2, SIZE, SIZE, 3), np.uint8)
        decoder()[1](path.read_bytes(), choose, pair[0], "bicubic")
        decoder("pillow")[1](path.read_bytes(), choose, pair[1], "bicubic")
        error = np.mean((pair[0].astype(float) - pair[1]) ** 2)
        figures.append(10 * np.log10(255**2 / max(error, 1e-6)))
    return float(np.median(figures))


def contestants(args: argparse.Namespace) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Title → (interpreter and arguments, environment); prints why a peer is left out."""
    from pipeline.data.jpeg import available

    plain = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    python = [sys.executable]
    entries = {f"ours ({available()[0]})": ([*python, "ours"], plain)}
    if "simplejpeg" in available()[1:]:
        entries["ours (simplejpeg)"] = ([*python, "simplejpeg"], plain)
    installed = pillow_version(plain)
    stock = {**plain, "PYTHONPATH": str(args.stock_pillow.resolve())}
    if args.stock_pillow.is_dir():
        entries[f"ImageFolder, Pillow {pillow_version(stock)}"] = ([*python, "imagefolder"], stock)
    else:
        print(f"stock Pillow: not in {args.stock_pillow}, so ImageFolder has {installed} only")
    if ".post" in installed or not args.stock_pillow.is_dir():
        entries[f"ImageFolder, Pillow {installed}"] = ([*python, "imagefolder"], plain)
    entries[f"webdataset, Pillow {installed}"] = ([*python, "webdataset"], plain)
    probe = subprocess.run(
        [args.dali_python, "-c", "import nvidia.dali as d; print(d.__version__)"],
        capture_output=True, text=True, check=False,
    ) if Path(args.dali_python).exists() else None  # fmt: skip
    if probe and probe.returncode == 0:
        entries[f"DALI {probe.stdout.strip()} CPU"] = ([args.dali_python, "dali"], plain)
    else:
        print(f"DALI: not installed for {args.dali_python} (pip install nvidia-dali-cuda120)")
    return entries


def pillow_version(environment: dict[str, str]) -> str:
    code = "import PIL; print(PIL.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def measure(command: list[str], environment: dict[str, str], folder: Path, images: int, core: int
            ) -> dict[str, float]:  # fmt: skip
    interpreter, name = command
    done = subprocess.run(
        ["taskset", "-c", str(core), interpreter, __file__, "--turn", name, "--corpus", folder,
         "--images", str(images)],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"error: {name} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def report(rates: dict[str, list[float]], walls: dict[str, list[float]]) -> dict[str, float | None]:
    """Print the table; the ratios of the last line."""
    own = next(iter(rates))
    print(f"{'':34}{'images/CPU s':>14}{'images/s':>10}   ours is faster by (least-most)")
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(rates[own], values, strict=True)]
        figures = f"{statistics.median(values):14.0f}{statistics.median(walls[name]):10.0f}"
        print(f"{name:34}{figures}   {spread(ratios)}")

    def ratio(start: str) -> float | None:
        name = next((n for n in rates if n.startswith(start)), None)
        if name is None:
            return None
        ratios = [a / b for a, b in zip(rates[own], rates[name], strict=True)]
        return round(statistics.median(ratios), 2)

    peers = {"imagefolder": "ImageFolder", "webdataset": "webdataset", "dali": "DALI"}
    return {f"vs_{key}": ratio(start) for key, start in peers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1536, help="per contestant and round")
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stock-pillow", type=Path, default=Path("build/bench/pillow"),
                        help="folder made by pip install --target … pillow")  # fmt: skip
    parser.add_argument("--dali-python", default="build/bench/dali/bin/python",
                        help="interpreter of an environment that has DALI")  # fmt: skip
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        makers = {
            "ours": lambda: ours(args.corpus, "auto"),
            "simplejpeg": lambda: ours(args.corpus, "simplejpeg"),
            "imagefolder": lambda: imagefolder(args.corpus),
            "webdataset": lambda: webdataset(args.corpus),
            "dali": lambda: dali(args.corpus),
        }
        print(json.dumps(take_turn(makers[args.turn](), args.images)), flush=True)
        os._exit(0)  # workers and DALI's threads need no farewell
    core = max(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_corpus(folder, 512)
        print(f"512 images of 500x375, {size / 1000:.0f} KB on average; core {core}")
        entries = contestants(args)
        rates: dict[str, list[float]] = {title: [] for title in entries}
        walls: dict[str, list[float]] = {title: [] for title in entries}
        for _ in range(args.rounds):
            for title, (command, environment) in entries.items():
                turn = measure(command, environment, folder, args.images, core)
                rates[title].append(turn["images"] / turn["cpu"])
                walls[title].append(turn["images"] / turn["wall"])
        result = report(rates, walls)
        print(json.dumps({**result, "psnr_db": round(median_psnr(folder), 1)}))


if __name__ == "__main__":
    main()
