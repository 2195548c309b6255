"""Any number of ranks shares a batch that it divides, in the order of one rank."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_helpers import ALONE, coloured_images, on_ranks, write_encoder, write_shards
from orders import global_batch

from eval import attentive, finetune, linprobe
from eval.shared import finetune_plan
from eval.shared.batches import check_batch, micro_batch_of, partitions_of
from eval.shared.options import settings_of
from eval.shared.session import session_of
from pipeline.config import planning
from pipeline.data.order import steps_per_epoch
from pipeline.distributed import Ranks
from pipeline.errors import UserError
from pipeline.runtime.engine import init_ranks

WORLDS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 24, 32, 48, 64, 96, 128, 192)


@pytest.mark.parametrize("world", WORLDS)
def test_partitions_are_shared_evenly_and_the_order_is_that_of_one_rank(world):
    for batch in (world, 3 * world, 96 * world, 1024 * world):
        partitions = partitions_of(batch, world)
        assert partitions % world == 0
        assert batch % partitions == 0
        assert steps_per_epoch(10 * batch + batch // 2, batch, partitions) == 10
        if 64 % (world & -world) == 0:
            assert partitions == partitions_of(batch, 1)


def test_batches_of_powers_of_two_keep_their_order():
    for batch, partitions in ((16384, 64), (1024, 64), (128, 64), (32, 32), (1, 1)):
        assert partitions_of(batch, 1) == partitions
    assert partitions_of(1536, 1) == 192
    parts = [
        global_batch(
            [100] * 5, seed=0, epoch=0, step=1, batch_size=96,
            partitions=partitions_of(96, world), window=8,
        )
        for world in (1, 2, 3, 6, 12, 24, 96)
    ]  # fmt: skip
    assert all(np.array_equal(parts[0], part) for part in parts)


def test_a_batch_that_cannot_be_split_names_those_that_can():
    check_batch(96, 96)
    with pytest.raises(UserError, match=r"--batch-size 1024 .* over 3 ranks; 1023 or 1026 can"):
        check_batch(1024, 3)
    with pytest.raises(UserError, match=r"--batch-size 2 .* over 3 ranks; 3 can"):
        check_batch(2, 3)
    with pytest.raises(UserError, match=r"over 3 ranks; 1020 or 1026 can"):
        check_batch(1024, 3, pairs=True)
    with pytest.raises(UserError, match=r"over 3 ranks; 1020 or 1026 can"):
        finetune_plan.check(settings(1024), 3)
    with pytest.raises(UserError, match="--batch-size -3: must be at least 1"):
        check_batch(-3, 3)


def test_micro_batches_divide_the_share_of_a_rank():
    assert micro_batch_of(16384, 2, 256) == 256
    assert micro_batch_of(34, 2, 256) == 17
    assert micro_batch_of(66, 2, 16) == 11
    assert micro_batch_of(38, 2, 16) == 1


@pytest.mark.parametrize(
    ("per_rank", "patches", "multiple", "size"),
    [
        (34, 576, 1, 17), (34, 576, 2, 2), (34, 196, 2, 34), (30, 576, 2, 10), (15, 196, 1, 15),
        (6, 10**6, 1, 1), (6, 10**6, 2, 2), (1024, 196, 2, 32),
    ],
)  # fmt: skip
def test_an_automatic_micro_batch_is_even_where_images_are_paired(
    per_rank, patches, multiple, size, monkeypatch
):
    """17 images of 384 x 384 are the most that a CPU takes of 34; in pairs it takes 2."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert planning.auto_micro_batch(per_rank, patches, multiple) == size


def settings(batch: int, **more: float) -> finetune.Settings:
    return finetune.Settings("", "", batch_size=batch, **more)


def test_only_pairs_need_even_batches(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    micro = finetune_plan.micro_batch
    assert micro(settings(34), {}, 576, 1) == 2
    assert micro(settings(34, mixup=0, cutmix=0), {}, 576, 1) == 17
    assert micro(settings(34, mixup=0, cutmix=0), {}, 576, 2) == 17
    assert micro(settings(24), {"train_micro_batch_size_per_gpu": 4}, 576, 2) == 4
    with pytest.raises(UserError, match="17 per rank is odd; choose a multiple of 4, or --mixup 0"):
        micro(settings(34), {}, 576, 2)
    for size, words in (
        (5, "does not divide the 12 .*--batch-size 24 over 2"),
        (3, "must be even"),
    ):
        with pytest.raises(UserError, match=f"train_micro_batch_size_per_gpu {size}.*{words}"):
            micro(settings(24), {"train_micro_batch_size_per_gpu": size}, 576, 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("batches")
    write_shards(folder / "train", *coloured_images(70, 6, seed=1))
    write_shards(folder / "val", *coloured_images(37, 6, seed=2))
    write_encoder(folder / "run")
    return folder


WORDS = {
    "linprobe": ["--epochs", "2", "--warmup-epochs", "0", "--base-lr", "20"],
    "attentive": ["--steps", "3", "--rates", "1e-2", "--decays", "0"],
    "finetune": ["--epochs", "2", "--warmup-epochs", "0", "--base-lr", "0.05", "--mixup", "0",
                 "--cutmix", "0", "--erasing", "0", "--drop-path", "0", "--precision", "fp32"],
}  # fmt: skip


def evaluate(name: str, home: Path, folder: Path, ranks: Ranks) -> dict:
    module = {"linprobe": linprobe, "attentive": attentive, "finetune": finetune}[name]
    data = ["--encoder", home / "run", "--train", home / "train", "--val", home / "val"]
    words = [*data, "--batch-size", "33", "--workers", "0", *WORDS[name]]
    args = module.build_parser().parse_args([str(word) for word in words])
    session = session_of(args, ranks, getattr(args, "feature", "mean_patch"))
    return module.evaluate(settings_of(module.Settings, args), session, folder)


def work(ranks: Ranks, home: str, folder: str) -> None:
    init_ranks()
    for name in WORDS:
        result = evaluate(name, Path(home), Path(folder) / name, ranks)
        Path(folder, f"{name}-{ranks.rank}.json").write_text(json.dumps(result))


def test_three_ranks_with_an_odd_batch_give_the_result_of_one(home, tmp_path):
    on_ranks(3, work, str(home), str(tmp_path))
    init_ranks()
    for name in WORDS:
        alone = evaluate(name, home, tmp_path / f"alone-{name}", ALONE)
        for rank in range(3):
            result = json.loads((tmp_path / f"{name}-{rank}.json").read_text())
            assert (result["ranks"], result["images"]) == (3, 37)
            assert result["top1"] == alone["top1"]
            if "train_loss" in result:
                assert result["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-3)
