"""A path that cannot be used is one sentence and exit code 2; a slip in relaxmim is a traceback."""

import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

from shard_tools import demo_images, index_shards, make_shards, subset, verify_shards
from shard_tools.cli import ToolError
from shard_tools.manifest import read_manifest
from shard_tools.sharding.job import check_room
from shard_tools.sharding.layout import make_plan
from shard_tools.sharding.sources import open_source
from tests.helpers.shard_samples import image_tree, jpeg

ROOT = Path(__file__).resolve().parents[2]

# Breaks a function that every shard's writer calls, in this process and in its workers.
SLIP = """
import shard_tools.sharding.writer as writer

def check_image(data, settings, sound):
    return len(data) + "bytes"

writer.check_image = check_image
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return image_tree(tmp_path_factory.mktemp("tree") / "images", {"cat": 3, "dog": 3})


@pytest.fixture(scope="module")
def shards(tree) -> Path:
    dest = tree.parent / "shards"
    assert make_shards.main([str(tree), str(dest), "--shard-size", "4KiB"]) == 0
    return dest


@pytest.mark.parametrize("workers", [1, 2])
def test_a_slip_in_a_shard_worker_shows_its_traceback_and_the_image(tree, tmp_path, workers):
    (tmp_path / "slip").mkdir()
    (tmp_path / "slip/sitecustomize.py").write_text(SLIP)
    command = [sys.executable, ROOT / "shard_tools/make_shards.py", tree, tmp_path / "out"]
    done = subprocess.run(
        [*command, "--shard-size", "4KiB", "--workers", str(workers)],
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'slip'}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "in check_image" in done.stderr
    assert "TypeError: unsupported operand" in done.stderr
    assert f"while working on {tree}/" in done.stderr
    assert "error: " not in done.stderr
    assert not list((tmp_path / "out").glob(".*.tmp"))


# Kills the worker that has the image of 31 x 23 pixels in hand, as a crash or the kernel would.
DEATH = """
import os
import shard_tools.sharding.writer as writer

original = writer.check_image

def check_image(data, settings, sound):
    image = original(data, settings, sound)
    if (image.width, image.height) == (31, 23):
        os.kill(os.getpid(), {signal})
    return image

writer.check_image = check_image
"""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("signal", ["9", "11"])
def test_the_death_of_a_worker_names_the_file_and_can_be_resumed(tmp_path, workers, signal):
    tree = image_tree(tmp_path / "images", {"cat": 20, "dog": 20})
    (tree / "dog" / "deadly.jpg").write_bytes(jpeg(1, (31, 23)))
    (tmp_path / "slip").mkdir()
    (tmp_path / "slip/sitecustomize.py").write_text(DEATH.replace("{signal}", signal))
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "shard_tools/make_shards.py", tree, out, "--shard-size"]
    command += ["40KiB", "--workers", str(workers)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'slip'}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"error: a worker process died while working on {tree}/dog/deadly.jpg (out of memory, or a "
        "crash in a decoder); finished shards are kept, --resume does the rest"
    )
    assert "Traceback" not in done.stderr
    assert not list(out.glob(".*.tmp"))
    assert make_shards.main([*map(str, command[2:]), "--resume"]) == 0
    assert read_manifest(out).samples == 41
    assert verify_shards.main([str(out), "--workers", "1"]) == 0


def test_a_slip_in_this_process_is_raised(shards, monkeypatch):
    monkeypatch.setattr(verify_shards, "read_samples", lambda path: None)
    with pytest.raises(TypeError) as caught:
        verify_shards.main([str(shards), "--workers", "1"])
    assert f"while working on {shards}/shard-00000" in "".join(
        traceback.format_exception(caught.value)
    )


def commands(tree: Path, shards: Path, bad: Path) -> dict[str, tuple]:
    small = ["--fraction", "0.5"]
    return {
        "make_shards": (make_shards, [tree, bad]),
        "demo_images": (demo_images, [bad, "--train", 16, "--val", 16]),
        "subset": (subset, [shards, bad, *small]),
        "subset --copy": (subset, [shards, bad, *small, "--copy"]),
        "index_shards": (index_shards, [shards, "--output", bad]),
    }


@pytest.mark.parametrize(
    "name", ["make_shards", "demo_images", "subset", "subset --copy", "index_shards"]
)
@pytest.mark.parametrize("inside", [True, False])
def test_a_destination_that_is_a_file_or_below_one_is_named(
    tree, shards, tmp_path, capfd, name, inside
):
    (tmp_path / "file").write_text("x")
    bad = tmp_path / "file" / "out" if inside else tmp_path / "file"
    tool, words = commands(tree, shards, bad)[name]
    assert tool.main([str(word) for word in words]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("option", ["--classes-from", "--synsets"])
def test_a_list_that_is_no_text_is_named(tree, tmp_path, capfd, option):
    (tmp_path / "list").write_bytes(b"cat\n\xff\n")
    source = tree if option == "--classes-from" else tmp_path / "val.tar"
    (tmp_path / "val.tar").write_bytes(b"\0" * 10240)
    assert (
        make_shards.main([str(source), str(tmp_path / "out"), option, str(tmp_path / "list")]) == 2
    )
    assert f"error: {tmp_path / 'list'}: cannot be read as UTF-8" in capfd.readouterr().err


def test_too_small_a_disk_is_said_before_anything_is_written(tree, tmp_path, capsys, monkeypatch):
    def made(name, free, *options, total=10**12):
        usage = SimpleNamespace(total=total, free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        return make_shards.main([str(tree), str(tmp_path / name), "--workers", "1", *options])

    size = sum(path.stat().st_size + 5 * 512 for path in tree.rglob("*.JPEG"))
    assert made("small", size - 1) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'small'}: the shards take 0.00 GB more, but 0.00 GB are free" in error
    assert not list((tmp_path / "small").rglob("*.*"))
    assert made("enough", size) == 0
    assert made("unknown", 0, total=0) == 0  # what some file systems of clouds say
    assert made("resized", 0, "--max-side", "8") == 0


def test_shards_that_are_there_need_no_room(tree, shards, tmp_path, monkeypatch):
    settings = make_shards.settings_of(make_shards.parser().parse_args(["a", "b"]))
    plan = make_plan(open_source(tree), settings)
    out = shutil.copytree(shards, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1, free=0))
    check_room(out, plan)
    for path in sorted(out.glob("*.tar"))[1:]:
        path.unlink()
    with pytest.raises(ToolError, match="GB more"):
        check_room(out, plan)


def test_a_full_disk_is_one_sentence_that_names_the_shard(tree, tmp_path, capfd, monkeypatch):
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr("shard_tools.sharding.writer.ShardWriter", _on(full))
    assert make_shards.main([str(tree), str(tmp_path / "out"), "--workers", "1"]) == 2
    os.close(full)
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error == (
        f"error: {tmp_path / 'out/shard-000000.tar'}: cannot be written (No space left on device)"
    )
    assert not list((tmp_path / "out").glob(".*.tmp"))


def _on(handle: int):
    from shard_tools.tar import ShardWriter

    return lambda _: ShardWriter(handle)


@pytest.mark.parametrize("lines", [1, 10**5])
def test_output_that_nobody_reads_ends_a_command_without_a_word(lines):
    code = f"""
from pipeline.errors import reader_may_leave
with reader_may_leave():
    for _ in range({lines}):
        print("x" * 80)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + 13
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as whole:
        assert len(whole.stdout.read().splitlines()) == lines
    assert whole.returncode == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_tool_whose_streams_are_closed(closed, tree, tmp_path):
    command = [sys.executable, ROOT / "shard_tools/make_shards.py", tree, tmp_path / "out"]
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command, "--workers", "1"]
    assert subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
    assert verify_shards.verify(str(tmp_path / "out"), decode=True, workers=1) == ([], [])
