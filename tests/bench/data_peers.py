"""What bench_data.py compares: each loader as an endless iterator over batches. Runs inside the
environment of the peer.

    python data_peers.py NAME --corpus FOLDER --images N --workers W

Every contestant serves batches of 64 random crops (scale 0.2-1, bicubic and antialiased, 224 x 224,
mirrored half of the time) as uint8 in a random order. The last line of a turn is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peer_formats import files_of, open_pil, tree_seconds

BATCH, SIZE, WARM = 64, 224, 6
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def tars_of(folder: Path) -> list[str]:
    return sorted(str(path) for path in (folder / "shards").glob("*.tar"))


def draw_box(width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) as torchvision's RandomResizedCrop draws it."""
    for _ in range(10):
        area = width * height * random.uniform(*SCALE)
        ratio = random.uniform(*RATIO)
        wide, high = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < wide <= width and 0 < high <= height:
            return random.randint(0, width - wide), random.randint(0, height - high), wide, high
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


# ---------------------------------------------------------------- ours


def ours(folder: Path, workers: int, decode: str = "auto", shards: str = "shards") -> Iterator[int]:
    from pipeline.data.batch import LoaderConfig
    from pipeline.data.crops import Crop
    from pipeline.data.loader import train_loader

    config = LoaderConfig(
        folder / shards, batch_size=BATCH, micro_batch=BATCH, crop=Crop(SIZE, SCALE, RATIO),
        workers=workers, partitions=BATCH, decode=decode,
    )  # fmt: skip
    for batch in train_loader(config, 0, 1, range(10**6)):
        yield len(batch.image)


def decoder_alone(folder: Path, _: int, shards: str = "shards") -> Iterator[int]:
    """Our decoder on bytes in memory: what the loader's bookkeeping is held against."""
    import numpy as np

    from pipeline.data.crops import Crop
    from pipeline.data.jpeg import decoder
    from shard_tools.manifest import read_manifest

    manifest = read_manifest(folder / shards)
    tars = [Path(manifest.path(number)).read_bytes() for number in range(len(manifest.shards))]
    rows = manifest.index
    where = np.searchsorted(manifest.starts, np.arange(len(rows)), "right") - 1
    files = [
        tars[tar][row["offset"] : row["offset"] + row["length"]]
        for tar, row in zip(where, rows, strict=True)
    ]
    rng, crop, call = np.random.default_rng(0), Crop(SIZE, SCALE, RATIO), decoder()[1]
    out = np.empty((BATCH, SIZE, SIZE, 3), np.uint8)
    while True:
        for place, number in enumerate(rng.integers(0, len(files), BATCH)):
            call(
                files[number],
                crop.choose(rng.random(Crop.UNIFORMS).tolist()),
                out[place],
                "bicubic",
            )
        yield BATCH


# ---------------------------------------------------------------- torch's DataLoader


def pil_transform() -> Callable:
    from torchvision import transforms as T

    bicubic = T.InterpolationMode.BICUBIC
    crop = T.RandomResizedCrop(SIZE, scale=SCALE, ratio=RATIO, interpolation=bicubic)
    return T.Compose([crop, T.RandomHorizontalFlip(), T.PILToTensor()])


def tensor_transform() -> Callable:
    from torchvision.transforms import v2

    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(SIZE, SCALE, RATIO, interpolation=bicubic, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


class Files:
    """A map-style dataset: `load` on the bytes of each file."""

    def __init__(self, folder: Path, load: Callable) -> None:
        self.paths, self.load = files_of(folder), load

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        with open(self.paths[number], "rb") as file:
            return self.load(file.read())


def batches(dataset: Any, workers: int) -> Iterator[int]:
    """Of a map-style dataset, through a DataLoader that starts its workers once."""
    from torch.utils.data import DataLoader

    loader: DataLoader = DataLoader(
        dataset, BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True
    )
    while True:
        for item in loader:
            images = item[0] if isinstance(item, list | tuple) else item
            yield len(images)


def imagefolder(folder: Path, workers: int) -> Iterator[int]:
    from torchvision.datasets import ImageFolder

    return batches(ImageFolder(str(folder / "images"), pil_transform()), workers)


def torchvision(folder: Path, workers: int) -> Iterator[int]:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    transform = tensor_transform()

    def load(data: bytes) -> Any:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return transform(decode_jpeg(encoded, ImageReadMode.RGB))

    return batches(Files(folder, load), workers)


def torchcodec(folder: Path, workers: int) -> Iterator[int]:
    from torchcodec.decoders import decode_jpeg

    transform = tensor_transform()
    return batches(Files(folder, lambda data: transform(decode_jpeg(data))), workers)


def kornia(folder: Path, workers: int) -> Iterator[int]:
    import numpy as np
    from kornia_rs.imgproc import resize
    from kornia_rs.io import decode_image_jpegturbo

    def load(data: bytes) -> Any:
        image = decode_image_jpegturbo(data, "rgb")
        left, top, wide, high = draw_box(image.shape[1], image.shape[0])
        piece = np.ascontiguousarray(image[top : top + high, left : left + wide])
        out = resize(piece, (SIZE, SIZE), "bicubic")
        return np.ascontiguousarray(out[:, ::-1]) if random.random() < 0.5 else out

    return batches(Files(folder, load), workers)


def webdataset(folder: Path, workers: int) -> Iterator[int]:
    import webdataset as wds

    data = wds.WebDataset(tars_of(folder), resampled=True, shardshuffle=False).shuffle(200)
    data = data.decode("pilrgb").to_tuple("jpg", "cls").map_tuple(pil_transform()).batched(BATCH)
    for images, _ in wds.WebLoader(data, batch_size=None, num_workers=workers):
        yield len(images)


def streaming(folder: Path, workers: int) -> Iterator[int]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    transform = pil_transform()

    class Images(StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            return transform(open_pil(super().__getitem__(at)["jpg"]))

    data = Images(
        local=str(folder / "streaming"), shuffle=True, batch_size=BATCH, num_canonical_nodes=1
    )
    loader: DataLoader = DataLoader(data, BATCH, num_workers=workers, persistent_workers=True)
    while True:
        for images in loader:
            yield len(images)


def litdata(folder: Path, workers: int) -> Iterator[int]:
    from litdata import StreamingDataLoader, StreamingDataset

    transform = pil_transform()

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return transform(open_pil(super().__getitem__(at)["jpg"]))

    data = Images(str(folder / "litdata"), shuffle=True, drop_last=True)
    loader = StreamingDataLoader(
        data, batch_size=BATCH, num_workers=workers, persistent_workers=True
    )
    while True:
        for images in loader:
            yield len(images)


def energon(folder: Path, workers: int) -> Iterator[int]:
    from megatron.energon import (
        DefaultTaskEncoder,
        SampleDecoder,
        WorkerConfig,
        get_loader,
        get_train_dataset,
        stateless,
    )

    transform = pil_transform()

    class Encoder(DefaultTaskEncoder):
        decoder = SampleDecoder(image_decode="pilrgb")

        @stateless(restore_seeds=True)
        def encode_sample(self, sample: Any) -> Any:
            sample.image = transform(sample.image)
            return sample

    config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    data = get_train_dataset(
        str(folder / "energon"), batch_size=BATCH, shuffle_buffer_size=200,
        max_samples_per_sequence=100, task_encoder=Encoder(), worker_config=config,
    )  # fmt: skip
    for batch in get_loader(data):
        yield len(batch.image)


# ---------------------------------------------------------------- loaders with threads of their own


def dali(folder: Path, workers: int, tar: bool = False) -> Iterator[int]:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=workers, device_id=None, seed=0)
    def pipeline() -> Any:
        if tar:
            encoded = fn.readers.webdataset(
                paths=tars_of(folder),
                ext=["jpg"],
                random_shuffle=True,
                missing_component_behavior="error",
            )
        else:
            encoded, _ = fn.readers.file(file_root=str(folder / "images"), random_shuffle=True)
        images = fn.decoders.image_random_crop(
            encoded, device="cpu", output_type=types.RGB, random_area=SCALE,
            random_aspect_ratio=RATIO,
        )  # fmt: skip
        images = fn.resize(images, size=(SIZE, SIZE), interp_type=types.INTERP_CUBIC)
        return fn.flip(images, horizontal=fn.random.coin_flip())

    pipe = pipeline()
    pipe.build()
    while True:
        (images,) = pipe.run()
        assert tuple(images.as_tensor().shape()) == (BATCH, SIZE, SIZE, 3)
        yield BATCH


def spdl(folder: Path, workers: int) -> Iterator[int]:
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    paths = files_of(folder)

    def endless() -> Iterator[str]:
        while True:
            yield from random.sample(paths, len(paths))

    def load(path: str) -> Any:
        packets = spdl.io.demux_image(path)
        left, top, wide, high = draw_box(packets.codec.width, packets.codec.height)
        steps = [f"crop={wide}:{high}:{left}:{top}", f"scale={SIZE}:{SIZE}:flags=bicubic"]
        steps += ["hflip"] if random.random() < 0.5 else []
        return spdl.io.decode_packets(packets, filter_desc=",".join([*steps, "format=rgb24"]))

    def join(frames: list[Any]) -> Any:
        return spdl.io.to_numpy(spdl.io.convert_frames(frames))

    builder = PipelineBuilder().add_source(endless()).pipe(load, concurrency=workers)
    pipeline = builder.aggregate(BATCH).pipe(join).add_sink(3).build(num_threads=workers)
    with pipeline.auto_stop():
        for images in pipeline:
            assert images.shape == (BATCH, SIZE, SIZE, 3)
            yield BATCH


def nvimgcodec(folder: Path, workers: int) -> Iterator[int]:
    import numpy as np
    import torch
    from nvidia import nvimgcodec as codec

    cpu = [codec.Backend(codec.BackendKind.CPU_ONLY)]
    decoder = codec.Decoder(
        device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=workers, backends=cpu
    )
    params = codec.DecodeParams(color_spec=codec.ColorSpec.SRGB)
    paths, out = files_of(folder), torch.empty((BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    for names in itertools.repeat(paths):
        streams = []
        for path in random.sample(names, BATCH):
            stream = codec.CodeStream(Path(path).read_bytes())
            left, top, wide, high = draw_box(stream.width, stream.height)
            region = codec.Region(top, left, top + high, left + wide)
            streams.append(stream.get_sub_code_stream(region=region))
        for place, image in enumerate(decoder.decode(streams, params=params)):
            pixels = torch.from_numpy(np.asarray(image.cpu())).permute(2, 0, 1)[None]
            if random.random() < 0.5:
                pixels = pixels.flip(-1)
            out[place] = torch.nn.functional.interpolate(
                pixels, (SIZE, SIZE), mode="bicubic", antialias=True
            )[0]
        yield BATCH


def ffcv(folder: Path, workers: int) -> Iterator[int]:
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    crop = RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=SCALE, ratio=RATIO)
    steps = {"image": [crop, RandomHorizontalFlip(), ToTensor()], "label": None}
    loader = Loader(
        str(folder / "ffcv" / "data.beton"), batch_size=BATCH, num_workers=workers,
        order=OrderOption.RANDOM, drop_last=True, pipelines=steps,
    )  # fmt: skip
    while True:
        for images in loader:
            yield len(images[0])


LOADERS: dict[str, Callable[[Path, int], Iterator[int]]] = {
    "ours": ours,
    "ours, simplejpeg": lambda f, w: ours(f, w, "simplejpeg"),
    "ours, markers": lambda f, w: ours(f, w, shards="markers"),
    "our decoder": decoder_alone,
    "our decoder, markers": lambda f, w: decoder_alone(f, w, "markers"),
    "imagefolder": imagefolder,
    "torchvision": torchvision,
    "webdataset": webdataset,
    "streaming": streaming,
    "litdata": litdata,
    "energon": energon,
    "torchcodec": torchcodec,
    "kornia-rs": kornia,
    "dali": dali,
    "dali tar": lambda f, w: dali(f, w, tar=True),
    "spdl": spdl,
    "nvimgcodec": nvimgcodec,
    "ffcv": ffcv,
}  # fmt: skip


# ---------------------------------------------------------------- a turn


def take_turn(batches: Iterator[int], images: int) -> dict[str, float]:
    """CPU and wall seconds for `images` images once the pipeline is full."""
    for _ in range(WARM):
        next(batches)
    cpu, wall, done = tree_seconds(), time.perf_counter(), 0
    while done < images:
        done += next(batches)
    return {"images": done, "cpu": tree_seconds() - cpu, "wall": time.perf_counter() - wall}


def one_thread() -> None:
    """The DataLoader's workers have one thread each; so has the main process."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=LOADERS)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1536)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    one_thread()
    turn = take_turn(LOADERS[args.name](args.corpus, args.workers), args.images)
    print("\n" + json.dumps(turn), flush=True)
    os._exit(0)  # workers and foreign threads need no farewell


if __name__ == "__main__":
    main()
