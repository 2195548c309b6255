"""Settings, trials and a begun folder of eval/cifar_paper.py, without its runs."""

import json
from dataclasses import asdict, replace

from eval.cifar_paper import build_parser, settings_of
from eval.paper.commands import Workspace, read_scale, row_recipe, run_name
from eval.paper.reproduction import result_path
from eval.studies import cifar_plan
from eval.studies.study import wanted_metrics
from eval.studies.tuning import SEED, Trial
from pipeline.config.recipe import dump_recipe


def settings(data, output, *words):
    words = ["--scale", "cifar-tiny", "--data", data, "--output", output, *words]
    return settings_of(build_parser().parse_args(list(map(str, words))))


def fill(tuning, values):
    """Write the results of the trials {(method, base_lr): value}."""
    for (method, rate), value in values.items():
        path = result_path(tuning.trial(rate), tuning.rows[method], SEED, "linprobe")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"protocol": "linprobe-cached", "top1": value}))


def begun_study(output):
    """Claims 3, 5 and 9 of two seeds: C-MAE is complete, R-MAE has one seed, claim 9 nothing but
    MAE; runs as pretraining leaves them, without their weights."""
    output.mkdir()
    scale = read_scale("cifar")
    made = json.loads(json.dumps(asdict(replace(scale, train="", val="", hours=None, tried=""))))
    record = {"scale": made, "images": "", "tuned": True, "compute": 2.3}
    (output / "study.json").write_text(json.dumps(record))
    trials = [vars(Trial("MAE", "pretrain", rate, "linprobe", 40.0)) for rate in (5e-4, 2e-3)]
    (output / "tuning.json").write_text(json.dumps({"trials": trials}))
    study = cifar_plan.study_of(Workspace(output, scale), (3, 5, 9), 2, 2.3)
    for number, (name, metrics) in enumerate(wanted_metrics(study.claims, study.names).items()):
        row = study.row(name)
        for seed in range(0 if "nothing" in name or "jitter" in name else 2 - (name == "R-MAE")):
            run = output / run_name(row, seed)
            (run / "eval").mkdir(parents=True)
            recipe = row_recipe(study.workspace, row).model_copy(update={"seed": seed})
            (run / "recipe.yaml").write_text(dump_recipe(recipe))
            steps = [{"step": n, "loss": 2 / (n + seed), "images_per_second": 300 + n % 7}
                     for n in range(25, 3141, 25)]  # fmt: skip
            (run / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
            lines = ("run: x", *(f"step {s['step']}/3125  loss" for s in steps), "done: step 3125")
            said = (f"2026-11-26 15:{n // 60:02}:{n % 60:02} {x}\n" for n, x in enumerate(lines))
            (run / "log.txt").write_text("".join(said))
            value = 40.123456 + 10 * number + seed / 7
            for metric in metrics:
                result = {"protocol": metric, "image" if metric == "psnr" else "top1": value}
                if metric == "linprobe":
                    result |= {"protocol": "linprobe-cached", "feature": "cls"}
                (run / f"eval/{metric}.json").write_text(json.dumps(result))
    return study
