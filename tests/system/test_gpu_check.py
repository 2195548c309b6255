"""make gpu-check: rehearsed on the CPU and on a null GPU; its ways to end badly; its figures."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import gpu_page
import null_gpu
import pytest
import torch
from bench_gpu import least_bytes, leaves_of, with_backward
from gpu_stages import STAGES
from gpu_stages.kernels import allowed, distance, read_junit, read_ncu, slowest
from gpu_stages.training import MOST, apart

from pipeline.kernels.cases import Sizes

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests/system/gpu_check.py"
# What a GPU node does not have.
ABSENT = ("hypothesis", "moto", "boto3", "skimage")


@pytest.fixture
def absent(tmp_path):
    """A folder that, first on the path, makes packages look as if they were not installed."""
    for name in ABSENT:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})\n")
    return str(tmp_path)


def test_every_stage_has_a_box_and_what_is_timed_runs_alone():
    assert list(STAGES) == list(gpu_check.BOXES)
    alone = [name for name, (_, beside) in gpu_check.BOXES.items() if not beside]
    assert alone == ["step", "pretrain", "loader", "kernel_speed", "ncu"]
    assert list(gpu_check.BOXES)[-5:] == alone  # the others have ended before


@pytest.mark.slow
def test_the_rehearsal(tmp_path, absent):
    """Every stage on the CPU, without what a node lacks and without a compiler."""
    environment = os.environ | {
        "PYTHONPATH": absent,
        "PYTEST_ADDOPTS": "-p no:hypothesispytest",  # which is installed here
    }
    command = [sys.executable, SCRIPT, "--rehearse", "--output", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    last = json.loads(done.stdout.splitlines()[-1])
    expected = dict.fromkeys(STAGES, "passed")
    skipped = {name: status for name, status in last["stages"].items() if "skipped" in status}
    assert skipped.keys() <= {"ops", "compile", "ncu"}, last["stages"]
    assert last["stages"] == expected | skipped, (tmp_path / "out/log.txt").read_text()[-5000:]
    assert done.returncode == 0
    assert last["device"].startswith("CPU")

    result = json.loads((tmp_path / "out/result.json").read_text())["results"]
    assert result["kernels"]["tests"] > result["kernels"]["skipped"]
    curves = result["recipes"]["curves"]
    assert {c for row in curves.values() for c in row["columns"]} == {f"ZeRO-{n}" for n in range(4)}
    steps = result["step"]["steps"]
    assert {n for n, row in steps.items() if "images_per_second" in row} >= {
        "mae", "rmae", "cmae", "plain MAE", "plain MAE, compiled",
    }  # fmt: skip
    for name in ("mae", "rmae", "cmae"):
        assert sum(steps[name]["launches_by_phase"].values()) == steps[name]["launches"]
    assert steps["cmae"]["launches_by_phase"]["EMA"] > 0
    assert result["resume"]["killed_after"] > result["resume"]["resumed_from"] >= 10
    assert result["pretrain"]["images_per_second"] > 0
    assert 0 <= result["pretrain"]["waiting"] <= 1
    assert result["loader"]["bound"].keys() == {"mae", "rmae", "cmae"}
    page = (tmp_path / "out/page.md").read_text()
    assert "A rehearsal" in page
    assert "█" in page

    document = tmp_path / "gpu.md"
    document.write_text(f"{gpu_page.BEGIN}\n{gpu_page.END}\n")
    command = [sys.executable, SCRIPT, "--write", document, "--output", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "go into no document" in done.stderr


@pytest.mark.slow
def test_the_stages_on_a_gpu_that_computes_nothing(tmp_path):
    """The CUDA path of every stage that needs no figures: torch's CUDA build, Triton's compiler for
    sm_80, DeepSpeed under every ZeRO stage, and exact launches."""
    try:
        environment = null_gpu.environment(tmp_path)
    except null_gpu.NoCompilerError as error:
        pytest.skip(str(error))
    names = ["numerics", "recipes", "step", "pretrain", "loader", "kernel_speed", "ncu"]
    environment["PYTHONPATH"] = os.pathsep.join(gpu_check.PATHS)
    command = [sys.executable, SCRIPT, "--rehearse", "--output", tmp_path, "--stage", *names]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    found = {}
    for name in names:
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert found[name]["null"]
        status = found[name]["status"]
        assert status == "passed" or (name == "ncu" and "no ncu" in status), done.stderr[-5000:]
    steps = found["step"]["steps"]
    # Masks and the epoch's number are a launch each; a step without a teacher reads what DeepSpeed
    # reads and waits no more.
    assert steps["mae"]["launches_by_phase"]["masks"] == 2
    assert steps["cmae"]["launches_by_phase"]["masks"] <= 12
    assert steps["mae"]["waits"] <= 9
    assert steps["cmae"]["waits"] <= steps["mae"]["waits"]
    assert steps["plain MAE"]["waits"] == 0


# ---- ways to end badly ---------------------------------------------------------------------------

STAGE = """
import json, subprocess, sys, time
from pathlib import Path
folder, name = Path(sys.argv[1]), sys.argv[2]
def note(**found):
    (folder / f"{name}.json").write_text(json.dumps({"device": "some GPU"} | found))
note(curves=1)
if name == "kernels":      # hangs, with a child
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "child").write_text(str(child.pid))
    print("waits", flush=True); time.sleep(60)
if name == "numerics":     # dies without a word of its own
    print("CUDA error: an illegal memory access", flush=True); import os; os._exit(134)
if name == "recipes":      # says what is wrong
    note(status="failed: mae under ZeRO-3 is 7 % off fp32")
if name == "step":         # finds what no page can be made of
    note(status="passed", batch=8, steps={"mae": {"images_per_second": "quick"}})
if name == "loader":
    print("about to go", flush=True); import os, signal; os.kill(os.getpid(), signal.SIGSEGV)
if name == "ncu":          # ends the check
    import os, signal; os.kill(os.getppid(), signal.SIGHUP); time.sleep(60)
"""


class Staged(gpu_check.Check):
    """A check whose stages are short scripts."""

    def command(self, name, box):
        return [sys.executable, "-c", STAGE, str(self.folder), name]


def test_a_stage_that_hangs_or_dies_hides_nothing(tmp_path, capsys):
    args = argparse.Namespace(
        output=tmp_path, budget=60, limit=6, rehearse=False, batch=1, mae=None
    )
    assert Staged(args, ["kernels", "numerics", "recipes", "step", "loader"]).run() == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["device"] == "some GPU"
    assert result["stages"] == {
        "kernels": "failed: not done within 6 s",
        "numerics": "failed: exit code 134: CUDA error: an illegal memory access",
        "recipes": "failed: mae under ZeRO-3 is 7 % off fp32",
        "step": "passed",
        "loader": "failed: ended by SIGSEGV: about to go",
    }
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["stages"] == result["stages"]
    assert written["results"]["kernels"]["curves"] == 1  # what it had found before it hung
    assert "waits" in (tmp_path / "log.txt").read_text()
    assert "The page could not be made" in (tmp_path / "page.md").read_text()
    assert child_has_ended(tmp_path)


@pytest.mark.parametrize(("budget", "box"), [(940, 340), (470, 170), (300, 170), (100, 100)])
def test_a_larger_budget_has_larger_boxes(tmp_path, budget, box):
    args = argparse.Namespace(output=tmp_path, budget=budget, limit=0, rehearse=False)
    assert Staged(args, []).box("step") == pytest.approx(box, abs=1)


def test_what_is_not_done_in_time_says_what_gives_it_more(tmp_path, monkeypatch):
    args = argparse.Namespace(
        output=tmp_path, budget=60, limit=0, rehearse=False, batch=1, mae=None
    )
    monkeypatch.setitem(gpu_check.BOXES, "kernels", (6, True))
    check = Staged(args, ["kernels"])
    assert check.run() == 1
    said = "failed: not done within 6 s (--budget 90 gives it more)"
    assert check.result()["stages"]["kernels"] == said


CHECK = """
import sys
import gpu_check
class Staged(gpu_check.Check):
    def command(self, name, box):
        return [sys.executable, "-c", sys.argv[1], str(self.folder), name]
gpu_check.why_no_cuda = lambda: ""
gpu_check.Check = Staged
sys.exit(gpu_check.main(["--output", sys.argv[2], "--limit", "60", "--stages", *sys.argv[3:]]))
"""


def test_a_signal_leaves_what_was_found_and_the_last_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CHECK, STAGE, tmp_path, "recipes", "ncu", "step"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(gpu_check.PATHS)}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGHUP
    result = json.loads(done.stdout.splitlines()[-1])
    ended = "failed: the check was ended by SIGHUP"
    assert result["stages"]["ncu"] == result["stages"]["step"] == ended
    assert result["device"] == "some GPU"
    written = json.loads((tmp_path / "result.json").read_text())["results"]
    assert written["ncu"] == {"device": "some GPU", "curves": 1, "status": ended}


def test_a_process_that_the_driver_holds_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "KILLED", 0.2)
    monkeypatch.setattr(gpu_check, "end_group", lambda process: None)
    args = argparse.Namespace(
        output=tmp_path, budget=60, limit=6, rehearse=False, batch=1, mae=None
    )
    check = Staged(args, ["kernels", "recipes"])
    check.box = lambda name: 5.0 if name == "recipes" else 0.5
    monkeypatch.setattr(gpu_check, "LEAST", 0.1)
    check.run()
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    stages = check.result()["stages"]
    assert stages["kernels"].endswith(", and cannot be killed: the driver holds it (dmesg)")
    assert stages["recipes"].startswith("failed: mae under")


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(gpu_check, "why_no_cuda", lambda: "")
    assert gpu_check.main(["--output", str(tmp_path / "file/out")]) == 2
    assert "file/out: cannot be written (Not a directory)" in capsys.readouterr().err


def test_a_folder_of_other_files_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "why_no_cuda", lambda: "")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shard.tar").touch()
    (tmp_path / "README.md").touch()
    assert gpu_check.main(["--output", str(tmp_path)]) == 2
    assert "holds files that no gpu-check wrote, and a check empties" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["README.md", "data", "shard.tar"]


@pytest.mark.parametrize("mark", ["page.md", gpu_check.LOCK])
def test_the_folder_of_an_earlier_check_is_emptied_for_one_check_alone(tmp_path, capsys, mark):
    args = argparse.Namespace(output=tmp_path, budget=4, limit=0, rehearse=False, batch=1, mae=None)
    for name in (mark, "step.json"):
        (tmp_path / name).touch()
    check = Staged(args, [])
    assert not (tmp_path / "step.json").exists()
    assert gpu_check.main(["--rehearse", "--output", str(tmp_path)]) == 2
    assert "another gpu-check runs there" in capsys.readouterr().err
    check.lock.close()
    Staged(args, []).lock.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch", "0"], "--batch 0: must be at least 1"),
        (["--budget", "nan"], "--budget nan: must be above 0 and finite"),
        (["--limit", "-1"], "--limit -1: must be at least 0"),
    ],
)
def test_a_number_that_no_check_has_is_a_sentence(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--output", str(tmp_path / "out"), *words])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stage_that_is_named_twice_runs_once():
    assert gpu_check.parse_args(["--stages", "step", "ops", "step"]).stages == ["step", "ops"]


def child_has_ended(folder):
    """Whether the child of the stage that hangs is gone within ten seconds."""
    state, end = Path(f"/proc/{(folder / 'child').read_text()}/stat"), time.monotonic() + 10
    while state.exists() and " Z " not in state.read_text():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_what_ends_the_check_ends_its_stages(tmp_path):
    class Interrupted(Staged):
        def end_beside(self):
            while self.beside:
                if (tmp_path / "child").exists() and (tmp_path / "child").read_text():
                    raise KeyboardInterrupt
                time.sleep(0.05)

    args = argparse.Namespace(
        output=tmp_path, budget=60, limit=60, rehearse=False, batch=1, mae=None
    )
    with pytest.raises(KeyboardInterrupt):
        Interrupted(args, ["kernels"]).run()
    assert child_has_ended(tmp_path)


def test_stages_that_find_no_time_are_skipped(tmp_path):
    args = argparse.Namespace(output=tmp_path, budget=4, limit=0, rehearse=False, batch=1, mae=None)
    check = Staged(args, ["step", "loader"])
    assert check.run() == 0
    result = check.result()
    assert result["stages"] == dict.fromkeys(("step", "loader"), "skipped: no time left of 4 s")
    assert result["device"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "there is none here; make gpu-check REHEARSE=1" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_torch_that_is_broken_is_no_missing_gpu(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open')\n")
    monkeypatch.setattr(gpu_check, "PATHS", [str(tmp_path), *gpu_check.PATHS])
    assert gpu_check.why_no_cuda() == (
        "torch cannot say whether there is one (ImportError: libcudart.so.13: cannot open)"
    )


# ---- what the figures rest on --------------------------------------------------------------------


def test_a_kernel_that_is_off_is_no_agreement():
    x = torch.linspace(-4, 4, 9)
    assert distance(x, x) == 0
    assert distance(x + 1, x) == 0.25  # of the largest value
    assert not distance(x * float("nan"), x) <= allowed(x)
    assert not distance(-x, x) <= allowed(x)
    assert distance(x[:3], x) == float("inf")
    assert distance(x.bfloat16(), x) == float("inf")
    bits = torch.tensor([0, 255], dtype=torch.uint8)
    assert distance(bits, bits.flip(0)) == 255  # not 1: bytes do not wrap
    places = torch.tensor([0, 1], dtype=torch.int32)
    assert distance(places, places) <= allowed(places) < distance(places, places + 1)


def test_a_curve_with_a_nan_is_off():
    assert apart([1.01, 2.0], [1.0, 2.0]) == pytest.approx(0.005)
    assert not apart([1.0, float("nan")], [1.0, 2.0]) <= MOST


def test_least_bytes_of_a_call_by_hand():
    sizes = Sizes(2, side=32, patch=8, width=16, decoder=32, keep=4)
    found = least_bytes(sizes)
    assert found["cutmix"] == 2 * 2 * 32 * 32 * 3  # read and written
    rows, values = 2 * (sizes.length - sizes.keep), sizes.values
    read = rows * values * (2 + 1) + rows * 4  # predictions in bf16, pixels, positions
    assert read <= found["patch_loss"] <= 1.2 * read + 1000
    assert found["patch_loss with backward"] > found["patch_loss"] + rows * values * 2


def test_backward_is_timed_without_adding_up_gradients():
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    call = with_backward(lambda: a * (2 * a + b).detach() + 3 * b)
    assert [leaf is x for leaf, x in zip(leaves_of(a * 1 + b), (a, b), strict=True)] == [True] * 2
    for _ in range(2):
        assert torch.equal(sum(call()), torch.full((3,), 6.0))
    assert a.grad is None
    assert b.grad is None


# ---- page, ncu, junit ----------------------------------------------------------------------------


def result_of(**results):
    return {
        "device": "NVIDIA H100", "date": "2027-01-02T03:04:05+00:00", "torch": "2.11.0",
        "cores": 16, "rehearsal": False, "seconds": 401.2,
        "stages": dict.fromkeys(results, "passed"), "results": results,
    }  # fmt: skip


STEP = {
    "images_per_second": 1000.0, "ms": 128.0, "mfu": 0.4213, "peak_gb": 20.5, "launches": 1250,
    "copies": 3, "waits": 2, "ms_by_phase": {"encoder": 40.0, "rest": 2.0},
    "launches_by_phase": {"encoder": 200, "rest": 5}, "busy_ms": 110.0,
    "busy_by_kind": {"matrix products": 80.0, "sums": 30.0},
}  # fmt: skip


def test_the_page_goes_between_the_marks_and_replaces_the_one_before(tmp_path):
    document, source = tmp_path / "gpu.md", tmp_path / "result.json"
    document.write_text(f"# Head\n\n{gpu_page.BEGIN}\nold\n{gpu_page.END}\ntail\n")
    plain = STEP | {"images_per_second": 500.0, "ms_by_phase": {"rest": 1.0}}
    del plain["busy_by_kind"]
    usual = {"mae, graphs": {"images_per_second": 2000.0, "ms": 32.0, "mfu": 0.3}}
    rows = {"mae": STEP, "plain MAE": plain, "facebookresearch/mae": {"skipped": "no checkout"}}
    found = {"batch": 128, "steps": rows, "ratios": {"mae / plain MAE": 2.0}}
    found |= {"usual": 64, "usual_steps": usual}
    source.write_text(json.dumps(result_of(step=found)))
    for _ in range(2):
        assert gpu_page.write_into(document, source) == 0
    text = document.read_text()
    assert text.startswith("# Head\n")
    assert text.endswith(f"{gpu_page.END}\ntail\n")
    assert "old" not in text
    assert text.count("## NVIDIA H100, 2027-01-02") == 1
    assert "### A step, 128 images" in text
    bars = {
        line.split("█")[0].strip(): line.count("█") for line in text.splitlines() if "█" in line
    }
    assert bars == {"mae": 30, "plain MAE": 15}
    assert "| mae | 1,000 | 128 | 110 | - | 42.13% | 20.5 | 1,250 | 3 | 2 |" in text
    assert "| matrix products | 80 |" in text
    assert "| 64 images | images/s | ms | MFU |" in text
    assert "| mae, graphs | 2,000 | 32 | 30.00% |" in text
    assert "| encoder | 40 / 200 |" in text
    document.write_text("no marks\n")
    assert gpu_page.write_into(document, source) == 2
    assert document.read_text() == "no marks\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1], "is not a result of a check, which has date, device, "),
        ({"device": "NVIDIA H100"}, "is not a result of a check, which has date, device, "),
        (result_of(step={"steps": {"mae": STEP}}), "no page can be made of it (KeyError: 'batch')"),
    ],
)
def test_no_page_is_made_of_a_file_that_is_no_result(tmp_path, capsys, content, said):
    document, source = tmp_path / "gpu.md", tmp_path / "result.json"
    document.write_text(text := f"{gpu_page.BEGIN}\nold\n{gpu_page.END}\n")
    source.write_text(json.dumps(content))
    assert gpu_page.write_into(document, source) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source}: {said}")
    assert len(error.splitlines()) == 1
    assert document.read_text() == text


@pytest.mark.parametrize("value", [None, 0.0])
def test_a_page_is_made_of_figures_that_are_none(value):
    step = dict.fromkeys(STEP, value) | {"images_per_second": 5.0}
    step |= {
        "ms_by_phase": {"encoder": value},
        "launches_by_phase": {},
        "busy_by_kind": {"a": value},
    }
    results = {
        "step": {"batch": 8, "steps": {"mae": step, "lost": {"images_per_second": value}},
                 "ratios": {"a / b": value}, "usual": 64,
                 "usual_steps": {"mae": {"images_per_second": value}}},
        "pretrain": {"images_per_second": value, "batch": 8, "waiting": value, "of_step": value},
        "loader": {"cores": 2, "images_per_second": {"1": value},
                   "bound": {"mae": {"by": "loader", "cores_needed": value}}},
        "kernel_speed": {"microseconds": {"a": {"triton": value, "copy": value, "of copy": value}}},
        "recipes": {"curves": {"mae": {"fp32": [value], "columns": {"a": {"distance": value}}}}},
        "numerics": {"agreement": {"a": {"distance": value, "allowed": value}}},
        "evaluation": {"top1": {"knn": value}, "features_apart": value},
        "ncu": {"call": "a", "kernels": {"b": {}}},
    }  # fmt: skip
    page = gpu_page.page(result_of(**results))
    for head in (
        "## A step",
        "## The loader",
        "## Kernels",
        "## Loss",
        "## Evaluation",
        "## Nsight",
    ):
        assert head in page


def test_docs_gpu_tells_of_the_h200_what_its_result_has():
    text = " ".join((ROOT / "docs/gpu.md").read_text().split())
    text = text[text.index("## What an H200 showed") : text.index("## Figures")]
    found = json.loads((ROOT / "docs/page/gpu-h200.json").read_text())["results"]
    steps, ratio = found["step"]["steps"], found["step"]["ratios"]
    speed = {
        title: f"{row['images_per_second']:,.0f}" for title, row in steps.items() if "ms" in row
    }
    kernels, parts = found["kernel_speed"]["microseconds"], found["kernel_speed"]["parts"]
    floor = found["kernel_speed"]["launch"]
    share = {
        name: f"{row['of copy']:.0%}"[:-1] for name, row in kernels.items() if "of copy" in row
    }
    masks = [round(kernels[name]["triton"], 1) for name in kernels if name.startswith("s")]
    loss = sorted(share[name] for name in share if name.startswith("patch_loss"))
    unfinished = [n for n, row in found.items() if row["status"].startswith("failed: not done")]
    shipped = "mae, compiled, graphs"
    for words in (
        f"{speed[shipped]} images/s at batch 256: "
        f"{ratio[f'{shipped} / facebookresearch/mae']:.2f} times facebookresearch/mae's model, and "
        f"{ratio[f'{shipped} / plain MAE, compiled']:.2f} times a plain",
        f"({speed['mae']} and {speed['facebookresearch/mae']})",
        f"{found['kernels']['tests']} kernel tests",
        f"The time limits of {', '.join(f'`{n}`' for n in unfinished[:-1])} and "
        f"`{unfinished[-1]}` ended",
        f"placing reaches {share['place_tokens']} % of its speed, cutmix {share['cutmix']} %, the "
        f"loss {loss[0]} to {loss[-1]} %",
        f"take {min(masks)} to {max(masks)} µs",
        f"an empty kernel {floor['empty, 256 programs']:.1f}, and one that stores a word "
        f"{floor['one store, 256 programs']:.1f}",
        f"a cast that took {parts['sum of 800 × 512 in PyTorch, and its cast']:.0f} µs",
        f"a kernel of our own now takes {parts['sum_partials of 800 × 512, 16 warps']:.1f}.",
        f"{parts['place_tokens_backward, 4 rows, 16 samples']:.1f} µs instead of "
        f"{parts['place_tokens_backward, 8 rows, 8 samples']:.1f}",
    ):
        assert words in text, words


def test_docs_gpu_has_the_marks():
    text = (ROOT / "docs/gpu.md").read_text()
    assert 0 < text.index(gpu_page.BEGIN) < text.index(gpu_page.END)


def test_docs_gpu_has_the_figures_that_are_kept(tmp_path):
    document = tmp_path / "gpu.md"
    document.write_text((ROOT / "docs/gpu.md").read_text())
    command = ["--write", str(document), "--output", str(ROOT / "docs/page/gpu-h100.json")]
    assert gpu_check.main(command) == 0
    assert document.read_text() == (ROOT / "docs/gpu.md").read_text()


def test_the_slowest_kernel_is_the_furthest_from_a_copy_of_those_that_take_time():
    rows = {
        "tiny": {"triton": 3.0, "of copy": 0.01},
        "jitter": {"triton": 900.0, "of copy": 0.05},
        "loss": {"triton": 100.0, "of copy": 0.8},
        "untimed": {"eager": 1.0},
    }
    assert slowest(rows) == "jitter"
    assert slowest({"tiny": rows["tiny"]}) == "tiny"


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","color_jitter_kernel","GPU Speed Of Light","DRAM Throughput","%","12.5"
"0","7","color_jitter_kernel","Launch Statistics","Registers Per Thread","register/thread","40"
"1","7","color_jitter_sum_kernel","GPU Speed Of Light","DRAM Throughput","%","8"
"""


def test_ncu_csv_is_read_by_kernel_and_metric():
    assert read_ncu(NCU) == {
        "color_jitter_kernel": {
            "DRAM Throughput": "12.5 %", "Registers Per Thread": "40 register/thread",
        },
        "color_jitter_sum_kernel": {"DRAM Throughput": "8 %"},
    }  # fmt: skip
    assert read_ncu("==ERROR== no counters\n") == {}


def test_a_pytest_report_names_what_failed(tmp_path):
    (tmp_path / "r.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="b"/>'
        '<testcase classname="a" name="c"><failure/></testcase>'
        '<testcase classname="a" name="d"><skipped/></testcase></testsuite></testsuites>'
    )
    assert read_junit(tmp_path / "r.xml") == {"tests": 3, "skipped": 1, "failed": ["a::c"]}
