"""CIFAR-10's shards of a study: of which images, whose folder, one command at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval.shared.cifar_shards import BUILDING, make_cifar_shards
from pipeline.errors import UserError

ROOT = Path(__file__).parents[3]


def test_shards_of_another_source_are_refused(tmp_path):
    with pytest.raises(UserError, match="name your copy: --cifar10 PATH"):
        make_cifar_shards(None, tmp_path)
    with pytest.raises(UserError, match="absent: no such file"):
        make_cifar_shards(tmp_path / "absent", tmp_path)
    done = tmp_path / "shards/done.json"
    done.parent.mkdir()
    done.write_text(json.dumps({"source": "a.zip", "bytes": 3}))
    (tmp_path / "a.zip").write_bytes(b"abc")
    (tmp_path / "b.zip").write_bytes(b"abc")
    make_cifar_shards(None, tmp_path)
    make_cifar_shards(tmp_path / "a.zip", tmp_path)
    with pytest.raises(UserError, match=r"was made of a\.zip, not of .*b\.zip"):
        make_cifar_shards(tmp_path / "b.zip", tmp_path)
    (tmp_path / "a.zip").unlink()
    make_cifar_shards(tmp_path / "a.zip", tmp_path)  # is not needed any more
    with pytest.raises(UserError, match=r"was made of a\.zip, not of .*absent"):
        make_cifar_shards(tmp_path / "absent", tmp_path)
    image = tmp_path / "cifar/train/cat/1.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"1234")
    done.write_text(json.dumps({"source": "cifar", "bytes": 4}))
    make_cifar_shards(tmp_path / "cifar", tmp_path)
    (tmp_path / "cifar/.DS_Store").write_bytes(b"x")
    make_cifar_shards(tmp_path / "cifar", tmp_path)
    image.with_name("2.png").write_bytes(b"5")  # of a copy that was not complete before
    with pytest.raises(UserError, match=r"was made of another cifar, not of .*cifar; choo"):
        make_cifar_shards(tmp_path / "cifar", tmp_path)
    done.write_text(json.dumps({"source": "cifar", "bytes": 0}))  # as earlier ones have it
    make_cifar_shards(tmp_path / "cifar", tmp_path)
    done.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        make_cifar_shards(None, tmp_path)
    done.write_text('{"train": 4096, "val": 1024, "size": 80}')  # the demo's photographs
    with pytest.raises(UserError, match="shards: are no shards of CIFAR-10"):
        make_cifar_shards(None, tmp_path)


def test_shards_and_images_of_somebody_else_are_left_alone(tmp_path):
    """--data may name a folder that is in use: data/, say, with ImageNet's shards and images."""
    theirs = tmp_path / "shards/train/00000.tar", tmp_path / "images/train/cat/1.png"
    for path in theirs:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"theirs")
    with pytest.raises(UserError, match=r"shards: holds no finished shards of CIFAR-10"):
        make_cifar_shards(tmp_path / "images", tmp_path)
    theirs[0].unlink()
    theirs[0].parent.rmdir()
    with pytest.raises(UserError, match=r"images of .* failed with exit code 2"):
        make_cifar_shards(tmp_path / "images", tmp_path)  # it has no test images
    assert theirs[1].read_bytes() == b"theirs"


def test_shards_are_built_by_one_command_at_a_time(tmp_path):
    """A second one would remove what the first has built so far."""
    building = tmp_path / "data" / BUILDING
    half = building / "shards/train/0.tar"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"x")
    (tmp_path / "c").mkdir()
    hold = (
        "import sys, pathlib; from pipeline.runtime.run_lock import RunLock\n"
        "lock = RunLock(pathlib.Path(sys.argv[1])); print('held', flush=True); input()"
    )
    words = [sys.executable, "-c", hold, str(building)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, cwd=ROOT, **pipes) as first:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=r"holds this folder .*; wait for it, or choose anoth"):
            make_cifar_shards(tmp_path / "c", tmp_path / "data")
        assert half.is_file()
        first.communicate(b"\n")
    with pytest.raises(UserError, match=r"images of .* failed with exit code 2"):
        make_cifar_shards(tmp_path / "c", tmp_path / "data")  # it is empty
    assert not half.exists()
