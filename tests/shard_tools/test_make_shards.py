from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_samples import SMALL, image_tree, make, read_samples, refused, tars_of
from signals import interruptible
from torchvision.datasets import ImageFolder

from shard_tools import tar as tarfmt
from shard_tools.cli import byte_size
from shard_tools.make_shards import main
from shard_tools.manifest import read_manifest

COUNTS = {"n03": 17, "n01": 9, "n02": 30}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_tree(tmp_path_factory.mktemp("source") / "train", COUNTS)


@pytest.fixture(scope="module")
def shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("shards") / "train"
    assert main([str(tree), str(dest), *SMALL]) == 0
    return dest


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


def test_shards_mix_the_classes_and_keep_to_their_size(shards: Path) -> None:
    manifest = read_manifest(shards)
    assert len(manifest.shards) >= 4
    for number, shard in enumerate(manifest.shards):
        labels = manifest.index["label"][manifest.starts[number] : manifest.starts[number + 1]]
        assert len(set(labels.tolist())) >= 2
        assert shard.bytes <= 60 << 10


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
    for task, spelling in ((2, tree), (0, tree / ".." / tree.name)):
        make(spelling, dest, "--num-tasks", "3", "--task-id", str(task))
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
    ("how", "code"),
    [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_a_stopped_job_resumes_to_the_same_bytes(
    tmp_path: Path, how: signal.Signals, code: int, workers: int
) -> None:
    tree = image_tree(tmp_path / "train", {"a": 120, "b": 80})
    whole, dest = tmp_path / "whole", tmp_path / "dest"
    options = ["--shard-size", "30KiB"]
    assert main([str(tree), str(whole), *options, "--workers", "1"]) == 0
    script = Path(tarfmt.__file__).with_name("make_shards.py")
    command = [sys.executable, script, tree, dest, *options, "--workers", str(workers)]
    with interruptible():
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    while not list(dest.glob(".parts/0*.json")):
        time.sleep(0.005)
    if how == signal.SIGHUP:
        os.killpg(process.pid, how)  # as a terminal does
    else:
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


def test_a_task_that_stops_at_errors_takes_no_plan_that_left_images_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = image_tree(tmp_path / "train", {"a": 20, "b": 20})
    (tree / "a" / "gone.jpg").symlink_to("nowhere.jpg")
    tasks = ("--num-tasks", "2", "--task-id")
    make(tree, tmp_path / "d", *tasks, "0", "--on-error", "skip")
    assert "a/gone.jpg" in refused(capsys, tree, tmp_path / "d", *tasks, "1")


def test_tars_of_another_program_are_left_alone(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "shard-000000.tar").write_bytes(b"another's")
    error = refused(capsys, tree, tmp_path / "d")
    assert f"{tmp_path / 'd'}: already holds tars that this job did not write" in error
    assert (tmp_path / "d" / "shard-000000.tar").read_bytes() == b"another's"


def test_resume_notices_files_that_were_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by one of equal size: no shard keeps what its file no longer holds."""
    tree, dest = image_tree(tmp_path / "tree", {"a": 90, "b": 90}), tmp_path / "dest"
    options = [str(tree), str(dest), "--shard-size", "30KiB", "--workers", "0"]
    last = sorted(tree.rglob("*.JPEG"))[-1]
    good = last.read_bytes()
    last.write_bytes(bytes(len(good)))
    assert main(options) == 2
    last.write_bytes(good)
    first, *others = sorted((dest / ".parts").glob("0*.json"))
    assert others
    kept = [dest / json.loads(part.read_bytes())["shard"]["name"] for part in others]
    before = [path.stat().st_ino for path in kept]
    replaced = tree / json.loads(first.read_bytes())["names"][0]
    data = bytearray(replaced.read_bytes())
    data[data.index(b"\xff\xdb") + 9] += 1  # of its quantisation table
    replaced.write_bytes(data)
    assert main([*options, "--resume"]) == 0
    assert "1 finished shard of images whose files were modified since" in capsys.readouterr().out
    assert [path.stat().st_ino for path in kept] == before
    assert main([str(tree), str(tmp_path / "whole"), *options[2:]]) == 0
    assert tars_of(dest) == tars_of(tmp_path / "whole")


def test_a_job_is_finished_from_where_its_source_is_now(
    tree: Path, shards: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tree, tmp_path / "train"))
    make(source, tmp_path / "d", "--num-tasks", "3", "--task-id", "0")
    make(source.rename(tmp_path / "moved"), tmp_path / "d", "--resume")
    found = tars_of(tmp_path / "d")
    for name, data in tars_of(shards).items():
        assert found[name] == data or name == "manifest.json"  # which names the source


@pytest.mark.parametrize("suffix", ["", ".tar", ".tar.gz"])
def test_resume_of_a_finished_folder_says_which_files_were_modified_since(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    """And of nothing else: an archive that is unpacked a second time is as old as it was."""
    tree = image_tree(tmp_path / "tree", {"a": 20, "b": 20})
    source = tree
    if suffix:
        source = tmp_path / f"tree{suffix}"
        with tarfile.open(source, "w:gz" if suffix.endswith("gz") else "w") as archive:
            archive.add(tree, ".")
    options = [str(source), str(tmp_path / "dest"), "--shard-size", "30KiB", "--workers", "0"]
    assert main(options) == 0
    shards = read_manifest(tmp_path / "dest").shards
    assert len(shards) > 1
    capsys.readouterr()
    assert main([*options, "--resume"]) == 0
    assert "modified" not in capsys.readouterr().out
    changed = source if suffix else sorted(tree.rglob("*.JPEG"))[0]
    later = time.time_ns() + 10**9
    os.utime(changed, ns=(later, later))
    assert main([*options, "--resume"]) == 0
    count = len(shards) if suffix else 1
    assert f"image files of {count} finished shard" in capsys.readouterr().out


def test_resume_of_a_finished_folder_sees_a_replacement_that_is_older(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = image_tree(tmp_path / "tree", {"a": 20, "b": 20})
    options = [str(tree), str(tmp_path / "dest"), "--shard-size", "30KiB", "--workers", "0"]
    replaced = sorted(tree.rglob("*.JPEG"))[0]
    other = tmp_path / "other.JPEG"
    other.write_bytes(replaced.read_bytes())  # of equal size
    os.utime(other, (1e9, 1e9))
    assert main(options) == 0
    time.sleep(0.02)  # of the clock of the file system
    os.replace(other, replaced)
    capsys.readouterr()
    assert main([*options, "--resume"]) == 0
    assert "image files of 1 finished shard were modified, replaced" in capsys.readouterr().out


HOLDER = """
import sys, pathlib
from shard_tools.sharding.job import Execution, at_work
with at_work([pathlib.Path(sys.argv[1])], Execution(tasks=int(sys.argv[2]))):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(("tasks", "code"), [("1", 2), ("2", 0)])
def test_two_calls_are_not_at_work_in_one_folder(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tasks: str, code: int
) -> None:
    """But tasks of an array are."""
    dest = tmp_path / "dest"
    arguments = [str(tree), str(dest), *SMALL, "--num-tasks", tasks, "--resume"]
    command = [sys.executable, "-c", HOLDER, dest, tasks]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        assert main(arguments) == code
        told = capsys.readouterr().err
        assert (f"error: {dest}: another make_shards.py is at work there" in told) == bool(code)
        holder.communicate()
    assert main(arguments) == 0


def test_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(["--help"])
    assert exit_code.value.code == 0
    assert "(default: 256MiB)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "size"), [("256MiB", 256 << 20), ("1.5K", 1536), ("7", 7), ("2gb", 2 << 30)]
)
def test_byte_sizes(text: str, size: int) -> None:
    assert byte_size(text) == size
