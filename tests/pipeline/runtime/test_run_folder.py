"""Run folders: atomic files, the lock, whole and broken checkpoints, where to go on."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tiny import tiny_recipe

from pipeline.config.recipe import dump_recipe
from pipeline.errors import UserError
from pipeline.method.objective import build_objective
from pipeline.runtime.checkpoint import STATE, CheckpointStore, SaveError, read_state
from pipeline.runtime.output import check_output
from pipeline.runtime.run_folder import export
from pipeline.runtime.run_lock import RunLock, claim
from pipeline.runtime.same_run import check_same, data_identity
from shard_tools.atomic import FILES, seal, verify
from shard_tools.manifest import read_manifest


def fake_checkpoint(run, step, recipe, **state):
    """A folder with the shape of a checkpoint (its weights are not read here)."""
    name = f"step-{step:08d}"
    place = run / "checkpoints" / f".{name}"
    place.mkdir(parents=True)
    (place / "weights.bin").write_bytes(os.urandom(100))
    (place / STATE).write_text(json.dumps({"step": step} | state))
    (place / "recipe.yaml").write_text(dump_recipe(recipe))
    seal(place, place.with_name(name))
    return place.with_name(name)


def test_a_folder_in_use_is_refused_and_names_the_holder(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable, "-c",
            "import sys, time; from pathlib import Path; "
            "from pipeline.runtime.run_lock import RunLock; "
            "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)",
            tmp_path,
        ],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(UserError, match=f"another run holds this folder .process {holder.pid}"):
            RunLock(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    RunLock(tmp_path)  # free again, even after a kill


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_no_held_lock(code, tmp_path, monkeypatch):
    def without(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("pipeline.runtime.run_lock.fcntl.lockf", without)
    with pytest.raises(
        UserError, match=rf"has no locks \({os.strerror(code)}\).* --no-lock"
    ) as error:
        RunLock(tmp_path)
    assert "another run holds" not in str(error.value)
    RunLock(tmp_path, needed=False).release()
    with pytest.raises(UserError, match="has no locks"):
        claim(tmp_path, "auto")
    assert claim(tmp_path, "auto", lock_needed=False)[1] is None


def test_an_output_that_cannot_be_a_folder_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: is a file; --output is a folder"):
        RunLock(tmp_path / "file")
    with pytest.raises(UserError, match=r"file.*: --output cannot be written .*Not a directory"):
        RunLock(tmp_path / "file/run")
    with pytest.raises(UserError, match=r"/proc/run.*: --output cannot be written"):
        RunLock(Path("/proc/run"))
    (tmp_path / "run/lock").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run/lock: --output cannot be written .Is a directory"):
        claim(tmp_path / "run", "auto")


@pytest.mark.parametrize("name", ["checkpoints", "encoder", "pictures"])
def test_what_stands_where_a_run_has_a_folder_is_said_at_the_start(name, tmp_path):
    path = tmp_path / name
    path.write_text("")
    with pytest.raises(UserError, match=f"^{path}: --output cannot be written .Not a directory"):
        claim(tmp_path, "auto")
    path.unlink()
    path.symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=f"^{path}: --output cannot be written .a link to nothing"):
        claim(tmp_path, "auto")
    (tmp_path / "nothing").mkdir()
    claim(tmp_path, "auto")


@pytest.mark.parametrize("name", ["checkpoints/latest", "encoder/encoder.json", "failure.txt"])
def test_a_folder_where_a_run_has_a_file_is_said_at_the_start(name, tmp_path):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(
        UserError, match=f"^{tmp_path / name}: --output cannot be written .a folder"
    ):
        claim(tmp_path, "auto")


def read_only(folder):
    """Make a folder read-only, for root too (a bind mount in this process's own namespace)."""
    if os.geteuid():
        folder.chmod(0o555)
        return []
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    return ["unshare", "-m", "sh", "-c", mount, str(folder)]


def test_an_output_whose_name_is_no_utf8_is_refused_before_the_first_save(tmp_path):
    with pytest.raises(
        UserError, match=r"r\\xe9n: --output cannot be written: its path is not UTF-8"
    ):
        check_output(tmp_path / "r\udce9n")


def test_a_read_only_output_is_a_sentence(tmp_path):
    code = (
        "import sys; from pathlib import Path; from pipeline.errors import UserError\n"
        "from pipeline.runtime.run_lock import claim\n"
        "try: claim(Path(sys.argv[1]), 'auto')\n"
        "except UserError as error: print(error)"
    )
    fake_checkpoint(tmp_path / "run", 10, tiny_recipe("mae"))
    prefix = read_only(tmp_path / "run")
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("needs a mount namespace, or a user that is not root")
    assert done.stderr == ""
    assert "--output cannot be written (" in done.stdout


def test_a_full_disk_at_the_start_is_a_sentence(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from pipeline.errors import UserError\n"
        "from pipeline.runtime.run_lock import claim\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"  # files stay empty
        "try: claim(Path(sys.argv[1]), 'auto')\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True
    )
    assert done.stdout == f"{tmp_path}/run/lock: --output cannot be written (File too large)\n"
    assert done.stderr == ""


def test_where_to_go_on(tmp_path):
    recipe = tiny_recipe("mae")
    assert claim(tmp_path, "auto")[1] is None
    fake_checkpoint(tmp_path, 10, recipe)
    newest = fake_checkpoint(tmp_path, 200, recipe)
    assert claim(tmp_path, "auto")[1] == newest
    other = tmp_path / "other"
    assert claim(other, str(tmp_path))[1] == newest
    assert claim(other, str(newest))[1] == newest
    with pytest.raises(UserError, match="already holds a run"):
        claim(tmp_path, "none")
    with pytest.raises(UserError, match="no valid checkpoint"):
        claim(other, str(tmp_path / "nowhere"))


def test_a_run_that_began_elsewhere_continues_itself_and_no_other_takes_its_place(tmp_path):
    """The same command after a preemption resumes, also with --resume PATH."""
    recipe, run, other = tiny_recipe("mae"), tmp_path / "run", tmp_path / "other"
    begin = fake_checkpoint(other, 10, recipe)
    newest = fake_checkpoint(run, 13, recipe, resumed_from=str(other))
    assert claim(run, str(other))[1] == newest
    assert claim(run, "auto")[1] == newest
    with pytest.raises(UserError, match=r"run already holds .* step-00000013.* --resume auto"):
        claim(run, str(begin))
    # Back in the run itself: the later one would be resumed from at the next start.
    later = fake_checkpoint(other, 20, recipe)
    with pytest.raises(UserError, match="other already holds a run at step-00000020"):
        claim(other, str(begin))
    assert claim(other, str(later))[1] == claim(other, str(other))[1] == later
    shutil.rmtree(later)
    assert claim(other, str(begin))[1] == begin


def test_a_checkpoint_of_another_recipe_is_refused_with_the_key(tmp_path):
    place = fake_checkpoint(tmp_path, 10, tiny_recipe("mae"))
    other = tiny_recipe("mae", "optimizer.base_lr=0.1", "seed=4")
    with pytest.raises(
        UserError, match=r"recipe \(optimizer.base_lr: 0.00015 != 0.1; seed: 0 != 4"
    ):
        check_same(place, other, FACTS)
    assert check_same(place, tiny_recipe("mae"), FACTS) == []


FACTS = {"images": 96, "data": "a" * 64, "batch_size": 8, "epochs": 100, "steps_per_epoch": 12}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"images": 192, "data": "b" * 64, "steps_per_epoch": 24}, r"\(96 images, now 192\)"),
        ({"data": "b" * 64}, "as many images, manifest aaaaaaaaaaaa, now bbbbbbbbbbbb"),
    ],
)
def test_a_checkpoint_of_other_data_is_refused_or_continued_deliberately(changed, said, tmp_path):
    recipe = tiny_recipe("mae", "optimizer.warmup_epochs=10", "optimizer.base_lr=3.2e-4")
    place = fake_checkpoint(tmp_path, 30, recipe, schedule=FACTS)
    assert check_same(place, recipe, FACTS) == []
    with pytest.raises(UserError, match=f"{said}.*--resume-changed"):
        check_same(place, recipe, FACTS | changed)
    first, second = check_same(place, recipe, FACTS | changed, anyway=True)
    assert re.search(said, first)
    # lr = 3.2e-4 * 8 / 256 * (step / steps of warm-up)
    now = "epoch 1.25 at lr 1.25e-06" if "images" in changed else "epoch 2.50 at lr 2.50e-06"
    assert second == f"warning: step 30 was epoch 2.50 at lr 2.50e-06, now {now}"


def test_the_data_of_an_older_checkpoint_is_not_known(tmp_path):
    place = fake_checkpoint(tmp_path, 10, tiny_recipe("mae"))
    assert check_same(place, tiny_recipe("mae"), FACTS) == []


def test_data_are_the_same_wherever_they_lie_and_others_where_a_byte_differs(shards, tmp_path):
    train = read_manifest(shards / "train")
    shutil.copytree(shards / "train", tmp_path / "copy")
    assert data_identity(read_manifest(tmp_path / "copy")) == data_identity(train)
    first = replace(train.shards[0], sha256="0" * 64)
    others = [
        replace(train, shards=(first, *train.shards[1:])),
        replace(train, shards=train.shards[::-1]),
        replace(train, index_sha256="0" * 64),
    ]
    assert len({data_identity(m) for m in (train, *others)}) == 4


LISTS = {"cut": b"{", "bytes": b"\xff\xfe", "empty": b"{}", "list": b"[]", "null": b'{"a": null}'}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", *LISTS])
def test_a_broken_checkpoint_is_named_and_the_one_before_is_taken(damage, tmp_path, capsys):
    recipe = tiny_recipe("mae")
    good = fake_checkpoint(tmp_path, 10, recipe)
    bad = fake_checkpoint(tmp_path, 20, recipe)
    weights = bad / "weights.bin"
    data = bytearray(weights.read_bytes())
    if damage == "flip":
        data[50] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(data[:-1])
    elif damage == "remove":
        weights.unlink()
    else:
        (bad / FILES).write_bytes(LISTS[damage])
    with pytest.raises(UserError, match="step-00000020"):
        verify(bad)
    assert CheckpointStore(tmp_path).newest() == good
    printed = capsys.readouterr().out
    assert "step-00000020" in printed
    assert "falling back to the previous checkpoint" in printed


def test_a_checkpoint_under_the_name_of_another_step_is_not_the_newest(tmp_path, capsys):
    recipe = tiny_recipe("mae")
    fake_checkpoint(tmp_path, 10, recipe)
    fake_checkpoint(tmp_path, 20, recipe).rename(tmp_path / "checkpoints/step-00000030")
    assert CheckpointStore(tmp_path).newest().name == "step-00000010"
    assert "step-00000030: holds step 20; rename it to step-00000020;" in capsys.readouterr().out


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path, capsys):
    recipe = tiny_recipe("mae")
    for step in (10, 20):
        (fake_checkpoint(tmp_path, step, recipe) / "weights.bin").unlink()
    with pytest.raises(UserError, match=r"step-00000010/.*: missing .* start from scratch"):
        claim(tmp_path, "auto")
    assert capsys.readouterr().out.count("falling back to the previous checkpoint") == 1


def write_weights(folder):
    """What a training writes: returns no problem."""
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"123")
    return ""


def test_a_store_keeps_the_newest_and_reads_back_what_was_saved(tmp_path):
    store, seen = CheckpointStore(tmp_path, keep=2), []
    read = lambda folder, state: seen.append((folder.name, state["loss"]))  # noqa: E731
    assert store.load(read) is None
    (tmp_path / "checkpoints/.step-00000001").mkdir(parents=True)  # by a kill
    for step in (5, 10, 15):
        place = store.save(step, write_weights, {"loss": step / 10})
    assert place == tmp_path / "checkpoints/step-00000015"
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000010", "step-00000015"]
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000015\n"
    assert store.load(read) == {"step": 15, "loss": 1.5}
    (place / "weights.bin").write_bytes(b"124")
    assert store.load(read) == {"step": 10, "loss": 1.0}
    assert seen == [("step-00000015", 1.5), ("step-00000010", 1.0)]


def test_a_copy_under_another_name_stays_and_is_not_resumed_from(tmp_path):
    store = CheckpointStore(tmp_path)
    kept = [
        shutil.copytree(store.save(5, write_weights, {}), tmp_path / "checkpoints" / name)
        for name in ("step-00000005-keep", "step-best")
    ]
    newest = store.save(10, write_weights, {})
    assert store.newest() == newest
    assert sorted(p for p in newest.parent.iterdir() if p.is_dir()) == [*kept[:1], newest, kept[1]]


def test_a_failed_save_leaves_the_checkpoint_before(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, write_weights, {})

    def full(folder):
        write_weights(folder)
        return "No space left on device"

    with pytest.raises(SaveError, match="step-00000010 could not be written: the disk is full; "
                       "the last valid checkpoint is step-00000005"):  # fmt: skip
        store.save(10, full, {})
    with pytest.raises(ValueError, match="JSON"):
        store.save(10, write_weights, {"loss": float("nan")})
    assert [p.name for p in store.all()] == ["step-00000005"]
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000005\n"


def test_an_encoder_whose_model_cannot_be_written_is_not_said_to_be_of_that_step(tmp_path):
    """A full disk, which has room for the encoder alone: the step is what a study skips a run by,
    and PSNR reads the model."""
    recipe = tiny_recipe("mae")
    objective, _ = build_objective(recipe)
    save_file(
        {k: v.clone().contiguous() for k, v in objective.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    run, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    export(run, tmp_path, objective, recipe, 1)
    names = ("encoder/encoder.json", "encoder/encoder.safetensors", "model.safetensors")
    before = [((run / name).read_bytes(), (run / name).stat().st_mtime_ns) for name in names]
    try:
        room = (run / "model.safetensors").stat().st_size - 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        with pytest.raises(SaveError, match="could not be written"):
            export(run, tmp_path, objective, recipe, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == [((run / n).read_bytes(), (run / n).stat().st_mtime_ns) for n in names]
    assert json.loads(before[0][0])["step"] == 1


def test_the_state_of_an_older_checkpoint_is_read_under_the_keys_of_today(tmp_path):
    (tmp_path / STATE).write_text(json.dumps({"step": 3, "stage": 2, "together": 64}))
    assert read_state(tmp_path) == {"step": 3, "zero_stage": 2, "negatives_batch": 64}


def test_half_written_checkpoints_are_never_seen(tmp_path):
    place = fake_checkpoint(tmp_path, 10, tiny_recipe("mae"))
    place.rename(place.with_name(".step-00000020"))
    assert CheckpointStore(tmp_path).newest() is None


def test_a_start_removes_what_a_kill_left_and_points_latest_to_where_it_goes_on(tmp_path):
    recipe = tiny_recipe("mae")
    found = fake_checkpoint(tmp_path, 10, recipe)
    fake_checkpoint(tmp_path, 20, recipe).rename(tmp_path / "checkpoints/.step-00000020")
    for name in (".recipe.yaml.7.tmp", "checkpoints/.latest.7.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / "checkpoints/latest").write_text("step-00000005\n")  # killed before it was written
    lock, place = claim(tmp_path, "auto")
    assert place == found
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000010\n"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name.startswith(".")) == []
    lock.release()


def test_a_child_does_not_keep_the_lock(tmp_path):
    """As a loader worker outlives a killed rank for some seconds."""
    code = (
        "import os, sys, time; from pathlib import Path; "
        "from pipeline.runtime.run_lock import RunLock; "
        "lock = RunLock(Path(sys.argv[1])); child = os.fork(); "
        "child or time.sleep(60); print(child, flush=True); os._exit(9)"
    )
    done = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True
    )
    child = int(done.stdout.readline())
    done.wait()
    try:
        RunLock(tmp_path).release()
    finally:
        os.kill(child, 9)
