"""Commands run once, in order, and say what failed."""

import os
import shlex
import signal
import sys
from dataclasses import replace

import pytest
from signals import interruptible

from eval.paper import job_runner
from eval.paper.job_runner import Command, costs, diverged, python, run_commands, show_plan
from pipeline.errors import DIVERGED, UserError


def touch(path, text="", *, code=0, needs=()):
    program = f"import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.write_text({text!r}); "
    program += f"print('said', p.name); sys.exit({code})"
    return Command(path.name, (sys.executable, "-c", program, str(path)), path, needs)


def test_jobs_run_once_and_after_what_they_need(tmp_path, capsys):
    second = touch(tmp_path / "b", needs=("a",))
    need = f"import pathlib; pathlib.Path({str(tmp_path / 'a')!r}).read_text(); "
    second = replace(
        second, command=(*second.command[:2], need + second.command[2], str(second.makes))
    )
    first = touch(tmp_path / "a")
    run_commands([second, first, touch(tmp_path / "c"), first], 2, tmp_path / "out")
    spent = costs(tmp_path / "out")
    assert set(spent) == {"a", "b", "c"}
    assert all(seconds > 0 for seconds in spent.values())
    assert (tmp_path / "out/logs/b.log").read_text() == "said b\n"
    assert "[3/3]" in capsys.readouterr().out
    before = [p.stat().st_mtime_ns for p in (tmp_path / "a", tmp_path / "b")]
    run_commands([second, first], 2, tmp_path / "out")
    assert costs(tmp_path / "out") == spent
    assert [p.stat().st_mtime_ns for p in (tmp_path / "a", tmp_path / "b")] == before
    assert "done" in next(show_plan([first]))


def test_nothing_starts_after_an_interruption(tmp_path, monkeypatch):
    """Ctrl-C while the environment of the commands is made, for which torch is imported."""

    def interrupted(_):
        signal.raise_signal(signal.SIGINT)
        return dict(os.environ)

    monkeypatch.setattr(job_runner, "environment", interrupted)
    with interruptible(), pytest.raises(KeyboardInterrupt):
        run_commands([Command("a", ("touch", str(tmp_path / "a")), tmp_path / "a")], 1, tmp_path)
    assert not (tmp_path / "a").exists()


def test_a_failure_is_named_and_the_rest_is_run(tmp_path):
    bad = replace(touch(tmp_path / "bad", code=3), makes=tmp_path / "never")
    after = touch(tmp_path / "after", needs=("bad",))
    with pytest.raises(UserError, match=r"1 of 3 commands failed: bad \(see .*logs/bad\.log\)"):
        run_commands([bad, after, touch(tmp_path / "good")], 1, tmp_path / "out")
    assert (tmp_path / "good").is_file()
    assert not (tmp_path / "after").exists()
    assert "bad" in costs(tmp_path / "out")


def test_a_trial_that_diverges_is_said_and_no_failure(tmp_path, capsys):
    out = tmp_path / "out"
    high = replace(touch(tmp_path / "high", code=DIVERGED), makes=tmp_path / "never")
    jobs = [high, touch(tmp_path / "probe", needs=("high",)), touch(tmp_path / "good")]
    run_commands(jobs, 1, out, trials=True)
    assert "high: diverged, so it counts as the worst (see " in capsys.readouterr().out
    assert (tmp_path / "good").is_file()
    assert not (tmp_path / "probe").exists()
    assert diverged(out) == {"high"}
    with pytest.raises(UserError, match="1 of 3 commands failed: high"):  # a row of a table
        run_commands(jobs, 1, out)
    (tmp_path / "high").unlink()
    run_commands([touch(tmp_path / "high")], 1, out)
    assert diverged(out) == set()  # what it came to last


def test_an_earlier_export_does_not_count_as_done(tmp_path):
    made = tmp_path / "encoder.json"
    job = Command("a", python("x.py"), made, step=20)
    made.write_text('{"step": 10}')
    assert not job.done
    made.write_text('{"step": 20}')
    assert job.done


def test_two_commands_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="two different commands are called a"):
        run_commands([touch(tmp_path / "a"), touch(tmp_path / "a", "other")], 1, tmp_path)


def test_a_line_of_the_plan_does_not_wait_for_the_costs_of_the_next(tmp_path):
    def count():
        raise AssertionError("counted too early")

    cheap = Command("a", ("true",), tmp_path / "a")
    dear = Command("b", ("true",), tmp_path / "b", images=1, count=count)
    assert next(show_plan([cheap, dear])).endswith("a")


def test_the_plan_can_be_pasted_into_a_shell(tmp_path):
    words = ("echo", "a=b", "{a: 1}", "", "x y", "it's", "$HOME", "a;b")
    _, line, _ = show_plan([Command("a", words, tmp_path / "a")])
    assert tuple(shlex.split(line)) == words


def lines_of_jobs(folder, *lines):
    folder.mkdir(exist_ok=True)
    (folder / "jobs.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_what_cannot_be_read_written_or_started_is_named(tmp_path):
    """Files at fault are named; nothing is run."""
    made = tmp_path / "encoder.json"
    made.write_text('{"step": ')
    with pytest.raises(UserError, match=rf"{made}: has no step"):
        run_commands([Command("a", python("x.py"), made, step=3)], 1, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"{tmp_path}/file.*: cannot be written \("):
        run_commands([touch(tmp_path / "b")], 1, tmp_path / "file" / "out")
    missing = Command("c", (str(tmp_path / "deepspeed"),), tmp_path / "c")
    with pytest.raises(UserError, match=rf"{tmp_path}/deepspeed: cannot be started \(No such"):
        run_commands([missing], 1, tmp_path / "out")
    folder = lines_of_jobs(tmp_path / "out", '{"name": "a", "cpu_seconds": 1}', '{"name"')
    with pytest.raises(UserError, match=r"jobs\.jsonl, line 2: not a record"):
        costs(folder)
    assert not (tmp_path / "b").exists()


def test_half_a_line_of_a_power_cut_is_no_record(tmp_path):
    first = '{"name": "a", "cpu_seconds": 1}'
    jobs = lines_of_jobs(tmp_path / "out", first) / "jobs.jsonl"
    with jobs.open("a") as file:
        file.write('{"name": "lost", "cpu_sec')
    assert costs(tmp_path / "out") == {"a": 1.0}
    run_commands([touch(tmp_path / "b")], 1, tmp_path / "out")
    assert costs(tmp_path / "out").keys() == {"a", "b"}
    assert jobs.read_text().splitlines()[0] == first


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "out/logs/b.log").mkdir(parents=True)
    with pytest.raises(UserError, match=r"out/logs/b\.log: cannot be written \(Is a directory\)"):
        run_commands([touch(tmp_path / "b")], 1, tmp_path / "out")


def test_a_slip_in_a_thread_keeps_its_traceback(tmp_path):
    with pytest.raises(TypeError):
        run_commands([Command("a", (1, 2), tmp_path / "a")], 1, tmp_path / "out")  # type: ignore
