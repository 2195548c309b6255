from __future__ import annotations

import io
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import webdataset
from PIL import Image
from shard_samples import image_tree, jpeg, tar_of, tars_of

from shard_tools.index_shards import main as index_shards
from shard_tools.make_shards import main as make_shards
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.subset import main, ranks, write_subset
from shard_tools.verify_shards import verify

COUNTS = {"n1": 40, "n2": 21, "n3": 4, "n4": 10}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_tree(tmp_path_factory.mktemp("tree"), COUNTS)


@pytest.fixture(scope="module")
def parent(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("parent") / "shards"
    arguments = [str(tree), str(dest), "--shard-size", "60KiB", "--workers", "1"]
    assert make_shards(arguments) == 0
    return dest


def test_the_draw_of_a_seed_never_changes() -> None:
    names = SimpleNamespace(names=["a/1.jpg", "b/2.jpg"], samples=2)
    assert ranks(names, 3).tolist() == [2297179218264463289, 11305522512721041880]


def take(parent: Path, dest: Path, *options: str) -> Manifest:
    workers = ["--workers", "1"] if "--copy" in options else []
    assert main([str(parent), str(dest), *options, *workers]) == 0
    assert verify(str(dest), decode=True, workers=1) == ([], [])
    return read_manifest(dest)


def images(manifest: Manifest) -> dict[str, bytes]:
    """Original name → image bytes, through index and offset."""
    found = {}
    for number, name in enumerate(manifest.names):
        shard, row = manifest.locate(np.array(number))
        data = Path(manifest.path(int(shard))).read_bytes()
        found[name] = data[row["offset"] : row["offset"] + row["length"]]
    assert len(found) == manifest.samples
    return found


def classes_of(manifest: Manifest) -> Counter[str]:
    return Counter(manifest.classes[label] for label in manifest.index["label"])


def check_bytes(manifest: Manifest, tree: Path) -> None:
    for name, data in images(manifest).items():
        assert data == (tree / name).read_bytes()
    for name, label in zip(manifest.names, manifest.index["label"], strict=True):
        assert name.split("/")[0] == manifest.classes[label]


def test_a_fraction_is_stratified(parent: Path, tree: Path, tmp_path: Path) -> None:
    subset = take(parent, tmp_path / "a", "--fraction", "0.1")
    assert classes_of(subset) == {"n1": 4, "n2": 2, "n3": 1, "n4": 1}
    check_bytes(subset, tree)
    assert sum(file.stat().st_size for file in (tmp_path / "a").iterdir()) < 5000  # no copy
    whole = take(parent, tmp_path / "b", "--fraction", "1")
    assert whole.names == read_manifest(parent).names
    again = take(parent, tmp_path / "c", "--fraction", "0.1", "--seed", "1")
    assert classes_of(again) == classes_of(subset)
    assert set(again.names) != set(subset.names)


def test_a_draw_knows_names_only_and_not_the_packing(
    parent: Path, tree: Path, tmp_path: Path
) -> None:
    """Shards of another order, size and resolution give the same images."""
    other = tmp_path / "other"
    options = ["--seed", "5", "--shard-size", "20KiB", "--max-side", "12", "--workers", "1"]
    assert make_shards([str(tree), str(other), *options]) == 0
    for number, choice in enumerate(
        (("--fraction", "0.3"), ("--count", "9"), ("--count", "4", "--choose", "one-per-class"))
    ):
        one = take(parent, tmp_path / f"a{number}", *choice)
        two = take(other, tmp_path / f"b{number}", *choice)
        assert set(one.names) == set(two.names)


def test_the_four_ways_to_take_a_count(parent: Path, tree: Path, tmp_path: Path) -> None:
    first = take(parent, tmp_path / "first", "--count", "7", "--choose", "first")
    assert first.names == read_manifest(parent).names[:7]
    random = take(parent, tmp_path / "random", "--count", "7", "--choose", "random")
    larger = take(parent, tmp_path / "larger", "--count", "12", "--choose", "random")
    assert set(random.names) < set(larger.names)  # 1, 10, 100 … images: each holds the one before
    assert set(random.names) != set(first.names)
    every = take(parent, tmp_path / "every", "--count", "40", "--choose", "one-class")
    assert every.samples == 40  # a class of so many is large enough
    single = take(parent, tmp_path / "single", "--count", "20", "--choose", "one-class")
    assert len(classes_of(single)) == 1
    assert set(classes_of(single)) <= {"n1", "n2"}  # the others are too small
    named = take(
        parent, tmp_path / "named", "--count", "3", "--choose", "one-class", "--class", "n3"
    )
    assert classes_of(named) == {"n3": 3}
    each = take(parent, tmp_path / "each", "--count", "4", "--choose", "one-per-class")
    assert classes_of(each) == dict.fromkeys(COUNTS, 1)
    for subset in (first, random, single, named, each):
        check_bytes(subset, tree)


def test_a_list_of_file_names(
    parent: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["n1_003.JPEG", "n4_000.JPEG", "n2_019.JPEG"]
    (tmp_path / "10percent.txt").write_text("\n".join(wanted) + "\n")
    subset = take(parent, tmp_path / "a", "--names", str(tmp_path / "10percent.txt"))
    assert {Path(name).name for name in subset.names} == set(wanted)
    check_bytes(subset, tree)
    (tmp_path / "wrong.txt").write_text("n1_003.JPEG\nn9_000.JPEG\n")
    assert main([str(parent), str(tmp_path / "b"), "--names", str(tmp_path / "wrong.txt")]) == 2
    assert "1 of 2 names are not in" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_listed_name_may_have_what_other_text_takes_for_the_end_of_a_line(
    end: str, tmp_path: Path
) -> None:
    named = ["a\u2028b", "c\x85d", "e\x0bf"]
    tar_of(tmp_path / "0.tar", {f"{name}.jpg": jpeg(i) for i, name in enumerate([*named, "a"])})
    assert index_shards([str(tmp_path), "--workers", "0"]) == 0
    (tmp_path / "some.txt").write_bytes(end.join([*named, ""]).encode())
    chosen = take(tmp_path, tmp_path / "chosen", "--names", str(tmp_path / "some.txt"))
    assert chosen.names == tuple(named)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("suffix", [".JPEG", ".jpg", ""])
def test_a_list_matches_the_keys_of_adopted_tars(
    suffix: str, shards: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a json a sample has no other name than its key, in two tars `tar/key`."""
    for shard in range(shards):
        members = {f"n1/n1_{number}.jpg": jpeg(number) for number in range(8)}
        tar_of(tmp_path / f"{shard}.tar", {**members, f"n2_{shard}.jpg": jpeg(20 + shard)})
    assert index_shards([str(tmp_path), "--workers", "0"]) == 0
    listed = tmp_path / "1percent.txt"
    listed.write_text(f"n1_3{suffix}\nn2_0{suffix}\n")
    if shards == 1:
        chosen = take(tmp_path, tmp_path / "a", "--names", str(listed))
        assert chosen.names == ("n1/n1_3", "n2_0")
        assert list(images(chosen).values()) == [jpeg(3), jpeg(20)]
        listed.write_text("n1_3.JPEG\nn1_3.jpg\n")
        assert main([str(tmp_path), str(tmp_path / "b"), "--names", str(listed)]) == 2
        assert "two of its names stand for one image" in capsys.readouterr().err
        return
    assert main([str(tmp_path), str(tmp_path / "b"), "--names", str(listed)]) == 2
    said = f"n1_3{suffix} of {listed} occurs more than once, as 0/n1/n1_3 and 1/n1/n1_3"
    assert said in capsys.readouterr().err
    listed.write_text(f"n2_0{suffix}\nn2_1{suffix}\n")
    chosen = take(tmp_path, tmp_path / "a", "--names", str(listed))
    assert chosen.names == ("0/n2_0", "1/n2_1")


def test_folders_of_a_list_must_be_the_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("cat/0.jpg", "cat/1.jpg", "dog/1.jpg", "dog/2.jpg")):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(jpeg(number))
    dest, listed = tmp_path / "s", tmp_path / "list.txt"
    assert make_shards([str(tmp_path / "tree"), str(dest), "--workers", "0"]) == 0
    listed.write_text("dog/1.jpg\n./cat/1.jpg\n/data/train/dog/2.jpg\n0.jpg\n")
    chosen = take(dest, tmp_path / "a", "--names", str(listed))
    assert set(chosen.names) == {"dog/1.jpg", "cat/1.jpg", "dog/2.jpg", "cat/0.jpg"}
    listed.write_text("dog/0.jpg\n")
    assert main([str(dest), str(tmp_path / "b"), "--names", str(listed)]) == 2
    assert f"1 of 1 names are not in {dest}, such as dog/0.jpg" in capsys.readouterr().err
    listed.write_text("1.jpg\n")
    assert main([str(dest), str(tmp_path / "b"), "--names", str(listed)]) == 2
    assert "1.jpg of" in capsys.readouterr().err


def test_a_name_itself_counts_before_its_stem(tmp_path: Path) -> None:
    for name in ("x/a.jpg", "x/a.png", "x/b.v1", "x/b.v2.jpg"):
        (tmp_path / "tree" / "x").mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(jpeg(len(name)))
    dest = tmp_path / "s"
    assert make_shards([str(tmp_path / "tree"), str(dest), "--workers", "0"]) == 0
    (tmp_path / "list.txt").write_text("a.png\nb.v2\n")
    chosen = take(dest, tmp_path / "a", "--names", str(tmp_path / "list.txt"))
    assert set(chosen.names) == {"x/a.png", "x/b.v2.jpg"}


def test_a_list_of_classes_renumbers(parent: Path, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("n4 some words\nn2\n")
    subset = take(parent, tmp_path / "a", "--classes", str(tmp_path / "classes.txt"))
    assert subset.classes == ("n2", "n4")
    assert classes_of(subset) == {"n2": 21, "n4": 10}
    check_bytes(subset, tree)
    nested = take(tmp_path / "a", tmp_path / "b", "--fraction", "0.2")
    assert classes_of(nested) == {"n2": 4, "n4": 2}
    assert Path(nested.folder) == parent
    check_bytes(nested, tree)


def test_a_class_may_have_a_space_in_its_name(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "tree", {"sea lion": 2, "sea": 2, "lion": 2})
    assert make_shards([str(tree), str(tmp_path / "made"), "--workers", "0"]) == 0
    (tmp_path / "classes.txt").write_text("sea lion\nlion a cat\n")
    words = "--classes", str(tmp_path / "classes.txt")
    assert take(tmp_path / "made", tmp_path / "a", *words).classes == ("lion", "sea lion")


def test_copies_are_shards_of_their_own(parent: Path, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("n4\nn2\n")
    choice = ["--classes", str(tmp_path / "classes.txt")]
    by_index = take(parent, tmp_path / "index", *choice)
    copied = take(parent, tmp_path / "copy", *choice, "--copy", "--shard-size", "40KiB")
    assert len(copied.shards) > 1
    assert copied.folder == str(tmp_path / "copy")
    assert images(copied) == images(by_index)
    check_bytes(copied, tree)
    urls = [copied.path(number) for number in range(len(copied.shards))]
    for number, sample in enumerate(webdataset.WebDataset(urls, shardshuffle=False)):
        assert int(sample["cls"]) == copied.index["label"][number]  # renumbered in the tar too
        assert json.loads(sample["json"])["name"] == copied.names[number]
        assert Image.open(io.BytesIO(sample["jpg"])).size == (
            copied.index["width"][number],
            copied.index["height"][number],
        )
    again = tmp_path / "again"
    arguments = [str(tmp_path / "index"), str(again), "--fraction", "1", "--copy"]
    assert main([*arguments, "--shard-size", "40KiB", "--workers", "2"]) == 0
    tars = {name: data for name, data in tars_of(tmp_path / "copy").items() if "tar" in name}
    assert tars.items() <= tars_of(again).items()


def test_a_subset_of_adopted_shards(tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "p-%d.tar"), maxcount=5, verbose=0) as sink:
        for i in range(12):
            sink.write({"__key__": f"k{i}", "jpg": jpeg(i), "cls": i % 2, "txt": f"caption {i}"})
    assert index_shards([str(folder), "--workers", "1"]) == 0
    parent = read_manifest(folder)
    subset = take(folder, tmp_path / "a", "--count", "5")
    assert images(subset).items() <= images(parent).items()
    copied = take(folder, tmp_path / "b", "--count", "5", "--copy")
    assert images(copied) == images(subset)
    for name, sample in zip(
        copied.names, webdataset.WebDataset(copied.path(0), shardshuffle=False), strict=True
    ):
        assert sample["txt"] == f"caption {name[1:]}".encode()  # fields we do not know are kept


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--fraction", "0"], "--fraction 0: must be above 0 and at most 1"),
        (["--count", "76"], "offers 1 to 75 images"),
        (["--count", "0"], "offers 1 to 75 images"),
        (["--count", "5", "--choose", "one-per-class"], "offers 1 to 4 images"),
        (["--count", "41", "--choose", "one-class"], "largest class has 40 images, not 41"),
        (["--count", "1", "--class", "n1"], "--class belongs to --choose one-class"),
        (["--count", "1", "--choose", "one-class", "--class", "x"], "not a class of"),
        (["--count", "1", "--choose", "first", "--seed", "0"], "--seed belongs to --fraction"),
        (["--names", "nowhere.txt", "--seed", "1"], "--seed belongs to --fraction and --count"),
        (["--count", "1", "--workers", "2"], "--workers belongs to --copy"),
        (["--count", "1", "--shard-size", "1KiB"], "--shard-size belongs to --copy"),
        (["--names", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--classes", "nowhere.txt"], "nowhere.txt: no such file"),
    ],
)
def test_bad_options_are_one_sentence(
    parent: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    sentence: str,
) -> None:
    assert main([str(parent), str(tmp_path / "d"), *options]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "d").exists()


def test_no_subset_is_of_no_image(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither of an empty list, nor of classes without images, nor of an empty folder."""
    manifest = read_manifest(parent)
    empty, one = tmp_path / "empty", tmp_path / "one"
    write_subset(manifest, empty, np.zeros(0, np.int64), {})
    write_subset(manifest, one, np.zeros(1, np.int64), {})
    held = manifest.classes[manifest.index["label"][0]]
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "others.txt").write_text("\n".join({*COUNTS} - {held}))
    names, others = (str(tmp_path / name) for name in ("none.txt", "others.txt"))
    for source, words, sentence in (
        (parent, ["--names", names], "none.txt: lists no image"),
        (parent, ["--names", names, "--copy"], "none.txt: lists no image"),
        (parent, ["--names", names, "--rest"], "none.txt: lists no image"),
        (one, ["--classes", others], "one: none of its images is chosen"),
        (empty, ["--fraction", "0.5"], "empty: holds no image to choose from"),
        (empty, ["--count", "1", "--choose", "one-class"], "empty: holds no image"),
        (empty, ["--names", names, "--rest"], "empty: holds no image"),
    ):
        assert main([str(source), str(tmp_path / "d"), *words]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
        assert not (tmp_path / "d").exists()


def test_exactly_one_way_and_an_empty_folder(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as code:
        main([str(parent), str(tmp_path / "d"), "--fraction", "0.1", "--count", "3"])
    assert code.value.code == 2
    with pytest.raises(SystemExit) as code:
        main([str(parent), str(tmp_path / "d")])
    assert code.value.code == 2
    assert main([str(parent), str(parent), "--count", "3"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_the_rest_is_what_a_choice_leaves(parent: Path, tmp_path: Path) -> None:
    part = take(parent, tmp_path / "part", "--fraction", "0.1", "--seed", "3")
    rest = take(parent, tmp_path / "rest", "--fraction", "0.1", "--seed", "3", "--rest")
    assert set(part.names) | set(rest.names) == set(read_manifest(parent).names)
    assert not set(part.names) & set(rest.names)
    assert part.samples + rest.samples == read_manifest(parent).samples
    assert part.classes == rest.classes
    assert rest.made["options"] == {"fraction": 0.1, "seed": 3, "rest": True}
    assert "rest" not in part.made["options"]


def test_no_rest_is_one_sentence(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(parent), str(tmp_path / "a"), "--fraction", "1", "--rest"]) == 2
    assert "--rest leaves no image" in capsys.readouterr().err
    (tmp_path / "classes.txt").write_text("n1\n")
    words = [str(parent), str(tmp_path / "b"), "--classes", str(tmp_path / "classes.txt"), "--rest"]
    assert main(words) == 2
    assert "--rest does not go with --classes" in capsys.readouterr().err
