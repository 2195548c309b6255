"""The loaders: pixels, ranks, workers, faults. Their order of samples: test_order.py."""

import io
import os
import shutil
import signal
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_helpers import jpeg, open_loader, write_shards
from orders import global_batch, partition_order
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode

from pipeline.data.crops import Crop, shorter_side
from pipeline.data.jpeg import available
from pipeline.data.loader import Loader, eval_loader
from pipeline.data.order import Order
from pipeline.data.randaugment import RandAugment
from pipeline.data.reader import SampleError
from pipeline.errors import UserError
from shard_tools import index_shards, subset
from shard_tools.manifest import ManifestError, read_manifest

SIZES = (7, 0, 5, 11, 9, 8)  # samples per shard; 40 in all


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = [[jpeg(100 * s + i) for i in range(count)] for s, count in enumerate(SIZES)]
    return write_shards(tmp_path_factory.mktemp("shards"), images)


def load(folder: Path, world: int = 1, workers: int = 0, micro: int = 2, **change: object) -> dict:
    """step → (images, samples, labels, keys) of the global batch, gathered over all ranks."""
    options = {"batch_size": 8, "seed": 3, "start_step": 0, "total_steps": 12, "partitions": 4}
    options |= {"window": 2, "crop": Crop(16), **change}
    steps: dict[int, list] = {}
    for rank in range(world):
        for batch in open_loader(
            folder, micro_batch=micro, rank=rank, world=world, workers=workers, **options
        ):
            parts = (batch.image, batch.sample, batch.label, batch.key)
            steps.setdefault(batch.step, []).append(parts)
    return {s: [torch.cat(p) for p in zip(*parts, strict=True)] for s, parts in steps.items()}


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for step in ours:
        for a, b in zip(ours[step], theirs[step], strict=True):
            assert torch.equal(a, b), f"step {step}"


def test_draws_with_replacement(shards: Path) -> None:
    order = Order((3, 2), seed=1, batch_size=8, partitions=4, window=2, draws=50)
    assert order.steps == 6
    samples, keys = zip(*[order.samples(0, s, 0, 8) for s in range(6)], strict=True)
    assert set(np.concatenate(samples)) == set(range(5))
    assert len(set(np.concatenate(keys))) == 48  # each draw has its own crop
    one = load(shards, samples_per_epoch=64, total_steps=9)
    assert_same(one, load(shards, world=2, micro=4, samples_per_epoch=64, total_steps=9))
    assert len(one) == 9


@pytest.mark.parametrize(
    ("world", "workers", "micro"), [(1, 2, 8), (2, 0, 4), (2, 2, 1), (4, 1, 2)]
)
def test_pixels_do_not_depend_on_ranks_or_workers(shards, world, workers, micro) -> None:
    whole = load(shards)
    assert list(whole) == list(range(12))  # more than two epochs of five steps
    assert_same(load(shards, world=world, workers=workers, micro=micro), whole)
    samples = torch.cat([whole[step][1] for step in range(5)])
    assert sorted(samples.tolist()) == list(range(40))


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_any_start_method_gives_the_same_batches(shards: Path, method: str) -> None:
    options = {"total_steps": 7, "start_step": 3, "second_crop": True}
    whole = load(shards, **options)
    assert_same(load(shards, workers=1, start_method=method, **options), whole)
    (batch,) = eval_loader(
        shards, batch_size=40, rank=0, world=1, image_size=8, workers=1, start_method=method
    )
    assert batch.sample.tolist() == list(range(40))


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_workers_of_any_start_method_take_the_same_memory(shards: Path, method: str) -> None:
    """torch is 260 MB of a process that imports it; two workers share it."""

    def own(pid: int) -> float:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        fields = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return fields["Private_Dirty"] / 1024

    sizes = {}
    for start in ("fork", method):
        loader = open_loader(
            shards, batch_size=8, micro_batch=8, total_steps=9, crop=Crop(16), partitions=4,
            workers=2, start_method=start,
        )  # fmt: skip
        batches = iter(loader)
        next(batches)
        sizes[start] = [own(worker.pid) for worker in loader._workers]
        loader.close()
    assert max(sizes[method]) < min(sizes["fork"]) + 20


def test_what_a_worker_is_sent_grows_with_neither_samples_nor_shards(tmp_path: Path) -> None:
    """As forkserver and spawn pickle it: a handle on the table of shards, a path to the index."""
    one = write_shards(tmp_path / "1", [[jpeg(0)] * 64])
    many = write_shards(tmp_path / "2", [[jpeg(0)] * 32] * 40)
    sizes = []
    for folder in (one, many):
        loader = open_loader(
            folder, batch_size=8, micro_batch=8, total_steps=3, crop=Crop(16), partitions=4,
            workers=1, start_method="spawn",
            augment=RandAugment("rand-m9-mstd0.5-inc1", 16, (0.5, 0.5, 0.5), seed=3),
        )  # fmt: skip
        sizes.append(len(ForkingPickler.dumps(loader._loader.dataset)))
        assert loader.manifest.samples in (64, 1280)
    assert max(sizes) < min(sizes) + 50


def test_two_loaders_share_a_manifest(shards: Path) -> None:
    manifest = read_manifest(shards)
    one, two = (load(folder, workers=1) for folder in (manifest, shards))
    assert_same(one, two)
    first = [eval_loader(manifest, batch_size=8, rank=0, world=1, image_size=8, workers=0)
             for _ in range(2)]  # fmt: skip
    assert first[0].manifest is first[1].manifest is manifest


@pytest.mark.parametrize(
    ("start", "world", "workers"), [(0, 4, 0), (3, 2, 1), (5, 1, 0), (11, 2, 0)]
)
def test_resume_at_any_step(shards, start, world, workers) -> None:
    rest = load(shards, world=world, workers=workers, start_step=start)
    assert_same(rest, {s: v for s, v in load(shards).items() if s >= start})


def test_batches_hold_what_the_shards_hold(shards: Path) -> None:
    loader = open_loader(
        shards, batch_size=8, micro_batch=4, rank=1, world=2, seed=0, start_step=0,
        total_steps=3, crop=Crop(16, scale=(1, 1), ratio=(1.2, 1.2), flip=False), workers=0,
        partitions=4, window=2,
    )  # fmt: skip
    assert len(loader) == 3
    starts = np.cumsum([0, *SIZES])
    for batch in loader:
        assert batch.image.dtype == torch.uint8
        assert batch.image.shape == (4, 16, 16, 3)
        for image, label, sample in zip(batch.image, batch.label, batch.sample, strict=True):
            shard = int(np.searchsorted(starts, int(sample), side="right")) - 1
            place = int(sample - starts[shard])
            assert label == (shard + place) % 5
            picture = Image.open(io.BytesIO(jpeg(100 * shard + place)))
            expected = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC), float)
            assert np.abs(image.numpy() - expected).mean() < 1


def test_adopted_shards_and_subsets_are_read_alike(shards: Path, tmp_path: Path) -> None:
    """What index_shards makes of tars that webdataset wrote, and a subset of it."""
    tars = sorted(str(path) for path in shards.glob("*.tar"))
    adopted, chosen = tmp_path / "adopted", tmp_path / "chosen"
    skip = ["--on-error", "skip"]  # one holds no samples
    assert index_shards.main([*tars, "--output", str(adopted), *skip]) in (0, 1)
    assert subset.main([str(adopted), str(chosen), "--fraction", "0.5"]) == 0
    samples = torch.cat([batch[1] for batch in load(adopted, total_steps=5).values()])
    assert sorted(samples.tolist()) == list(range(40))
    ours, theirs, part = (
        next(iter(eval_loader(f, batch_size=40, rank=0, world=1, image_size=8, workers=0)))
        for f in (adopted, shards, chosen)
    )
    assert torch.equal(ours.image, theirs.image)
    assert torch.equal(ours.label, theirs.label)
    found = {
        tuple(i.flatten().tolist()): int(n) for i, n in zip(ours.image, ours.label, strict=True)
    }
    for image, label in zip(part.image, part.label, strict=True):
        assert found[tuple(image.flatten().tolist())] == label
    assert 15 <= len(part.label) <= 25


def test_a_rank_needs_only_its_own_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [[jpeg(10 * s + i) for i in range(8)] for s in range(8)])
    order = Order((8,) * 8, 3, 8, 4, 2)
    loader = open_loader(
        folder, batch_size=8, micro_batch=4, rank=0, world=2, seed=3, start_step=0,
        total_steps=order.steps, crop=Crop(16), workers=0, partitions=4, window=2,
    )  # fmt: skip
    mine = {int(s) // 8 for p in (0, 1) for s in partition_order(order, 0, p)}
    assert len(mine) <= 5
    for shard in set(range(8)) - mine:
        (folder / f"t-{shard:06d}.tar").unlink()
    assert sum(len(batch.sample) for batch in loader) == 32


@settings(max_examples=30, deadline=None)
@given(world=st.integers(1, 7), batch=st.integers(1, 20))
def test_eval_counts_each_sample_once(shards: Path, world: int, batch: int) -> None:
    seen = []
    for rank in range(world):
        loader = eval_loader(
            shards, batch_size=batch, rank=rank, world=world, image_size=8, workers=0
        )
        batches = list(loader)
        assert len(batches) == len(loader)
        seen += [int(s) for b in batches for s in b.sample]
    assert seen == list(range(40))


@pytest.mark.parametrize("size", [32, 96, 160, 224, 256, 384])
def test_the_shorter_side_is_maes(size: int) -> None:
    assert shorter_side(size) == int(size / (224 / 256 if size <= 224 else 1.0))


def test_eval_crop_is_torchvisions(shards: Path) -> None:
    reference = v2.Compose([v2.Resize(36, InterpolationMode.BICUBIC), v2.CenterCrop(32)])
    (batch,) = eval_loader(
        shards, batch_size=40, rank=0, world=1, image_size=32, resize=36, workers=1
    )
    for place in range(SIZES[0]):
        expected = np.asarray(reference(Image.open(io.BytesIO(jpeg(place)))), float)
        assert np.abs(batch.image[place].numpy() - expected).mean() < 0.1
        assert np.abs(batch.image[place].numpy() - expected).max() <= 3


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_interleaved_batches_do_not_depend_on_the_ranks(shards: Path, world: int) -> None:
    """40 samples in batches of 7: the last one is short, and with 7 ranks one has none."""
    served = {}
    for rank in range(world):
        loader = eval_loader(
            shards, batch_size=7, rank=rank, world=world, image_size=8, workers=0, interleave=True
        )
        for number, batch in enumerate(loader):
            served[rank + number * world] = batch.sample.tolist()
        assert len(loader) == len(range(rank, 6, world))
    assert [served[n] for n in range(6)] == [
        list(range(a, min(a + 7, 40))) for a in range(0, 40, 7)
    ]


def test_crops_have_torchvisions_distribution() -> None:
    torch.manual_seed(0)
    rng, crop, shape = np.random.default_rng(0), Crop(), (60, 200)  # some tries do not fit
    ours, theirs = [], []
    picture = torch.empty(3, *shape)
    for _ in range(1500):
        box, _ = crop.choose(rng.random(Crop.UNIFORMS).tolist())(shape[1], shape[0])
        ours.append((box.top, box.left, box.bottom - box.top, box.right - box.left))
        theirs.append(v2.RandomResizedCrop(8, scale=(0.2, 1)).make_params([picture]))
    theirs = [[t[k] for k in ("top", "left", "height", "width")] for t in theirs]
    for a, b in zip(np.array(ours).T, np.array(theirs).T, strict=True):
        assert ks_2samp(a, b).pvalue > 1e-3
    flips = [crop.choose(rng.random(23).tolist())(9, 9)[1] for _ in range(1000)]
    assert 430 < sum(flips) < 570


def test_crops_reach_both_borders_and_ratios_are_log_uniform() -> None:
    quarter = Crop(image_size=2, scale=(0.25, 0.25), ratio=(0.25, 4.0))
    for place, corner in ((0.0, 0), (0.34, 1), (0.67, 2), (0.99, 2)):
        box, _ = quarter.choose([0.5] * 20 + [place, place, 0.5])(4, 4)
        assert (box.left, box.top, box.right, box.bottom) == (*[corner] * 2, *[corner + 2] * 2)


def test_the_same_sample_gets_another_crop_in_another_epoch(shards: Path) -> None:
    batches = load(shards)
    first = {int(k): i for s in range(5) for i, k in zip(batches[s][0], batches[s][1], strict=True)}
    second = {
        int(k): i for s in range(5, 10) for i, k in zip(batches[s][0], batches[s][1], strict=True)
    }
    assert sum(not torch.equal(first[k], second[k]) for k in first) > 35


def test_a_second_crop_of_each_image(shards: Path) -> None:
    def batches(second: bool, world: int = 1, workers: int = 0) -> list:
        loaders = [
            open_loader(
                shards, batch_size=8, micro_batch=4, rank=rank, world=world, seed=3, start_step=0,
                total_steps=2, crop=Crop(16), workers=workers, partitions=4, second_crop=second,
            )
            for rank in range(world)
        ]  # fmt: skip
        return sorted((b for x in loaders for b in x), key=lambda b: (b.step, b.sample.tolist()))

    one, two = batches(False), batches(True)
    for alone, pair, other in zip(one, two, batches(True, world=2, workers=1), strict=True):
        assert alone.second is None
        assert torch.equal(alone.image, pair.image)  # the first crop is what it was
        assert pair.second.shape == pair.image.shape
        assert torch.equal(pair.second, other.second)
        different = (pair.image != pair.second).flatten(1).any(1)
        assert different.all()


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Three of forty samples do not decode: 6 (first shard), 23 and 24 (third)."""
    images = [[jpeg(100 * s + i) for i in range(10)] for s in range(4)]
    images[0][6] = images[0][6][:300]
    images[2][3], images[2][4] = b"no picture", b"\xff\xd8\xff\xe0 neither this"
    return write_shards(tmp_path, images)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_fails_in_one_sentence(damaged: Path, workers: int) -> None:
    with pytest.raises(SampleError) as error:
        load(damaged, workers=workers)
    message = str(error.value)
    assert "\n" not in message
    assert any(f"sample {n} of" in message for n in (6, 23, 24))
    assert str(damaged / "t-00000") in message
    with pytest.raises(SampleError, match=r"sample 6 of .*t-000000.tar will not decode: \S.*"):
        list(eval_loader(damaged, batch_size=4, rank=0, world=1, image_size=8, workers=workers))


def test_bad_samples_are_replaced_alike_on_any_ranks(damaged: Path, caplog) -> None:
    whole = load(damaged, on_error="skip")
    assert_same(load(damaged, world=2, workers=1, micro=4, on_error="skip"), whole)
    served = torch.cat([whole[step][1] for step in range(5)]).tolist()
    assert len(served) == 40
    assert not {6, 23, 24} & set(served)
    faults = {record.getMessage() for record in caplog.records}
    assert {f.split(" of ")[0] for f in faults} == {f"skipped: sample {n}" for n in (6, 23, 24)}
    loader = open_loader(
        damaged, batch_size=8, micro_batch=8, rank=0, world=1, seed=3, start_step=0,
        total_steps=5, crop=Crop(16), workers=0, partitions=4, window=2, on_error="skip",
    )  # fmt: skip
    assert sum(batch.bad_samples for batch in loader) == loader.bad_samples == 3


def test_only_bad_samples_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [[b"broken"] * 8])
    with pytest.raises(SampleError, match="nor will the 16 samples after it"):
        load(folder, on_error="skip")


def test_a_shard_cut_under_our_feet(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [[jpeg(i) for i in range(40)]])
    loader = open_loader(
        folder, batch_size=40, micro_batch=40, rank=0, world=1, seed=0, start_step=0,
        total_steps=1, crop=Crop(16), workers=1, partitions=1, on_error="skip",
    )  # fmt: skip
    os.truncate(folder / "t-000000.tar", 5000)
    with pytest.raises(ManifestError, match="changed since its manifest was written"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_replaced_under_our_feet(tmp_path: Path, workers: int) -> None:
    """Whole images of the new one are at offsets of the old, and its labels are others."""
    folder = write_shards(tmp_path / "old", [[jpeg(i) for i in range(40)]])
    loader = open_loader(
        folder, batch_size=40, micro_batch=40, rank=0, world=1, seed=0, start_step=0,
        total_steps=1, crop=Crop(16), workers=workers, partitions=1, on_error="skip",
    )  # fmt: skip
    other = write_shards(tmp_path / "new", [[jpeg(99 - i) for i in range(60)]])
    os.replace(other / "t-000000.tar", folder / "t-000000.tar")
    with pytest.raises(ManifestError, match=r"bytes long where .* the shard changed since its man"):
        list(loader)


def test_an_index_replaced_in_place_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    """What is mapped and gone ends a worker by SIGBUS, as a full /dev/shm does."""
    folder, loader = thirty_steps(tmp_path, workers=1)
    batches = iter(loader)
    next(batches)
    os.kill(loader._workers[0].pid, signal.SIGSTOP)
    os.truncate(folder / "index.bin", 0)
    os.kill(loader._workers[0].pid, signal.SIGBUS)  # as between a look at its length and at it
    os.kill(loader._workers[0].pid, signal.SIGCONT)
    with pytest.raises(UserError, match=r"index\.bin: too short for an index \(0 bytes\)"):
        list(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_index_that_is_cut_does_not_end_the_process(tmp_path: Path, workers: int) -> None:
    """As by SIGBUS, which would be the rank's own without workers."""
    folder, loader = thirty_steps(tmp_path, workers)
    os.truncate(folder / "index.bin", 0)
    with pytest.raises(ManifestError, match=r"index\.bin: was cut to 0 bytes while in use"):
        list(loader)


def thirty_steps(tmp_path: Path, workers: int) -> tuple[Path, Loader]:
    folder = write_shards(tmp_path, [[jpeg(i) for i in range(8)] * 30])
    loader = open_loader(
        folder, batch_size=8, micro_batch=8, rank=0, world=1, seed=0, start_step=0,
        total_steps=30, crop=Crop(16), workers=workers, partitions=1,
    )  # fmt: skip
    return folder, loader


@pytest.mark.parametrize("decode", available())
def test_reads_that_give_less_are_continued(shards: Path, monkeypatch, decode: str) -> None:
    """As those of some network and FUSE file systems."""
    expected, read = load(shards, decode=decode), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: read(file, min(size, 100), at))
    assert_same(load(shards, decode=decode), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_under_way_is_one_sentence(shards, monkeypatch, workers):
    unreadable = os.open("/proc/self/mem", os.O_RDONLY)  # where nothing is mapped: EIO
    monkeypatch.setattr("pipeline.data.reader.Reader._handle", lambda *_: unreadable)
    with pytest.raises(ManifestError, match=r"\.tar: cannot be read any more \(Input/output error"):
        load(shards, workers=workers)
    os.close(unreadable)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 10}, "batch_size 10 is not a multiple of the 4 partitions"),
        ({"world": 3}, "4 partitions cannot be shared by 3 ranks"),
        ({"micro": 3}, "cannot be split over 1 ranks in micro-batches of 3; use a multiple of 3"),
        ({"batch_size": 48}, "40 samples cannot fill one batch"),
        ({"batch_size": 8, "samples_per_epoch": 5}, "an epoch of 5 draws cannot fill one batch"),
        ({"start_step": 13}, "steps 13 to 12: the first must be before the last"),
        ({"on_error": "ignore"}, "on_error 'ignore': must be 'fail' or 'skip'"),
        ({"window": 0}, "window 0: must be at least one shard"),
        ({"seed": -1}, "seed -1: must be between"),
        ({"partitions": 0}, "partitions 0: must be at least 1"),
        ({"workers": -1}, "workers -1: must be 0 or more"),
        ({"workers": 10**6}, r"workers 1000000: at most \d+, for the \d+ cores of this rank"),
        ({"decode": "magic"}, "decoder 'magic' is not available here"),
    ],
)
def test_bad_numbers_are_one_sentence(shards: Path, change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load(shards, **change)
    assert "\n" not in str(error.value)


def test_too_little_shared_memory_is_one_sentence(shards: Path, monkeypatch) -> None:
    small = shutil._ntuple_diskusage(2**20, 2**19, 2**19)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    with pytest.raises(UserError, match=r"/dev/shm has 0 MiB free; .* larger --shm-size"):
        load(shards, workers=2, batch_size=40, micro=40, crop=Crop(224))
    assert load(shards, workers=0, batch_size=40, micro=40, total_steps=1)


def test_the_loader_leaves_torchs_generator_alone(shards: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    load(shards, workers=1, total_steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_crops_and_folders(tmp_path: Path) -> None:
    for wrong in ({"scale": (0.0, 1.0)}, {"ratio": (2, 1)}, {"image_size": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Crop(**wrong)
    with pytest.raises(UserError, match="interpolation 'nearest': must be one of bicubic, bil"):
        Crop(interpolation="nearest")
    with pytest.raises(ManifestError, match=r"has no manifest\.json"):
        load(tmp_path)
    with pytest.raises(UserError, match="step 5: an epoch has the steps 0 to 4"):
        global_batch([40], seed=0, epoch=0, step=5, batch_size=8, partitions=4, window=2)


SCRIPT = """
import os, signal, sys, time
from pipeline.data.crops import Crop
from pipeline.data.batch import LoaderConfig
from pipeline.data.loader import train_loader
config = LoaderConfig(sys.argv[1], batch_size=8, micro_batch=8, crop=Crop(16), workers=2,
                      partitions=4, start_method=sys.argv[3])
loader = train_loader(config, 0, 1, range(1000))
batches = iter(loader)
next(batches)
children = [str(worker.pid) for worker in loader._workers]
for child in children:
    os.kill(int(child), signal.SIGTERM)
    os.kill(int(child), signal.SIGINT)
    os.kill(int(child), signal.SIGHUP)
count = sum(1 for _ in zip(range(30), batches))
print("served", count, *children, flush=True)
if sys.argv[2] == "hard":
    os._exit(85)
if sys.argv[2] == "crash":
    os.kill(int(children[0]), signal.SIGKILL)
    sum(1 for _ in batches)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize(("how", "code"), [("soft", 0), ("hard", 85), ("crash", 1)])
def test_workers_outlive_signals_but_not_the_rank(
    shards: Path, how: str, code: int, method: str
) -> None:
    """A fork server, of whose workers none is this process's child, ends with them."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(shards), how, method],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    cleaned = how == "hard" and "semaphore objects to clean up" in done.stderr  # Python's tracker
    assert how == "crash" or cleaned or not done.stderr
    served, count, *children = done.stdout.split()
    assert (served, count) == ("served", "30")
    assert len(children) >= 2
    for _ in range(150):
        left = [c for c in children if _is_python(c)]
        if not left:
            break
        signal.sigtimedwait([], 0.1)
    assert not left


def _is_python(pid: str) -> bool:
    try:
        return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
