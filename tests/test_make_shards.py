from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from shard_samples import encode, image_tree, jpeg, picture, tars_of
from torchvision.datasets import ImageFolder

from shard_tools import tarfmt
from shard_tools.checks import ImageFault, ImageSettings, check_image
from shard_tools.console import ToolError
from shard_tools.make_shards import byte_size, main
from shard_tools.manifest import read_manifest
from shard_tools.sources import open_source, read_item

COUNTS = {"n03": 17, "n01": 9, "n02": 30}
SMALL = ["--shard-size", "60KiB", "--workers", "1"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_tree(tmp_path_factory.mktemp("source") / "train", COUNTS)


@pytest.fixture(scope="module")
def shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("shards") / "train"
    assert main([str(tree), str(dest), *SMALL]) == 0
    return dest


def read_samples(folder: Path) -> list[dict]:
    """All samples through webdataset's own reader, in order."""
    manifest = read_manifest(folder)
    urls = [manifest.path(number) for number in range(len(manifest.shards))]
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


def make(source: Path, dest: Path, *options: str) -> Path:
    assert main([str(source), str(dest), *SMALL, *options]) == 0
    return dest


def report(folder: Path) -> dict[str, tuple[str, str]]:
    lines = map(json.loads, (folder / "report.jsonl").read_text().splitlines())
    return {line["name"]: (line["what"], line["reason"]) for line in lines}


# --- what the shards hold ---------------------------------------------------------------------


def test_webdataset_reads_what_torchvision_imagefolder_sees(tree: Path, shards: Path) -> None:
    folder, manifest = ImageFolder(str(tree)), read_manifest(shards)
    truth = {os.path.relpath(path, tree): label for path, label in folder.samples}
    assert list(manifest.classes) == folder.classes
    samples = read_samples(shards)
    assert len(samples) == manifest.samples == len(truth) == sum(COUNTS.values())
    seen = set()
    for number, sample in enumerate(samples):
        about = json.loads(sample["json"])
        assert {key for key in sample if not key.startswith("__")} == {"jpg", "cls", "json"}
        assert "." not in sample["__key__"]
        assert sample["jpg"] == (tree / about["name"]).read_bytes()
        assert int(sample["cls"]) == truth[about["name"]]
        assert about["synset"] == folder.classes[truth[about["name"]]]
        assert (about["width"], about["height"]) == Image.open(io.BytesIO(sample["jpg"])).size
        assert manifest.names[number] == about["name"]
        seen.add(about["name"])
    assert seen == set(truth)
    assert len({sample["__key__"] for sample in samples}) == len(samples)


def test_the_index_points_at_the_images(shards: Path) -> None:
    manifest = read_manifest(shards)
    for number, sample in enumerate(read_samples(shards)):
        shard, row = manifest.locate(np.array(number))
        data = Path(manifest.path(int(shard))).read_bytes()
        assert data[row["offset"] : row["offset"] + row["length"]] == sample["jpg"]
        assert row["label"] == int(sample["cls"])
        assert (row["width"], row["height"]) == Image.open(io.BytesIO(sample["jpg"])).size


def test_other_tar_readers_agree_and_nothing_depends_on_the_time(shards: Path) -> None:
    manifest = read_manifest(shards)
    for number, shard in enumerate(manifest.shards):
        path = manifest.path(number)
        with tarfile.open(path) as archive:
            members = archive.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o444)}
        assert len(members) == 3 * shard.samples
        listed = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True)
        assert listed.stdout.split() == [m.name for m in members]
        assert listed.stderr == ""
        assert os.path.getsize(path) % 10240 == 0


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=100).filter(lambda b: 0 not in b), st.integers(0, 8**11 - 1))
def test_a_header_is_the_one_of_tarfile(name: bytes, size: int) -> None:
    info = tarfile.TarInfo(name.decode("latin1"))
    info.size, info.mode, info.mtime = size, 0o444, 0
    expected = info.tobuf(tarfile.USTAR_FORMAT, encoding="latin1")
    if name.endswith(b"/"):
        return
    assert tarfmt.header(name, size) == expected


def test_shards_mix_the_classes_and_keep_to_their_size(shards: Path) -> None:
    manifest = read_manifest(shards)
    assert len(manifest.shards) >= 4
    for number, shard in enumerate(manifest.shards):
        labels = manifest.index["label"][manifest.starts[number] : manifest.starts[number + 1]]
        assert len(set(labels.tolist())) >= 2
        assert shard.bytes <= 60 << 10


# --- the same bytes whatever happens ----------------------------------------------------------


def test_bytes_do_not_depend_on_workers_or_file_order(
    tree: Path, shards: Path, tmp_path: Path
) -> None:
    other = tmp_path / "train"
    for path in sorted(tree.rglob("*.JPEG"), reverse=True):
        copy = other / path.relative_to(tree)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    assert main([str(other), str(tmp_path / "a"), "--shard-size", "60KiB", "--workers", "3"]) == 0
    assert tars_of(tmp_path / "a") == tars_of(shards)
    seeded = make(tree, tmp_path / "b", "--seed", "1")
    assert tars_of(seeded)["shard-000000.tar"] != tars_of(shards)["shard-000000.tar"]
    assert sorted(read_manifest(seeded).names) == sorted(read_manifest(shards).names)


def test_tasks_in_any_order_and_a_merge_make_the_same_shards(
    tree: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "d"
    for task in (2, 0):
        make(tree, dest, "--num-tasks", "3", "--task-id", str(task))
    assert not (dest / "manifest.json").exists()
    assert main([str(tree), str(dest), "--merge"]) == 2
    assert "shards are not finished yet: numbers 1, 4" in capsys.readouterr().err
    make(tree, dest, "--num-tasks", "3", "--task-id", "1")
    assert main([str(tree), str(dest), "--merge"]) == 0
    assert tars_of(dest) == tars_of(shards)
    assert not (dest / ".parts").exists()
    assert main([str(tree), str(dest), "--merge"]) == 0  # a second merge changes nothing
    assert tars_of(dest) == tars_of(shards)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("how", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_stopped_job_resumes_to_the_same_bytes(
    tmp_path: Path, how: signal.Signals, code: int, workers: int
) -> None:
    tree = image_tree(tmp_path / "train", {"a": 120, "b": 80})
    whole, dest = tmp_path / "whole", tmp_path / "dest"
    options = ["--shard-size", "30KiB"]
    assert main([str(tree), str(whole), *options, "--workers", "1"]) == 0
    script = Path(tarfmt.__file__).with_name("make_shards.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(tree), str(dest), *options, "--workers", str(workers)],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(dest.glob(".parts/0*.json")):
        time.sleep(0.005)
    process.send_signal(how)
    errors = process.communicate(timeout=60)[1]  # ends only when the workers have gone too
    assert process.returncode == code
    assert "Traceback" not in errors
    assert not (dest / "manifest.json").exists()
    parts = [path.stem for path in (dest / ".parts").glob("0*.json")]
    done = {path: path.stat().st_ino for path in (dest / f"shard-{n}.tar" for n in parts)}
    assert 0 < len(done) < len(list(whole.glob("shard-*.tar")))
    if how != signal.SIGKILL:
        assert errors.splitlines()[-1].startswith(f"error: stopped by {how.name}")
        assert list(dest.glob(".*.tmp")) == []
    (dest / ".shard-000001.tar.host.1.tmp").write_bytes(b"left by a killed process")
    assert main([str(tree), str(dest), *options]) == 2  # never by accident
    assert main([str(tree), str(dest), *options, "--resume", "--workers", "1"]) == 0
    assert tars_of(dest) == tars_of(whole)
    kept = {path: path.stat().st_ino for path in done}
    assert kept == done  # finished shards were not written again


def test_resume_does_nothing_when_finished_and_refuses_other_options(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = make(tree, tmp_path / "d")
    before = tars_of(dest)
    (dest / ".parts").mkdir()  # killed between its manifest and the clean-up
    make(tree, dest, "--resume")
    assert "already finished" in capsys.readouterr().out
    assert not (dest / ".parts").exists()
    assert main([str(tree), str(dest), *SMALL]) == 2
    assert "already holds shards" in capsys.readouterr().err
    assert main([str(tree), str(dest), *SMALL, "--resume", "--seed", "7"]) == 2
    assert "another source or of other options" in capsys.readouterr().err
    assert tars_of(dest) == before


# --- images of every kind ---------------------------------------------------------------------


def psnr(a: Image.Image, b: Image.Image) -> float:
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return 10 * np.log10(255**2 / max(np.mean(difference**2), 1e-12))


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """One class folder of files that are not what their name says, but can be used."""
    exif = Image.Exif()
    exif[0x0112] = 6
    adobe = encode(picture(5, mode="CMYK"), quality=95)
    kinds = {
        "plain.JPEG": jpeg(1),
        "png.JPEG": encode(picture(2), "PNG"),
        "gif.jpg": encode(picture(3).quantize(255), "GIF"),
        "rgba.png": encode(picture(4, mode="RGBA"), "PNG"),
        "cmyk.JPEG": adobe,
        "rotated.jpg": encode(picture(6), quality=90, exif=exif),
        "grey.jpg": encode(picture(7, mode="L"), quality=90),
        "deep.png": encode(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG"),
        "bitmap.JPG": encode(picture(8), "BMP"),
        "strip.tif": encode(picture(8), "TIFF"),
        "progressive.jpg": encode(picture(9), progressive=True, quality=90),
    }
    folder = tmp_path / "odd" / "class"
    folder.mkdir(parents=True)
    for name, data in kinds.items():
        (folder / name).write_bytes(data)
    (folder / "Thumbs.db").write_bytes(b"x")
    return folder.parent


def test_content_decides_and_conversions_are_reported(odd: Path, tmp_path: Path) -> None:
    dest = make(odd, tmp_path / "d")
    samples = {json.loads(sample["json"])["name"]: sample for sample in read_samples(dest)}
    same = {"plain.JPEG", "rotated.jpg", "grey.jpg", "progressive.jpg"}
    converted = {
        "png.JPEG": "PNG to JPEG",
        "gif.jpg": "GIF to JPEG",
        "rgba.png": "PNG to JPEG",
        "cmyk.JPEG": "CMYK to RGB",
        "deep.png": "PNG to JPEG",
        "bitmap.JPG": "BMP to JPEG",
        "strip.tif": "TIFF to JPEG",
    }
    assert len(samples) == len(same) + len(converted)
    expected = {f"class/{name}": ("converted", reason) for name, reason in converted.items()}
    expected["class/Thumbs.db"] = ("ignored", "not an image by its name")
    assert report(dest) == expected
    assert read_manifest(dest).made["report"]["converted"] == len(converted)
    for name in same:
        assert samples[f"class/{name}"]["jpg"] == (odd / "class" / name).read_bytes()
    for name in converted:
        stored = Image.open(io.BytesIO(samples[f"class/{name}"]["jpg"]))
        assert stored.format == "JPEG"
        assert json.loads(samples[f"class/{name}"]["json"])["converted"] == converted[name]
        if name == "deep.png":  # 16 bit: 40000 of 65535 is 156 of 255
            assert abs(np.asarray(stored).astype(int) - 156).max() <= 1
        else:
            assert psnr(stored.convert("RGB"), Image.open(odd / "class" / name).convert("RGB")) > 33


def test_orientation_is_recorded_and_not_applied(odd: Path, tmp_path: Path) -> None:
    for options in ([], ["--quality", "90"]):
        dest = make(odd, tmp_path / f"d{len(options)}", *options)
        manifest = read_manifest(dest)
        number = manifest.names.index("class/rotated.jpg")
        row = manifest.index[number]
        assert (row["orientation"], row["width"], row["height"]) == (6, 24, 18)
        assert json.loads(read_samples(dest)[number]["json"])["orientation"] == 6
        others = np.delete(manifest.index["orientation"], number)
        assert set(others.tolist()) == {1}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM"])
def test_any_damage_ends_in_an_image_or_a_reason(kind: str) -> None:
    """Random bytes in every format: never another exception, never an unreadable result."""
    draw = np.random.default_rng(0)
    whole = encode(picture(1).quantize() if kind == "GIF" else picture(1), kind)
    faults = 0
    for _ in range(150):
        data = bytearray(whole)
        for place in draw.integers(0, min(len(data), 600), draw.integers(1, 6)):
            data[place] = draw.integers(256)
        data = data[: draw.integers(len(data) // 2, len(data) * 2)]
        try:
            checked = check_image(bytes(data), ImageSettings())
        except ImageFault as fault:
            assert str(fault)  # noqa: PT017
            faults += 1
            continue
        image = Image.open(io.BytesIO(checked.data))
        image.load()
        assert image.size == (checked.width, checked.height)
        assert image.mode in ("L", "RGB")
    assert 0 < faults < 150


@pytest.mark.skipif(features.check("webp"), reason="this Pillow reads WebP")
def test_webp_without_a_decoder_is_named() -> None:
    with pytest.raises(ImageFault, match="WebP image, which this build of Pillow cannot read"):
        check_image(b"RIFF\x24\0\0\0WEBPVP8 " + bytes(24), ImageSettings())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"this is text", "not an image in a known format"),
        (jpeg(1, (64, 64))[:-300], "truncated"),
        (jpeg(1, (64, 64))[:-2], "truncated"),
        (jpeg(1, (64, 64))[:40] + b"\xff\xd9", ""),
        (encode(picture(1, (64, 64)), "PNG")[:-60], "truncated"),
        (encode(picture(1, (64, 64)), "PNG")[:60], ""),
    ],
)
def test_unusable_images_are_refused_or_listed(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, reason: str
) -> None:
    source = image_tree(tmp_path / "s", {"a": 3, "b": 3})
    (source / "a" / "bad.JPEG").write_bytes(data)
    assert main([str(source), str(tmp_path / "d"), *SMALL]) == 2
    errors = capsys.readouterr().err.splitlines()[-1]
    assert errors.startswith(f"error: {source}/a/bad.JPEG: ")
    assert reason in errors
    assert not (tmp_path / "d" / "manifest.json").exists()
    # The same job goes on when the user decides to leave the image out.
    make(source, tmp_path / "d", "--resume", "--on-error", "skip")
    ((name, (what, listed)),) = report(tmp_path / "d").items()
    assert (name, what) == ("a/bad.JPEG", "skipped")
    assert reason in listed
    assert "a/bad.JPEG" not in read_manifest(tmp_path / "d").names
    assert read_manifest(tmp_path / "d").samples == 6


def test_a_damaged_jpeg_that_still_decodes_is_kept_and_reported(tmp_path: Path) -> None:
    source = image_tree(tmp_path / "s", {"a": 2})
    data = jpeg(3, (64, 64))
    damaged = data[:-2] + b"\x11" * 64 + data[-2:]  # extraneous bytes before the end
    (source / "a" / "odd.JPEG").write_bytes(damaged)
    dest = make(source, tmp_path / "d")
    what, reason = report(dest)["a/odd.JPEG"]
    assert what == "damaged"
    assert "extraneous bytes" in reason
    assert read_manifest(dest).samples == 3


def test_headers_only_is_a_choice_that_sees_less(tmp_path: Path) -> None:
    source = image_tree(tmp_path / "s", {"a": 2})
    data = jpeg(3, (64, 64))
    scan = data.rindex(b"\xff\xda") + 40  # the second half of the picture is lost
    (source / "a" / "bad.JPEG").write_bytes(data[:scan] + b"\xff\xd9")
    assert main([str(source), str(tmp_path / "d"), *SMALL, "--on-error", "skip"]) == 0
    assert [what for what, _ in report(tmp_path / "d").values()] in (["skipped"], ["damaged"])
    dest = make(source, tmp_path / "e", "--check", "headers")
    assert read_manifest(dest).samples == 3
    assert report(dest) == {}
    (source / "a" / "bad.JPEG").write_bytes(data[:-40])  # a cut is seen in any case
    assert main([str(source), str(tmp_path / "f"), *SMALL, "--check", "headers"]) == 2


def test_a_file_that_changes_under_way_is_named(tree: Path, tmp_path: Path) -> None:
    source = open_source(image_tree(tmp_path / "s", {"a": 1}))
    (item,) = source.items
    (tmp_path / "s" / item.file).write_bytes(b"shorter")
    with pytest.raises(ToolError, match=r"a_000.JPEG: changed since it was listed"):
        read_item(source.root, item)
    (tmp_path / "s" / item.file).unlink()
    with pytest.raises(ToolError, match=r"a_000.JPEG: cannot be read \(No such file"):
        read_item(source.root, item)


def test_resizing_and_quality(tmp_path: Path) -> None:
    source = tmp_path / "s"
    (source / "a").mkdir(parents=True)
    for name, size in (("wide", (300, 100)), ("high", (90, 200)), ("small", (40, 30))):
        (source / "a" / f"{name}.jpg").write_bytes(jpeg(1, size))
    expected = {
        ("--resize-shorter", "60"): [(180, 60), (60, 133), (40, 30)],
        ("--max-side", "100"): [(100, 33), (45, 100), (40, 30)],
        ("--resize-shorter", "60", "--max-side", "90"): [(90, 30), (40, 90), (40, 30)],
        ("--quality", "50"): [(300, 100), (90, 200), (40, 30)],
    }
    for number, (options, sizes) in enumerate(expected.items()):
        dest = make(source, tmp_path / f"d{number}", *options)
        manifest = read_manifest(dest)
        found = {
            name: (int(row["width"]), int(row["height"]))
            for name, row in zip(manifest.names, manifest.index, strict=True)
        }
        assert [found[f"a/{name}.jpg"] for name in ("wide", "high", "small")] == sizes
        image = manifest.made["options"]["image"]
        for flag, value in zip(options[::2], options[1::2], strict=True):
            assert image[flag[2:].replace("-", "_")] == int(value)
        for name, sample in zip(manifest.names, read_samples(dest), strict=True):
            stored = Image.open(io.BytesIO(sample["jpg"]))
            assert stored.size == found[name]
            original = Image.open(source / name)
            reference = original.resize(stored.size, Image.Resampling.BICUBIC)
            assert psnr(stored, reference) > 30
            unchanged = sample["jpg"] == (source / name).read_bytes()
            assert unchanged == (name == "a/small.jpg" and options[0] != "--quality")


# --- other sources ----------------------------------------------------------------------------


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def images_of(folder: Path) -> dict[str, bytes]:
    """Original file name → image bytes, as stored."""
    samples = read_samples(folder)
    return {os.path.basename(json.loads(s["json"])["name"]): s["jpg"] for s in samples}


def labels_of(folder: Path) -> dict[str, str]:
    """Original file name → class name, by cls and the manifest."""
    manifest = read_manifest(folder)
    return {
        os.path.basename(json.loads(s["json"])["name"]): manifest.classes[int(s["cls"])]
        for s in read_samples(folder)
    }


def test_imagenets_tar_of_tars(tree: Path, shards: Path, tmp_path: Path) -> None:
    inner = {}
    for name in ("n03", "n01", "n02"):
        files = {path.name: path.read_bytes() for path in sorted((tree / name).iterdir())}
        inner[f"{name}.tar"] = tar_of(tmp_path / f"{name}.tar", files).read_bytes()
    outer = tar_of(tmp_path / "ILSVRC2012_img_train.tar", inner)
    assert tars_of(make(outer, tmp_path / "d")).keys() == tars_of(shards).keys()
    for name, data in tars_of(tmp_path / "d").items():  # the names are the same, so the order too
        assert name in ("manifest.json", "names.bin") or data == tars_of(shards)[name]


def test_a_tar_with_class_folders(tree: Path, shards: Path, tmp_path: Path) -> None:
    paths = sorted(tree.rglob("*.JPEG"))
    files = {str(path.relative_to(tree)): path.read_bytes() for path in paths}
    archive = tar_of(tmp_path / "set.tar", files | {"n01/readme.txt": b"x"})
    dest = make(archive, tmp_path / "d")
    assert tars_of(dest)["shard-000000.tar"] == tars_of(shards)["shard-000000.tar"]
    assert labels_of(dest) == labels_of(shards)
    assert report(dest) == {"n01/readme.txt": ("ignored", "not an image by its name")}
    mixed = tar_of(tmp_path / "mixed.tar", files | {"loose.jpg": jpeg(1)})
    assert main([str(mixed), str(tmp_path / "e"), *SMALL]) == 2


def test_imagenets_validation_tar_with_each_kind_of_labels(tmp_path: Path) -> None:
    files = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(i) for i in range(1, 8)}
    synsets = ["n2", "n1", "n3", "n1", "n2", "n2", "n3"]
    truth = dict(zip(files, synsets, strict=True))
    archive = tar_of(tmp_path / "val.tar", dict(reversed(files.items())))
    by_line = tmp_path / "by_line.txt"
    by_line.write_text("\n".join(synsets))
    by_name = tmp_path / "by_name.txt"
    by_name.write_text("\n".join(f"{name} {s}" for name, s in reversed(truth.items())))
    devkit = tmp_path / "ILSVRC2012_devkit_t12"
    (devkit / "data").mkdir(parents=True)
    # ILSVRC2012_IDs are not in synset order; the last row is an inner node of the tree.
    rows = [(1, "n3", "w", "g", 0), (2, "n1", "w", "g", 0), (3, "n2", "w", "g", 0)]
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children"]
    table = np.array([*rows, (4, "n9", "w", "g", 3)], dtype=[(name, "O") for name in fields])
    scipy.io.savemat(devkit / "data" / "meta.mat", {"synsets": table})
    numbers = {"n3": 1, "n1": 2, "n2": 3}
    lines = "\n".join(str(numbers[s]) for s in synsets)
    (devkit / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(lines + "\n")
    with tarfile.open(tmp_path / "devkit.tar.gz", "w:gz") as packed:
        packed.add(devkit, "ILSVRC2012_devkit_t12")
    for number, options in enumerate(
        [
            ("--synsets", str(by_line)),
            ("--synsets", str(by_name)),
            ("--devkit", str(devkit)),
            ("--devkit", str(tmp_path / "devkit.tar.gz")),
        ]
    ):
        dest = make(archive, tmp_path / f"d{number}", *options)
        assert labels_of(dest) == truth
        assert images_of(dest) == files
        assert read_manifest(dest).classes == ("n1", "n2", "n3")


def test_csv_and_jsonl(tree: Path, tmp_path: Path) -> None:
    paths = sorted(str(path.relative_to(tree)) for path in tree.rglob("*.JPEG"))
    labels = [path.split("/")[0] for path in paths]
    table = tree.parent / "list.csv"
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, ["label", "path"])
        writer.writeheader()
        writer.writerows({"path": f"train/{p}", "label": s} for p, s in zip(paths, labels))  # noqa: B905
    dest = make(table, tmp_path / "csv")
    assert labels_of(dest) == {os.path.basename(p): p.split("/")[0] for p in paths}
    lines = [{"path": path, "label": int(s[2])} for path, s in zip(paths, labels, strict=True)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dest = make(tmp_path / "list.jsonl", tmp_path / "jsonl", "--root", str(tree))
    assert labels_of(dest) == {os.path.basename(p): p[2] for p in paths}
    assert read_manifest(dest).classes == ("0", "1", "2", "3")
    (tmp_path / "bare.jsonl").write_text("\n".join(json.dumps({"path": path}) for path in paths))
    dest = make(tmp_path / "bare.jsonl", tmp_path / "bare", "--root", str(tree))
    assert all("cls" not in sample for sample in read_samples(dest))
    assert set(read_manifest(dest).index["label"].tolist()) == {-1}


def test_a_folder_without_classes_has_no_labels(tree: Path, tmp_path: Path) -> None:
    dest = make(tree / "n01", tmp_path / "d")
    manifest = read_manifest(dest)
    assert (manifest.samples, manifest.classes) == (9, ())
    assert all("cls" not in sample for sample in read_samples(dest))


def test_validation_classes_follow_the_training_set(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = image_tree(tmp_path / "val", {"n03": 2, "n02": 2})  # n01 has no validation image
    dest = make(val, tmp_path / "d", "--classes-from", str(shards))
    assert read_manifest(dest).classes == ("n01", "n02", "n03")
    labels = {
        os.path.dirname(n): i["label"]
        for n, i in zip(  # noqa: B905
            read_manifest(dest).names, read_manifest(dest).index
        )
    }
    assert labels == {"n02": 1, "n03": 2}
    image_tree(val, {"n09": 1})
    assert main([str(val), str(tmp_path / "e"), *SMALL, "--classes-from", str(shards)]) == 2
    assert "class 'n09' is not among the 3 given" in capsys.readouterr().err


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["empty"], "empty: holds no images"),
        (["list.csv"], "row 1 has no column `path`"),
        (["gone.jsonl"], "row 1: .*ghost.jpg: No such file"),
        (["text.tar"], "not a readable, uncompressed tar"),
        (["packed.tar"], "not a readable, uncompressed tar"),
        (["cut.tar"], "cut inside"),
        (["hidden"], ".ipynb_checkpoints: would become a class"),
        (["tree", "--quality", "0"], "--quality must lie between 1 and 100"),
        (["tree", "--max-side", "0"], "--max-side must be at least 1 pixel"),
        (["tree", "--num-tasks", "3", "--task-id", "3"], "--task-id must lie between 0 and"),
        (["tree", "--name", "a.b"], "--name must be a plain word"),
        (["tree", "--merge"], "nothing to merge"),
        (["."], "dest: lies inside . and would become part of it"),
        (["flat.tar", "--synsets", "two.txt"], "1 images, but 2 labels"),
        (["tree", "--classes-from", "list.csv"], "class 'a' is not among"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("file,label\nx.jpg,1\n")
    (tmp_path / "gone.jsonl").write_text('{"path": "ghost.jpg"}\n')
    (tmp_path / "text.tar").write_text("x" * 2000)
    (tmp_path / "two.txt").write_text("n1\nn2\n")
    image_tree(tmp_path / "tree", {"a": 2})
    image_tree(tmp_path / "hidden", {"a": 1, ".ipynb_checkpoints": 1})
    flat = tar_of(tmp_path / "flat.tar", {"x.JPEG": jpeg(1, (60, 60))})
    (tmp_path / "cut.tar").write_bytes(flat.read_bytes()[:900])
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as packed:
        packed.add(tmp_path / "tree", "tree")
    assert main([arguments[0], "dest", *arguments[1:], "--workers", "1"]) == 2
    captured = capsys.readouterr()
    assert re.search(sentence, captured.err), captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "dest" / "manifest.json").exists()


def test_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(["--help"])
    assert exit_code.value.code == 0
    assert "(default: 256MiB)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "size"), [("256MiB", 256 << 20), ("1.5K", 1536), ("7", 7), ("2gb", 2 << 30)]
)
def test_byte_sizes(text: str, size: int) -> None:
    assert byte_size(text) == size
