"""The engine: what a ds_config may say, how a batch is split, ZeRO 0-3 against plain torch."""

import json
import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import oracle
import pytest
import torch
from tiny import images, tiny_recipe

from pipeline.config.ds_config import (
    auto_micro_batch,
    plan_recipe,
    read_ds_config,
    resolve_precision,
    set_precision,
)
from pipeline.config.recipe import RECIPES, load_recipe
from pipeline.config.schedules import learning_rate
from pipeline.distributed import can_build, cannot_build, free_port
from pipeline.errors import UserError
from pipeline.method.objective import build_objective
from pipeline.method.parameter_groups import parameter_groups
from pipeline.runtime import engine as engines
from pipeline.runtime.engine import init_ranks
from pipeline.runtime.optimizers import muon, optimizer_of

ROOT = Path(__file__).parents[3]
PORT = free_port()


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
    assert optimizer_of(plan).section(plan)["optimizer"]["params"]["betas"] == [0.9, 0.95]
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
        ({"fp16": {"enabled": True}}, ["unknown key 'fp16'"]),
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
        ({"flops_profiler": {"enable": True}}, ["'flops_profiler.enable'; did you mean enabled?"]),
        ({"aio": {"blocks": 1}}, ["unknown key 'aio.blocks'"]),
        (
            {"activation_checkpointing": {"partition_activations": True}},
            ["'activation_checkpointing' would do nothing here: set gradient_checkpointing: true"],
        ),
        ({"timers": {"throughput": {"on": True}}}, ["unknown key 'timers.throughput.on'"]),
        ({"wall_clock_breakdown": "false"}, ["'wall_clock_breakdown' must be true or false"]),
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
    byol = tiny_recipe("cmae", "measure.kind=byol", "measure.heads={batch_norm: true}")
    lines = plan_recipe({"train_micro_batch_size_per_gpu": 2}, byol, world=2).describe()
    assert "statistics of batch norm: from the 4 images of one micro-batch on all ranks" in lines
    assert "batch: 1024 = 4 ranks × 64 images × 4 accumulation steps" in plan.describe()
    auto = plan_recipe({}, load_recipe(RECIPES / "mae.yaml"), world=2)
    assert 1024 // 2 % auto.micro_batch == 0


def test_the_log_counts_in_singular_and_plural():
    plan = plan_recipe({"train_micro_batch_size_per_gpu": 8}, tiny_recipe("mae"), world=1)
    assert "batch: 8 = 1 rank × 8 images × 1 accumulation step" in plan.describe()


def test_muon_is_refused_where_matrices_are_cut():
    recipe = tiny_recipe("mae", "optimizer.kind=muon")
    config = {"zero_optimization": {"stage": 3}}
    with pytest.raises(UserError, match=r"muon does not work under ZeRO stage 3.*stage 2 or lower"):
        optimizer_of(plan_recipe(config, recipe, 1))
    config = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    with pytest.raises(UserError, match=r"without zero_optimization\.round_robin_gradients"):
        muon.section(plan_recipe(config, recipe, 1))


def test_muon_makes_matrices_nearly_orthogonal():
    """Singular values of about 1 for any shape; sign and size of the input do not matter."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 24, 8), (1, 8, 24), (3, 16, 12)):
        x = torch.randn(shape, generator=generator)
        values = torch.linalg.svdvals(muon.orthogonalise(x))
        assert values.min() > 0.5
        assert values.max() < 1.3
        torch.testing.assert_close(muon.orthogonalise(-7 * x), -muon.orthogonalise(x))


def test_muon_is_the_plain_loop_in_float64():
    """Five steps of given gradients: every parameter of the blocks, the decoder and the rest."""
    recipe = tiny_recipe("mae", "optimizer.kind=muon")
    pair = [build_objective(recipe)[0].double() for _ in range(2)]
    plan = plan_recipe({}, recipe, 1)
    ours = muon.build(pair[0], parameter_groups(pair[0]), plan)
    plain = oracle.Muon(pair[1], parameter_groups(pair[1]), recipe.optimizer.betas)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        for group in (*ours.param_groups, *plain.param_groups):
            group["lr"] = 0.1 / (step + 1)
        for a, b in zip(*(o.parameters() for o in pair), strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=torch.float64)
            b.grad = a.grad.clone()
        ours.step()
        plain.step()
    for (name, a), b in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)


def plain_loop(method):
    """The same ten steps in plain torch, one process, the whole batch at once."""
    from zero_worker import BATCH, MICRO, STEPS, recipe_of

    recipe = recipe_of(method)
    objective, teacher = build_objective(recipe)
    groups = parameter_groups(objective)
    if method == "muon":
        optimizer = oracle.Muon(objective, groups, recipe.optimizer.betas)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=recipe.optimizer.betas, eps=1e-8)
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, 1, group)
        optimizer.zero_grad()
        image, sample = images(BATCH, seed=step), torch.arange(BATCH)
        total = 0.0
        if teacher is None:
            loss, _ = objective(image, sample, step)
            loss.backward()
            total = loss.item()
        else:  # negatives come from one micro-batch of both ranks
            for part in MICRO:
                loss, _ = objective(image[part], sample[part], step, teacher)
                (loss / 2).backward()
                total += loss.item() / 2
        norms.append(torch.nn.utils.clip_grad_norm_(objective.parameters(), 0.5).item())
        optimizer.step()
        if teacher is not None:
            teacher.update(objective, 0.9)
        losses.append(total)
    return losses, norms


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """This process as one rank, a folder of its checkpoints, and the losses of those runs."""
    import zero_worker

    ranks, folder = init_ranks(), tmp_path_factory.mktemp("one")
    losses = {
        f"{method}-{stage}": zero_worker.train(folder / f"{method}-{stage}", method, stage, ranks)[
            0
        ]
        for method, stages in zero_worker.ELASTIC.items()
        for stage in stages
    }
    return ranks, folder, losses


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, one_rank):
    """A folder of the checkpoints of two ranks, and their results."""
    output = tmp_path_factory.mktemp("two")
    command = [
        Path(sys.executable).parent / "deepspeed", "-q", "--num_accelerators", "2",
        "--master_port", str(PORT), ROOT / "tests/helpers/zero_worker.py", output, one_rank[1],
    ]  # fmt: skip
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # of this process
    env = {k: v for k, v in os.environ.items() if k not in ranks}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output, json.loads((output / "results.json").read_text())


def test_ranks_leave_no_shared_memory(two_ranks):
    """Two ranks loaded DeepSpeed's all-reduce over shared memory, where there is a compiler."""
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{PORT}_*"))


@pytest.fixture(scope="module")
def zero_results(two_ranks):
    return two_ranks[1]


@pytest.mark.parametrize("method", ["rmae", "cmae", "muon"])
def test_every_zero_stage_follows_the_plain_loop(method, zero_results):
    losses, norms = plain_loop(method)
    assert losses[0] - losses[-1] > 0.01  # it trains, so that agreement means something
    runs = {k: v for k, v in zero_results.items() if k.startswith(method)}
    assert len(runs) == (4 if method == "rmae" else 3)
    for name, run in runs.items():
        # Newton-Schulz multiplies the rounding in small singular values by up to 3.4^5.
        exact = 1e-4 if method != "muon" else 3e-3
        assert run["losses"] == pytest.approx(losses, rel=exact, abs=1e-4), name
        assert not any(math.isnan(n) for n in run["norms"]), name
        assert run["norms"] == pytest.approx(norms, rel=10 * exact), name


def test_a_resumed_run_is_the_same_run_bit_for_bit(zero_results):
    for name, run in zero_results.items():
        assert run["again"] == run["losses"][5:], name
        assert run["same_weights"], name


def test_another_stage_or_number_of_ranks_goes_on(one_rank, two_ranks):
    """Same global batches from one checkpoint: only the order of sums differs."""
    import zero_worker

    (ranks, _, alone), (output, results) = one_rank, two_ranks
    for name, run in results.items():
        method, stage = name.split("-")
        undisturbed = pytest.approx(run["losses"][5:], rel=1e-4)
        assert alone[name] == pytest.approx(run["losses"], rel=1e-4), name
        assert run["from_one_rank"] == undisturbed, f"{name}: to two ranks under another stage"
        other = zero_worker.ELASTIC[method][int(stage)]
        losses, _, _ = zero_worker.go_on(output / name, method, other, ranks)
        assert losses == undisturbed, f"{name}: to one rank under stage {other}"


def test_a_step_that_is_not_finite_is_skipped_under_every_stage(zero_results):
    for name, run in zero_results.items():
        assert run["skipped"] == [False] * 5 + [True, False], name
        assert run["kept"], f"{name}: a skipped step changed the weights"
        assert run["finite"], name


def test_weights_are_whole_under_every_stage(zero_results):
    names = zero_results["rmae-0"]["names"]
    assert "encoder.pos_embed" in names
    for stage in (1, 2, 3):
        assert zero_results[f"rmae-{stage}"]["names"] == names


def test_deepspeed_on_the_cpu_beside_torch_on_a_gpu_is_a_sentence(monkeypatch):
    monkeypatch.setattr(engines, "device_of", lambda number: torch.device("cuda", number))
    with pytest.raises(UserError, match="DS_ACCELERATOR is cpu, but torch sees a GPU: unset"):
        init_ranks()


def test_ops_are_built_where_pythons_headers_are_and_set_up_has_not_failed(monkeypatch, tmp_path):
    ninja, header = tmp_path / "ninja", tmp_path / "Python.h"
    failed = tmp_path / "torch_extensions" / "failed"
    ninja.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert not can_build()
    header.touch()
    assert can_build()
    failed.parent.mkdir()
    failed.touch()
    assert not can_build()
    failed.unlink()
    ninja.unlink()
    assert not can_build()
    monkeypatch.setenv("CXX", "")
    assert cannot_build() == "there is no CXX (an empty text), ninja"
