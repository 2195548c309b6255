from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_samples import tars_of

from shard_tools import demo_images
from shard_tools.demo_images import PHOTOGRAPHS, STRIPS, build, draw_box, main


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "tree"
    build(folder, train=320, val=160, size=40, seed=3)
    return folder


def pixels(tree: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images float [N, H, W, 3] and labels."""
    images, labels = [], []
    for label, name in enumerate(sorted(PHOTOGRAPHS)):
        for path in sorted((tree / split / name).iterdir()):
            images.append(np.asarray(Image.open(path), np.float32))
            labels.append(label)
    return np.stack(images), np.array(labels)


def test_the_tree_has_the_asked_counts_and_sizes(tree: Path) -> None:
    for split, count in (("train", 320), ("val", 160)):
        images, labels = pixels(tree, split)
        assert images.shape == (count, 40, 40, 3)
        assert np.bincount(labels).tolist() == [count // 16] * 16


def test_equal_options_give_equal_bytes_and_more_images_keep_the_first(
    tree: Path, tmp_path: Path
) -> None:
    build(tmp_path / "again", train=320, val=160, size=40, seed=3)
    assert files(tmp_path / "again") == files(tree)
    build(tmp_path / "small", train=48, val=16, size=40, seed=3)
    small = files(tmp_path / "small")
    small.pop("demo.json")
    assert len(small) == 64
    assert small.items() <= files(tree).items()
    build(tmp_path / "seed", train=48, val=16, size=40, seed=4)
    assert not set(files(tmp_path / "seed").values()) & set(small.values())


@pytest.mark.parametrize("size", [(640, 427), (400, 600), (512, 512)])
def test_no_pixel_is_in_both_splits(size: tuple[int, int]) -> None:
    draw = np.random.default_rng(0)
    used = {}
    for split in STRIPS:
        used[split] = np.zeros(size[::-1], bool)
        for _ in range(2000):
            left, top, right, bottom = draw_box(size, split, draw)
            assert 0 <= left < right <= size[0]
            assert 0 <= top < bottom <= size[1]
            used[split][top:bottom, left:right] = True
    assert not (used["train"] & used["val"]).any()
    assert used["train"].mean() > 0.55
    assert used["val"].mean() > 0.25


def test_the_mean_colour_does_not_give_the_class_away(tree: Path) -> None:
    """Chance is 1/16 = 6 %; twelve points above it is 5 deviations for 160 images."""
    features = {split: pixels(tree, split) for split in ("train", "val")}
    train, labels = features["train"][0].mean((1, 2)), features["train"][1]
    val, truth = features["val"][0].mean((1, 2)), features["val"][1]
    centres = np.stack([train[labels == label].mean(0) for label in range(16)])
    nearest = np.linalg.norm(val[:, None] - centres, axis=-1).argmin(1)
    assert (nearest == truth).mean() < 0.18
    design = np.c_[train - 128, np.ones(len(train))]
    weights = np.linalg.lstsq(design, np.eye(16)[labels], rcond=None)[0]
    linear = (np.c_[val - 128, np.ones(len(val))] @ weights).argmax(1)
    assert (linear == truth).mean() < 0.18


def test_the_texture_does_give_the_class_away(tree: Path) -> None:
    """Or the data would be worth nothing: nearest class mean of the
    mean absolute differences at three distances."""

    def energies(images: np.ndarray) -> np.ndarray:
        grey = images.mean(-1)
        grey = (grey - grey.mean((1, 2), keepdims=True)) / grey.std((1, 2), keepdims=True)
        moves = [(d, axis) for d in (1, 2, 4) for axis in (1, 2)]
        values = [
            np.abs(np.diff(grey, axis=a) if d == 1 else grey - np.roll(grey, d, a)).mean((1, 2))
            for d, a in moves
        ]
        return np.log(np.stack(values, 1))

    train, labels = pixels(tree, "train")
    val, truth = pixels(tree, "val")
    train, val = energies(train), energies(val)
    centres = np.stack([train[labels == label].mean(0) for label in range(16)])
    nearest = np.linalg.norm((val[:, None] - centres) / train.std(0), axis=-1).argmin(1)
    assert (nearest == truth).mean() > 0.19  # three times chance


def test_a_finished_tree_stays_and_another_folder_is_refused(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {path: path.stat().st_mtime_ns for path in tree.rglob("*.jpg")}
    arguments = ["--train", "320", "--val", "160", "--size", "40", "--seed", "3"]
    assert main([str(tree), *arguments]) == 0
    assert "already there" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in tree.rglob("*.jpg")}
    (tmp_path / "mine").write_text("x")
    assert main([str(tmp_path)]) == 2
    assert "not a demo tree" in capsys.readouterr().err
    assert tars_of(tmp_path) == {"mine": b"x"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--train", "3"], "--train 3: must be at least 16"),
        (["--size", "4"], "--size 4: must be at least 8 and at most 4096"),
    ],
)
def test_bad_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main([str(tmp_path / "x"), *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_photograph_that_is_not_in_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(demo_images.PHOTOGRAPHS, "ghost", ("skimage", "data/ghost.png"))
    assert main([str(tmp_path / "x"), "--train", "32", "--val", "32", "--size", "16"]) == 2
    assert "ghost.png: this version of skimage does not ship" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_current_folder_and_a_link_are_written_under_their_own_names(tmp_path, monkeypatch):
    words = ["--train", "16", "--val", "16", "--size", "8"]
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    assert main([".", *words]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["link", *words, "--seed", "1"]) == 0  # another tree in the place of the first
    assert (tmp_path / "link").is_symlink()
    assert '"seed": 1' in (tmp_path / "here/demo.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link"]
