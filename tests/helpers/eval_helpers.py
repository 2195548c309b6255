"""Small shards and encoders for the tests of the evaluations."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import timm
import torch
import torch.multiprocessing
from PIL import Image
from safetensors.torch import load_file, save_file

from eval.shared.cli import join_ranks
from eval.shared.results import Timer
from pipeline.distributed import Ranks
from shard_tools.manifest import SAMPLE, Shard, read_manifest, write_manifest

SIZE = 16
ALONE = Ranks.alone()
OPTIONS = {"img_size": SIZE, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@contextmanager
def held_by_another(folder: Path) -> Iterator[None]:
    """A folder in which another process trains."""
    program = "import sys, time; from pathlib import Path; from pipeline.runtime.run_lock import "
    program += "RunLock; lock = RunLock(Path(sys.argv[1])); print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", program, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            yield
        finally:
            holder.kill()


class SlowTimer(Timer):
    """As if each start took 1000 seconds more."""

    def __init__(self) -> None:
        super().__init__()
        self.start -= 1000


def coloured_images(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [count, 24, 20, 3] images whose colour hints at their label, and the labels."""
    random = np.random.default_rng(seed)
    label = np.arange(count) % classes
    hue = np.random.default_rng(0).integers(40, 216, (classes, 1, 1, 3))
    image = hue[label] + random.normal(0, 15, (count, 24, 20, 3))
    return image.clip(0, 255).astype(np.uint8), label


def write_shards(
    folder: Path, image: np.ndarray, label: np.ndarray, per_shard: int = 16, classes: int = 0,
    level: int = 6,
) -> Path:  # fmt: skip
    """Shards with PNG images (lossless; level 0: files of one size) in the given order."""
    folder.mkdir(parents=True)
    rows, shards = [], []
    for number, first in enumerate(range(0, len(image), per_shard)):
        path = folder / f"part-{number:06d}.tar"
        chosen = range(first, min(first + per_shard, len(image)))
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in chosen:
                buffer = io.BytesIO()
                Image.fromarray(image[sample]).save(buffer, "png", compress_level=level)
                entry = tarfile.TarInfo(f"{sample:08d}.png")
                entry.size = buffer.tell()
                tar.addfile(entry, io.BytesIO(buffer.getvalue()))
        with tarfile.open(path) as tar:
            for member, sample in zip(tar.getmembers(), chosen, strict=True):
                height, width = image[sample].shape[:2]
                place = (member.offset_data, member.size, label[sample], width, height, 1, 1, 0)
                rows.append(place)
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        shards.append(Shard(path.name, len(chosen), len(data), digest))
    names = [f"class{number}" for number in range(classes or int(label.max()) + 1)]
    write_manifest(folder, shards=shards, index=np.array(rows, SAMPLE), classes=names)
    return folder


def other_content(folder: Path, dest: Path) -> Path:
    """A copy of shards with the same index, whose first shard has another checksum."""
    manifest = read_manifest(folder)
    shards = [replace(manifest.shards[0], sha256="0" * 64), *manifest.shards[1:]]
    shutil.copytree(folder, dest)
    write_manifest(
        dest, shards=shards, index=np.array(manifest.index), classes=manifest.classes,
        made=manifest.made, names=manifest.names,
    )  # fmt: skip
    return dest


def write_encoder(run: Path, seed: int = 0) -> Path:
    """A run folder with an exported encoder of random weights (not MAE's initialisation)."""
    torch.manual_seed(seed)
    vit = timm.create_model("vit_base_patch16_224", num_classes=0, **OPTIONS)
    folder = run / "encoder"
    folder.mkdir(parents=True)
    save_file(
        {name: value.contiguous() for name, value in vit.state_dict().items()},
        folder / "encoder.safetensors",
    )
    info = {
        "arch": "vit_base_patch16_224",
        "options": OPTIONS,
        "mean": MEAN,
        "std": STD,
        "method": "mae",
        "recipe": "mae",
        "step": 7,
    }
    (folder / "encoder.json").write_text(json.dumps(info))
    return run


def spoil_encoder(run: Path, copy: Path) -> Path:
    """A copy of a run's encoder with one weight NaN, so that every feature is NaN."""
    shutil.copytree(run / "encoder", copy / "encoder")
    path = copy / "encoder/encoder.safetensors"
    weights = load_file(path)
    weights["blocks.0.attn.qkv.weight"][0, 0] = float("nan")
    save_file(weights, path)
    return copy


def command(module: ModuleType, *arguments: str) -> subprocess.CompletedProcess:
    """Run an evaluation as a user would, alone, whatever ranks this process is one of."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in ranks}
    return subprocess.run(
        [sys.executable, str(module.__file__), *arguments],
        capture_output=True, text=True, timeout=240, env=env,
    )  # fmt: skip


def _on_rank(rank: int, world: int, port: int, work: Callable[..., None], arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = join_ranks()
    work(ranks, *arguments)
    torch.distributed.destroy_process_group()


def on_two_ranks(work: Callable[..., None], *arguments: str) -> None:
    """Call work(ranks, *arguments) on two real processes joined by gloo."""
    on_ranks(2, work, *arguments)


def on_ranks(world: int, work: Callable[..., None], *arguments: str) -> None:
    """Call work(ranks, *arguments) on real processes joined by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A server that has imported everything once, from which every rank is forked.
    multiprocessing.set_forkserver_preload(["eval.finetune", "eval.linprobe"])
    torch.multiprocessing.start_processes(
        _on_rank, (world, port, work, arguments), nprocs=world, start_method="forkserver"
    )
