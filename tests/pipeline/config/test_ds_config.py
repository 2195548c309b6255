"""What a ds_config may say, and the plan a recipe makes with it: precision, split of the batch."""

import json
from pathlib import Path

import pytest
from tiny import tiny_recipe

from pipeline.config.ds_config import read_ds_config
from pipeline.config.planning import auto_micro_batch, plan_recipe, resolve_precision, set_precision
from pipeline.config.recipe import RECIPES, load_recipe
from pipeline.errors import UserError
from pipeline.runtime.optimizers import optimizer_of

ROOT = Path(__file__).parents[3]


def write(tmp_path, value):
    path = tmp_path / "ds.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


SHIPPED = {
    "zero0": (0, "fp32"), "zero1": (1, "autocast"), "zero2": (2, "autocast"),
    "zero3": (3, "autocast"), "zero2-bf16": (2, "bf16"), "zero2-bf16-fp32-grads": (2, "bf16"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_are_taken(name):
    assert sorted(p.stem for p in (ROOT / "ds_configs").iterdir()) == sorted(SHIPPED)
    config, (stage, _) = read_ds_config(name), SHIPPED[name]
    assert config["zero_optimization"]["stage"] == stage
    plan = plan_recipe(config, load_recipe(RECIPES / "rmae.yaml"), world=8)
    assert (plan.stage, plan.micro_batch * plan.accumulation) == (stage, 128)
    assert plan.config["gradient_clipping"] == 0.0
    params = optimizer_of(plan).section(plan)["optimizer"]["params"]
    assert (params["betas"], params["eps"], params["weight_decay"]) == ([0.9, 0.95], 1e-8, 0.0)
    assert params["lr"] == pytest.approx(3e-4 * 1024 / 256)
    assert plan.precision == "fp32"  # on any CPU: bf16 only where it is asked for
    assert plan.describe()[0].startswith("precision: fp32")


@pytest.mark.parametrize("name", SHIPPED)
def test_what_shipped_configs_are_on_a_gpu(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("pipeline.distributed.bf16_units", lambda: True)
    plan = plan_recipe(read_ds_config(name), load_recipe(RECIPES / "rmae.yaml"), world=8)
    assert plan.precision == SHIPPED[name][1]
    assert plan.config.get("data_types", {}) == (
        {"grad_accum_dtype": "fp32"} if name.endswith("fp32-grads") else {}
    )
    assert ("gradients are summed in fp32" in plan.describe()[0]) == name.endswith("fp32-grads")
    if plan.precision == "autocast":
        section = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        assert plan.config["torch_autocast"] == section


@pytest.mark.parametrize(
    ("wanted", "gpu", "units", "on", "words"),
    [
        (True, False, True, True, ""),
        (True, False, False, True, "emulated"),
        ("auto", False, True, False, "auto"),
        ("auto", True, True, True, ""),
        ("auto", True, False, False, "auto"),
        (False, True, True, False, ""),
    ],
)
@pytest.mark.parametrize(("section", "name"), [("bf16", "bf16"), ("torch_autocast", "autocast")])
def test_precision_depends_on_what_was_asked_for_and_on_the_gpu(
    wanted, gpu, units, on, words, section, name, monkeypatch
):
    """The processor's own bf16 units change nothing but a word in the log."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("pipeline.distributed.bf16_units", lambda: units)
    config = {section: {"enabled": wanted}, "zero_optimization": {"stage": 2}}
    precision = name if on else "fp32"
    found, why = resolve_precision(wanted, 2, section)
    assert found == precision
    assert words in why if words else not why
    plan = plan_recipe(config, tiny_recipe("mae"), world=1)
    assert plan.precision == precision
    assert plan.config[section]["enabled"] is on
    if section == "bf16":
        assert plan.config["bf16"].get("check_grad_overflow", False) is on
    assert config[section] == {"enabled": wanted}  # left as it was


def test_both_sections_at_once_follow_the_one_that_is_on():
    config = {"bf16": {"enabled": False}, "zero_optimization": {"stage": 2}}
    config["torch_autocast"] = {"enabled": True}
    assert plan_recipe(config, tiny_recipe("mae"), world=1).precision == "autocast"
    config |= {"bf16": {"enabled": True}, "torch_autocast": {"enabled": False}}
    assert plan_recipe(config, tiny_recipe("mae"), world=1).precision == "bf16"


@pytest.mark.parametrize(
    ("name", "wanted", "precision"),
    [
        ("zero2", "bf16", "autocast"), ("zero2", "fp32", "fp32"), ("zero0", "bf16", "autocast"),
        ("zero2-bf16", "bf16", "bf16"), ("zero2-bf16", "fp32", "fp32"),
    ],
)  # fmt: skip
def test_a_precision_can_be_set_over_a_file(name, wanted, precision):
    config = read_ds_config(name)
    set_precision(config, wanted)
    assert plan_recipe(config, tiny_recipe("mae"), world=1).precision == precision


def test_bf16_is_refused_where_it_cannot_run(monkeypatch):
    with pytest.raises(UserError, match="bf16 needs"):
        resolve_precision(True, 0, "bf16")
    assert resolve_precision(True, 0, "torch_autocast")[0] == "autocast"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "V100")
    monkeypatch.setattr("pipeline.distributed.bf16_units", lambda: False)
    for section in ("bf16", "torch_autocast"):
        with pytest.raises(UserError, match=f"{section}.enabled true: V100 has no bf16 units"):
            resolve_precision(True, 1, section)


def test_auto_micro_batch_is_a_function_of_the_recipe():
    """Never of the machine's speed or memory: InfoNCE's negatives come from it."""
    assert auto_micro_batch(512, 196) == 32  # ViT at 224 x 224 with patches of 16
    assert auto_micro_batch(512, 64) == 128  # CIFAR-10
    assert auto_micro_batch(48, 64) == 48
    assert auto_micro_batch(34, 196) == 34
    assert auto_micro_batch(7 * 11, 400) == 11
    assert auto_micro_batch(5, 10**6) == 1
    demo = load_recipe(RECIPES / "demo_cmae.yaml")
    assert demo.encoder.patches == 144
    assert plan_recipe({}, demo, world=2).micro_batch == 64
    assert load_recipe(RECIPES / "mae.yaml").encoder.patches == 196


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"optimizer": {"type": "AdamW"}}, ["'optimizer' belongs to the recipe"]),
        ({"gradient_clipping": 1.0}, ["belongs to the recipe: optimizer.gradient_clipping"]),
        ({"lr": 1e-3}, ["optimizer.base_lr"]),
        ({"train_batch_size": 8}, ["belongs to the recipe: batch_size"]),
        ({"zero_optimisation": {}}, ["unknown key 'zero_optimisation'", "zero_optimization"]),
        ({"zero_optimization": {"stge": 1}}, ["zero_optimization.stge", "stage"]),
        ({"zero_optimization": 2}, ["must be an object"]),
        ({"zero_optimization": {"stage": 4}}, ["0, 1, 2 or 3"]),
        ({"bf16": {"enabled": True}}, ["bf16 needs zero_optimization.stage"]),
        ({"bf16": {"enabled": "yes"}}, ["bf16.enabled must be true, false or", "yes"]),
        ({"bf16": {"enabled": 1}}, ["bf16.enabled must be true, false or", "1"]),
        ({"fp16": {"enabled": True}}, ["'fp16' is not used here"]),
        ({"torch_autocast": {"enabled": 1}}, ["torch_autocast.enabled must be true, false or"]),
        ({"torch_autocast": {"dtype": "float16"}}, ["unknown key 'torch_autocast.dtype'"]),
        (
            {"torch_autocast": {"enabled": True}, "bf16": {"enabled": "auto"}}
            | {"zero_optimization": {"stage": 2}},
            ["bf16 and torch_autocast exclude each other"],
        ),
        (
            {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
            | {"zero_optimization": {"stage": 1}},
            ["grad_accum_dtype fp32 needs zero_optimization.stage 2 or 3"],
        ),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, ["must be bf16 or fp32, not 'fp8'"]),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}, "torch_autocast": {"enabled": True}},
            ["data_types.grad_accum_dtype bf16 needs bf16.enabled"],
        ),
        ({"compile": "yes"}, ["'compile' must be true, false or"]),
        ({"compile": True, "zero_optimization": {"stage": 3}}, ["compile needs"]),
        ({"cuda_graphs": 1}, ["'cuda_graphs' must be true, false or"]),
        ({"gradient_checkpointing": "auto"}, ["must be true or false, not 'auto'"]),
        (
            {"cuda_graphs": True, "gradient_checkpointing": True},
            ["cuda_graphs and gradient_checkpointing exclude each other"],
        ),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, ["reduce_bucket_size", "'big'"]),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, ["should be greater than 0, not 0"]),
        ({"zero_optimization": {"offload_optimizer": 3}}, ["offload_optimizer' must be an object"]),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"devize": "cpu"}}},
            ["unknown key 'zero_optimization.offload_optimizer.devize'; valid: ", "device"],
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            ["offload_optimizer needs zero_optimization.stage 1, 2 or 3: DeepSpeed ignores it"],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            ["offload_param needs zero_optimization.stage 3", "under stage 2"],
        ),
        ({"zero_optimization": {"cpu_offload": True}}, ["cpu_offload needs"]),
        (
            {"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}},
            ["zero_quantized_gradients needs zero_optimization.stage 3"],
        ),
        (
            {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}},
            ["zero_hpz_partition_size needs zero_optimization.stage 3"],
        ),
        (
            {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 1e9}},
            ["stage3_max_live_parameters needs zero_optimization.stage 3", "under stage 2"],
        ),
        (
            {"zero_optimization": {"stage": 1, "compute_grad_norm": False}},
            ["compute_grad_norm must be true: the norm shows that a gradient is not finite"],
        ),
        (
            {"zero_optimization": {"stage": 2}, "prescale_gradients": True},
            ["prescale_gradients needs", "reduce_scatter false, not stage 2 with reduce_scatter"],
        ),
        (
            {"zero_optimization": {"stage": 3, "reduce_scatter": False}}
            | {"gradient_predivide_factor": 2},
            ["gradient_predivide_factor needs zero_optimization.stage 0 or 1, or 2", "not stage 3"],
        ),
        ({"zero_optimization": {"stage": True}}, ["must be 0, 1, 2 or 3, not True"]),
        (
            {"zero_optimization": {"stage": 1}}
            | {"bf16": {"enabled": True, "check_grad_overflow": False}},
            ["bf16.check_grad_overflow must be true: it makes DeepSpeed skip a step"],
        ),
        ({"zero_optimization": {"stage": 1, "legacy_stage1": True}}, ["legacy_stage1", "leave it"]),
        ({"comms_logger": {"enable": True}}, ["'comms_logger.enable'; valid: ", "enabled"]),
        ({"comms_logger": 3}, ["'comms_logger' must be an object"]),
        ({"flops_profiler": {"enabled": "yes"}}, ["flops_profiler.enabled' must be true"]),
        ({"flops_profiler": {"profile_step": 1.5}}, ["profile_step' must be a whole number"]),
        ({"flops_profiler": {"output_file": 1}}, ["must be a text or null, not 1"]),
        ({"aio": {"block_size": "1MB"}}, ["'aio.block_size' must be a whole number, not '1MB'"]),
        ({"flops_profiler": {"enable": True}}, ["'flops_profiler.enable'; did you mean enabled?"]),
        ({"aio": {"blocks": 1}}, ["unknown key 'aio.blocks'"]),
        (
            {"activation_checkpointing": {"partition_activations": True}},
            ["'activation_checkpointing' is not used here; use gradient_checkpointing: true"],
        ),
        ({"fp16": {"enabled": "auto"}}, ["'fp16' is not used here; use bf16 or torch_autocast"]),
        ({"amp": {"enabled": False}}, ["'amp' is not used here; use bf16 or torch_autocast"]),
        (
            {"wandb": {"enabled": True}},
            ["'wandb' is not used here; use the recipe's monitor.log_to"],
        ),
        ({"csv_monitor": {}}, ["monitor.log_to", "metrics.jsonl"]),
        ({"timers": {"throughput": {"on": True}}}, ["unknown key 'timers.throughput.on'"]),
        ({"wall_clock_breakdown": "false"}, ["'wall_clock_breakdown' must be true or false"]),
        ({"watchdog_seconds": 1e-9}, ["a number from 1 to 10^9, or 0 for none, not 1e-09"]),
        ({"steps_per_print": 0}, ["'steps_per_print' must be a whole number from 1 up, not 0"]),
        ({"communication_data_type": "fp7"}, ["must be fp16, bf16 or fp32, not 'fp7'"]),
        ({"gradient_predivide_factor": 0}, ["must be a number above 0, not 0"]),
        ({"train_micro_batch_size_per_gpu": 2.5}, ["whole number from 1 up", "not 2.5"]),
        ({"train_micro_batch_size_per_gpu": True}, ["whole number from 1 up", "not True"]),
        (
            {"bf16": {"enabled": True, "check_grad_overflow": "x"}}
            | {"zero_optimization": {"stage": 1}},
            ["'bf16.check_grad_overflow' must be true or false, not 'x'"],
        ),
        (
            {"torch_autocast": {"enabled": True, "lower_precision_safe_modules": "x"}},
            ["lower_precision_safe_modules' must be a list of class names, not 'x'"],
        ),
        *(
            (
                {"torch_autocast": {"enabled": True, "lower_precision_safe_modules": [name]}},
                ["lower_precision_safe_modules': ", f"{name!r} is not a class; write it"],
            )
            for name in ("Linear", "torch.nn.Linar", "torch.nm.Linear", "torch.nn.functional.relu")
        ),
        ("{", ["not valid JSON"]),
        ("[]", ["JSON object"]),
    ],
)
def test_bad_configs_are_one_sentence(value, words, tmp_path):
    with pytest.raises(UserError) as error:
        read_ds_config(write(tmp_path, value))
    assert "\n" not in str(error.value)
    assert "ds.json" in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_gradients_may_be_scaled_before_they_are_summed_where_deepspeed_can(tmp_path):
    scaled = {"prescale_gradients": True, "gradient_predivide_factor": 2.0}
    for zero in ({"stage": 1}, {"stage": 2, "reduce_scatter": False}):
        read_ds_config(write(tmp_path, scaled | {"zero_optimization": zero}))


def test_a_config_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read \(no such file\)$"):
        read_ds_config(tmp_path / "none.json")
    with pytest.raises(
        UserError,
        match=r"zero4: cannot be read .*; did you mean zero\d\? bundled are: zero0, zero1, zero2",
    ):
        read_ds_config("zero4")


def test_a_bare_name_is_the_bundled_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_ds_config("zero1") == read_ds_config(ROOT / "ds_configs/zero1.json")


@pytest.mark.parametrize(
    ("micro", "world", "words"),
    [("auto", 3, "3 ranks"), ("auto", 16, "16 ranks"), (3, 2, "3 does not divide"), (0, 1, "0")],
)
def test_a_batch_that_cannot_be_split(micro, world, words):
    with pytest.raises(UserError, match=words):
        plan_recipe({"train_micro_batch_size_per_gpu": micro}, tiny_recipe("mae"), world)


@pytest.mark.parametrize(
    ("name", "changes", "least"),
    [
        ("cmae", (), 2),
        ("cmae", ("measure.negatives=all",), 1),
        ("cmae", ("measure.negatives=image",), 1),
        ("cmae", ("measure.tokens=cls",), 2),
        ("cmae", ("measure={kind: byol}",), 1),
        ("cmae", ("measure={kind: byol}", "measure.heads.batch_norm=true"), 2),
        ("mae", (), 1),
    ],
)
def test_a_micro_batch_that_leaves_no_negative_is_refused(name, changes, least):
    config, recipe = {"train_micro_batch_size_per_gpu": 1}, tiny_recipe(name, *changes)
    assert recipe.measure.least_images == least
    if least == 1:
        assert plan_recipe(config, recipe, world=1).micro_batch == 1
        return
    with pytest.raises(UserError, match="over all ranks it has 1, and at least 2 are needed"):
        plan_recipe(config, recipe, world=1)
    assert plan_recipe(config, recipe, world=2).micro_batch == 1


def test_cutmix_needs_another_image_in_a_ranks_micro_batch():
    recipe = tiny_recipe("mae", "views.cutmix=0.5")
    with pytest.raises(UserError, match="another image of a rank's micro-batch, which has only"):
        plan_recipe({"train_micro_batch_size_per_gpu": 1}, recipe, world=2)
    assert plan_recipe({"train_micro_batch_size_per_gpu": 2}, recipe, world=2).micro_batch == 2


def test_split_of_the_batch_and_its_negatives():
    recipe = load_recipe(RECIPES / "cmae.yaml")
    plan = plan_recipe({"train_micro_batch_size_per_gpu": 64}, recipe, world=4)
    assert (plan.micro_batch, plan.accumulation) == (64, 4)
    assert plan.config["gradient_accumulation_steps"] == 4
    assert any("256 images of one micro-batch" in line for line in plan.describe())
    at_once = plan_recipe({"train_micro_batch_size_per_gpu": 256}, recipe, world=4)
    assert not any("of one micro-batch" in line for line in at_once.describe())
    byol = tiny_recipe("cmae", "measure.kind=byol", "measure.heads={batch_norm: true}")
    lines = plan_recipe({"train_micro_batch_size_per_gpu": 2}, byol, world=2).describe()
    assert "statistics of batch norm: from the 4 images of one micro-batch on all ranks" in lines
    assert "batch: 1024 = 4 ranks × 64 images × 4 accumulation steps" in plan.describe()
    auto = plan_recipe({}, load_recipe(RECIPES / "mae.yaml"), world=2)
    assert 1024 // 2 % auto.micro_batch == 0


def test_the_log_counts_in_singular_and_plural():
    plan = plan_recipe({"train_micro_batch_size_per_gpu": 8}, tiny_recipe("mae"), world=1)
    assert "batch: 8 = 1 rank × 8 images × 1 accumulation step" in plan.describe()


def test_what_a_config_says_is_kept_and_what_it_does_not_say_is_filled_in():
    plan = plan_recipe({}, tiny_recipe("mae"), world=1)
    assert plan.watchdog_seconds == 1800  # docs/cluster.md
    assert plan.config["steps_per_print"] >= 10**9  # DeepSpeed's own lines: never
    said = {"enabled": True, "lower_precision_safe_modules": ["torch.nn.Linear"]}
    config = {"torch_autocast": said, "steps_per_print": 5, "watchdog_seconds": 7}
    plan = plan_recipe(config, tiny_recipe("mae"), world=1)
    assert plan.config["torch_autocast"] == said | {"dtype": "bfloat16"}
    assert (plan.config["steps_per_print"], plan.watchdog_seconds) == (5, 7.0)
    off = plan_recipe({"watchdog_seconds": 0}, tiny_recipe("mae"), world=1)
    assert off.watchdog_seconds == 0
