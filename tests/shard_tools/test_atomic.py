"""Files and folders that are there whole or not at all."""

import hashlib
import json

import pytest

from pipeline.errors import UserError
from shard_tools.atomic import FILES, seal, verify, write_atomic, write_json


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


def test_a_changed_file_of_a_sealed_folder_is_named(tmp_path):
    (tmp_path / ".a").mkdir()
    (tmp_path / ".a/x").write_bytes(b"12")
    seal(tmp_path / ".a", tmp_path / "a")
    for content, reason in ((b"13", "damaged"), (b"1", "missing or of the wrong size")):
        (tmp_path / "a/x").write_bytes(content)
        with pytest.raises(UserError, match=f"a/x: {reason}"):
            verify(tmp_path / "a")
