"""Learning rates of layers: which parameters have which, by hand; what a run applies and logs."""

import json
import math

import pytest
from tiny import tiny_overrides, tiny_recipe

from pipeline import pretrain
from pipeline.config.recipe import RECIPES
from pipeline.config.schedules import learning_rate
from pipeline.errors import UserError
from pipeline.estimate import parse_args, predict
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups

# Of an encoder of two blocks: the beginning of a name → its layer.
LAYERS = {
    "encoder.cls_token": 0, "encoder.mask_token": 0, "encoder.patch_embed.": 0,
    "encoder.blocks.0.": 1, "encoder.blocks.1.": 2, "encoder.norm.": 3, "measure.": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", ["mae", "rmae", "cmae", "mocov3"])
def test_every_parameter_has_the_rate_of_its_layer(name):
    objective, _ = build_objective(
        tiny_recipe(name, "optimizer.layer_decay=0.5", "optimizer.layer_anneal=0.4")
    )
    found = {}
    for group in parameter_groups(objective):
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = group
    assert len(found) == sum(p.requires_grad for p in objective.parameters())
    seen = set()
    for key, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        (layer,) = {number for start, number in LAYERS.items() if key.startswith(start)}
        seen.add(layer)
        group = found[id(parameter)]
        assert group["lr_scale"] == (0.125, 0.25, 0.5, 1.0)[layer]
        assert group["anneal"] == pytest.approx((0.4, 0.6, 0.8, 1.0)[layer], rel=1e-15)
        decays = parameter.ndim > 1 and not key.endswith(".bias")
        if key.endswith("_token"):
            decays = objective.recipe.optimizer.weight_decay.tokens
        assert group["weight_decay"] == (objective.recipe.optimizer.weight_decay.value * decays)
    assert seen == {0, 1, 2, 3}


def test_without_them_there_are_the_two_groups_of_before():
    objective, _ = build_objective(tiny_recipe("cmae"))
    groups = parameter_groups(objective)
    assert [set(group) for group in groups] == 2 * [{"name", "weight_decay", "params"}]
    assert [group["name"] for group in groups] == ["decay", "no_decay"]
    order = [id(p) for p in objective.parameters() if p.requires_grad]
    for group in groups:  # the order of the flat weights and of the optimizer's state
        assert [id(p) for p in group["params"]] == [
            i for i in order if i in {id(p) for p in group["params"]}
        ]


def schedule(**keys):
    keys = {"base_lr": 0.32, "epochs": 10, "warmup_epochs": 2, "min_lr": 1e-4} | keys
    return tiny_recipe("mae", *(f"optimizer.{key}={value}" for key, value in keys.items()))


def test_a_layers_rate_is_the_written_equation():
    recipe, low, peak = schedule(), 1e-4, 0.32 * 8 / 256
    for scale, share in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.4), (0.25, 0.75)):
        for step in range(30):  # three steps an epoch
            if step < 6:
                expected = peak / share * step / 6
            else:
                t = (step - 6) / 24
                angle = math.pi * t / share if t < share else math.pi
                expected = low + (peak / share - low) * (1 + math.cos(angle)) / 2
            group = {"lr_scale": scale, "anneal": share}
            assert learning_rate(recipe, step, 3, group) == pytest.approx(
                scale * expected, rel=1e-12
            )


def test_a_rate_that_ends_early_sums_up_to_the_same():
    recipe = schedule(warmup_epochs=0, min_lr=0, epochs=100)
    sums = [
        sum(learning_rate(recipe, step, 10, {"anneal": share}) for step in range(1000))
        for share in (1.0, 0.7, 0.3)
    ]
    assert sums == pytest.approx(3 * [sums[0]], rel=0.01)
    assert learning_rate(recipe, 300, 10, {"anneal": 0.3}) == 0
    assert learning_rate(recipe, 0, 10, {"anneal": 0.3}) == pytest.approx(recipe.lr / 0.3)


def test_a_plain_group_has_the_plain_rate():
    recipe = schedule()
    for step in range(40):
        plain = learning_rate(recipe, step, 3)
        assert learning_rate(recipe, step, 3, {"weight_decay": 0.1}) == plain
        assert learning_rate(recipe, step, 3, {"lr_scale": 1.0, "anneal": 1.0}) == plain


@pytest.mark.parametrize("key", ["layer_decay", "layer_anneal"])
@pytest.mark.parametrize("value", [0, -0.5, 1.5, ".nan"])
def test_values_that_are_no_share_are_refused(key, value):
    with pytest.raises(UserError, match=f"key 'optimizer.{key}': input should be"):
        tiny_recipe("mae", f"optimizer.{key}={value}")


def test_the_planner_counts_the_groups():
    plans = [
        predict(tiny_recipe("mae", *changes), parse_args(["--gpus", "1", "--launch-ms", "0.01"]))
        for changes in ((), ("optimizer.layer_anneal=0.5",))
    ]
    for one, other in zip(*(plan["stages"] for plan in plans), strict=True):
        assert other["launches"] - one["launches"] == 2 * 6
    assert plans[0]["flops_per_step"] == plans[1]["flops_per_step"]


def test_a_run_applies_and_logs_them_and_resumes(shards, tmp_path, capsys):
    def run(output, last, *changes):
        words = ["--data", str(shards / "train"), "--output", str(tmp_path / output)]
        words += ["--recipe", str(RECIPES / "mae.yaml"), "--ds_config", "zero1"]
        for change in (
            *tiny_overrides("mae"), "optimizer.epochs=1", "optimizer.warmup_epochs=0",
            "optimizer.layer_decay=0.5", "optimizer.layer_anneal=0.4", "monitor.log_steps=1",
            *changes,
        ):  # fmt: skip
            words += ["--set", change]
        assert pretrain.main([*words, "--max-steps", str(last)]) == 0
        rows = (tmp_path / output / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row) for row in rows]

    whole = run("whole", 7)
    printed = capsys.readouterr().out
    assert "layer_decay 0.5: the embeddings have 0.125 of the learning rate" in printed
    assert "layer_anneal 0.4: the embeddings begin at 2.5 of the learning rate" in printed
    peak = 1.5e-4 * 8 / 256
    for step, row in enumerate(whole):
        angles = (math.pi * min(1, step / 12 / share) for share in (1, 0.4))
        first, last = ((1 + math.cos(angle)) / 2 * peak for angle in angles)
        assert row["lr"] == pytest.approx(first, rel=1e-6)
        assert row["lr_first_layer"] == pytest.approx(0.125 / 0.4 * last, rel=1e-6, abs=1e-20)
    run("parts", 3)
    parts = run("parts", 7)
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    plain = run("plain", 7, "optimizer.layer_decay=1", "optimizer.layer_anneal=1")
    assert "lr_first_layer" not in plain[0]
    assert [row["loss"] for row in plain[:1]] == [row["loss"] for row in whole[:1]]
    assert plain[-1]["loss"] != whole[-1]["loss"]
