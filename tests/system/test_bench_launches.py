"""make bench-launches: keys of its last line, no GPU in what it times, its command line."""

import json
import os
import sys

import bench_launches
import pytest


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bench_launches.py", *words])
    bench_launches.main()


def test_the_last_line_and_no_gpu_beside_it(monkeypatch, capsys):
    """Where there is a GPU a step timed on the host would be captured as a graph of nothing."""
    phases = ("masking", "forward", "backward", "optimizer", "EMA")
    seen = {phase: {"launches": 3, "copies": 0, "waits": 1} for phase in phases}
    environments = []

    def child(words, env):
        if "host" not in words:
            return dict.fromkeys(bench_launches.STUDIED, seen)
        environments.append(env)
        return {"ratio": 0.5}

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(bench_launches, "child", child)
    run(monkeypatch, "--rounds", "1")
    assert {env["CUDA_VISIBLE_DEVICES"] for env in environments} == {""}
    assert {env["DS_ACCELERATOR"] for env in environments} == {"cpu"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {
        "optimizer_launches": 3,
        "host_reads": 1,
        "host_ratio": {str(stage): 0.5 for stage in range(4)},
        "forward_launches": dict.fromkeys(("mae", "rmae", "cmae"), 3),
        "masking_launches": dict.fromkeys(("mae", "cmae"), 3),
        "syncs": dict.fromkeys(bench_launches.STUDIED, 3),
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--mae", "/nope"], "--mae /nope: has no models_mae.py"),
    ],
)
def test_bad_words_are_a_sentence(monkeypatch, capsys, words, said):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *words)
    assert said in capsys.readouterr().err
