"""Files and folders that are there whole or not at all."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from pipeline.errors import UserError
from shard_tools.atomic import FILES, check_writable, seal, verify, write_atomic, write_json


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a" / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(TypeError):
        write_atomic(path, 3)
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(path, {"top1": number})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_sealed_folder_lists_its_files_and_replaces_the_one_before(tmp_path):
    place = tmp_path / "step-1"
    for content in (b"old", b"new"):
        temporary = tmp_path / ".step-1"
        (temporary / "deep").mkdir(parents=True)
        (temporary / "deep/x").write_bytes(content)
        seal(temporary, place)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    digest = hashlib.sha256(b"new").hexdigest()
    assert json.loads((place / FILES).read_text()) == {"deep/x": [3, digest]}
    verify(place)


def test_a_sealed_folder_may_be_read_by_whom_the_umask_lets(tmp_path):
    (tmp_path / ".step-1").mkdir()
    (tmp_path / ".step-1/x").write_bytes(b"x")
    (tmp_path / ".step-1/x").chmod(0o600)  # as safetensors does
    before = os.umask(0o027)
    try:
        seal(tmp_path / ".step-1", tmp_path / "step-1")
    finally:
        os.umask(before)
    assert (tmp_path / "step-1/x").stat().st_mode & 0o777 == 0o640


def test_a_changed_file_of_a_sealed_folder_is_named(tmp_path):
    (tmp_path / ".a").mkdir()
    (tmp_path / ".a/x").write_bytes(b"12")
    seal(tmp_path / ".a", tmp_path / "a")
    for content, reason in ((b"13", "damaged"), (b"1", "missing or of the wrong size")):
        (tmp_path / "a/x").write_bytes(content)
        with pytest.raises(UserError, match=f"a/x: {reason}"):
            verify(tmp_path / "a")


def test_what_cannot_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_text("")
    new = tmp_path / "a/b/c"
    for path, folder in ((new, False), (new, True), (tmp_path, True), (tmp_path / "file", False)):
        check_writable(path, folder)
    for path, folder, reason in (
        (tmp_path, False, r"cannot be written \(Is a directory\)"),
        (tmp_path / "file", True, r"cannot be written \(Not a directory\)"),
        (tmp_path / "file/x", False, rf"cannot be written \({tmp_path}/file: Not a directory\)"),
        (tmp_path / ("a" * 300), True, r"cannot be written \(File name too long\)"),
        (Path("/proc/x/y"), True, r"cannot be written \(/proc: "),
        (Path("s3://bucket/x"), True, r"it is a URL; only local files are written"),
        (Path("file:///x"), False, r"it is a URL; only local files are written"),
    ):
        with pytest.raises(UserError, match=reason):
            check_writable(path, folder)
    with pytest.raises(UserError, match=r": --output is bad \(Is a directory\); take another"):
        check_writable(tmp_path, what="--output is bad", advice="; take another")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_quick_look_hashes_what_is_named_and_sizes_the_rest(tmp_path):
    (tmp_path / "new").mkdir()
    for name in ("small", "large"):
        (tmp_path / "new" / name).write_bytes(b"12")
    seal(tmp_path / "new", tmp_path / "sealed")
    (tmp_path / "sealed/large").write_bytes(b"13")
    verify(tmp_path / "sealed", ("small",))
    with pytest.raises(UserError, match="large: damaged"):
        verify(tmp_path / "sealed")
    (tmp_path / "sealed/large").write_bytes(b"1")
    with pytest.raises(UserError, match="large: missing or of the wrong size"):
        verify(tmp_path / "sealed", ())
