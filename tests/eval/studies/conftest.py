"""Shards of CIFAR-10's study."""

import pytest
from eval_helpers import coloured_images, write_shards


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards as make_cifar_shards leaves them."""
    folder = tmp_path_factory.mktemp("cifar")
    for seed, (part, count) in enumerate(
        {"train": 160, "val": 32, "tune-train": 144, "tune-val": 16}.items()
    ):
        write_shards(folder / "shards" / part, *coloured_images(count, 4, seed=seed))
    (folder / "shards/done.json").write_text("{}")
    return folder
