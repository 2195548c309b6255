"""CIFAR-10 in each of its forms gives the same images; a pickle that does more is refused."""

import io
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from shard_tools.cifar_batches import read_pickle
from shard_tools.cifar_images import image_place, main
from shard_tools.cli import ToolError
from shard_tools.make_shards import main as make_shards
from shard_tools.manifest import read_manifest

CLASSES = ["cat", "dog", "ship"]
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)
LABELS = [n % 3 for n in range(12)]
# Batch → rows of PIXELS.
PARTS = {"data_batch_1": slice(0, 3), "data_batch_2": slice(3, 6), "test_batch": slice(6, 12)}


def short(text):
    """A string as Python 2 pickled it."""
    return b"U" + bytes([len(text)]) + text


def python2(pixels, labels):
    """A batch as Python 2 and its numpy wrote the official ones, opcode by opcode."""
    rows, columns = pixels.shape
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x02(cnumpy\nndarray\nq\x03K\x00\x85"
    array += (
        short(b"b") + b"tRq\x04(K\x01" + b"K" + bytes([rows]) + b"M" + struct.pack("<H", columns)
    )
    array += b"\x86cnumpy\ndtype\nq\x05(" + short(b"u1") + b"K\x00K\x01tRq\x06(K\x03" + short(b"|")
    array += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    array += b"T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tb"
    names = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}q\x01(" + short(b"labels") + names + short(b"data") + array + b"u."


def python3(protocol):
    def write(pixels, labels):
        return pickle.dumps({b"labels": list(labels), b"data": pixels}, protocol=protocol)

    return write


def binary(pixels, labels):
    return np.column_stack([np.array(labels, np.uint8), pixels]).tobytes()


def tar_gz(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name if "/" in name else f"cifar-10-batches/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def batches(write, suffix, meta):
    files = {f"{n}{suffix}": write(PIXELS[rows], LABELS[rows]) for n, rows in PARTS.items()}
    return files | meta | {"readme.html": b"<a>"}


WAYS = {
    "python2": (python2, "", {"batches.meta": pickle.dumps({"label_names": CLASSES}, 2)}),
    "protocol2": (python3(2), "", {"batches.meta": pickle.dumps({b"label_names": CLASSES}, 4)}),
    "protocol4": (python3(4), "", {"batches.meta": pickle.dumps({b"label_names": CLASSES}, 0)}),
    "binary": (binary, ".bin", {"batches.meta.txt": b"cat\ndog\nship\n\n"}),
}


def image_of(row):
    return PIXELS[row].reshape(3, 32, 32).transpose(1, 2, 0)


def content(path):
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


@pytest.mark.parametrize("way", WAYS)
def test_the_official_archives_give_their_pixels_and_labels(way, tmp_path):
    source = tar_gz(tmp_path / "cifar.tar.gz", batches(*WAYS[way]))
    assert main([str(source), str(tmp_path / "images")]) == 0
    for split, first in (("train", 0), ("val", 6)):
        found = content(tmp_path / f"images/{split}.tar")
        assert len(found) == 6
        for number, (name, data) in enumerate(found.items()):
            assert name.split("/")[0] == CLASSES[LABELS[first + number]]
            assert np.array_equal(np.array(Image.open(io.BytesIO(data))), image_of(first + number))
    unpacked = tmp_path / "folder"
    with tarfile.open(source) as tar:
        tar.extractall(unpacked, filter="data")
    assert main([str(unpacked), str(tmp_path / "again")]) == 0
    for split in ("train", "val"):
        first, second = (tmp_path / f / f"{split}.tar" for f in ("images", "again"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("pack", ["folder", "zip", "tar"])
def test_image_folders_are_copied_as_they_are(pack, tmp_path):
    tree, wanted = tmp_path / "cifar10", {}
    for split, name in (("train", "train"), ("test", "val")):
        for number in range(6):
            path = tree / split / CLASSES[number % 3] / f"{number // 3}.png"  # names repeat
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image_of(number)).save(path)
            inside = f"{path.parent.name}/{path.name}"
            wanted.setdefault(name, {})[inside] = path.read_bytes()
    (tree / "train/cat/.DS_Store").write_bytes(b"x")
    source = tree
    if pack == "zip":
        source = tmp_path / "c.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for path in sorted(tree.rglob("*.*")):
                archive.write(path, path.relative_to(tmp_path))
    elif pack == "tar":
        source = tmp_path / "c.tar"
        with tarfile.open(source, "w") as tar:
            tar.add(tree, "./cifar10")
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert {split: content(tmp_path / f"out/{split}.tar") for split in wanted} == wanted


def test_the_tars_can_be_sharded(tmp_path):
    source = tar_gz(tmp_path / "cifar.tar.gz", batches(*WAYS["binary"]))
    assert main([str(source), str(tmp_path / "images")]) == 0
    words = [str(tmp_path / "images/train.tar"), str(tmp_path / "shards"), "--workers", "0"]
    assert make_shards(words) == 0
    manifest = read_manifest(tmp_path / "shards")
    assert manifest.samples == 6
    assert manifest.classes == tuple(CLASSES)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def evil_global(module, name):
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(U\x04echotR."


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (evil_global("os", "system"), "names os.system"),
        (evil_global("builtins", "eval"), "names builtins.eval"),
        (evil_global("numpy", "load"), "names numpy.load"),
        (pickle.dumps(np.zeros(3)), "not uint8"),
        (pickle.dumps({b"data": np.array([{}, "x"], object)}), "not uint8"),
        (pickle.dumps({b"data": np.asfortranarray(PIXELS[:2])}, 4), "by rows"),
        (pickle.dumps([1, 2]), "no dictionary"),
        (pickle.dumps({1: 2}), "not text"),
        (pickle.dumps({b"a": {1, 2}}, 4), "damaged: KeyError"),  # sets are no opcode of ours
        (b"", "damaged"),
        (python2(PIXELS[:3], [0, 1, 2])[:-4000], "damaged|truncated"),
        # Changing a stand-in: BUILD with attributes for the function `_encode`.
        (b"\x80\x02c_codecs\nencode\nN}(U\x01aK\x01u\x86b.", "changes what is not an array"),
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 50) + b".", "damaged: KeyError"),  # a petabyte
    ],
)
def test_a_pickle_that_names_or_builds_more_is_refused(data, sentence):
    with pytest.raises(ToolError, match=rf"^data_batch_1: not a batch .*({sentence})"):
        read_pickle(data, "data_batch_1")


def test_no_code_of_a_pickle_runs(tmp_path, capsys):
    made = tmp_path / "made"
    files = batches(*WAYS["protocol4"])
    files["data_batch_2"] = pickle.dumps({b"data": Evil(made), b"labels": [0]})
    source = tar_gz(tmp_path / "cifar.tar.gz", files)
    assert main([str(source), str(tmp_path / "out")]) == 2
    assert "data_batch_2: not a batch" in capsys.readouterr().err
    assert not made.exists()
    assert list((tmp_path / "out").iterdir()) == []


def without(files, name):
    return {key: value for key, value in files.items() if key != name}


def tree(*splits, classes=2):
    """An ImageFolder of empty image files."""
    return {f"{split}/c{n}/1.png": b"" for split in splits for n in range(classes)}


def meta_of(names):
    """The python version with these classes."""
    return batches(*WAYS["python2"]) | {"batches.meta": pickle.dumps({"label_names": names}, 2)}


def bad_sources():
    binary_files, python_files = batches(*WAYS["binary"]), batches(*WAYS["python2"])
    label = bytes([3]) + bytes(3072)
    cifar100 = pickle.dumps({b"data": PIXELS[:2], b"fine_labels": [0, 1]})
    return [
        (without(binary_files, "test_batch.bin"), "lacks test_batch.bin of CIFAR-10"),
        (without(binary_files, "batches.meta.txt"), "lacks batches.meta.txt"),
        ({"test_batch.bin": b"", "batches.meta.txt": b"a b"}, "lacks data_batch_1"),
        (binary_files | {"data_batch_1.bin": bytes(3072)}, "data_batch_1.bin: 3072 bytes"),
        (binary_files | {"data_batch_1.bin": b""}, "data_batch_1.bin: 0 bytes"),
        (binary_files | {"data_batch_1.bin": label}, "label that is not from 0 to 2"),
        (binary_files | {"batches.meta.txt": b"\n"}, "names no classes"),
        (binary_files | {"batches.meta.txt": b"cat\ncat\nship"}, "names the class 'cat' twice"),
        (binary_files | {"batches.meta.txt": b"cat\n..\na/b"}, "'..', which cannot be"),
        (meta_of(["cat", "a/b", "ship"]), "'a/b', which cannot be the name of a folder"),
        (meta_of(["cat", "\ud800", "ship"]), "which cannot be the name of a folder"),
        (meta_of(["cat", "a\nb", "ship"]), "which cannot be the name of a folder"),
        (
            binary_files | {"data_batch_2.bin": binary_files["test_batch.bin"]},
            "test_batch.bin is the same as data_batch_2.bin",
        ),
        (binary_files | python_files, "python or of the binary version"),
        (binary_files | {"train/cat/1.png": b""}, "image files and batches"),
        (python_files | {"data_batch_1": cifar100}, "is of CIFAR-100"),
        (python_files | {"data_batch_1": python2(PIXELS[:3], [0, 1])}, "3072] and 2 labels"),
        (without(python_files, "data_batch_1"), "lacks data_batch_1 of CIFAR-10"),
        (
            binary_files | {"data_batch_4.bin": binary_files["data_batch_1.bin"]},
            "lacks data_batch_3.bin of CIFAR-10",
        ),
        ({"readme.html": b""}, "holds no training images"),
        ({"train": b"", "test": b"", "meta": b"", "file.txt~": b""}, "is CIFAR-100; give"),
        ({"train.bin": b"", "test.bin": b"", "fine_label_names.txt": b""}, "is CIFAR-100; give"),
        (tree("train", "test", classes=11), "has 11 classes, CIFAR-10 has 10"),
        (tree("train", "test", "valid"), "holds test and valid; give one of them"),
        (tree("train") | {"train/cat/a/b.png": b"", "train/cat/a_b.png": b""}, "cat/a_b.png of"),
        (tree("train", "test") | {"../train/cat/9.png": b""}, "train/cat/9.png leads out"),
        ({"train/cat/\udce9.png": b""}, "is not UTF-8"),
        ({"train/cat/1.png": b"", "test/dog/1.png": b""}, "'cat' is in one of them only"),
    ]


@pytest.mark.parametrize(("files", "sentence"), bad_sources(), ids=lambda v: str(v)[:30])
def test_a_bad_source_is_one_sentence(files, sentence, tmp_path, capsys):
    source = tar_gz(tmp_path / "c.tar.gz", files)
    assert main([str(source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_archives_are_one_sentence(tmp_path, capsys):
    whole = tar_gz(tmp_path / "whole.tar.gz", batches(*WAYS["binary"])).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.zip").write_text("no archive")
    for name in ("cut.tar.gz", "text.zip", "absent"):
        assert main([str(tmp_path / name), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert str(tmp_path / name) in error
        assert error.count("\n") == 1


def test_a_zip_that_holds_more_than_it_declares_takes_little_memory(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/a/1.png", bytes(64 << 20))
        entry = archive.infolist()[0]
        entry.file_size = 10_000  # written at the end, in the list of contents
    tracemalloc.start()
    try:
        assert main([str(tmp_path / "c.zip"), str(tmp_path / "out")]) == 2
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "c.zip: is damaged" in capsys.readouterr().err
    assert peak < 16 << 20


def written(source, dest):
    assert main([str(source), str(dest)]) == 0
    return {split: set(content(dest / f"{split}.tar")) for split in ("train", "val")}


def test_odd_names_of_folders_and_files(tmp_path, capsys):
    """From Windows, in capitals, with a system's leftovers."""
    names = [f"{split}/{n}/{base}" for split, base in (("Train", "1.PNG"), ("VALID", "1.Jpg"))
             for n in ("cat", "dog")]  # fmt: skip
    with zipfile.ZipFile(tmp_path / "c.tar.gz", "w") as archive:
        for name in [*names, "Thumbs.db", "__MACOSX/train/cat/._1.png", ".DS_Store", "look.png"]:
            info = zipfile.ZipInfo("x")
            info.filename = f"mine\\{name}".replace("/", "\\")
            archive.writestr(info, b"x")
    found = written(tmp_path / "c.tar.gz", tmp_path / "out")
    assert found == {"train": {"cat/1.PNG", "dog/1.PNG"}, "val": {"cat/1.Jpg", "dog/1.Jpg"}}
    output = capsys.readouterr()
    assert output.out.endswith("out: 2 training and 2 test images of 2 classes\n")
    first, second = output.err.splitlines()
    assert first.endswith("1 image files are not in train/<class>/ or test/<class>/ and were left "
                          "out, such as mine/look.png")  # fmt: skip
    assert second.endswith("has 2 training and 2 test images of 2 classes; CIFAR-10 has 50000 and "
                           "10000 of 10")  # fmt: skip


def test_batches_in_capitals_and_twice_are_known(tmp_path, capsys):
    files = {name.upper(): data for name, data in batches(*WAYS["binary"]).items()}
    source = tar_gz(tmp_path / "c.tar.gz", files)
    assert len(written(source, tmp_path / "out")["train"]) == 6
    files |= {name.lower(): data for name, data in files.items()}
    assert main([str(tar_gz(tmp_path / "d.tar.gz", files)), str(tmp_path / "again")]) == 2
    assert "holds data_batch_1.bin more than once" in capsys.readouterr().err


def test_linked_folders_are_followed_once(tmp_path):
    for name in tree("train", "test"):
        path = tmp_path / "disk" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    (tmp_path / "c").mkdir()
    for split in ("train", "test"):
        (tmp_path / "c" / split).symlink_to(tmp_path / "disk" / split)
    (tmp_path / "disk/train/c0/loop").symlink_to(tmp_path / "disk/train")
    found = written(tmp_path / "c", tmp_path / "out")
    assert found == {split: {"c0/1.png", "c1/1.png"} for split in ("train", "val")}


@pytest.mark.parametrize("name", ["train/c0/2.png", "train/c2"])
def test_a_link_to_nothing_is_not_lost_in_silence(name, tmp_path, capsys):
    for file in tree("train", "test"):
        path = tmp_path / "c" / file
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    (tmp_path / "c" / name).symlink_to(tmp_path / "gone")
    assert main([str(tmp_path / "c"), str(tmp_path / "out")]) == 2
    assert f"{name} is a link to nothing; mend or remove it" in capsys.readouterr().err


def test_class_names_are_whole_lines(tmp_path):
    files = batches(*WAYS["binary"]) | {"batches.meta.txt": b"sports car\ndog\r\nship\n\n"}
    source = tar_gz(tmp_path / "c.tar.gz", files)
    found = written(source, tmp_path / "out")["train"]
    assert {name.split("/")[0] for name in found} == {"sports car", "dog", "ship"}


def test_batches_are_not_held_without_limit(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shard_tools.cifar_images.MOST_BYTES", 20_000)
    source = tar_gz(tmp_path / "c.tar.gz", batches(*WAYS["binary"]))
    assert main([str(source), str(tmp_path / "out")]) == 2
    assert "has over 20000 bytes of batches" in capsys.readouterr().err


def test_a_link_in_a_tar_is_not_lost_in_silence(tmp_path, capsys):
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for name in [*tree("train", "test"), "train/c0/2.png"]:
            info = tarfile.TarInfo(name)
            if name.endswith("2.png"):
                info.type, info.linkname = tarfile.LNKTYPE, "train/c0/1.png"
            tar.addfile(info, io.BytesIO())
    assert main([str(tmp_path / "c.tar"), str(tmp_path / "out")]) == 2
    assert "train/c0/2.png is a link and not a file" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz", "tar.bz2"])
def test_a_tar_is_cut_or_damaged_between_its_members(suffix, tmp_path, capsys):
    """tarfile alone takes such a place for the end."""
    mode = f"w:{suffix[4:]}"
    for number, bad in enumerate((bytes(range(256)) * 2, b"", b"x" * 100)):
        path = tmp_path / f"{number}.{suffix}"
        with tarfile.open(path, mode) as tar:
            for name in tree("train", "test"):
                info = tarfile.TarInfo(name)
                tar.addfile(info, io.BytesIO())
            tar.fileobj.write(bad)
            tar.closed = True  # without its end
            tar.fileobj.close()
        assert main([str(path), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "neither a member nor the end is at byte 2048" in error
        assert error.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_pictures_of_any_kind_become_shards(tmp_path):
    """Grey, with transparency, of a palette, of another size."""
    rgb = Image.fromarray(image_of(0))
    kinds = {"L.png": rgb.convert("L"), "RGBA.png": rgb.convert("RGBA"),
             "P.png": rgb.convert("P"), "large.png": rgb.resize((64, 64)),
             "cmyk.jpg": rgb.convert("CMYK")}  # fmt: skip
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / "c" / split / label).mkdir(parents=True)
            for name, image in kinds.items():
                image.save(tmp_path / "c" / split / label / name)
    assert main([str(tmp_path / "c"), str(tmp_path / "images")]) == 0
    for split in ("train", "val"):
        words = [str(tmp_path / f"images/{split}.tar"), str(tmp_path / split), "--workers", "0"]
        assert make_shards(words) == 0
        assert read_manifest(tmp_path / split).samples == 10


def test_where_an_image_belongs():
    assert image_place("test/cifar10/TRAIN/cat/1.jpg") == ("train", "cat", "1.jpg")
    assert image_place("testing/train/1.jpg") == ("val", "train", "1.jpg")
    assert image_place("cifar10/train/cat/1.jpg") == ("train", "cat", "1.jpg")
    assert image_place("./test/cat/a/1.jpg") == ("val", "cat", "a_1.jpg")
    assert image_place("train/1.jpg") is None  # no class
    assert image_place("train/../x/cat/1.jpg") is None
    assert image_place("train/cat/labels.txt") is None
