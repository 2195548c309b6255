"""A study's archive: what it keeps, and that a page or the study itself comes of it."""

import json
import os
import re
from dataclasses import asdict, replace

import pytest
from cifar_study import begun_study, fill, settings

from eval.cifar_paper import cifar_paper, rebuild
from eval.paper.commands import run_name
from eval.paper.cost import Rates, read_rates
from eval.paper.reproduction import result_path
from eval.studies import archive, cifar_plan
from eval.studies.cifar_claims import LONGER, claims_of
from eval.studies.cifar_page import Facts
from eval.studies.tuning import read_trials
from pipeline.errors import UserError


def test_errors_name_no_folder_that_is_gone(tmp_path):
    output = tmp_path / "out"
    begun_study(output)
    (output / "facts.json").write_text(json.dumps(asdict(Facts((5,), 2, 7200.0, "core"))))
    (output / "rates.json").write_text("[")
    sentence = "/rates.json: not a file of measured rates"
    with (
        pytest.raises(UserError, match=f"^{re.escape(str(output))}{sentence}"),
        archive.laid_out(output) as folder,
    ):
        read_rates(folder / "rates.json")
    archive.pack(output, tmp_path / "a.tar.xz")
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'a.tar.xz'))}{sentence}"):
        rebuild(tmp_path / "a.tar.xz")


def test_an_archive_keeps_what_a_page_needs(tmp_path):
    run = tmp_path / "out/mae-0"
    (run / "eval").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    (run / "checkpoints/weights").write_bytes(os.urandom(100_000))
    (run / "recipe.yaml").write_text("name: mae\n")
    steps = [{"step": n, "loss": 1 / 3 + n} for n in range(1, 1001)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    said = ("run: x", *(f"step {n}/9  loss" for n in range(4)), "step 3: knn 4.0",
            *(f"step {n}/9  loss" for n in range(4, 10)), "done: step 9")  # fmt: skip
    (run / "log.txt").write_text("".join(f"2026-11-26 15:18:30 {line}\n" for line in said))
    (run / "eval/knn.json").write_text(json.dumps({"protocol": "knn", "top1": 12.3456789}))
    (run / "pictures").mkdir()
    (run / "pictures/a.png").write_bytes(b"first")
    (run / "pictures/b.png").write_bytes(b"last")
    (tmp_path / "out/study.json").write_text("{}")
    (tmp_path / "out/data").mkdir()
    size = archive.pack(tmp_path / "out", tmp_path / "a.tar.xz")
    archive.pack(tmp_path / "out", tmp_path / "b.tar.xz")
    assert (tmp_path / "a.tar.xz").read_bytes() == (tmp_path / "b.tar.xz").read_bytes()
    assert size == (tmp_path / "a.tar.xz").stat().st_size < 10_000
    with archive.unpacked(tmp_path / "a.tar.xz") as folder:
        names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        made = ("recipe.yaml", "metrics.jsonl", "log.txt", "eval/knn.json", "pictures/b.png")
        assert names == {"study.json", *(f"mae-0/{name}" for name in made)}
        log = (folder / "mae-0/log.txt").read_text().splitlines()
        assert [line[20:].split("/")[0] for line in log] == [
            "run: x", "step 3", "step 3: knn 4.0", "step 9", "done: step 9",
        ]  # fmt: skip
        lines = (folder / "mae-0/metrics.jsonl").read_text().splitlines()
        kept = [json.loads(line) for line in lines]
        assert len(kept) == archive.STEPS
        assert (kept[0], kept[-1]) == ({"step": 1, "loss": 1.3333}, {"step": 1000, "loss": 1000.3})
        knn = json.loads((folder / "mae-0/eval/knn.json").read_text())
        assert knn["top1"] == 12.3456789  # claims hang on the digits of results
    (tmp_path / "a.tar.xz").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"a\.tar\.xz: not an archive of runs"):
        rebuild(tmp_path / "a.tar.xz")
    with pytest.raises(UserError, match="absent: no such file"):
        rebuild(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("study.json", {"scale": None}, "study.json: not the record of a study"),
        ("facts.json", {"claims": [99]}, "facts.json: names claims that there are not"),
        ("facts.json", {"seeds": 0}, "facts.json: names claims that there are not, or no seeds"),
        ("facts.json", {"claims": [[5]]}, "facts.json: is missing from the archive, or damaged"),
        ("facts.json", {"seconds": float("nan")}, "facts.json: seconds nan: must be at least 0"),
        ("study.json", None, r"b\.tar\.xz: has no study\.json"),
    ],
)
def test_an_archive_of_something_else_is_one_sentence(name, change, sentence, tmp_path):
    output = tmp_path / "out"
    begun_study(output)
    facts = asdict(Facts((5,), 2, 7200.0, "core"))
    (output / "facts.json").write_text(json.dumps(facts))
    if change is None:
        (output / name).unlink()
    else:
        (output / name).write_text(json.dumps(json.loads((output / name).read_text()) | change))
    archive.pack(output, tmp_path / "b.tar.xz")
    with pytest.raises(UserError, match=sentence):
        rebuild(tmp_path / "b.tar.xz")
    assert not (tmp_path / "b.html").exists()


def test_the_pictures_of_most_encoders_are_kept(data, tmp_path):
    """Drawn again where another method is there, and an archive's where the weights are gone."""
    chosen = settings(data, tmp_path, "--claims", "5", "--seeds", "1")
    study = cifar_plan.study_of(chosen.workspace, (5,), 1, 2.0)

    def look():
        return [job.makes.parent for job in cifar_plan.jobs_of_rows(study) if job.name == "look"]

    (two,) = look()
    two.mkdir(parents=True)
    (two / "index.html").write_text("")
    (two / "pca.png").write_bytes(b"two")
    study = replace(study, claims=claims_of([3, 5]))
    (three,) = look()
    assert three != two
    three.mkdir()
    (three / "pca.png").write_bytes(b"three")
    assert archive.selected(tmp_path)["look/pca.png"] == b"three"
    (tmp_path / "look/pca.png").write_bytes(b"archived")
    assert look() == []
    assert archive.selected(tmp_path)["look/pca.png"] == b"archived"


def test_a_study_continues_from_its_archive(data, tmp_path, capsys):
    """Elsewhere, without the weights: trials and results count, and what is missing is made, with
    the pretrainings that it needs."""
    words = ("--claims", "5", "6", "--seeds", "1")
    begun = settings(data, tmp_path / "out", *words)
    record = cifar_plan.claim_output(begun)
    tuning = cifar_plan.tuning_of(begun)
    rates = {(m, r): 40.0 + r for m in ("MAE", "R-MAE") for r in (5e-4, 2e-3)}
    fill(tuning, rates)
    tuning.write()
    study = cifar_plan.study_of(begun.workspace, begun.claims, 1, record["compute"])
    for name, what, protocol in (("MAE", "psnr", "psnr"), ("MAE", "finetune", "finetune"),
                                 ("R-MAE", "psnr", "psnr")):  # fmt: skip
        path = result_path(begun.workspace, study.row(name), 0, what)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"protocol": protocol, "top1": 40.0, "image": 20.0}))
    archive.pack(tmp_path / "out", tmp_path / "a.tar.xz")
    words = (*words, "--restore", tmp_path / "a.tar.xz")
    chosen = settings(data, tmp_path / "elsewhere" / "new", *words)
    cifar_paper(replace(chosen, dry_run=True))
    assert f"{chosen.output}/" in capsys.readouterr().out
    assert not chosen.output.parent.exists()
    cifar_plan.restore_output(chosen, chosen.restored)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["new"]
    assert cifar_plan.claim_output(chosen) == record
    bill = Rates(tmp_path / "rates.json", str(data / "shards/train"))
    plan = cifar_plan.make_plan(chosen, bill)
    stages = [[job.name for job in stage if not job.done] for stage in plan.stages]
    longer = [f"{run_name(study.row(name), 0)} finetune" for name in LONGER]
    assert stages == [[], [], longer]
    cifar_plan.tuning_of(chosen).write()
    trials = read_trials(chosen.output / "tuning.json")
    assert {(t.method, t.base_lr): t.value for t in trials} == rates
    more = replace(chosen, claims=(5, 14))  # MAE's and R-MAE's linear probe
    names = [job.name for job in cifar_plan.make_plan(more, bill).stages[2] if not job.done]
    mae = "mae-optimizer-base-lr-0-002-0"
    again = {f"{r}{mae} {what}" for r in ("", "r") for what in ("pretrain", "linprobe")}
    new = {f"r{mae} finetune"}  # MAE's is there
    assert {name for name in names if name.split()[0].endswith(mae)} == again | new
    assert names[-1] == "look"
    cifar_plan.restore_output(chosen, chosen.restored)  # the next sitting's command is the same
    assert "has the study of" in capsys.readouterr().out
    assert (chosen.output / "tuning.json").is_file()
    for other in ({**record, "compute": 9.0}, None):
        path = chosen.output / "study.json"
        path.write_text(json.dumps(other)) if other else path.unlink()
        with pytest.raises(UserError, match=r"new holds something already; name another --output"):
            cifar_plan.restore_output(chosen, chosen.restored)


def test_what_cannot_be_restored_leaves_nothing(data, tmp_path):
    (tmp_path / "out/mae-0/eval").mkdir(parents=True)
    (tmp_path / "out/mae-0/eval/knn.json").write_text(json.dumps({"protocol": "knn", "top1": 1.0}))
    archive.pack(tmp_path / "out", tmp_path / "nothing.tar.xz")
    cifar_plan.claim_output(settings(data, tmp_path / "out", "--untuned"))
    archive.pack(tmp_path / "out", tmp_path / "other.tar.xz")
    (tmp_path / "bad.tar.xz").write_bytes(b"no tar")
    odd = archive.compressed({"study.json": b"", "study.json/a": b""})
    (tmp_path / "odd.tar.xz").write_bytes(odd)
    for name, sentence in (
        ("odd", "study.json/a: cannot be unpacked (Not a directory)"),
        ("bad", "bad.tar.xz: not an archive of runs"),
        ("absent", "absent.tar.xz: cannot be read"),
        ("nothing", "nothing.tar.xz: has no study.json, so it is not of eval/cifar_paper.py"),
        ("other", "other.tar.xz: was made with another tuned"),
    ):
        path = tmp_path / f"{name}.tar.xz"
        chosen = settings(data, tmp_path / "else/new", "--restore", path)
        with pytest.raises(UserError, match=re.escape(sentence)):
            cifar_plan.restore_output(chosen, path)
    assert not (tmp_path / "else").exists()


def test_a_plan_that_was_measured_before_keeps_no_study_from_its_archive(data, tmp_path):
    """Into a folder that --dry-run has made, by a link to another disk."""
    begun = settings(data, tmp_path / "out", "--claims", "5", "--seeds", "1")
    cifar_plan.claim_output(begun)
    (begun.output / "rates.json").write_text('{"theirs": 1.0, "both": 1.0}')
    archive.pack(begun.output, tmp_path / "a.tar.xz")
    disk, link = tmp_path / "disk", tmp_path / "new"
    disk.mkdir()
    link.symlink_to(disk)
    (disk / "rates.json").write_text('{"ours": 2.0, "both": 2.0}')
    cifar_plan.restore_output(replace(begun, output=link), tmp_path / "a.tar.xz")
    assert link.is_symlink()
    assert sorted(path.name for path in disk.iterdir()) == ["rates.json", "study.json"]
    assert read_rates(disk / "rates.json") == {"theirs": 1.0, "both": 2.0, "ours": 2.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.xz", "disk", "new", "out"]


def test_pictures_leave_an_archive_before_it_is_too_large(tmp_path, monkeypatch):
    for number in range(4):
        folder = tmp_path / f"out/run{number}-0/pictures"
        folder.mkdir(parents=True)
        (folder.parent / "recipe.yaml").write_text("name: mae\n")
        (folder / "a.png").write_bytes(os.urandom(40_000))
    monkeypatch.setattr(archive, "LARGEST", 100_000)
    assert archive.pack(tmp_path / "out", tmp_path / "a") < 100_000
    with archive.unpacked(tmp_path / "a") as folder:
        assert len(list(folder.rglob("*.png"))) == 2
        assert len(list(folder.rglob("recipe.yaml"))) == 4
    monkeypatch.setattr(archive, "LARGEST", 100)
    with pytest.raises(UserError, match="are over 100"):
        archive.pack(tmp_path / "out", tmp_path / "a")
