from __future__ import annotations

import errno
import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from shard_samples import encode, jpeg, picture, tar_of, tars_of

from shard_tools.index_shards import main
from shard_tools.manifest import FORMATS, read_manifest
from shard_tools.subset import main as subset
from shard_tools.verify_shards import verify


def write_foreign(folder: Path, samples: list[dict], per_shard: int = 4) -> dict[str, bytes]:
    """Shards as webdataset's own ShardWriter makes them."""
    folder.mkdir(parents=True)
    pattern = str(folder / "part-%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=per_shard, verbose=0) as sink:
        for sample in samples:
            sink.write(sample)
    return tars_of(folder)


def check_against_webdataset(folder: Path, key: str = "jpg") -> None:
    """Sample by sample: our offsets give the bytes that webdataset's reader gives."""
    manifest = read_manifest(folder)
    urls = [manifest.path(number) for number in range(len(manifest.shards))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(theirs) == manifest.samples
    for number, sample in enumerate(theirs):
        shard, row = manifest.locate(np.array(number))
        with open(manifest.path(int(shard)), "rb") as file:
            file.seek(int(row["offset"]))
            assert file.read(int(row["length"])) == sample[key]
        assert row["label"] == int(sample.get("cls", b"-1"))


def test_shards_written_by_webdataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [
        {"__key__": f"dir/s{i:03d}", "jpg": jpeg(i, (20 + i, 30)), "cls": i % 3} for i in range(10)
    ]
    before = write_foreign(tmp_path / "f", samples)
    assert main([str(tmp_path / "f"), "--workers", "2"]) == 0
    assert "adopted 10 images of 3 classes in 3 shards" in capsys.readouterr().out
    assert before.items() <= tars_of(tmp_path / "f").items()  # nothing was rewritten
    check_against_webdataset(tmp_path / "f")
    manifest = read_manifest(tmp_path / "f")
    assert manifest.classes == ("0", "1", "2")
    assert manifest.index["width"].tolist() == list(range(20, 30))
    assert manifest.names[3] == "dir/s003"
    assert verify(str(tmp_path / "f"), decode=True, workers=1) == ([], [])


def test_img2dataset_layout_has_no_labels(tmp_path: Path) -> None:
    samples = [
        {
            "__key__": f"{i:09d}",
            "jpg": jpeg(i),
            "txt": "a caption. with dots",
            "json": {"url": f"http://x/{i}.jpg", "width": 24, "height": 18, "caption": "a"},
        }
        for i in range(6)
    ]
    write_foreign(tmp_path / "f", samples)
    (tmp_path / "f" / "00000_stats.json").write_text("{}")
    (tmp_path / "f" / "00000.parquet").write_bytes(b"PAR1")
    assert main([str(tmp_path / "f"), "--workers", "1"]) == 0
    check_against_webdataset(tmp_path / "f")
    manifest = read_manifest(tmp_path / "f")
    assert manifest.classes == ()
    assert manifest.names[0] == "http://x/0.jpg"


def test_names_of_one_url_are_the_keys(tmp_path: Path) -> None:
    """LAION has images with several captions; a name stands for one sample."""
    samples = [
        {"__key__": f"{i:09d}", "jpg": jpeg(i), "json": {"url": f"http://x/y/{min(i, 4)}.jpg"}}
        for i in range(6)
    ]
    write_foreign(tmp_path / "f", samples, per_shard=6)
    assert main([str(tmp_path / "f"), "--workers", "1"]) == 0
    names = list(read_manifest(tmp_path / "f").names)
    assert names == [*(f"http://x/y/{i}.jpg" for i in range(4)), "000000004", "000000005"]
    (tmp_path / "list.txt").write_text("http://x/y/2.jpg\n000000005\n")
    arguments = [tmp_path / "f", tmp_path / "g", "--names", tmp_path / "list.txt"]
    assert subset([*map(str, arguments)]) == 0
    assert list(read_manifest(tmp_path / "g").names) == ["http://x/y/2.jpg", "000000005"]


def test_braces_that_no_shell_expanded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "a-{0..3}.tar")]) == 2
    assert "a-{0..3}.tar: no such file or folder; give the folder" in capsys.readouterr().err


def test_timm_layout_with_class_names(tmp_path: Path) -> None:
    synsets = ["n01", "n02"]
    samples = [
        {
            "__key__": f"n0{i % 2 + 1}_{i}",
            "jpg": jpeg(i),
            "cls": i % 2,
            "json": {
                "filename": f"n0{i % 2 + 1}/{i}.JPEG",
                "label": i % 2,
                "synset": synsets[i % 2],
            },
        }
        for i in range(5)
    ]
    write_foreign(tmp_path / "f", samples)
    assert main([str(tmp_path / "f"), "--output", str(tmp_path / "index")]) == 0
    manifest = read_manifest(tmp_path / "index")
    assert manifest.classes == ("n01", "n02")
    assert manifest.names[1] == "n02/1.JPEG"
    assert not (tmp_path / "f" / "manifest.json").exists()
    check_against_webdataset(tmp_path / "index")


def test_labels_in_the_json_and_other_formats(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    rotated = encode(picture(2), quality=90, exif=exif)
    samples = [
        {"__key__": "a", "png": encode(picture(1), "PNG"), "json": {"label": 4}},
        {"__key__": "b", "jpeg": rotated, "json": {"label": 0}},
        {"__key__": "c", "jpg": jpeg(3), "seg.png": encode(picture(4), "PNG"), "cls": 2},
    ]
    write_foreign(tmp_path / "f", samples)
    (tmp_path / "classes.txt").write_text("zero\none\ntwo\nthree\nfour\n")
    assert main([str(tmp_path / "f"), "--classes-from", str(tmp_path / "classes.txt")]) == 0
    manifest = read_manifest(tmp_path / "f")
    assert manifest.index["label"].tolist() == [4, 0, 2]
    assert [FORMATS[number] for number in manifest.index["format"]] == ["png", "jpeg", "jpeg"]
    assert manifest.index["orientation"].tolist() == [1, 3, 1]
    assert manifest.classes[4] == "four"


def test_long_names_and_folders_of_tars(tmp_path: Path) -> None:
    """PAX headers before the members, tars in sub-folders."""
    long = "k" * 150
    for number in range(2):
        folder = tmp_path / "f" / f"sub{number}"
        folder.mkdir(parents=True)
        with tarfile.open(folder / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            for name, data in (
                (f"{long}{number}.jpg", jpeg(number)),
                (f"{long}{number}.cls", b"1"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    assert main([str(tmp_path / "f"), "--workers", "1"]) == 0
    manifest = read_manifest(tmp_path / "f")
    assert [shard.name for shard in manifest.shards] == ["sub0/x.tar", "sub1/x.tar"]
    check_against_webdataset(tmp_path / "f")


def test_unusable_samples_are_refused_or_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [
        {"__key__": "good", "jpg": jpeg(1), "cls": 0},
        {"__key__": "noimage", "txt": "x", "cls": 0},
        {"__key__": "text", "jpg": b"no image", "cls": 0},
    ]
    write_foreign(tmp_path / "f", samples)
    assert main([str(tmp_path / "f"), "--workers", "1"]) == 2
    assert "sample 'noimage': has no image, only cls, txt" in capsys.readouterr().err
    assert not (tmp_path / "f" / "manifest.json").exists()
    assert main([str(tmp_path / "f"), "--workers", "1", "--on-error", "skip"]) == 0
    assert read_manifest(tmp_path / "f").samples == 1
    lines = (tmp_path / "f" / "report.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == [
        "part-0000.tar/noimage",
        "part-0000.tar/text",
    ]
    assert main([str(tmp_path / "f")]) == 2
    assert "already has a manifest.json; --replace" in capsys.readouterr().err
    assert main([str(tmp_path / "f"), "--replace", "--on-error", "skip"]) == 0


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda data: data[:700], "not a readable"),
        (lambda data: data[:9000], "cut inside member 'a.jpg'"),
        (lambda data: data[: len(data) - 10240], "cut inside|end of the archive"),
        (lambda data: b"\x1f\x8b" + data, r"is compressed \(gzip\).* decompress it"),
        (lambda data: b"", "empty file"),
        (lambda data: bytes(10240), "holds no samples"),
        (lambda data: data + b"more", "data after the end of the archive"),
    ],
)
def test_damaged_tars_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: object, sentence: str
) -> None:
    samples = [{"__key__": "a", "jpg": jpeg(1, (900, 700)), "cls": 0}]
    write_foreign(tmp_path / "f", samples)
    path = tmp_path / "f" / "part-0000.tar"
    path.write_bytes(harm(path.read_bytes()))
    assert main([str(tmp_path / "f"), "--workers", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(sentence, error), error
    assert not (tmp_path / "f" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["in1k-{}-0000.tar", "{}/0000.tar"])
def test_tars_of_a_training_and_a_held_out_set_are_not_mixed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """timm's imagenet-1k-wds, as it is downloaded, has both in one folder."""
    tars = [tmp_path / "f" / name.format(split) for split in ("train", "validation")]
    for number, tar in enumerate(tars):
        tar.parent.mkdir(parents=True, exist_ok=True)
        tar_of(tar, {"a.jpg": jpeg(number), "a.cls": b"0"})
    assert main([str(tmp_path / "f"), "--workers", "1"]) == 2
    assert "holds a training set and a held-out one" in capsys.readouterr().err
    for given in (tars[:1], tars):  # one, or both as they are meant
        dest = tmp_path / str(len(given))
        assert main([*map(str, given), "--output", str(dest), "--workers", "1"]) == 0
        assert read_manifest(dest).samples == len(given)


def test_no_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no .tar files" in capsys.readouterr().err
    assert main([str(tmp_path / "x")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_a_full_disk_leaves_the_manifest_that_was_to_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tar_of(tmp_path / "a.tar", {"1.jpg": jpeg(1)})
    assert main([str(tmp_path), "--workers", "0"]) == 0
    tar_of(tmp_path / "b.tar", {"2.jpg": jpeg(2)})
    before = read_manifest(tmp_path)
    synced = []

    def fsync(handle: int) -> None:  # report, index, then the names
        synced.append(handle)
        if len(synced) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert main([str(tmp_path), "--workers", "0", "--replace"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert read_manifest(tmp_path) == before
    assert not list(tmp_path.glob(".*.tmp"))
    assert main([str(tmp_path), "--workers", "0", "--replace"]) == 0
    assert read_manifest(tmp_path).samples == 2
