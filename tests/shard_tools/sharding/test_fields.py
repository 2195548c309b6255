"""Which fields a sample of a new shard has, and that all readers understand each choice."""

import json

import numpy as np
import pytest
from shard_samples import image_tree, make, read_samples, tars_of

from pipeline.data.loader import eval_loader
from shard_tools import index_shards, subset, verify_shards
from shard_tools.make_shards import main
from shard_tools.manifest import read_manifest
from shard_tools.sharding.layout import FIELDS
from shard_tools.tar import RECORD


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """By fields a folder of shards of the same images."""
    root = tmp_path_factory.mktemp("fields")
    tree = image_tree(root / "in", {"a": 5, "b": 7, "c": 4})
    return {fields: make(tree, root / fields, "--fields", fields) for fields in FIELDS}


@pytest.mark.parametrize("fields", FIELDS)
def test_every_reader_finds_image_and_label(shards, fields, tmp_path, capsys):
    folder, default = shards[fields], shards["jpg,cls,json"]
    manifest, whole = read_manifest(folder), read_manifest(default)
    samples = read_samples(folder)
    for sample, row, name in zip(samples, manifest.index, manifest.names, strict=True):
        assert {k for k in sample if k[0] != "_"} == set(fields.split(","))
        if "json" in fields:
            about = json.loads(sample["json"])
            assert about["name"] == name
            assert about["synset"] == manifest.classes[row["label"]] == name[0]
            assert about.get("label", "in cls") == ("in cls" if "cls" in fields else row["label"])
        if "cls" in fields:
            assert int(sample["cls"]) == row["label"]
    assert manifest.names == whole.names
    assert manifest.index["label"].tolist() == whole.index["label"].tolist()
    assert verify_shards.main([str(folder), "--decode", "--workers", "0"]) == 0
    (batch,) = eval_loader(folder, batch_size=16, rank=0, world=1, image_size=8, workers=0)
    (same,) = eval_loader(default, batch_size=16, rank=0, world=1, image_size=8, workers=0)
    assert np.array_equal(batch.image, same.image)
    assert batch.label.tolist() == same.label.tolist()
    assert index_shards.main([str(folder), "--output", str(tmp_path / "i"), "--workers", "0"]) == 0
    adopted = read_manifest(tmp_path / "i")
    assert adopted.index.tolist() == manifest.index.tolist()
    assert adopted.classes == (manifest.classes if "json" in fields else ("0", "1", "2"))
    assert verify_shards.main([str(tmp_path / "i"), "--workers", "0"]) == 0
    (tmp_path / "classes").write_text("c\nb\n")
    arguments = [str(folder), str(tmp_path / "s"), "--classes", str(tmp_path / "classes")]
    assert subset.main([*arguments, "--copy", "--workers", "0"]) == 0
    assert verify_shards.main([str(tmp_path / "s"), "--workers", "0"]) == 0
    copied = read_samples(tmp_path / "s")
    assert {frozenset(k for k in s if k[0] != "_") for s in copied} == {
        frozenset(fields.split(","))
    }
    if fields == "jpg,json":
        assert {json.loads(s["json"])["label"] for s in copied} == {0, 1}


def test_each_field_takes_a_kibibyte_and_the_default_is_as_it_was(shards):
    size = {f: sum(s.bytes for s in read_manifest(p).shards) for f, p in shards.items()}
    assert abs(size["jpg,cls,json"] - size["jpg,cls"] - 16 * 1024) < RECORD
    assert abs(size["jpg,cls,json"] - size["jpg,json"] - 16 * 1024) < RECORD
    options = read_manifest(shards["jpg,cls,json"]).made["options"]
    assert "fields" not in options  # so plans of before the option are still known
    assert read_manifest(shards["jpg,cls"]).made["options"] == options | {"fields": "jpg,cls"}


def test_a_plan_with_other_fields_is_another_plan(tmp_path, capsys):
    tree = image_tree(tmp_path / "in", {"a": 2})
    dest = make(tree, tmp_path / "s")
    before = tars_of(dest)
    assert main([str(tree), str(dest), "--resume", "--fields", "jpg,cls"]) == 2
    assert "of other options" in capsys.readouterr().err
    assert main([str(tree), str(dest), "--resume"]) == 2  # another --shard-size than make's
    assert tars_of(dest) == before
    with pytest.raises(SystemExit):
        main([str(tree), str(dest), "--fields", "jpg"])
    assert "choose from 'jpg,cls,json', 'jpg,cls', 'jpg,json'" in capsys.readouterr().err
