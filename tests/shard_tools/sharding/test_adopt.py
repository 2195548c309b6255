"""Adopting tars as people have them: what is taken, what is refused, and that verify agrees."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from shard_samples import encode, jpeg, picture, report, tar_of

from shard_tools.index_shards import main
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.subset import main as subset
from shard_tools.tar import read_samples
from shard_tools.verify_shards import main as verify_main
from shard_tools.verify_shards import verify

COPY = ("--copy", "--workers", "0")  # of subset.py, in this process


def adopt(*arguments: object) -> int:
    return main([*map(str, arguments), "--workers", "0"])


def adopted(folder: Path, *options: object) -> Manifest:
    """The manifest that is written; verify agrees with it."""
    assert adopt(folder, *options) == 0
    assert verify(str(folder), decode=True, workers=0)[0] == []
    return read_manifest(folder)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence of a command that writes nothing."""
    capsys.readouterr()
    assert adopt(*arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    texts = list(map(str, arguments))
    folder = Path(texts[texts.index("--output") + 1] if "--output" in texts else texts[0])
    assert not (folder / "manifest.json").exists()
    return error[0]


def stored(manifest: Manifest) -> list[bytes]:
    """The image bytes of all samples, by index and offset."""
    found = []
    for number, row in enumerate(manifest.index):
        shard, _ = manifest.locate(number)
        with open(manifest.path(int(shard)), "rb") as file:
            file.seek(int(row["offset"]))
            found.append(file.read(int(row["length"])))
    return found


def samples(count: int, first: int = 0, **fields: Any) -> dict[str, bytes]:
    """Members `sN.cls`, `sN.jpg` and those of `fields`, each a function of the number."""
    members = {}
    for number in range(first, first + count):
        inner = {"cls": b"%d" % (number % 3), "jpg": jpeg(number)}
        inner |= {name.replace("_", "."): make(number) for name, make in fields.items()}
        members |= {f"s{number}.{name}": data for name, data in inner.items() if data is not None}
    return members


# The image


@pytest.mark.parametrize(
    ("field", "kind"),
    [
        ("JPG", "JPEG"), ("Jpeg", "JPEG"), ("jpe", "JPEG"), ("JFIF", "JPEG"), ("PNG", "PNG"),
        ("bmp", "BMP"), ("gif", "GIF"), ("ppm", "PPM"), ("input.jpg", "JPEG"),
        ("INPUT.PNG", "PNG"), ("image.jpeg", "JPEG"), ("img.png", "PNG"), ("tif", "TIFF"),
        ("TIFF", "TIFF"),
    ],
)  # fmt: skip
def test_known_fields_of_images_in_any_case(field: str, kind: str, tmp_path: Path) -> None:
    data = [encode(picture(number), kind) for number in range(2)]
    members = {"a.cls": b"0", f"a.{field}": data[0], "b.cls": b"1", f"b.{field}": data[1]}
    tar_of(tmp_path / "x.tar", members)
    assert stored(adopted(tmp_path)) == data
    theirs = webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)
    assert [sample[field.lower()] for sample in theirs] == data


def test_a_field_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {
        "a.left.jpg": jpeg(1), "a.right.jpg": jpeg(2), "b.LEFT.jpg": jpeg(3), "b.txt": b"x",
    }  # fmt: skip
    tar_of(tmp_path / "x.tar", members)
    error = refused(capsys, tmp_path)
    assert "x.tar: sample 'a': has no image, only left.jpg, right.jpg; --image-field names" in error
    error = refused(capsys, tmp_path, "--image-field", "*.jpg")
    assert "has 2 images, left.jpg and right.jpg" in error
    error = refused(capsys, tmp_path, "--image-field", "right.jpg")
    assert "sample 'b': has no field right.jpg, only left.jpg, txt" in error
    assert stored(adopted(tmp_path, "--image-field", ".Left.JPG")) == [jpeg(1), jpeg(3)]
    both = adopted(tmp_path, "--replace", "--image-field", "right.jpg;left.jpg")
    assert stored(both) == [jpeg(2), jpeg(3)]


def test_the_first_known_field_is_preferred_and_never_one_of_two_equals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = encode(picture(9), "PNG")
    tar_of(tmp_path / "x.tar", {"a.png": png, "a.jpg": jpeg(1), "a.image.jpg": jpeg(2)})
    assert stored(adopted(tmp_path)) == [jpeg(1)]
    tar_of(tmp_path / "x.tar", {"a.image.jpg": jpeg(1), "a.input.jpg": jpeg(2)})
    (tmp_path / "manifest.json").unlink()
    assert "has 2 images, image.jpg and input.jpg" in refused(capsys, tmp_path)


# Samples of a tar


def test_fields_that_are_not_adjacent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = samples(24)
    by_field = sorted(members, key=lambda name: name.endswith(".cls"))
    tar_of(tmp_path / "x.tar", {name: members[name] for name in by_field})
    error = refused(capsys, tmp_path)
    assert "x.tar: sample 's0': its fields are not adjacent in the tar" in error
    error = refused(capsys, tmp_path, "--on-error", "skip")
    assert "no sample of the tars can be used; the first: x.tar/s0: its fields are not" in error
    tar_of(tmp_path / "y.tar", samples(5))
    manifest = adopted(tmp_path, "--on-error", "skip")
    assert [shard.name for shard in manifest.shards] == ["y.tar"]
    assert manifest.index["label"].tolist() == [0, 1, 2, 0, 1]
    assert len(report(tmp_path)) == 24


def test_a_key_that_is_used_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar_of(tmp_path / "x.tar", samples(3))
    with tarfile.open(tmp_path / "x.tar", "a") as archive:
        info = tarfile.TarInfo("s0.jpg")
        info.size = len(jpeg(7))
        archive.addfile(info, io.BytesIO(jpeg(7)))
    assert "sample 's0': its key is used twice in this tar" in refused(capsys, tmp_path)
    assert stored(adopted(tmp_path, "--on-error", "skip")) == [jpeg(1), jpeg(2)]
    tar_of(tmp_path / "x.tar", {"a.jpg": jpeg(1), "a.JPG": jpeg(2)})
    assert "has field 'jpg' twice" in refused(capsys, tmp_path, "--output", tmp_path / "o")


def test_equal_keys_in_two_shards(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"d{number}").mkdir()
        tar_of(tmp_path / f"d{number}" / "x.tar", {"a.jpg": jpeg(number), "b.jpg": jpeg(number)})
    manifest = adopted(tmp_path)
    assert stored(manifest) == [jpeg(0), jpeg(0), jpeg(1), jpeg(1)]
    assert manifest.names == ("d0/x/a", "d0/x/b", "d1/x/a", "d1/x/b")
    assert subset([str(tmp_path), str(tmp_path / "few"), "--count", "3"]) == 0
    assert verify(str(tmp_path / "few"), decode=True, workers=0)[0] == []


def test_what_is_no_sample_is_listed(tmp_path: Path) -> None:
    others = {"README": b"x", "._s0.jpg": b"x", "d/.DS_Store": b"x", "__meta__": b"x", "a.": b"x"}
    tar_of(tmp_path / "x.tar", samples(1) | others)
    assert adopted(tmp_path).samples == 1
    assert set(report(tmp_path)) == {f"x.tar/{name}" for name in others}
    assert {what for what, _ in report(tmp_path).values()} == {"ignored"}


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name in ("\udce9.jpg", "a\nb.jpg", "\udce9"):
            info = tarfile.TarInfo(name)
            info.size = len(jpeg(1))
            archive.addfile(info, io.BytesIO(jpeg(1)))
    assert adopted(tmp_path).names == ("\\udce9", "a b")


def test_links_are_followed_and_what_leads_nowhere_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name, data in samples(2).items():
        (tree / name).write_bytes(data)
    (tree / "t0.jpg").hardlink_to(tree / "s0.jpg")
    (tree / "t0.cls").write_bytes(b"2")
    (tree / "t1.jpg").symlink_to("s1.jpg")
    (tree / "t1.cls").write_bytes(b"0")
    folder = tmp_path / "tars"
    folder.mkdir()
    pack = ["tar", "--sort=name", "-C", tree, "-cf", folder / "x.tar", "."]
    subprocess.run(pack, check=True)
    manifest = adopted(folder)
    assert stored(manifest) == [jpeg(0), jpeg(1), jpeg(0), jpeg(1)]
    assert manifest.index["label"].tolist() == [0, 1, 2, 0]
    for number, choice in enumerate((["--fraction", "1"], ["--fraction", "1", *COPY])):
        few = tmp_path / f"few{number}"
        assert subset([str(folder), str(few), *choice]) == 0
        assert verify(str(few), decode=True, workers=0)[0] == []
        assert read_manifest(few).index["label"].tolist() == [0, 1, 2, 0]
    (folder / "manifest.json").unlink()
    (tree / "t1.jpg").unlink()
    (tree / "t1.jpg").symlink_to("/elsewhere/u.jpg")
    subprocess.run(pack, check=True)
    error = refused(capsys, folder)
    assert "sample './t1': its field 'jpg' is a link to 'elsewhere/u.jpg', which is not" in error
    assert adopted(folder, "--on-error", "skip").samples == 3


def test_samples_that_share_an_image_keep_their_own_fields(tmp_path: Path) -> None:
    """By label where they differ, else in order."""
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for key, label in (("a", b"0"), ("b", b"0"), ("c", b"1")):
            for name, data in (("cls", label), ("jpg", jpeg(1)), ("txt", key.encode())):
                info = tarfile.TarInfo(f"{key}.{name}")
                if name == "jpg" and key != "a":
                    info.type, info.linkname = tarfile.LNKTYPE, "a.jpg"
                    archive.addfile(info)
                else:
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    adopted(tmp_path)
    (tmp_path / "classes.txt").write_text("1\n")
    for number, (choice, texts) in enumerate(
        (
            (["--fraction", "1"], [b"a", b"b", b"c"]),
            (["--classes", str(tmp_path / "classes.txt")], [b"c"]),
        )
    ):
        few, index = tmp_path / f"few{number}", tmp_path / f"index{number}"
        assert subset([str(tmp_path), str(index), *choice]) == 0
        assert verify(str(index), decode=True, workers=0)[0] == []
        assert subset([str(tmp_path), str(few), *choice, *COPY]) == 0
        copies = webdataset.WebDataset(read_manifest(few).path(0), shardshuffle=False)
        assert [sample["txt"] for sample in copies] == texts


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (tarfile.FIFOTYPE, "is a FIFO"),
        (tarfile.CHRTYPE, "is a device"),
        (tarfile.BLKTYPE, "is a device"),
        (b"Z", "of the unknown type"),
    ],
)
def test_special_members(
    kind: bytes, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar_of(tmp_path / "x.tar", samples(2))
    with tarfile.open(tmp_path / "x.tar", "a") as archive:
        for name in ("t.jpg", "pipe"):
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info)
    assert re.search(f"sample 't': its field 'jpg' .*{problem}", refused(capsys, tmp_path))
    assert adopted(tmp_path, "--on-error", "skip").samples == 2
    assert problem in report(tmp_path)["x.tar/t"][1]
    assert problem in report(tmp_path)["x.tar/pipe"][1]


def test_a_sparse_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tree").mkdir()
    for name, data in samples(1).items():
        (tmp_path / "tree" / name).write_bytes(data)
    with open(tmp_path / "tree" / "t.jpg", "wb") as file:
        file.write(jpeg(1))
        file.truncate(1 << 20)
    for kind in ("gnu", "oldgnu", "posix"):
        folder = tmp_path / kind
        folder.mkdir()
        pack = ["tar", "-S", f"--format={kind}", "--sort=name", "-C", tmp_path / "tree"]
        subprocess.run([*pack, "-cf", folder / "x.tar", "."], check=True)
        assert "its field 'jpg' is stored sparse" in refused(capsys, folder)
        assert adopted(folder, "--on-error", "skip").samples == 1


# Whole tars


def end_of(path: Path) -> int:
    """Bytes of a tar without its end blocks and their padding."""
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    return last.offset_data + last.size + -last.size % 512


@pytest.mark.parametrize("blocks", [0, 1])
def test_tars_without_their_end_blocks(
    blocks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tar_of(tmp_path / "x.tar", samples(4))
    path.write_bytes(path.read_bytes()[: end_of(path) + 512 * blocks])
    error = refused(capsys, tmp_path)
    assert "x.tar: cut at byte" in error
    assert "--lenient" in error
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert stored(adopted(tmp_path, "--lenient")) == [sample["jpg"] for sample in theirs]
    assert len(theirs) == 4
    for number, choice in enumerate((["--count", "2"], ["--count", "2", *COPY])):
        few = tmp_path / f"few{number}"
        assert subset([str(tmp_path), str(few), *choice]) == 0
        assert verify(str(few), decode=True, workers=0)[0] == []
    path.write_bytes(path.read_bytes()[: end_of(path) - 600])  # also then a cut is a cut
    assert "x.tar: cut inside member" in refused(
        capsys, tmp_path, "--lenient", "--output", few / "o"
    )


def test_a_tar_without_samples_is_passed_with_skip_and_verify_agrees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar_of(tmp_path / "full.tar", samples(3))
    tar_of(tmp_path / "empty.tar", {})
    (tmp_path / "nothing.tar").write_bytes(b"")
    tar_of(tmp_path / "readme.tar", {"README": b"x"})
    cut = tar_of(tmp_path / "cut.tar", samples(2))
    cut.write_bytes(cut.read_bytes()[:1500])
    assert "cut.tar: " in refused(capsys, tmp_path)
    assert "empty.tar: holds no samples" in refused(capsys, tmp_path / "empty.tar")
    manifest = adopted(tmp_path, "--on-error", "skip")
    assert [shard.name for shard in manifest.shards] == ["full.tar"]
    left_out = {"cut.tar", "empty.tar", "nothing.tar", "readme.tar"}
    assert set(report(tmp_path)) == left_out
    remarks = verify(str(tmp_path), decode=False, workers=0)[1]
    assert [line.split(": ")[0] for line in remarks] == sorted(left_out)
    tar_of(tmp_path / "new.tar", samples(1))
    assert verify(str(tmp_path), decode=False, workers=0)[0] == [
        "new.tar: this tar is not in the manifest"
    ]


def hostile(size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """The header of `a.jpg` with any bytes in its size field."""
    block = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[156:157] = size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_an_image_that_no_memory_should_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Members of 2 GiB and of 9 GiB, past what an octal size can say; the file has holes."""
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        folder = tmp_path / str(kind)
        folder.mkdir()
        after = tar_of(folder / "after.part", samples(1)).read_bytes()
        with open(folder / "x.tar", "wb") as file:
            for name, size in (("large.jpg", 2 << 30), ("larger.jpg", 9 << 30)):
                info = tarfile.TarInfo(name)
                info.size = size
                file.write(info.tobuf(kind))
                file.seek(size, os.SEEK_CUR)
            file.write(after)
        contents = read_samples(folder / "x.tar").samples
        assert [sample.key for sample in contents] == ["large", "larger", "s0"]
        (offset, size) = contents[2].fields["jpg"]
        with open(folder / "x.tar", "rb") as file:
            file.seek(offset)
            assert file.read(size) == jpeg(0)
        error = refused(capsys, folder)
        assert "sample 'large': its image is 2147483648 bytes long, the limit is" in error


def base_256(size: int) -> bytes:
    return (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, "big", signed=True)


def pax(text: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    record = b"%d " % (len(text) + 1 + len(str(len(text) + 4))) + text
    return hostile(b"%011o\0" % len(record), kind) + record.ljust(512, b"\0")


@pytest.mark.parametrize(
    "head",
    [
        pax(b"size=4611686018427387904\n"), pax(b"size=-512\n"), pax(b"size=1e9\n"),
        pax(b"size=9999999999999999999999999999999\n"), pax(b"size=999999999999\n"),
        pax(b"size=4611686018427387904\n", tarfile.XGLTYPE),
        pax(b"GNU.sparse.size=4611686018427387904\n"), pax(b"hdrcharset=" + b"x" * 400 + b"\n"),
        hostile(base_256(2**62)), hostile(base_256(2**80)), hostile(base_256(-512)),
        hostile(base_256(-1)), hostile(b"77777777777\0"), hostile(b"9" * 12),
        hostile(base_256(2**62), tarfile.XHDTYPE), hostile(b"77777777777\0", tarfile.XGLTYPE),
        hostile(base_256(2**62), tarfile.GNUTYPE_LONGNAME), hostile(base_256(2**40), b"S"),
        hostile(base_256(-512), tarfile.GNUTYPE_LONGLINK), hostile(base_256(2**62), b"D"),
    ],
)  # fmt: skip
def test_sizes_that_no_tar_has_are_a_sentence(
    head: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tar_of(tmp_path / "good.part", samples(2)).read_bytes()
    (tmp_path / "x.tar").write_bytes(head + hostile(b"00000000000\0") + good)
    error = refused(capsys, tmp_path)
    assert "x.tar: " in error
    assert len(error) < 500
    if adopt(tmp_path, "--on-error", "skip", "--lenient") == 0:  # only a.jpg itself is unusable
        assert stored(read_manifest(tmp_path)) == [jpeg(0), jpeg(1)]
    else:
        assert "error: " in capsys.readouterr().err


def test_compressed_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tar_of(tmp_path / "x.part", samples(2)).read_bytes()
    for name, kind in (("x.tar.gz", "gzip"), ("x.tgz", "gzip"), ("x.tar", "gzip")):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(gzip.compress(data))
        for given in (folder, folder / name):
            error = refused(capsys, given)
            assert f"{name}: is compressed ({kind})" in error
            assert "decompress it" in error
    folder = tmp_path / "zstd"
    folder.mkdir()
    subprocess.run(
        ["zstd", "-q", tmp_path / "x.part", "-o", folder / "y.tar.zst"], check=True, timeout=60
    )
    assert "y.tar.zst: is compressed (zstd)" in refused(capsys, folder)
    tar_of(folder / "z.tar", samples(2))
    assert "y.tar.zst: is compressed (zstd)" in refused(capsys, folder)
    assert adopted(folder, "--on-error", "skip").samples == 2
    assert report(folder)["y.tar.zst"][0] == "skipped"


def test_which_tars_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    for number, name in enumerate(("b.tar", "sub/A.TAR", "._b.tar", "__MACOSX/b.tar")):
        tar_of(tmp_path / name, samples(2, 2 * number))
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert [shard.name for shard in adopted(tmp_path).shards] == ["b.tar", "sub/A.TAR"]
    tar_of(tmp_path / "c.tar", samples(1, 9))
    one = [tmp_path / "c.tar", tmp_path / "sub" / ".." / "b.tar", "--output", tmp_path / "o"]
    assert adopt(*one) == 0  # these tars, whatever else is beside them
    assert verify(str(tmp_path / "o"), decode=False, workers=0) == ([], [])
    error = refused(capsys, tmp_path / "c.tar", tmp_path / "sub/../c.tar", "--output", "o")
    assert "c.tar: the same tar is given twice, also as " in error
    (tmp_path / "sub" / "link.tar").symlink_to("../b.tar")
    error = refused(capsys, tmp_path, "--output", tmp_path / "p")
    assert f"link.tar: the same tar is given twice, also as {tmp_path / 'b.tar'}" in error


def test_what_is_no_file_is_never_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar_of(tmp_path / "good.tar", samples(2))
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "link.tar").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.tar").symlink_to("self.tar")
    assert "link.tar: is not a regular file, or is a link to nothing" in refused(capsys, tmp_path)
    assert "pipe.tar: is not a regular file" in refused(capsys, tmp_path / "pipe.tar")
    assert adopted(tmp_path, "--on-error", "skip").samples == 2
    assert set(report(tmp_path)) == {"pipe.tar", "link.tar", "self.tar"}


def test_a_disk_that_cannot_be_read_names_the_tar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first bytes of this process's memory are a file that answers EIO."""
    path = tar_of(tmp_path / "x.tar", samples(2))
    adopted(tmp_path)
    path.unlink()
    path.symlink_to("/proc/self/mem")
    assert verify_main([str(tmp_path), "--workers", "0"]) == 1
    out = capsys.readouterr().out
    assert out.count("fault: x.tar: cannot be read (Input/output error)") == 1
    (tmp_path / "manifest.json").unlink()
    assert "x.tar: cannot be read (Input/output error)" in refused(capsys, tmp_path)


# Labels and classes


@pytest.mark.parametrize("text", ["cat", "", "-1", "1.5", "1e3", "0x1", "1 2", "9" * 5000, "²"])
def test_a_cls_that_is_no_class_index_names_its_sample(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar_of(tmp_path / "x.tar", samples(2) | {"t.cls": text.encode(), "t.jpg": jpeg(5)})
    assert "x.tar: sample 't': its cls is" in refused(capsys, tmp_path)
    assert adopted(tmp_path, "--on-error", "skip").samples == 2


@pytest.mark.parametrize(
    ("about", "sentence"),
    [
        (b'{"label": "cat"}', "its json has label 'cat', not a class index"),
        (b'{"label": true}', "its json has label True"),
        (b'{"label": 1.5}', "its json has label 1.5"),
        (b'{"label": -1}', "its json has label -1"),
        (b'{"label": 1000000000000}', "its json has label 1000000000000"),
        (b'{"label": null}', "has no label, other samples have one"),
        (b'{"class_id": 3}', "but 'class_id' in its json"),
        (b'{"synset": "n01"}', "but 'synset' in its json"),
        (b"[1]", "has no label, other samples have one"),
        (b"{", "its json cannot be read"),
        (b"\xff", "its json cannot be read"),
        (b"[" * 100_000, "its json cannot be read"),
    ],
)
def test_a_json_without_a_class_index(
    about: bytes, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar_of(tmp_path / "x.tar", samples(2) | {"t.jpg": jpeg(5), "t.json": about})
    error = refused(capsys, tmp_path)
    assert "x.tar: sample 't'" in error
    assert sentence in error
    assert adopted(tmp_path, "--on-error", "skip").samples == 2


@pytest.mark.parametrize("field", ["label", "class", "cls.txt", "target", "Labels"])
def test_a_field_that_looks_like_a_label_is_not_dropped(
    field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar_of(tmp_path / "x.tar", {"a.jpg": jpeg(1), f"a.{field}": b"3"})
    assert f"but a field {field.lower()!r}; --unlabelled" in refused(capsys, tmp_path)
    manifest = adopted(tmp_path, "--unlabelled")
    assert manifest.index["label"].tolist() == [-1]


def test_without_labels_by_request(tmp_path: Path) -> None:
    synset = {"json": lambda n: json.dumps({"label": "text", "synset": f"n{n}"}).encode()}
    tar_of(tmp_path / "x.tar", samples(6, **synset))
    manifest = adopted(tmp_path, "--unlabelled")
    assert manifest.classes == ()
    assert manifest.index["label"].tolist() == [-1] * 6
    for number, choice in enumerate((["--count", "2"], ["--count", "2", *COPY])):
        few = tmp_path / f"few{number}"
        assert subset([str(tmp_path), str(few), *choice]) == 0
        assert verify(str(few), decode=True, workers=0)[0] == []


def test_cls_and_json_disagree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar_of(tmp_path / "x.tar", samples(2, json=lambda n: b'{"label": 1}'))
    error = refused(capsys, tmp_path)
    assert "sample 's0': its cls is 0, its json says label 1" in error
    assert adopted(tmp_path, "--on-error", "skip").samples == 1


def test_labels_are_all_there_or_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar_of(tmp_path / "x.tar", samples(2))
    tar_of(tmp_path / "y.tar", {"a.jpg": jpeg(7), "b.jpg": jpeg(8)})
    error = refused(capsys, tmp_path)
    assert "y.tar: sample 'a' has no label, other samples have one" in error
    manifest = adopted(tmp_path, "--on-error", "skip")
    assert [shard.name for shard in manifest.shards] == ["x.tar"]
    assert report(tmp_path)["y.tar/b"] == ("skipped", "has no label")
    assert adopted(tmp_path, "--replace", "--unlabelled").samples == 4


def timm(labels: list[tuple[int, str]]) -> dict[str, bytes]:
    members = {}
    for number, (label, synset) in enumerate(labels):
        about = {"filename": f"{synset}/{number}.JPEG", "label": label, "synset": synset}
        members |= {
            f"k{number}.cls": b"%d" % label,
            f"k{number}.jpg": jpeg(number),
            f"k{number}.json": json.dumps(about).encode(),
        }
    return members


def test_a_synset_has_one_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar_of(tmp_path / "x.tar", timm([(0, "n0"), (1, "n1"), (1, "n0"), (2, "n1"), (2, "n2")]))
    said = "has label 1 and synset 'n0', but x.tar/k1 has 'n1' for it"
    assert f"x.tar: sample 'k2': {said}" in refused(capsys, tmp_path)
    manifest = adopted(tmp_path, "--on-error", "skip")
    assert manifest.classes == ("n0", "n1", "n2")
    assert manifest.samples == 3
    assert report(tmp_path)["x.tar/k3"][1].endswith("x.tar/k1 has label 1 for it")
    other = tmp_path / "two"
    other.mkdir()
    tar_of(other / "x.tar", timm([(0, "n0")]))
    tar_of(other / "y.tar", timm([(0, "n1")]))
    assert "y.tar/k0: has label 0 and synset 'n1', but x.tar/k0 has 'n0' for it" in refused(
        capsys, other
    )


def test_synsets_against_given_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.txt").write_text("n0\nn1\n")
    given = ["--classes-from", tmp_path / "classes.txt"]
    tar_of(tmp_path / "x.tar", timm([(0, "n0"), (1, "other"), (0, "n1"), (2, "n2")]))
    said = "sample 'k2': has label 0 and synset 'n1', which is class 1"
    assert said in refused(capsys, tmp_path, *given)
    assert adopted(tmp_path, *given, "--on-error", "skip").samples == 2
    assert report(tmp_path)["x.tar/k3"][1] == "has label 2 of 2 classes"


def test_verify_finds_a_synset_with_another_label(tmp_path: Path) -> None:
    """The tar was changed after it was adopted; sizes are equal and the checksum is not alone."""
    path = tar_of(tmp_path / "x.tar", timm([(0, "n0"), (1, "n1")]))
    adopted(tmp_path)
    path.write_bytes(
        path.read_bytes().replace(b'"label": 0, "synset": "n0"', b'"label": 0, "synset": "n1"')
    )
    assert (
        "x.tar: sample 'k0': its json says synset 'n1', the index says 'n0'"
        in verify(str(tmp_path), decode=False, workers=0)[0]
    )
    path.write_bytes(path.read_bytes().replace(b'"label": 0', b'"label": 1'))
    assert (
        "x.tar: sample 'k0': its cls is 0, its json says label 1"
        in verify(str(tmp_path), decode=False, workers=0)[0]
    )


def test_a_renumbered_copy_says_the_new_labels_everywhere(tmp_path: Path) -> None:
    tar_of(tmp_path / "x.tar", timm([(0, "n0"), (1, "n1"), (2, "n2"), (2, "n2")]))
    adopted(tmp_path)
    (tmp_path / "classes.txt").write_text("n2\n")
    for number, copy in enumerate(([], COPY)):
        few = tmp_path / f"few{number}"
        choice = ["--classes", str(tmp_path / "classes.txt"), *copy]
        assert subset([str(tmp_path), str(few), *choice]) == 0
        assert read_manifest(few).classes == ("n2",)
        assert verify(str(few), decode=True, workers=0)[0] == []
    (sample, _) = webdataset.WebDataset(read_manifest(few).path(0), shardshuffle=False)
    assert (sample["cls"], json.loads(sample["json"])["label"]) == (b"0", 0)


def test_options_that_exclude_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar_of(tmp_path / "x.tar", samples(1))
    (tmp_path / "classes.txt").write_text("n0\n")
    options = ["--unlabelled", "--classes-from", tmp_path / "classes.txt"]
    assert "--unlabelled leaves out; give one" in refused(capsys, tmp_path, *options)
