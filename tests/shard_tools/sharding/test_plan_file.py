"""The plan of a sharding job on the disk: columns, what they take, and one plan for all tasks."""

import multiprocessing
import shutil
import tracemalloc

import pytest
from shard_samples import image_tree, tars_of

from shard_tools import make_shards
from shard_tools.cli import ToolError
from shard_tools.manifest import read_manifest
from shard_tools.sharding.found import Image, Images
from shard_tools.sharding.items import Item, Items
from shard_tools.sharding.layout import PARTS, Settings, make_plan
from shard_tools.sharding.plan_file import PLAN_FILE, read_plan, write_plan
from shard_tools.sharding.sources import Source
from shard_tools.texts import Texts

IMAGES = [
    Image("n1/a.jpg", "n1/a.jpg", 0, 7),
    Image("n1/ä \udcff.jpg", "ä \udcff.jpg", 0, 2**40),  # the end of its name
    Image("n2/b.jpg", "/data/n2.tar", 2**40, 5),
    Image("n2/c.jpg", "/data/n2.tar", 512, 0),
    Image("n2/d.jpg", "n2/D.jpg", 0, 1),
    Image("n", "nn/n", 0, 1),
]


def test_columns_give_back_what_was_put_in():
    images = Images(IMAGES)
    assert list(images) == IMAGES == images[:]
    assert images[-2] == IMAGES[-2]
    assert images == Images(iter(IMAGES)) != Images(IMAGES[:-1])
    assert len(images.places) == 3  # the archive once
    with pytest.raises(IndexError):
        images[6]
    texts = Texts.lines("a\n\nü".encode())
    assert list(texts) == ["a", "", "ü"] == texts[:]
    assert texts.joined().decode() == "a\n\nü"
    assert (len(Texts.lines(b"")), list(Texts.lines(b"\n"))) == (0, ["", ""])
    with pytest.raises(UnicodeDecodeError):
        Texts.lines(b"\xff")


def source(count: int) -> Source:
    names = (f"n{i % 9}/{i}é.jpg" for i in range(count))
    items = Items(
        Item(name, i % 9, "a.tar" if i % 3 else name, i, 10_000 + i) for i, name in enumerate(names)
    )
    return Source("/root", items, tuple(f"n{i}" for i in range(9)))


def read_in_another_process(items, connection):
    connection.send([*items])


def test_a_stored_plan_holds_the_items_of_each_shard_in_order(tmp_path):
    (tmp_path / PARTS).mkdir()
    whole = source(200)
    plan = make_plan(whole, Settings(shard_size=300_000))
    write_plan(tmp_path, plan)
    stored = read_plan(tmp_path)
    assert (stored.digest, stored.settings, stored.root) == (plan.digest, plan.settings, "/root")
    assert stored.classes == whole.classes
    assert stored.shards == len(plan.starts) - 1 > 3
    items = [item for number in range(stored.shards) for item in stored.items(number)]
    assert items == [whole.items[i] for i in plan.order]
    assert sorted(items) == sorted(whole.items)
    assert stored.items(1)[0] == stored.items(1)[-len(stored.items(1))] == items[plan.starts[1]]
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(
        target=read_in_another_process, args=(stored.items(1), there)
    )
    child.start()
    assert here.recv() == [*stored.items(1)]
    child.join()


def test_another_or_a_cut_plan_is_refused(tmp_path):
    (tmp_path / PARTS).mkdir()
    write_plan(tmp_path, make_plan(source(50), Settings()))
    stored = read_plan(tmp_path)
    write_plan(tmp_path, make_plan(source(51), Settings()))
    with pytest.raises(ToolError, match="was replaced by another plan"):
        _ = stored.items(0)[0]
    path = tmp_path / PARTS / PLAN_FILE
    whole = path.read_bytes()
    for data in (b"", whole[:40], whole[:-900], b"x" + whole[1:]):
        path.write_bytes(data)
        with pytest.raises(ToolError, match=r"plan\.bin: cannot be read .*; remove .*\.parts"):
            read_plan(tmp_path)


def test_the_order_is_by_rank_then_by_offset():
    """Equal names (a list may name an image twice) have equal ranks."""
    items = Items(Item("same.jpg", -1, "a.tar", offset, 9) for offset in (5, 1, 3))
    items.append(Item("other.jpg", -1, "a.tar", 2, 9))
    offsets = [items[i].offset for i in make_plan(Source("/", items), Settings()).order]
    assert [offset for offset in offsets if offset != 2] == [1, 3, 5]


def test_an_image_takes_little_memory_while_it_is_planned(tmp_path):
    (tmp_path / PARTS).mkdir()
    tracemalloc.start()
    try:
        many = source(20_000)
        write_plan(tmp_path, make_plan(many, Settings()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / 20_000 < 160


def test_tasks_take_the_plan_of_the_first(tmp_path, capsys):
    """What comes into the source later is no part of it; another call is refused."""
    folder = image_tree(tmp_path / "in", {"n0": 4, "n1": 4})
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    common = ["--shard-size", "4KiB", "--workers", "0"]
    assert make_shards.main([str(folder), str(alone), *common]) == 0
    task = [str(folder), str(shared), *common, "--num-tasks", "2", "--task-id"]
    assert make_shards.main([*task, "0"]) == 0
    assert "8 images of 2 classes" in capsys.readouterr().out
    shutil.copy(next(iter((folder / "n0").iterdir())), folder / "n0" / "late.jpg")
    assert make_shards.main([*task, "1"]) == 0
    assert "images of" not in capsys.readouterr().out  # nothing was listed
    assert make_shards.main([*task, "1", "--seed", "1"]) == 2
    assert "of another source or other options" in capsys.readouterr().err
    assert make_shards.main([*task, "0", "--merge"]) == 0
    assert tars_of(shared) == tars_of(alone)
    assert read_manifest(shared).names == read_manifest(alone).names
    assert not (shared / PARTS).exists()
