from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import threading
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
from http_server import Server
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_samples import flipped

from shard_tools import remote
from shard_tools.manifest import (
    INDEX,
    MANIFEST,
    NAMES,
    SAMPLE,
    SHARDS,
    Manifest,
    ManifestError,
    Shard,
    read_bytes,
    read_manifest,
    write_manifest,
)
from shard_tools.shard_table import ShardTable


def rows(count: int) -> np.ndarray:
    index = np.zeros(count, SAMPLE)
    index["offset"] = np.arange(count) * 10
    index["length"] = 10
    index["label"] = np.arange(count) % 3 - 1
    return index


def shard_folder(folder: Path, counts: tuple[int, ...] = (3, 2)) -> Manifest:
    folder.mkdir(parents=True)
    shards = []
    for number, count in enumerate(counts):
        name = f"shard-{number:06d}.tar"
        (folder / name).write_bytes(bytes(100))
        shards.append(Shard(name, count, 100, "0" * 64))
    index = np.concatenate([rows(count) for count in counts])
    names = [f"n/{number}.JPEG" for number in range(sum(counts))]
    return write_manifest(
        folder, shards=shards, index=index, classes=("a", "ü"), made={"tool": "test"}, names=names
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = shard_folder(tmp_path / "s")
    manifest = read_manifest(str(tmp_path / "s"))
    assert manifest == written
    assert manifest.samples == 5
    assert manifest.starts.tolist() == [0, 3, 5]
    assert manifest.starts.dtype == np.int64
    assert manifest.index.tolist() == [*rows(3).tolist(), *rows(2).tolist()]
    assert manifest.names[4] == "n/4.JPEG"
    assert manifest.classes == ("a", "ü")
    assert Path(manifest.path(1)).stat().st_size == 100
    assert not manifest.index.flags.writeable
    again = pickle.loads(pickle.dumps(manifest))  # as a loader's worker process receives it
    assert again == manifest
    assert again.index.tolist() == manifest.index.tolist()


def test_the_index_is_documented_bytes(tmp_path: Path) -> None:
    shard_folder(tmp_path / "s")
    data = (tmp_path / "s" / INDEX).read_bytes()
    assert struct.unpack("<8sIIQ", data[:24]) == (b"RMIMINDX", 2, 24, 5)
    assert struct.unpack("<QIiHHBBH", data[64 + 24 : 64 + 48]) == (10, 10, 0, 0, 0, 0, 0, 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.data())
def test_locate_is_a_walk_over_the_shards(counts: list[int], data: st.DataObject) -> None:
    total = sum(counts)
    shards = tuple(Shard(str(i), n, 100, "") for i, n in enumerate(counts))
    manifest = Manifest("x", shards)
    manifest.__dict__["index"] = rows(total)
    wanted = data.draw(st.lists(st.integers(0, max(0, total - 1)), max_size=9 if total else 0))
    walk = [shard for shard, n in enumerate(counts) for _ in range(n)]
    shard, row = manifest.locate(np.array(wanted, np.int64))
    assert shard.tolist() == [walk[sample] for sample in wanted]
    assert row["offset"].tolist() == [10 * sample for sample in wanted]
    for outside in (-1, total):
        with pytest.raises(ManifestError, match="run from 0 to"):
            manifest.locate(np.array([outside]))


@pytest.mark.parametrize("name", [MANIFEST, INDEX, NAMES])
def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path, name: str) -> None:
    shard_folder(tmp_path / "s")
    path = tmp_path / "s" / name
    data = path.read_bytes()
    whole = read_manifest(tmp_path / "s")
    damaged = [flipped(data, bit) for bit in range(0, 8 * len(data), 11)]
    damaged += [data[:size] for size in range(0, len(data), 7)]
    for content in damaged:
        path.write_bytes(content)
        try:
            manifest = read_manifest(tmp_path / "s")
            index, names = manifest.index, manifest.names
        except ManifestError:
            continue
        # Only a change that keeps the meaning may pass: white space at the end of the JSON, or
        # the unused bytes of the index header.
        assert (manifest, names) == (whole, whole.names)
        assert index.tolist() == whole.index.tolist()
        assert name != NAMES


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda s: (s / MANIFEST).unlink(), "has no manifest.json; make it with"),
        (lambda s: (s / INDEX).unlink(), "index.bin: is missing"),
        (lambda s: (s / "shard-000001.tar").unlink(), "shard-000001.tar: this shard is missing"),
        (lambda s: (s / "shard-000000.tar").write_bytes(b"x"), "1 bytes long where .* says 100"),
        (lambda s: (s / MANIFEST).write_text("[]"), "not a manifest"),
        (lambda s: (s / MANIFEST).write_text("{}"), "not a manifest"),
        (lambda s: (s / INDEX).write_bytes(b"RMIM"), "too short"),
    ],
)
def test_a_broken_folder_is_one_sentence(tmp_path: Path, harm: object, sentence: str) -> None:
    shard_folder(tmp_path / "s")
    harm(tmp_path / "s")
    with pytest.raises(ManifestError, match=sentence) as caught:
        read_manifest(tmp_path / "s")
    assert "\n" not in str(caught.value)


def test_a_folder_of_folders_says_which_to_take(tmp_path: Path) -> None:
    for name in ("train", "val"):
        shard_folder(tmp_path / name)
    with pytest.raises(ManifestError, match=rf"one of them, such as {tmp_path / 'train'}$"):
        read_manifest(tmp_path)
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(ManifestError, match=rf"one of them, such as {tmp_path / 'val'}$"):
        read_manifest(tmp_path)
    (tmp_path / "val").rename(tmp_path / "flowers")
    with pytest.raises(ManifestError, match=rf"one of them, such as {tmp_path / 'flowers'}$"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", [MANIFEST, INDEX, "shard-000000.tar"])
def test_a_file_of_shards_says_their_folder(tmp_path: Path, name: str) -> None:
    shard_folder(tmp_path / "s")
    with pytest.raises(ManifestError, match=rf"is a file; give the .* shards, {tmp_path / 's'}$"):
        read_manifest(tmp_path / "s" / name)
    (tmp_path / "a.json").touch()
    with pytest.raises(ManifestError, match=r"a\.json: is a file and no folder; shards are made"):
        read_manifest(tmp_path / "a.json")


def test_no_folder_and_unknown_version(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match="are given as their folder; where it has no manifest"):
        read_manifest(tmp_path / "part-{0..3}.tar")
    shard_folder(tmp_path / "s")
    content = json.loads((tmp_path / "s" / MANIFEST).read_text())
    content["version"] = 99
    (tmp_path / "s" / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ManifestError, match="version 99 is not known, this code reads 1"):
        read_manifest(tmp_path / "s")


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "a/../../x.tar", "a//x.tar"])
def test_a_shard_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.tar").write_bytes(bytes(100))
    with pytest.raises(ManifestError, match="leaves its folder"):
        write_manifest(tmp_path / "s", shards=[Shard(name, 1, 100, "")], index=rows(1))


def test_rows_must_lie_in_their_shard_and_their_classes(tmp_path: Path) -> None:
    before = shard_folder(tmp_path / "s")
    shards = before.shards
    for field, value, sentence in [
        ("offset", 91, "sample 4 is outside"),
        ("offset", 2**64 - 5, "sample 4 is outside"),
        ("label", 2, "label 2 of 2 classes"),
        ("label", -2, "label -2 of 2 classes"),
    ]:
        index = before.index.copy()
        index[field][4] = value
        with pytest.raises(ManifestError, match=sentence):
            write_manifest(tmp_path / "s", shards=shards, index=index, classes=before.classes)
    with pytest.raises(ManifestError, match="4 rows for 5 samples"):
        write_manifest(tmp_path / "s", shards=shards, index=before.index[:4])
    with pytest.raises(ManifestError, match="one line per sample"):
        write_manifest(tmp_path / "s", shards=shards, index=before.index, names=["one"])
    assert read_manifest(tmp_path / "s") == before  # a refused call changes nothing


def test_a_subset_finds_the_tars_after_a_move_of_both(tmp_path: Path) -> None:
    parent = shard_folder(tmp_path / "data" / "train")
    write_manifest(
        tmp_path / "data" / "subset",
        shards=[Shard("shard-000001.tar", 1, 100, "0" * 64)],
        index=parent.index[4:5],
        shard_folder=parent.folder,
    )
    (tmp_path / "data").rename(tmp_path / "moved")
    subset = read_manifest(tmp_path / "moved" / "subset")
    assert subset.samples == 1
    assert Path(subset.path(0)) == tmp_path / "moved" / "train" / "shard-000001.tar"
    (tmp_path / "moved" / "train" / "shard-000001.tar").unlink()
    with pytest.raises(ManifestError, match="shard is missing"):
        read_manifest(tmp_path / "moved" / "subset")


def test_a_manifest_is_read_through_an_fsspec_url(tmp_path: Path) -> None:
    local = shard_folder(tmp_path / "s")
    memory = fsspec.filesystem("memory")
    for name in (MANIFEST, INDEX, NAMES):
        memory.pipe(f"/bucket/s/{name}", (tmp_path / "s" / name).read_bytes())
    remote = read_manifest("memory://bucket/s")
    assert remote.index.tolist() == local.index.tolist()
    assert remote.names == local.names
    assert remote.path(1) == "memory://bucket/s/shard-000001.tar"
    with pytest.raises(ManifestError, match=r"nowhere/manifest.json: cannot be read"):
        read_manifest("memory://bucket/nowhere")


def test_a_url_that_cannot_be_read_says_why_and_not_the_url_again(
    free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.files["/busy/manifest.json"] = b"{}"
    server.faults["/busy/manifest.json"] = ["busy"] * 9
    why = {
        f"{server.url}/none": "not found",
        f"{server.url}/busy": "HTTP 503 ",
        f"http://127.0.0.1:{free_port}": "Connect call failed",
        f"https://127.0.0.1:{server.server_port}": "SSL",
        "nonsense://a": "Protocol not known",
    }
    try:
        for url, words in why.items():
            with pytest.raises(ManifestError) as error:
                read_manifest(url)
            where, _, reason = str(error.value).partition(": cannot be read (")
            assert where == f"{url}/manifest.json"
            assert words in reason
            assert url not in reason
        assert [server.counts[f"/{name}/manifest.json"] for name in ("none", "busy")] == [1, 6]
    finally:
        server.shutdown()
        server.server_close()


class BackendError(Exception):
    """What a backend of fsspec might raise."""


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (BackendError("no credentials"), True),
        (OSError(5, "Input/output error"), True),
        (ValueError("no such bucket"), True),
        (ImportError("install it"), True),
        (TypeError("a slip"), False),
        (KeyError("a slip"), False),
        (AttributeError("a slip"), False),
    ],
)
def test_what_a_backend_says_is_a_sentence_and_a_slip_is_none(
    error: Exception, refused: bool
) -> None:
    class Backend(fsspec.AbstractFileSystem):
        protocol = "failing"
        cachable = False

        def _open(self, path: str, mode: str = "rb", **_: object) -> object:
            raise error

    fsspec.register_implementation("failing", Backend, clobber=True)
    with pytest.raises(ManifestError if refused else type(error)) as caught:
        read_bytes("failing://bucket/x")
    if refused:
        reason = error.strerror if isinstance(error, OSError) and error.errno else str(error)
        assert str(caught.value) == f"failing://bucket/x: cannot be read ({reason})"


def test_a_disk_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """The first bytes of this process's memory are a file that answers EIO."""
    shard_folder(tmp_path / "s")
    for name in (INDEX, MANIFEST):
        (tmp_path / "s" / name).unlink()
        (tmp_path / "s" / name).symlink_to("/proc/self/mem")
        with pytest.raises(ManifestError, match=f"{name}: cannot be read .Input/output error"):
            read_manifest(tmp_path / "s")


def test_contents_that_no_reader_expects(tmp_path: Path) -> None:
    """Sealed with a right checksum, as a crafted manifest would be."""
    shard_folder(tmp_path / "s")
    path = tmp_path / "s" / MANIFEST
    good = json.loads(path.read_text())
    first, second = good["shards"]
    for change, sentence in (
        ({"made": [1]}, "how the shards were made is not recorded as an object"),
        ({"shards": [first, {**second, "name": first["name"]}]}, "lists the shard .* twice"),
        (
            {"shards": [{**s, "samples": 2**62} for s in (first, second)]},
            "cannot hold that many samples",
        ),
    ):
        content = {key: value for key, value in (good | change).items() if key != "checksum"}
        content["checksum"] = hashlib.sha256(
            json.dumps(content, sort_keys=True).encode()
        ).hexdigest()
        path.write_text(json.dumps(content))
        with pytest.raises(ManifestError, match=sentence):
            read_manifest(tmp_path / "s")
    path.write_text("[" * 100_000)
    with pytest.raises(ManifestError, match="not a manifest of relaxmim shards"):
        read_manifest(tmp_path / "s")


def test_names_that_cannot_be_unpacked(tmp_path: Path) -> None:
    shard_folder(tmp_path / "s")
    path = tmp_path / "s" / MANIFEST
    for blob in (b"no zlib", zlib.compress(b"\xff\xfe")):
        content = json.loads(path.read_text())
        content.pop("checksum")
        (tmp_path / "s" / NAMES).write_bytes(blob)
        content["names_sha256"] = hashlib.sha256(blob).hexdigest()
        content["checksum"] = hashlib.sha256(
            json.dumps(content, sort_keys=True).encode()
        ).hexdigest()
        path.write_text(json.dumps(content))
        with pytest.raises(ManifestError, match=r"names.bin: holds no list of names"):
            _ = read_manifest(tmp_path / "s").names


def many_shards(folder: Path, count: int = 4097) -> list[Shard]:
    """Shards that share one file's bytes by hard links, one sample each."""
    folder.mkdir(parents=True)
    shards = [Shard(f"a/{n}-é.tar", 1, 100, f"{n:064x}") for n in range(count)]
    (folder / "a").mkdir()
    (folder / "a" / shards[0].name[2:]).write_bytes(bytes(100))
    for shard in shards[1:]:
        os.link(folder / shards[0].name, folder / shard.name)
    return shards


def test_many_shards_are_listed_in_a_table_of_their_own(tmp_path: Path) -> None:
    shards = many_shards(tmp_path / "s")
    index = np.zeros(len(shards), SAMPLE)
    index["length"], index["label"] = 7, -1
    few = write_manifest(tmp_path / "s", shards=shards[:4096], index=index[:4096])
    content = json.loads((tmp_path / "s" / MANIFEST).read_text())
    assert (content["version"], len(content["shards"])) == (1, 4096)
    assert not (tmp_path / "s" / SHARDS).exists()
    many = write_manifest(tmp_path / "s", shards=shards, index=index)
    content = json.loads((tmp_path / "s" / MANIFEST).read_text())
    assert (content["version"], "shards" in content) == (2, False)
    assert list(many.shards) == shards
    assert list(few.shards) == shards[:4096]
    assert (tmp_path / "s" / MANIFEST).stat().st_size < 1000
    (tmp_path / "s" / shards[7].name).unlink()
    with pytest.raises(ManifestError, match=r"7-é\.tar: this shard is missing"):
        read_manifest(tmp_path / "s")
    memory = fsspec.filesystem("memory")
    for name in (MANIFEST, INDEX, SHARDS):
        memory.pipe(f"/many/{name}", (tmp_path / "s" / name).read_bytes())
    assert list(read_manifest("memory://many").shards) == shards


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda b: b[:-1], "its texts do not fit together"),
        (lambda b: b"x" + b[1:], "not a table of relaxmim shards"),
        (lambda b: b[:8] + b"\xff" * 8 + b[16:], "not a table of relaxmim shards"),
        (lambda b: b"", "not a table of relaxmim shards"),
        (lambda b: b.replace("é".encode(), b"\xff\xff"), "its names are no UTF-8"),
        (lambda b: b.replace(b"a/0", b"../"), "leaves its folder"),
        (lambda b: b.replace(b"a/0", b"a/\0"), "leaves its folder"),
        (lambda b: b.replace(b"a/1-", b"a/0-"), "lists the shard 'a/0-é.tar' twice"),
        (lambda b: b[:23] + b"\x80" + b[24:], "is not a count of samples"),
        (lambda b: b[:23] + b"\x7f" + b[24:31] + b"\x7f" + b[32:], "cannot hold that many samples"),
    ],
)
def test_a_damaged_table_of_shards_is_one_sentence(
    tmp_path: Path, change: object, sentence: str
) -> None:
    table = ShardTable.of([Shard(f"a/{n}-é.tar", 1, 100, "0" * 64) for n in range(3)])
    shard_folder(tmp_path / "s")
    content = json.loads((tmp_path / "s" / MANIFEST).read_text())
    del content["shards"], content["checksum"]
    data = change(table.encode())
    (tmp_path / "s" / SHARDS).write_bytes(data)
    content |= {"version": 2, "shards_sha256": hashlib.sha256(data).hexdigest()}
    for wrong in (False, True):  # sealed with a right checksum, then not
        content.pop("checksum", None)
        content["checksum"] = hashlib.sha256(
            json.dumps(content, sort_keys=True).encode()
        ).hexdigest()
        (tmp_path / "s" / MANIFEST).write_text(json.dumps(content))
        with pytest.raises(ManifestError, match="checksum does not" if wrong else sentence):
            read_manifest(tmp_path / "s")
        content["shards_sha256"] = "0" * 64
    (tmp_path / "s" / SHARDS).unlink()
    with pytest.raises(ManifestError, match=r"shards\.bin: cannot be read"):
        read_manifest(tmp_path / "s")
