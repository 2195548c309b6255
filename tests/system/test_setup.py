"""Set-up's stages: what is asked for, what is skipped, what an interruption leaves, what is said.

Bare machines are in tests/system/fresh.sh.
"""

import fcntl
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("setup_run", "setup_venv", "setup_builds", "setup_env")
SCRIPT = ROOT / ".ci" / "setup_env.py"
EVERYTHING = "build-essential python3-dev libjpeg-dev zlib1g-dev libtiff-dev libwebp-dev"


@pytest.fixture
def setup_env(tmp_path, monkeypatch):
    """The module of another checkout: a copy of what set-up reads, in a temporary folder."""
    scripts = [f".ci/{part}.py" for part in PARTS]
    for name in ("requirements.lock", "setup.py", "pyproject.toml", *scripts):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "_jpegcrop.c").write_text("int version = 1;\n")
    (tmp_path / "build").mkdir()
    monkeypatch.syspath_prepend(tmp_path / ".ci")
    for name in PARTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("setup_env")
    assert Path(module.ROOT) == tmp_path
    yield module
    for name in PARTS:
        del sys.modules[name]


@pytest.fixture
def stamps(setup_env):
    """A folder for stamps."""
    folder = setup_env.venv.VENV / "setup"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def venv(setup_env):
    """A real .venv with pip in it."""
    setup_env.venv.make_venv()
    assert setup_env.venv.venv_fault() is None
    return setup_env.venv.VENV


def every_header(setup_env):
    return setup_env.builds.Tools(True, True, frozenset(setup_env.builds.HEADERS))


def test_a_bare_machine_is_told_every_package(setup_env):
    line = setup_env.builds.advice(setup_env.builds.Tools(False, False, frozenset()))
    assert line.endswith(f"apt install {EVERYTHING}")
    assert all(name in line for name in ("plain Pillow", "simplejpeg", "torch's"))


def test_only_what_is_missing_is_named(setup_env):
    headers = frozenset(setup_env.builds.HEADERS) - {"webp/decode.h"}
    line = setup_env.builds.advice(setup_env.builds.Tools(True, True, headers))
    assert line.endswith("apt install libwebp-dev")
    assert "plain Pillow" in line
    assert not any(name in line for name in ("simplejpeg", "torch's"))
    assert setup_env.builds.advice(every_header(setup_env)) == ""


def test_a_compiler_without_pythons_headers_builds_nothing(setup_env):
    tools = setup_env.builds.Tools(True, True, frozenset(setup_env.builds.HEADERS) - {"Python.h"})
    assert [tools.pillow(), tools.decoder(), tools.ops()] == [False] * 3
    assert tools.missing() == ["python3-dev"]


def test_headers_are_looked_for_with_the_compiler(setup_env, monkeypatch):
    monkeypatch.setenv("CC", "/nonexistent/cc -O2")
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert setup_env.builds.look() == setup_env.builds.Tools(False, False, frozenset())


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_header_in_the_compilers_folders_is_found(setup_env, monkeypatch, tmp_path):
    (tmp_path / "inc" / "webp").mkdir(parents=True)
    for name in ("jpeglib.h", "webp/decode.h"):
        (tmp_path / "inc" / name).touch()
    monkeypatch.setenv("CC", f"cc -nostdinc -I{tmp_path / 'inc'}")
    assert setup_env.builds.look().headers - {"Python.h"} == {"jpeglib.h", "webp/decode.h"}


def test_the_headers_are_those_of_the_docker_image():
    text = (ROOT / "Dockerfile").read_text()
    packages = text[text.index("--no-install-recommends") :].split("&&")[0].split()
    assert set(EVERYTHING.split()) - {"build-essential"} | {"g++"} <= set(packages)


def stage(setup_env, name, tools):
    return next(s for s in setup_env.stages(tools) if s.name == name)


def test_a_stamp_holds_until_its_inputs_change(setup_env, stamps):
    tools = every_header(setup_env)
    for name in ("wheels", "pillow", "relaxmim", "ops"):
        assert not setup_env.is_done(stage(setup_env, name, tools))
        setup_env.stamp(stage(setup_env, name, tools), "built")
        assert setup_env.is_done(stage(setup_env, name, tools))
    setup_env.builds.c_sources()[0].write_text("int version = 2;\n")
    assert not setup_env.is_done(stage(setup_env, "relaxmim", tools))
    assert setup_env.is_done(stage(setup_env, "wheels", tools))
    setup_env.venv.LOCK.write_text(setup_env.venv.LOCK.read_text() + "another==1.0\n")
    for name in ("wheels", "pillow", "relaxmim", "ops"):
        assert not setup_env.is_done(stage(setup_env, name, tools))


def test_a_compiler_that_comes_later_is_used_and_one_that_goes_is_not_missed(setup_env, stamps):
    bare, full = setup_env.builds.Tools(False, False, frozenset()), every_header(setup_env)
    for name in ("pillow", "relaxmim", "ops"):
        setup_env.stamp(stage(setup_env, name, bare), "")
        assert setup_env.is_done(stage(setup_env, name, bare))
        assert not setup_env.is_done(stage(setup_env, name, full))
        setup_env.stamp(stage(setup_env, name, full), "built")
        assert setup_env.is_done(stage(setup_env, name, bare))


def test_a_build_that_failed_is_tried_again_by_make_setup_only(setup_env, stamps):
    ops = stage(setup_env, "ops", every_header(setup_env))
    setup_env.stamp(ops, "failed")
    assert setup_env.is_done(ops)
    assert not setup_env.is_done(ops, retry=True)


def test_half_made_moved_and_foreign_environments_are_seen(setup_env, venv, tmp_path):
    config = (venv / "pyvenv.cfg").read_text()
    (venv / "pyvenv.cfg").write_text(re.sub(r"(?m)^version.*$", "version = 3.9.1", config))
    assert "another Python" in setup_env.venv.venv_fault()
    (venv / "pyvenv.cfg").write_text(config)
    record = next(setup_env.venv.site_packages().glob("pip-*/RECORD"))
    record.rename(record.with_name("gone"))
    assert "half made" in setup_env.venv.venv_fault()
    record.with_name("gone").rename(record)
    script = venv / "bin" / "pip"
    text = script.read_text()
    script.write_text(text.replace(str(tmp_path), "/elsewhere"))
    assert "moved" in setup_env.venv.venv_fault()
    script.write_text(text)
    assert setup_env.venv.venv_fault() is None
    (venv / "bin" / "python").unlink()
    assert "half made" in setup_env.venv.venv_fault()
    setup_env.venv.make_venv()
    assert setup_env.venv.venv_fault() is None


def make_wheel(folder, name):
    """A wheel with one module, as pip takes it."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "value = 1\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n")
    return path


def pillow_of(setup_env, folder, release, lacking=()):
    """A wheel of pillow-simd that says which formats it has."""
    wheel = folder / f"pillow_simd-{release}-cp311-cp311-linux_x86_64.whl"
    present = {name: name not in lacking for name in setup_env.builds.FORMATS}
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("PIL/__init__.py", "")
        archive.writestr("PIL/features.py", f"check = {present}.get\n")
    return wheel


def test_a_kept_pillow_simd_is_of_this_release_and_has_every_format(
    setup_env, venv, tmp_path, monkeypatch
):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # nothing can be fetched to build another
    release = setup_env.builds.PILLOW_SIMD.split("==")[1]
    pillow_of(setup_env, tmp_path, "1.0")
    with pytest.raises(setup_env.Failed):
        setup_env.builds.pillow_wheel(tmp_path, avx2=True)
    kept = pillow_of(setup_env, tmp_path, release)
    assert setup_env.builds.pillow_wheel(tmp_path, avx2=True) == kept
    pillow_of(setup_env, tmp_path, release, lacking=("webp",))
    with pytest.raises(setup_env.Failed):
        setup_env.builds.pillow_wheel(tmp_path, avx2=True)
    assert "built without webp\n" in setup_env.LOG.read_text()


def test_an_installation_cut_off_is_done_again(setup_env, venv, tmp_path):
    wheel = make_wheel(tmp_path, "onemodule")
    setup_env.venv.pip("--no-index", wheel)
    folder = setup_env.venv.site_packages()
    (folder / "onemodule-1.0.dist-info" / "RECORD").unlink()  # pip writes it last
    (folder / "onemodule.py").unlink()
    (folder / "~neother").mkdir()
    setup_env.venv.pip("--no-index", wheel)
    assert not (folder / "onemodule.py").exists()  # pip alone believes that it is there
    setup_env.venv.remove_halves()
    setup_env.venv.pip("--no-index", wheel)
    assert (folder / "onemodule.py").exists()
    assert not (folder / "~neother").exists()


def test_a_failure_shows_the_end_of_the_log_and_a_hint(setup_env, stamps, capsys):
    noise = "DEPRECATION: old\\nWARNING: Location is ignored"
    code = f"print('{noise}\\nOSError: No space left on device'); raise SystemExit(3)"
    work = lambda: setup_env.builds.run([sys.executable, "-c", code], 60)  # noqa: E731
    failing = setup_env.Stage("wheels", "installing (6 GB)", "key", False, work)
    with pytest.raises(setup_env.SetupError, match=r"(?s)^installing: .*code 3.*setup.log.*7 GB"):
        setup_env.do(2, failing, 5)
    out, err = capsys.readouterr()
    assert out == "[2/5] installing (6 GB)\n"
    assert err.strip() == "| OSError: No space left on device"
    assert not setup_env.is_done(failing)


def test_a_network_that_is_not_there_is_the_hint_though_pip_names_another_cause(setup_env, stamps):
    with setup_env.LOG.open("a") as log:
        log.write(
            "\n== [2/5] installing\nWARNING: Retrying: Temporary failure in name resolution\n"
        )
        log.write("ERROR: No matching distribution found for absl-py==2.5.1\n")
    assert setup_env.hint().startswith("no network")


def test_a_build_that_fails_is_survived_and_stamped(setup_env, stamps, capsys):
    def work():
        raise setup_env.builds.NotBuilt("no such header")

    optional = setup_env.Stage("ops", "compiling", "key", True, work)
    setup_env.do(5, optional, 5)
    assert "not built: no such header" in capsys.readouterr().out
    assert (stamps / "ops").read_text() == "key\nfailed\n"


def test_a_time_limit_ends_the_command_and_its_children(setup_env, tmp_path):
    code = f"echo $$ > {tmp_path}/pids; sleep 60 & echo $! >> {tmp_path}/pids; wait"
    begun = time.monotonic()
    with pytest.raises(setup_env.Failed, match="limit of 1 s"):
        setup_env.builds.run(["sh", "-c", code], 1)
    assert time.monotonic() - begun < 10
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def gone(pid):
    """Whether a process has ended, a moment after it was killed."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_what_a_killed_set_up_had_started_is_ended_by_the_next(setup_env, tmp_path):
    code = "import setup_run as s; s.run(['sh', '-c', 'echo $$ > pid; sleep 60'], 90)"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path / ".ci")}
    )
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    child = int((tmp_path / "pid").read_text())
    assert Path(f"/proc/{child}").exists()
    with setup_env.alone():
        assert gone(child)


def test_ctrl_c_ends_set_up_with_one_line_and_130(setup_env, tmp_path):
    with (tmp_path / "build" / "setup.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        command = [sys.executable, tmp_path / ".ci" / "setup_env.py"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert "another set-up of this folder is running" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "set-up interrupted; the same command resumes it\n"


def test_a_folder_of_someone_else_is_one_sentence(setup_env, tmp_path):
    (tmp_path / "build").rmdir()
    (tmp_path / "build").write_text("a file")
    command = [sys.executable, tmp_path / ".ci" / "setup_env.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: \S+/build: File exists\n", done.stderr)


def test_it_needs_nothing_but_the_standard_library():
    command = [sys.executable, "-E", "-S", SCRIPT, "--help"]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_python_that_cannot_make_environments_is_named_with_its_packages(setup_env, tmp_path):
    python = tmp_path / "python"  # one without ensurepip and libstdc++
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import nothing_of_this_name"\n')
    python.chmod(0o755)
    setup_env.venv.base_python = lambda: str(python)
    with pytest.raises(setup_env.SetupError, match=r"/python .*apt install python3-venv libstdc"):
        setup_env.set_up(retry=False)
    assert not setup_env.venv.VENV.exists()
