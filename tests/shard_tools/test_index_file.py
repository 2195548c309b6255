"""The memory-mapped index: what is read and checked, and when; version 1 is still read."""

import hashlib
import json
import os
import pickle
import struct

import fsspec
import numpy as np
import pytest

from shard_tools.index_file import BLOCK, SAMPLE, Index, encode_index, header_bytes
from shard_tools.manifest import (
    INDEX,
    MANIFEST,
    ManifestError,
    Shard,
    _checksum,
    read_manifest,
    write_manifest,
)
from shard_tools.shard_table import ShardTable

COUNTS = (BLOCK, 0, 2 * BLOCK - 7, 900)  # blocks and shards do not coincide
TOTAL = sum(COUNTS)


def rows():
    index = np.zeros(TOTAL, SAMPLE)
    index["offset"] = np.arange(TOTAL) % 700
    index["length"] = 1 + np.arange(TOTAL) % 300
    index["label"] = np.arange(TOTAL) % 4 - 1
    return index


@pytest.fixture
def folder(tmp_path):
    shards = [Shard(f"{n}.tar", count, 1000, f"{n:064d}") for n, count in enumerate(COUNTS)]
    for shard in shards:
        (tmp_path / shard.name).write_bytes(bytes(1000))
    write_manifest(tmp_path, shards=shards, index=rows(), classes=("a", "b", "c"))
    return tmp_path


def as_version_1(folder):
    """Write the index and the manifest of `folder` as version 1 had them."""
    data = rows().tobytes()
    digest = hashlib.sha256(data).digest()
    (folder / INDEX).write_bytes(
        struct.pack("<8sIIQ32s8x", b"RMIMINDX", 1, 24, TOTAL, digest) + data
    )
    content = json.loads((folder / MANIFEST).read_text())
    content.pop("checksum")
    content["index_sha256"] = digest.hex()
    content["checksum"] = _checksum(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def test_the_bytes_are_those_of_the_docstring(folder):
    data = (folder / INDEX).read_bytes()
    magic, version, width, count, root, block, rest = struct.unpack("<8sIIQ32sI4s", data[:64])
    assert (magic, version, width, count, block, rest) == (
        b"RMIMINDX",
        2,
        24,
        TOTAL,
        BLOCK,
        bytes(4),
    )
    content, digests = data[64 : 64 + 24 * TOTAL], data[64 + 24 * TOTAL :]
    assert content == rows().tobytes()
    step = 24 * BLOCK
    blocks = [content[i : i + step] for i in range(0, len(content), step)]
    assert digests == b"".join(hashlib.sha256(b).digest() for b in blocks)
    assert root == hashlib.sha256(struct.pack("<QI", TOTAL, BLOCK) + digests).digest()
    assert read_manifest(folder).index_sha256 == root.hex()


@pytest.mark.parametrize("version", [1, 2])
def test_single_rows_and_all_rows_are_the_same(folder, version):
    if version == 1:
        as_version_1(folder)
    manifest = read_manifest(folder)
    asked = np.array([[0, BLOCK - 1, BLOCK], [TOTAL - 1, 2 * BLOCK, 5]])
    assert np.array_equal(manifest.rows(asked), rows()[asked])
    assert manifest.lazy_index.row(BLOCK) == rows()[BLOCK]
    assert np.array_equal(manifest.index, rows())
    assert not manifest.index.flags.writeable
    assert np.array_equal(read_manifest(folder).locate(asked)[1], rows()[asked])


def test_a_block_is_checked_at_its_first_use_and_only_then(folder):
    """A flipped bit is noticed by those who use its block, at once or never."""
    with open(folder / INDEX, "r+b") as file:
        file.seek(64 + 24 * (BLOCK + 10) + 3)
        file.write(b"\1")
    manifest = read_manifest(folder)
    before = manifest.rows(np.array([3, 2 * BLOCK]))
    assert np.array_equal(before, rows()[[3, 2 * BLOCK]])
    for use in (
        lambda: manifest.lazy_index.row(BLOCK),
        lambda: manifest.rows(np.array([3, BLOCK])),
        lambda: manifest.locate(np.array(2 * BLOCK - 1)),
        lambda: manifest.index,
    ):
        with pytest.raises(ManifestError, match=r"index.bin: damaged, its checksum does not"):
            use()


@pytest.mark.parametrize("version", [1, 2])
def test_a_row_that_fits_no_shard_is_refused_with_its_number(folder, version):
    """Rows under a right checksum that could not be right."""
    manifest = read_manifest(folder)
    for field, value, words in [
        ("offset", 1000, f"sample {BLOCK + 1} is outside its shard"),
        ("offset", 2**64 - 1, f"sample {BLOCK + 1} is outside its shard"),
        ("label", 3, f"sample {BLOCK + 1} has label 3 of 3 classes"),
    ]:
        index = rows()
        index[field][BLOCK + 1] = value
        encoded = encode_index(index)
        if version == 1:
            digest = hashlib.sha256(index.tobytes()).digest()
            head = struct.pack("<8sIIQ32s8x", b"RMIMINDX", 1, 24, TOTAL, digest)
            encoded = head + index.tobytes()
        (folder / INDEX).write_bytes(encoded)
        checksum = encoded[24:56].hex()
        lazy = Index("i", str(folder / INDEX), checksum, manifest.starts, manifest.table.bytes, 3)
        with pytest.raises(ManifestError, match=words):
            lazy.row(BLOCK + 1)


def test_the_rows_are_the_pages_of_the_file(folder):
    """Two readers hold no copy each: what one writes to the file, both see."""
    first, second = (read_manifest(folder).index for _ in range(2))
    with open(folder / INDEX, "r+b") as file:
        file.seek(64 + 24 * 7)
        file.write(struct.pack("<Q", 12345))
    assert first["offset"][7] == second["offset"][7] == 12345


def test_what_is_sent_to_a_worker_does_not_grow_with_the_samples(folder):
    manifest = read_manifest(folder)
    assert len(manifest.index) == TOTAL
    sent = pickle.dumps(manifest)
    assert len(sent) < 2000
    assert np.array_equal(pickle.loads(sent).index, rows())


def test_a_huge_index_is_opened_without_being_read(tmp_path):
    """A thousand million rows, as a sparse file: only the block in use need be there."""
    count = 10**9
    blocks = -(-count // BLOCK)
    block, last = bytes(24 * BLOCK), bytes(24 * (count - (blocks - 1) * BLOCK))
    one, end = (hashlib.sha256(b).digest() for b in (block, last))
    digests = one * (blocks - 1) + end
    path = tmp_path / INDEX
    with open(path, "wb") as file:
        file.write(header_bytes(count, digests))
        file.seek(64 + 24 * count)
        file.write(digests)
    with open(path, "rb") as file:
        checksum = file.read(64)[24:56].hex()
    starts = np.array([0, count])
    index = Index("index.bin", str(path), checksum, starts, np.array([10]), 1)
    assert index.row(count - 1)["label"] == 0
    assert os.stat(path).st_blocks * 512 < 20e6


def test_a_remote_index_is_copied_once_and_mapped(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("RELAXMIM_CACHE", str(cache))
    memory = fsspec.filesystem("memory")
    for name in (MANIFEST, INDEX):
        memory.pipe(f"/mapped/s/{name}", (folder / name).read_bytes())
    remote = read_manifest("memory://mapped/s")
    assert np.array_equal(remote.index, rows())
    memory.rm(f"/mapped/s/{INDEX}")
    assert np.array_equal(read_manifest("memory://mapped/s").rows(np.array([5])), rows()[[5]])
    assert [p.name for p in cache.glob("*.index")] == [f"{remote.index_sha256}.index"]
    (cache / f"{remote.index_sha256}.index").unlink()
    with pytest.raises(ManifestError, match=r"memory://mapped/s/index.bin: cannot be read"):
        _ = read_manifest("memory://mapped/s").index
    memory.pipe(f"/mapped/s/{INDEX}", encode_index(rows()[::-1]))
    with pytest.raises(ManifestError, match="belongs to another manifest"):
        _ = read_manifest("memory://mapped/s").index
    assert not list(cache.glob("*part"))


def test_a_table_of_shards_is_a_sequence_of_them():
    shards = [Shard("a/é.tar", 3, 2**62, "0" * 64), Shard("", 0, 0, ""), Shard("b", 1, 5, "ff")]
    table = ShardTable.of(shards)
    assert list(table) == shards
    assert table[-1] == shards[2]
    assert table[1:] == tuple(shards[1:])
    assert table.samples.tolist() == [3, 0, 1]
    assert table.bytes.tolist() == [2**62, 0, 5]
    assert pickle.loads(pickle.dumps(table)) == table == ShardTable.of(table)
    assert table != ShardTable.of(shards[:2])
    assert len(ShardTable.of([])) == 0
    with pytest.raises(IndexError):
        table[3]
