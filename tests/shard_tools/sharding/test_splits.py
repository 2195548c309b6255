"""Archives of a training and a validation set: what is in neither, or not where it should be."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from shard_samples import SMALL, jpeg, make, refused, report, tar_of

from shard_tools.make_shards import main
from shard_tools.manifest import read_manifest

BOTH = {
    name: jpeg(number)
    for number, name in enumerate(("train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg"))
}


@pytest.mark.parametrize("above", ["", "set/"])
def test_images_in_no_set_are_reported(above: str, tmp_path: Path) -> None:
    names = ["logo.png", "set/logo.png"] if above else ["logo.png"]
    members = {above + name: data for name, data in BOTH.items()}
    dest = make(tar_of(tmp_path / "t.tar", members | dict.fromkeys(names, b"")), tmp_path / "d")
    assert report(dest / "train") == dict.fromkeys(names, ("ignored", "in none of the sets"))
    assert read_manifest(dest / "train").samples == 2


@pytest.mark.parametrize("empty", ["train", "val"])
def test_a_set_without_images_is_not_left_out(
    empty: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {name: data for name, data in BOTH.items() if not name.startswith(empty)}
    archive = tar_of(tmp_path / "t.tar", members | {f"{empty}/a/readme.txt": b"see elsewhere"})
    assert f"t.tar: its folder {empty} holds no images" in refused(capsys, archive, tmp_path / "d")


def test_a_class_of_the_validation_set_alone_is_said_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tar_of(tmp_path / "t.tar", BOTH | {"val/c/5.jpg": jpeg(5)})
    error = refused(capsys, archive, tmp_path / "d")
    assert f"{archive}/val: class 'c' is not among the 2 given" in error


@pytest.mark.parametrize("archive", [False, True])
def test_a_folder_above_the_classes_of_each_set_is_no_class(
    archive: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {name.replace("/", "/images/", 1): data for name, data in BOTH.items()}
    for name, data in members.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    source = tar_of(tmp_path / "t.tar", members) if archive else tmp_path / "in"
    error = refused(capsys, source, tmp_path / "d")
    assert "one class folder, images, which holds folders such as a; move them one" in error
    for name, data in members.items():  # an image beside them: they belong to its class
        beside = str(Path(name).parents[1] / "0.jpg")
        members = members | {beside: data}
        (tmp_path / "in" / beside).write_bytes(data)
    source = tar_of(tmp_path / "t.tar", members) if archive else tmp_path / "in"
    dest = make(source, tmp_path / "one")
    assert read_manifest(dest / "train").classes == ("images",)
    assert read_manifest(dest / "train").samples == 3


def test_a_list_of_synsets_in_an_archive_has_to_confirm_its_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"a": "n00000001", "b": "n00000002"}
    members = {
        f"{top}/{names[folder]}/{base}": data
        for (top, folder, base), data in ((n.split("/"), d) for n, d in BOTH.items())
    }
    lines = b"n00000001 tench, Tinca tinca\nn00000002 shark\n"
    right = tar_of(tmp_path / "r.tar", members | {"LOC_synset_mapping.txt": lines})
    assert main([str(right), str(tmp_path / "r"), *SMALL]) == 0
    more = lines + b"n00000003 ray\n"
    wrong = tar_of(tmp_path / "w.tar", members | {"LOC_synset_mapping.txt": more})
    error = refused(capsys, wrong, tmp_path / "w")
    assert f"2 classes where {wrong}, LOC_synset_mapping.txt names 3; n00000003 is" in error


def test_what_is_left_of_a_cut_archive_is_still_two_sets(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "t.tar", BOTH)
    data = archive.read_bytes()
    archive.write_bytes(data[: data.index(b"val/b/4.jpg") + 600])
    dest = make(archive, tmp_path / "d", "--on-error", "skip")
    assert [read_manifest(dest / name).samples for name in ("train", "val")] == [2, 1]
    assert "cut inside member 'val/b/4.jpg'" in report(dest / "train")["t.tar"][1]


def test_an_image_that_is_left_out_is_reported_of_its_own_set(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "t.tar", BOTH | {"val/a/note.txt": b""})
    link = tarfile.TarInfo("val/a/5.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "nowhere.jpg"
    with tarfile.open(archive, "a") as tar:
        tar.addfile(link)
    dest = make(archive, tmp_path / "d", "--on-error", "skip")
    assert report(dest / "train") == {}
    said = report(dest / "val")
    assert said.keys() == {"val/a/5.jpg", "val/a/note.txt"}
    assert "'val/a/5.jpg' is a link to 'val/a/nowhere.jpg', which is" in said["val/a/5.jpg"][1]


def test_a_folder_outside_the_archive_is_no_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tar_of(tmp_path / "t.tar", {"../a/1.jpg": jpeg(1), "b/2.jpg": jpeg(2)})
    error = refused(capsys, archive, tmp_path / "d")
    assert f"{archive}: ../a/1.jpg leads out of the archive, so its folder is no class" in error
