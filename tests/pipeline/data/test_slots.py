"""Memory of batches that is used again, and only when nobody looks at it any more."""

import contextlib
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_helpers import jpeg, open_loader, write_shards

from pipeline.data.batch import Batch
from pipeline.data.crops import Crop
from pipeline.data.slots import Slots
from pipeline.errors import UserError

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")


def numbers(count: int) -> torch.Tensor:
    return torch.arange(count)


def test_a_slot_is_free_once_its_last_view_is_gone() -> None:
    slots = Slots(owners=2, each=2, size=100)
    assert [slots.take(1), slots.take(1), slots.take(1)] == [2, 3, None]
    assert slots.take(0) == 0
    lent = slots.lend(3, (4, 5))
    view = lent[1:].float() + 0, lent[2]
    del lent
    assert slots.take(1) is None
    del view
    assert slots.take(1) == 3


def test_slots_do_not_overlap() -> None:
    slots = Slots(owners=3, each=2, size=5000)
    for slot in range(6):
        slots.tensor(slot, (5000,)).fill_(slot + 1)
    for slot in range(6):
        assert slots.tensor(slot, (50, 100)).eq(slot + 1).all()
    assert [slots.take(owner) for owner in range(3)] == [0, 2, 4]  # and the marks are elsewhere


@pytest.mark.parametrize("crops", [1, 2])
def test_a_batch_passes_as_the_number_of_its_slot(crops: int) -> None:
    slots = Slots(1, 1, 2 * 3 * 4 * 4 * 3)
    slot = slots.take(0)
    assert slot is not None
    room = slots.tensor(slot, (crops, 3, 4, 4, 3))
    room.copy_(torch.arange(room.numel(), dtype=torch.uint8).view(room.shape))
    images = list(room)
    batch = Batch(
        images[0], numbers(3), numbers(3), numbers(3), second=(images[1:] or [None])[0],
        slot=(slots.key, slot),
    )  # fmt: skip
    sent = pickle.dumps(batch)
    assert len(sent) < 2000
    got = pickle.loads(sent)
    assert got.slot is None
    assert torch.equal(got.image, room[0])
    assert (got.second is None) == (crops == 1)
    if crops == 2:
        assert torch.equal(got.second, room[1])
    kept = got.image[2]
    assert slots.take(0) is None
    del got
    assert slots.take(0) is None
    del kept
    assert slots.take(0) == slot
    assert np.array_equal(pickle.loads(sent).label, [0, 1, 2])


def test_too_few_open_files_for_workers_are_a_sentence(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [[jpeg(n) for n in range(8)]])
    how = {"total_steps": 1, "batch_size": 8, "micro_batch": 8, "crop": Crop(16), "seed": 0}
    limits, said, taken = resource.getrlimit(resource.RLIMIT_NOFILE), "", []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(12):  # each start ends at another file
            os.close(taken.pop())
            try:
                open_loader(shards, workers=1, partitions=1, window=1, **how).close()
            except UserError as error:
                said += str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for file in taken:
            os.close(file)
    assert "too many files are open: 1 workers keep 3 micro-batches" in said
