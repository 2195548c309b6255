"""ImageNet in the layouts that people have: the same bytes and labels out of each."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import scipy.io
from pyarrow import parquet
from shard_samples import SMALL, image_tree, jpeg, labels_of, read_samples, report, tar_of, tars_of

from shard_tools.make_shards import main
from shard_tools.manifest import read_manifest

SYNSETS = ("n01440764", "n01443537", "n02119789")
TRUTH = [2, 0, 1, 0, 2, 2]  # class of validation image 1, 2, …


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}"


def val_files() -> dict[str, bytes]:
    return {f"{val_name(i)}.JPEG": jpeg(100 + i) for i in range(1, len(TRUTH) + 1)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ in class folders."""
    root = tmp_path_factory.mktemp("imagenet")
    image_tree(root / "train", dict.fromkeys(SYNSETS, 4))
    for number, (name, data) in enumerate(val_files().items()):
        folder = root / "val" / SYNSETS[TRUTH[number]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def wanted(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    return sharded(folders, tmp_path_factory.mktemp("wanted"))


def sharded(source: Path, dest: Path, *options: str) -> dict[str, dict[str, bytes]]:
    """All files of both splits but the manifest, which names its source."""
    assert main([str(source), str(dest), *SMALL, *options]) == 0
    found = {split: tars_of(dest / split) for split in ("train", "val")}
    for split, files in found.items():
        assert read_manifest(dest / split).classes == SYNSETS
        for name in ("manifest.json", "report.jsonl"):
            files.pop(name)
        assert report(dest / split) == {}
    return found


def devkit(folder: Path) -> Path:
    """ILSVRC2012_devkit_t12: its ILSVRC2012_IDs are not in synset order."""
    (folder / "data").mkdir(parents=True)
    order = [SYNSETS[2], SYNSETS[0], SYNSETS[1]]
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children"]
    rows = [(i, synset, "w", "g", 0) for i, synset in enumerate(order, 1)]
    table = np.array([*rows, (4, "n00000009", "w", "g", 3)], dtype=[(f, "O") for f in fields])
    scipy.io.savemat(folder / "data" / "meta.mat", {"synsets": table})
    lines = "".join(f"{order.index(SYNSETS[i]) + 1}\n" for i in TRUTH)
    (folder / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)
    return folder


def train_tars(folders: Path, scratch: Path) -> dict[str, bytes]:
    tars = {}
    for synset in reversed(SYNSETS):
        files = {p.name: p.read_bytes() for p in sorted((folders / "train" / synset).iterdir())}
        tars[f"{synset}.tar"] = tar_of(scratch / f"{synset}.tar", files).read_bytes()
        (scratch / f"{synset}.tar").unlink()
    return tars


def original(folders: Path, root: Path) -> None:
    root.mkdir()
    tar_of(root / "ILSVRC2012_img_train.tar", train_tars(folders, root))
    tar_of(root / "ILSVRC2012_img_val.tar", val_files())
    kit = devkit(root / "kit")
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as packed:
        packed.add(kit, "ILSVRC2012_devkit_t12")
    shutil.rmtree(kit)


def original_unpacked_kit(folders: Path, root: Path) -> None:
    original(folders, root)
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    devkit(root / "ILSVRC2012_devkit_t12")


def kaggle(folders: Path, root: Path) -> None:
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    shutil.copytree(folders / "train", data / "train")
    (data / "val").mkdir()
    (data / "test").mkdir()
    for name, content in val_files().items():
        (data / "val" / name).write_bytes(content)
        (data / "test" / name.replace("val", "test")).write_bytes(content)
    lines = [f"{val_name(i)},{SYNSETS[c]} 1 2 3 4 " for i, c in enumerate(TRUTH, 1)]
    (root / "LOC_val_solution.csv").write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(["ImageId,PredictionString", *reversed(lines)]).encode()
    )
    mapping = "\r\n".join(f"{synset} a tench, Tinca {i}" for i, synset in enumerate(SYNSETS))
    (root / "LOC_synset_mapping.txt").write_text("\ufeff" + mapping)


def hugging_face(folders: Path, root: Path) -> None:
    (root / "data").mkdir(parents=True)
    files = {
        f"{path.stem}_{path.parent.name}.JPEG": path.read_bytes()
        for path in sorted((folders / "train").rglob("*.JPEG"))
    }
    names = list(files)
    for number in range(2):
        part = {name: files[name] for name in names[number::2]}
        tar = tar_of(root / "part.tar", part).read_bytes()
        (root / "data" / f"train_images_{number}.tar.gz").write_bytes(gzip.compress(tar))
    val = {
        f"./{name[:-5]}_{SYNSETS[c]}.JPEG": data
        for (name, data), c in zip(val_files().items(), TRUTH, strict=True)
    }
    tar = tar_of(root / "part.tar", val).read_bytes()
    (root / "data" / "val_images.tar.gz").write_bytes(gzip.compress(tar))
    (root / "part.tar").unlink()


def hugging_face_parquet(folders: Path, root: Path) -> None:
    (root / "data").mkdir(parents=True)
    train = [
        (f"{path.stem}_{path.parent.name}.JPEG", path.read_bytes())
        for path in sorted((folders / "train").rglob("*.JPEG"), key=lambda path: path.stem[-3:])
    ]
    val = [
        (f"{name[:-5]}_{SYNSETS[c]}.JPEG", data)
        for (name, data), c in zip(val_files().items(), TRUTH, strict=True)
    ]
    for part in range(2):
        parquet_file(root / f"data/train-0000{part}-of-00002.parquet", train[part::2])
    parquet_file(root / "data/validation-00000-of-00001.parquet", val)
    test = [("ILSVRC2012_test_00000001.JPEG", jpeg(200))]
    parquet_file(root / "data/test-00000-of-00001.parquet", test)


def parquet_file(path: Path, images: list[tuple[str, bytes]]) -> None:
    """Labels are class indices, -1 where they are withheld."""
    labels = [next((i for i, s in enumerate(SYNSETS) if s in name), -1) for name, _ in images]
    values = [{"bytes": data, "path": name} for name, data in images]
    parquet.write_table(pyarrow.table({"image": values, "label": labels}), path)


def flat_val(folders: Path, root: Path) -> None:
    shutil.copytree(folders / "train", root / "train")
    (root / "val").mkdir()
    for name, content in val_files().items():
        (root / "val" / name).write_bytes(content)
    devkit(root / "ILSVRC2012_devkit_t12")


def class_tars_in_train(folders: Path, root: Path) -> None:
    (root / "train").mkdir(parents=True)
    for name, data in train_tars(folders, root).items():
        (root / "train" / name).write_bytes(data)
    shutil.copytree(folders / "val", root / "val")


LAYOUTS = [
    original,
    original_unpacked_kit,
    kaggle,
    hugging_face,
    hugging_face_parquet,
    flat_val,
    class_tars_in_train,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_the_same_bytes(
    layout: Callable[[Path, Path], None],
    folders: Path,
    wanted: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path("My Drive")
    layout(folders, root)
    assert sharded(root, Path("shards")) == wanted
    left = sorted(path.name for path in Path("shards").iterdir())
    assert left == ["train", "val"]  # and no unpacked archives


def test_kaggles_folder_by_each_of_its_levels(
    folders: Path, wanted: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    kaggle(folders, tmp_path / "k")
    for number, below in enumerate(("ILSVRC", "ILSVRC/Data/CLS-LOC")):
        assert sharded(tmp_path / "k" / below, tmp_path / f"d{number}") == wanted


def test_the_parts_alone_give_the_same(
    folders: Path, wanted: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    original(folders, tmp_path / "o")
    train, val = tmp_path / "train", tmp_path / "val"
    assert main([str(tmp_path / "o" / "ILSVRC2012_img_train.tar"), str(train), *SMALL]) == 0
    kit = tmp_path / "o" / "ILSVRC2012_devkit_t12.tar.gz"
    options = ("--classes-from", str(train), "--devkit", str(kit))
    archive = tmp_path / "o" / "ILSVRC2012_img_val.tar"
    assert main([str(archive), str(val), *SMALL, *options]) == 0
    for split in (train, val):
        tar = "shard-000000.tar"
        assert (split / tar).read_bytes() == wanted[split.name][tar]


def test_class_tars_that_hold_their_folder(tmp_path: Path) -> None:
    """As `tar -cf n01440764.tar n01440764` makes them; the folder of another class is none."""
    (tmp_path / "tars").mkdir()
    for number, synset in enumerate(SYNSETS):
        tar_of(tmp_path / "tars" / f"{synset}.tar", {f"{synset}/{number}.jpg": jpeg(number)})
    assert main([str(tmp_path / "tars"), str(tmp_path / "d"), *SMALL]) == 0
    made = read_manifest(tmp_path / "d")
    assert made.classes == SYNSETS
    assert made.samples == len(SYNSETS)
    for name, label in zip(made.names, made.index["label"], strict=True):
        assert name == f"{SYNSETS[label]}/{label}.jpg"
    tar_of(tmp_path / "tars" / f"{SYNSETS[0]}.tar", {f"{SYNSETS[1]}/0.jpg": jpeg(0)})
    assert main([str(tmp_path / "tars"), str(tmp_path / "e"), *SMALL]) == 2


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "tar.zst", "wrapped", "folder of gz"])
def test_imagenet_21k_is_one_set_of_class_tars(
    kind: str, folders: Path, wanted: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    tars = train_tars(folders, tmp_path)
    source = tmp_path / "winter21_whole"
    if kind.startswith("folder"):
        source.mkdir()
        for name, data in tars.items():
            packed = kind == "folder of gz"
            (source / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    else:
        prefix = "winter21_whole/" if kind == "wrapped" else ""
        source = tar_of(tmp_path / "whole.tar", {prefix + k: v for k, v in tars.items()})
        if kind == "tar.gz":
            source = tmp_path / "whole.tar.gz"
            source.write_bytes(gzip.compress((tmp_path / "whole.tar").read_bytes()))
        elif kind == "tar.zst":
            if not shutil.which("zstd"):
                pytest.skip("the program zstd is not installed")
            subprocess.run(["zstd", "-q", source], check=True)
            source = tmp_path / "whole.tar.zst"
    assert main([str(source), str(tmp_path / "d"), *SMALL]) == 0
    assert read_manifest(tmp_path / "d").classes == SYNSETS
    assert tars_of(tmp_path / "d")["shard-000000.tar"] == wanted["train"]["shard-000000.tar"]
    assert not (tmp_path / "d" / ".parts").exists()
    assert main([str(source), str(tmp_path / "s"), *SMALL, "--splits"]) == 0
    assert read_manifest(tmp_path / "s" / "train").samples == 12


def test_one_wrapping_folder_is_no_class(tmp_path: Path) -> None:
    for number, prefix in enumerate(("val/", "./val/", "a/b/")):
        archive = tar_of(
            tmp_path / f"{number}.tar", {prefix + k: v for k, v in val_files().items()}
        )
        dest = tmp_path / f"d{number}"
        labels = tmp_path / "labels.txt"
        labels.write_text("".join(f"{SYNSETS[c]}\n" for c in TRUTH))
        assert main([str(archive), str(dest), *SMALL]) == 0
        assert read_manifest(dest).classes == ()
        assert main([str(archive), str(dest) + "l", *SMALL, "--synsets", str(labels)]) == 0
        assert read_manifest(str(dest) + "l").classes == SYNSETS
    # A synset above all images is the class of a set of one class.
    files = {f"train/{SYNSETS[0]}/{i}.jpg": jpeg(i) for i in range(3)}
    archive = tar_of(tmp_path / "one.tar", files)
    assert main([str(archive), str(tmp_path / "one"), *SMALL]) == 0
    assert read_manifest(tmp_path / "one").classes == (SYNSETS[0],)
    files |= {f"train/{SYNSETS[1]}/deep/er/{i}.jpg": jpeg(i) for i in range(3)}
    archive = tar_of(tmp_path / "two.tar", files)
    assert main([str(archive), str(tmp_path / "two"), *SMALL]) == 0
    assert read_manifest(tmp_path / "two").classes == SYNSETS[:2]


def remove(*names: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for name in names:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def cut(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        os.truncate(root / name, os.path.getsize(root / name) // 3)

    return change


def other_mapping(root: Path) -> None:
    (root / "LOC_synset_mapping.txt").write_text(f"{SYNSETS[0]} tench\nn09999999 fish\n")


def shorter_mapping(root: Path) -> None:
    (root / "LOC_synset_mapping.txt").write_text(f"{SYNSETS[0]} tench\n{SYNSETS[2]} fish\n")


@pytest.mark.parametrize(
    ("layout", "change", "sentence"),
    [
        (original, remove("ILSVRC2012_img_val.tar"), "ILSVRC2012_img_val.tar: is missing"),
        (original, remove("ILSVRC2012_img_train.tar"), "ILSVRC2012_img_train.tar: is missing"),
        (original, remove("ILSVRC2012_devkit_t12.tar.gz"), "devkit_t12.tar.gz: is missing"),
        (original, cut("ILSVRC2012_img_val.tar"), "ILSVRC2012_img_val.tar: cut"),
        (kaggle, remove("LOC_val_solution.csv"), "labels to match the classes; --synsets or"),
        (kaggle, other_mapping, "3 classes where"),
        (kaggle, shorter_mapping, f"names 2; {SYNSETS[1]} is only in one of them"),
        (kaggle, remove("ILSVRC/Data/CLS-LOC/val"), "val: is missing beside"),
        (
            kaggle,
            remove("ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000003.JPEG"),
            "1 of 6 labelled images are not there, such as ILSVRC2012_val_00000003",
        ),
        (flat_val, remove("val/ILSVRC2012_val_00000003.JPEG"), "1 of 6 labelled images"),
        (flat_val, remove("ILSVRC2012_devkit_t12"), "has no class folders or labels"),
        (hugging_face, remove("data/train_images_0.tar.gz"), "train_images_0 is missing"),
        (hugging_face, remove("data/val_images.tar.gz"), "val_images.tar.gz: is missing"),
        (hugging_face, cut("data/val_images.tar.gz"), "damaged or cut gzip stream"),
        (class_tars_in_train, cut("train/n01443537.tar"), "n01443537.tar: cut"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_written(
    layout: Callable[[Path, Path], None],
    change: Callable[[Path], None],
    sentence: str,
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout(folders, tmp_path / "root")
    change(tmp_path / "root")
    assert main([str(tmp_path / "root"), str(tmp_path / "d"), *SMALL]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "d").rglob("*.tar")) or "gz" in sentence


def test_splits_are_no_classes(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "root").mkdir()
    shutil.copytree(folders / "train", tmp_path / "root" / "train")
    assert main([str(tmp_path / "root"), str(tmp_path / "d"), *SMALL]) == 2
    assert "root: holds train, which are not classes" in capsys.readouterr().err
    (tmp_path / "root" / "test").mkdir()  # ImageNet's, which has no classes
    (tmp_path / "root" / "test" / "1.JPEG").write_bytes(jpeg(1))
    assert main([str(tmp_path / "root"), str(tmp_path / "d"), *SMALL]) == 2
    assert "root: holds test and train, which are not classes" in capsys.readouterr().err


def packed(root: Path, kind: str) -> Path:
    """The folder itself, or an archive of what is in it."""
    if kind == "folder":
        return root
    archive = shutil.make_archive(str(root) + "-packed", kind, root)
    return Path(archive)


PACKED = ["folder", "tar", "gztar", "zip"]


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize(
    ("inside", "said"),
    [
        ("train val", "validation set in val"),
        ("training testing", "validation set in testing"),
        ("Train Val Test", "validation set in Val; not read: Test"),
        ("x/train x/valid", "validation set in valid"),
    ],
)
def test_both_sets_are_found_where_others_put_them(
    inside: str, said: str, kind: str, folders: Path, wanted: dict[str, dict[str, bytes]],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """mnist_png, Kaggle's archives that nest a folder, fast.ai's imagenette2.tgz."""
    train, val, *others = inside.split()
    shutil.copytree(folders / "train", tmp_path / "root" / train)
    shutil.copytree(folders / "val", tmp_path / "root" / val)
    for other in others:
        shutil.copytree(folders / "val", tmp_path / "root" / other)
    assert sharded(packed(tmp_path / "root", kind), tmp_path / "d") == wanted
    out = capsys.readouterr().out
    assert all(part in out for part in said.split("; "))
    if kind != "folder":
        assert ", train: 12 images of 3 classes" in out
        assert ", val: 6 images of 3 classes" in out


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("layout", [kaggle, flat_val], ids=lambda layout: layout.__name__)
def test_a_flat_validation_set_in_an_archive_has_its_labels(
    layout: Callable[[Path, Path], None], kind: str, folders: Path,
    wanted: dict[str, dict[str, bytes]], tmp_path: Path,
) -> None:  # fmt: skip
    layout(folders, tmp_path / "a" / "root")
    archive = packed(tmp_path / "a" / "root", kind)
    if layout is flat_val and kind != "folder":
        devkit(tmp_path / "a" / "ILSVRC2012_devkit_t12")  # beside the archive
    assert main([str(archive), str(tmp_path / "d"), *SMALL]) == 0
    for split, files in wanted.items():
        found = tars_of(tmp_path / "d" / split)
        assert {name: found[name] for name in files} == files
        assert "in none of the sets" not in str(report(tmp_path / "d" / split))


def test_labels_that_are_given_are_taken_before_those_that_lie_there(
    folders: Path, tmp_path: Path
) -> None:
    kaggle(folders, tmp_path / "k")
    given = [SYNSETS[(c + 1) % 3] for c in TRUTH]
    (tmp_path / "val.txt").write_text("\n".join(given))
    options = ("--synsets", str(tmp_path / "val.txt"))
    assert main([str(tmp_path / "k"), str(tmp_path / "d"), *SMALL, *options]) == 0
    assert labels_of(tmp_path / "d" / "val") == {
        f"{val_name(number)}.JPEG": synset for number, synset in enumerate(given, 1)
    }


@pytest.mark.parametrize("kind", PACKED)
def test_tiny_imagenet(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for number, synset in enumerate(SYNSETS):
        image_tree(root / "train" / synset, {"images": 3})
        (root / "train" / synset / f"{synset}_boxes.txt").write_text(f"{number}\n")
    images = {f"val_{i}.JPEG": jpeg(50 + i) for i in range(6)}
    lines = [f"{name}\t{SYNSETS[TRUTH[i]]}\t0\t1\t2\t3\n" for i, name in enumerate(images)]
    for folder in ("val", "test"):
        (root / folder / "images").mkdir(parents=True)
        for name, data in images.items():
            (root / folder / "images" / name).write_bytes(data)
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    assert main([str(packed(root, kind)), str(tmp_path / "d"), *SMALL]) == 0
    assert read_manifest(tmp_path / "d" / "train").classes == SYNSETS
    assert read_manifest(tmp_path / "d" / "train").samples == 9
    found = {s["jpg"]: int(s["cls"]) for s in read_samples(tmp_path / "d" / "val")}
    assert found == {data: TRUTH[i] for i, data in enumerate(images.values())}
    (root / "val" / "val_annotations.txt").write_text("".join(lines[1:]) + "val_0.JPEG\n")
    assert main([str(packed(root, kind)), str(tmp_path / "e"), *SMALL]) == 2


@pytest.mark.parametrize("kind", PACKED[1:])
def test_an_archive_of_both_that_is_cut(
    kind: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = packed(Path(shutil.copytree(folders, tmp_path / "root")), kind)
    os.truncate(archive, os.path.getsize(archive) * 2 // 3)
    assert main([str(archive), str(tmp_path / "d"), *SMALL]) == 2
    error = capsys.readouterr().err
    assert f"{archive}: " in error
    assert "cut" in error or "what follows is missing" in error
    assert not list((tmp_path / "d").rglob("*.tar"))


def test_a_finished_folder_is_said_before_an_archive_is_unpacked(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = packed(Path(shutil.copytree(folders, tmp_path / "root")), "gztar")
    assert main([str(archive), str(tmp_path / "d"), *SMALL]) == 0
    assert "unpacking" in capsys.readouterr().out
    assert main([str(archive), str(tmp_path / "d"), *SMALL]) == 2
    captured = capsys.readouterr()
    assert "unpacking" not in captured.out
    assert "already holds shards" in captured.err


@pytest.mark.parametrize("kind", PACKED[1:])
def test_an_archive_of_both_is_known_by_its_content(
    kind: str, folders: Path, wanted: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    archive = packed(Path(shutil.copytree(folders, tmp_path / "root")), kind)
    assert sharded(archive.rename(tmp_path / "download"), tmp_path / "d") == wanted


@pytest.mark.parametrize("kind", PACKED[2:])
def test_a_finished_archive_is_not_unpacked_to_be_resumed(
    kind: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But where a set is missing, or the archive or an option is another."""

    def resumed(*options: str) -> tuple[int, bool, int]:
        code = main([str(archive), str(dest), *SMALL, "--resume", *options])
        out = capsys.readouterr().out
        return code, "unpacking" in out, out.count("already finished, nothing to do")

    archive, dest = packed(Path(shutil.copytree(folders, tmp_path / "root")), kind), tmp_path / "d"
    assert resumed() == (0, True, 0)
    assert resumed() == (0, False, 2)
    assert not (dest / ".parts").exists()
    assert resumed("--seed", "5") == (2, True, 0)
    shutil.rmtree(dest / ".parts", ignore_errors=True)
    shutil.rmtree(dest / "val")
    assert resumed() == (0, True, 1)
    os.utime(archive)
    assert resumed() == (0, True, 2)


def test_nor_is_a_folder_of_archives(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kaggle's and Hugging Face's archives of each set; but where one is another file."""

    def resumed() -> tuple[int, bool, int]:
        code = main([str(tmp_path / "source"), str(dest), *SMALL, "--resume"])
        out = capsys.readouterr().out
        return code, "unpacking" in out, out.count("already finished, nothing to do")

    dest = tmp_path / "d"
    (tmp_path / "source").mkdir()
    for name in ("train", "val"):
        shutil.make_archive(str(tmp_path / "source" / name), "gztar", folders / name)
    assert resumed() == (0, True, 0)
    assert resumed() == (0, False, 2)
    os.utime(tmp_path / "source/val.tar.gz")
    assert resumed() == (0, True, 2)


def test_tasks_and_merge_of_both_splits(
    folders: Path, wanted: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    dest = str(tmp_path / "d")
    for task in ("1", "0"):
        assert main([str(folders), dest, *SMALL, "--num-tasks", "2", "--task-id", task]) == 0
    assert main([str(folders), dest, "--merge"]) == 0
    for split, files in wanted.items():
        assert (Path(dest) / split / "shard-000000.tar").read_bytes() == files["shard-000000.tar"]
    assert main([str(folders), dest, *SMALL, "--resume"]) == 0  # finished, nothing to do


def test_a_class_list_in_each_form_that_people_have(folders: Path, tmp_path: Path) -> None:
    order = (SYNSETS[1], "n09999999", SYNSETS[0], SYNSETS[2])
    for number, text in enumerate(
        [
            "\n".join(order),
            "\ufeff" + "\r\n".join(order) + "\r\n",
            "\n".join(f"{synset} tench, Tinca tinca" for synset in order),
            "\n".join(f"{synset},tench" for synset in order),
            "\n".join(f"{synset}\ttench" for synset in order),
        ]
    ):
        path = tmp_path / "classes.txt"
        path.write_bytes(text.encode())
        dest = tmp_path / f"d{number}"
        source = str(folders / "train")
        assert main([source, str(dest), *SMALL, "--classes-from", str(path)]) == 0
        assert read_manifest(dest).classes == order
        assert sorted(set(read_manifest(dest).index["label"].tolist())) == [0, 2, 3]
