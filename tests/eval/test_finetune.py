"""Finetuning follows MAE's protocol, learns, resumes and writes a classifier."""

import json
import os
import shutil
import signal
from collections.abc import Container
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from eval_helpers import (
    ALONE,
    OPTIONS,
    SlowTimer,
    coloured_images,
    command,
    held_by_another,
    on_two_ranks,
    spoil_encoder,
    write_encoder,
    write_shards,
)
from timm.data.mixup import Mixup
from timm.layers import DropPath

from eval import finetune
from eval.finetune import Settings
from eval.reporting.tables import facts
from eval.shared import batch_augment as augment
from eval.shared import finetune_plan
from eval.shared.checkpoints import Checkpoints, hold
from eval.shared.classifier import (
    build_classifier,
    classify,
    layer_groups,
    layer_of,
    read_classifier,
    write_classifier,
)
from eval.shared.encoders import EncoderInfo
from eval.shared.features import normalise
from eval.shared.options import settings_of
from eval.shared.results import write_result
from eval.shared.session import EvalSession, session_of
from pipeline.config.ds_config import read_ds_config
from pipeline.data.loader import eval_loader
from pipeline.distributed import Ranks
from pipeline.errors import DIVERGED, PREEMPTED, UserError
from pipeline.runtime.engine import init_ranks
from pipeline.runtime.seeding import seed_all
from pipeline.weights.load import load_encoder
from pipeline.weights.run import read_encoder
from shard_tools.manifest import read_manifest

ZERO2 = Path(finetune.__file__).parents[1] / "ds_configs/zero2.json"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    write_shards(folder / "train", *coloured_images(70, 6, seed=1))
    write_shards(folder / "val", *coloured_images(37, 6, seed=2))
    write_encoder(folder / "run")
    return folder


def model_of(home: Path, classes: int = 7) -> tuple:
    encoder, info = read_encoder(home / "run")
    torch.manual_seed(0)
    return encoder, build_classifier(encoder, EncoderInfo.of(info), classes, drop_path=0.1)


def test_defaults_are_the_protocol() -> None:
    args = finetune.build_parser().parse_args(["--encoder", "", "--train", "", "--val", ""])
    assert settings_of(Settings, args) == Settings("", "")
    expected = {
        "epochs": 100, "warmup_epochs": 5, "batch_size": 1024, "base_lr": 1e-3, "min_lr": 1e-6,
        "weight_decay": 0.05, "layer_decay": 0.75, "drop_path": 0.1, "erasing": 0.25,
        "randaugment": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1,
        "crop_area": 0.08,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_head_and_norm_are_fresh_and_the_rest_is_pretrained(home: Path) -> None:
    encoder, model = model_of(home, classes=400)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.15)
    assert model.head.weight.abs().max() <= 4e-5
    assert not model.head.bias.any()
    assert torch.equal(model.fc_norm.weight, torch.ones(32))
    assert not model.fc_norm.bias.any()
    own = dict(model.named_parameters())
    for name, parameter in encoder.named_parameters():
        if name.startswith("norm."):
            assert name not in own
        else:
            assert torch.equal(own[name], parameter), name


def test_logits_are_those_of_the_mean_of_the_patch_tokens(home: Path) -> None:
    encoder, model = model_of(home)
    torch.nn.init.normal_(model.head.weight)
    pixels = torch.randn(3, 3, 16, 16)
    last: list[torch.Tensor] = []
    encoder.blocks[-1].register_forward_hook(lambda m, i, output: last.append(output))
    with torch.no_grad():
        encoder(pixels)
        mean = last[0][:, 1:].mean(dim=1)
        centred = mean - mean.mean(1, keepdim=True)
        normal = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        expected = normal @ model.head.weight.T
        torch.testing.assert_close(model.eval()(pixels), expected, rtol=1e-4, atol=1e-5)


def test_drop_path_grows_linearly(home: Path) -> None:
    encoder = timm.create_model("vit_base_patch16_224", num_classes=0, **OPTIONS | {"depth": 5})
    options = OPTIONS | {"depth": 5, "drop_path_rate": 0.9}  # of the encoder's own training
    info = EncoderInfo("vit_base_patch16_224", options, (), (), {})
    model = build_classifier(encoder, info, 3, drop_path=0.1)
    rates = [
        block.drop_path1.drop_prob if isinstance(block.drop_path1, DropPath) else 0.0
        for block in model.blocks
    ]
    assert rates == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])


def test_layer_decay_and_weight_decay_of_each_parameter(home: Path) -> None:
    _, model = model_of(home)
    groups = layer_groups(model, weight_decay=0.05, layer_decay=0.75)
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    names = dict(model.named_parameters())
    assert sum(len(g["params"]) for g in groups) == len(names)
    expected = {
        "cls_token": (0.75**3, 0.0),
        "pos_embed": (0.75**3, 0.0),
        "patch_embed.proj.weight": (0.75**3, 0.05),
        "patch_embed.proj.bias": (0.75**3, 0.0),
        "blocks.0.attn.qkv.weight": (0.75**2, 0.05),
        "blocks.0.norm1.weight": (0.75**2, 0.0),
        "blocks.1.mlp.fc2.weight": (0.75, 0.05),
        "blocks.1.mlp.fc2.bias": (0.75, 0.0),
        "fc_norm.weight": (1.0, 0.0),
        "head.weight": (1.0, 0.05),
        "head.bias": (1.0, 0.0),
    }
    for name, pair in expected.items():
        assert found[id(names[name])] == pytest.approx(pair), name
    assert layer_of("blocks.11.norm2.bias", 12) == 12
    assert layer_of("head.weight", 12) == layer_of("fc_norm.bias", 12) == 13


def test_learning_rate_at_given_steps() -> None:
    def rate(step: int) -> float:
        return finetune.learning_rate(Settings("", ""), step, steps=10)

    peak = 1e-3 * 1024 / 256
    assert rate(0) == 0
    assert rate(25) == pytest.approx(peak / 2)
    assert rate(50) == pytest.approx(peak)
    assert rate(525) == pytest.approx(1e-6 + (peak - 1e-6) / 2)
    assert rate(1000) == pytest.approx(1e-6)


def test_either_mixup_or_cutmix_changes_every_batch() -> None:
    mix = augment.make_mixup(mixup=0.8, cutmix=1.0, smoothing=0.1, classes=4)
    label = torch.tensor([0, 1, 2, 3])
    kinds, unchanged = [], 0
    for seed in range(60):
        seed_all(seed)
        pixels = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).contiguous()
        mixed, target = mix(pixels.clone(), label)
        unchanged += torch.equal(mixed, pixels)
        torch.testing.assert_close(target.sum(1), torch.ones(4))
        values = mixed[0].unique()
        # Cutmix keeps pure pixels (0 or 3), mixup blends all of them alike.
        kinds.append("cutmix" if bool(((values == 0) | (values == 3)).all()) else "mixup")
        share = mixed[0, 0].mean() / 3  # of the partner, image 3
        smooth = 0.9 * torch.tensor([1 - share, 0, 0, share]) + 0.025
        torch.testing.assert_close(target[0], smooth, rtol=1e-4, atol=1e-4)
        # All images of a batch share one draw.
        torch.testing.assert_close(target[1], smooth[[1, 0, 3, 2]], rtol=1e-4, atol=1e-4)
    assert unchanged < 6  # boxes of no pixel
    assert 15 < kinds.count("cutmix") < 45
    plain = augment.make_mixup(mixup=0.0, cutmix=0.0, smoothing=0.1, classes=4)
    pixels = torch.randn(4, 3, 8, 8)
    same, target = plain(pixels.clone(), label)
    assert torch.equal(same, pixels)
    torch.testing.assert_close(target, torch.eye(4) * 0.9 + 0.025)


def test_rand_augment_is_done_by_the_loader(home: Path) -> None:
    """Crops are alike with and without it, and each is augmented by its sample and epoch alone."""
    init_ranks()
    images = {}
    for policy in ("", "rand-m9-mstd0.5-inc1"):
        for workers in (0, 1):
            words = arguments(home, home / "x.json", "--randaugment", policy, "--workers", workers)
            s, session = asked(words)
            run = finetune.Finetuning(s, finetune.plan_training(s, home, ALONE), session)
            assert run.run_plan.optimizer.betas == (0.9, 0.999)
            batches = [next(iter(run.loader(step))) for step in (0, 4)]
            images[policy, workers] = [(b.sample, b.image) for b in batches]
            run.engine.destroy()
    for (a, x), (b, y) in zip(images["", 0], images["rand-m9-mstd0.5-inc1", 0], strict=True):
        assert torch.equal(a, b)
        assert (x != y).flatten(1).any(1).float().mean() > 0.7
    for policy in ("", "rand-m9-mstd0.5-inc1"):
        for (_, x), (_, y) in zip(images[policy, 0], images[policy, 1], strict=True):
            assert torch.equal(x, y)


def test_erasing_takes_a_quarter_of_the_images() -> None:
    erase = augment.make_erasing(0.25, torch.device("cpu"))
    assert erase is not None
    seed_all(0)
    pixels = erase(torch.full((2000, 3, 8, 8), 9.0))
    erased = (pixels != 9).any(1)
    assert erased.flatten(1).any(1).float().mean().item() == pytest.approx(0.25, abs=0.04)
    # One rectangle, of normal noise that differs from pixel to pixel.
    box = erased.any(2).sum(1) * erased.any(1).sum(1)
    assert torch.equal(box, erased.sum((1, 2)))
    for image, hidden in zip(pixels, erased, strict=True):
        values = image[hidden.expand(3, -1, -1)]
        assert len(values.unique()) == len(values)
    noise = pixels[pixels != 9]
    assert noise.mean().abs() < 0.05
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert augment.make_erasing(0.0, torch.device("cpu")) is None


def test_what_is_asked_for_reaches_the_training(home: Path, monkeypatch) -> None:
    """Mixing, erasing, drop path, and the rate and decay with which each weight is updated."""
    init_ranks()
    words = ("--mixup", "0.3", "--cutmix", "0.6", "--smoothing", "0.2", "--erasing", "0.4",
             "--drop-path", "0.5", "--layer-decay", "0.5", "--weight-decay", "0.3",
             "--base-lr", "0.16", "--warmup-epochs", "0")  # fmt: skip
    s, session = asked(arguments(home, home / "x.json", *words))
    run = finetune.Finetuning(s, finetune_plan.plan_training(s, home, ALONE), session)
    mix, erase = run.mix, run.erase
    assert isinstance(mix, Mixup)
    assert erase is not None
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.label_smoothing) == (0.3, 0.6, 0.2)
    assert (mix.mix_prob, mix.switch_prob, mix.mode, mix.num_classes) == (1.0, 0.5, "batch", 6)
    assert (erase.probability, erase.min_area, erase.max_area) == (0.4, 0.02, 1 / 3)
    path = run.module.model.blocks[-1].drop_path1
    assert isinstance(path, DropPath)
    assert path.drop_prob == 0.5
    seen, micro_step = [], run.engine.micro_step
    monkeypatch.setattr(run, "erase", torch.zeros_like)
    monkeypatch.setattr(
        run.engine, "micro_step", lambda *given: seen.append(given) or micro_step(*given)
    )
    run.train_step(0, iter(run.loader(0)))
    for _, pixels, target in seen:
        assert not pixels.any()  # erased
        torch.testing.assert_close(target.min(1).values, torch.full((len(target),), 0.2 / 6))
    peak = 0.16 * 16 / 256
    scales = {number: peak * 0.5 ** (3 - number) for number in range(4)}
    found = {group["name"]: (group["lr"], group["weight_decay"])
             for group in run.engine.optimizer.param_groups}  # fmt: skip
    assert found == {f"layer {number}, {word}": (pytest.approx(rate), decay)
                     for number, rate in scales.items()
                     for word, decay in (("decay", 0.3), ("no decay", 0.0))}  # fmt: skip
    run.engine.destroy()


def test_the_loss_is_soft_target_cross_entropy_in_fp32() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    pixels, target = torch.randn(4, 3, 2, 2), torch.rand(4, 5).softmax(1)
    for kind, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        loss, terms = finetune.Classifier(model.to(kind))(pixels, target)
        logits = pixels.flatten(1).double() @ model[1].weight.double().T + model[1].bias.double()
        expected = -(target * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()
        assert (loss.dtype, terms) == (torch.float32, {})
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance)


def test_validation_runs_without_drop_path_and_training_continues_with_it(home: Path) -> None:
    init_ranks()
    s, session = asked(arguments(home, home / "x.json", "--drop-path", "0.9"))
    run = finetune.Finetuning(s, finetune_plan.plan_training(s, home, ALONE), session)
    model = run.module.model
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.weight)
    hits = torch.zeros(2)
    loader = eval_loader(home / "val", batch_size=37, rank=0, world=1, image_size=16, workers=0)
    for batch in loader:
        pixels = normalise(batch.image, session.info.mean, session.info.std, torch.device("cpu"))
        model.eval()
        with torch.no_grad():
            best = model(pixels).argsort(dim=1, descending=True)
        hits += torch.tensor([(best[:, :n] == batch.label[:, None]).sum() for n in (1, 5)])
        model.train()
        with torch.no_grad():  # what drop path would change
            assert not torch.equal(model(pixels).argmax(1), best[:, 0])
    found = run.validate()
    assert [found["top1"], found["top5"]] == pytest.approx((100 * hits / 37).tolist(), abs=1e-3)
    assert found["images"] == 37
    assert all(part.training for part in run.module.modules())
    run.engine.destroy()


def arguments(home: Path, output: Path, *more: str) -> list[str]:
    common = ["--encoder", home / "run", "--train", home / "train", "--val", home / "val"]
    small = ["--epochs", 12, "--warmup-epochs", 2, "--batch-size", 16, "--base-lr", 0.05]
    easy = ["--randaugment", "", "--mixup", 0, "--cutmix", 0, "--erasing", 0, "--drop-path", 0]
    rest = ["--ds_config", ZERO2, "--workers", 0, "--output", output, *more]
    return [str(v) for v in (*common, *small, *easy, *rest)]


def asked(words: list[str], ranks: Ranks = ALONE) -> tuple[Settings, EvalSession]:
    """What a command line names."""
    args = finetune.build_parser().parse_args(words)
    return settings_of(Settings, args), session_of(args, ranks)


def evaluate(words: list[str], folder: Path, ranks: Ranks = ALONE) -> dict:
    return finetune.evaluate(*asked(words, ranks), folder)


def work(ranks: Ranks, home: str, output: str) -> None:
    """Finetune, then call it again: it finds that all is done."""
    init_ranks()
    for number in (1, 2):
        words = arguments(Path(home), Path(output))
        result = evaluate(words, Path(output).with_suffix(""), ranks)
        Path(output).with_name(f"{number}-{ranks.rank}.json").write_text(json.dumps(result))


def test_two_ranks_finetune_resume_and_export(home: Path, tmp_path: Path) -> None:
    on_two_ranks(work, str(home), str(tmp_path / "result.json"))
    first, second = (
        [json.loads((tmp_path / f"{number}-{rank}.json").read_text()) for rank in (0, 1)]
        for number in (1, 2)
    )
    result = first[0]
    assert result["images"] == 37
    assert result["top1"] > 60  # chance is 16.7
    assert (result["ranks"], result["protocol"]) == (2, "finetune")
    assert [row["epoch"] for row in result["history"]] == pytest.approx(list(range(1, 13)))
    assert first[1]["top1"] == result["top1"]
    assert second[0]["history"] == result["history"] == first[1]["history"]
    init_ranks()
    alone = evaluate(arguments(home, tmp_path / "alone", "--stop-epoch", "1"), tmp_path / "alone")
    losses = [history[0]["loss"] for history in (result["history"], alone["history"])]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # of the global batch
    checkpoints = tmp_path / "result/checkpoints"
    latest = (checkpoints / "latest").read_text().strip()
    assert [p.name for p in checkpoints.glob("step-*")] == [latest]
    model, info = read_classifier(tmp_path / "result")
    assert info["classes"] == [f"class{n}" for n in range(6)]
    correct = 0
    loader = eval_loader(home / "val", batch_size=8, rank=0, world=1, image_size=16, workers=0)
    for batch in loader:
        pixels = normalise(batch.image, info["mean"], info["std"], torch.device("cpu"))
        correct += int((classify(model, pixels).argmax(1) == batch.label).sum())
    assert round(100 * correct / 37, 3) == result["top1"]


def test_resuming_equals_never_stopping(home: Path, tmp_path: Path) -> None:
    init_ranks()
    results = []
    for name, stops in (("whole", (12,)), ("parts", (5, 12))):
        for epochs in stops:
            words = arguments(home, tmp_path / name, "--stop-epoch", epochs)
            result = evaluate(words, tmp_path / name)
        results.append(result["history"])
    assert results[0] == results[1]
    other = arguments(home, tmp_path / "whole", "--base-lr", "0.1")
    with pytest.raises(UserError, match="holds a training with another base_lr"):
        evaluate(other, tmp_path / "whole")


def test_stopping_within_an_epoch_resumes_there(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At half of the first of two epochs of four steps; the rest is that of one run, and so is the
    time that both took."""
    monkeypatch.setattr(finetune, "Timer", SlowTimer)
    init_ranks()
    done, train_step = [], finetune.Finetuning.train_step

    def note(self: finetune.Finetuning, step: int, micro: object) -> torch.Tensor:
        done.append(step)
        return train_step(self, step, micro)

    monkeypatch.setattr(finetune.Finetuning, "train_step", note)
    words = arguments(home, tmp_path / "x", "--epochs", "2", "--warmup-epochs", "1")
    half = evaluate([*words, "--stop-epoch", "0.5"], tmp_path / "parts")
    assert done == [0, 1]
    assert [row["epoch"] for row in half["history"]] == [0.5]
    assert half["top1"] == half["history"][-1]["top1"]
    assert "trained for 0.5 of 2 epochs" in facts(half)
    again = evaluate([*words, "--stop-epoch", "0.5"], tmp_path / "parts")
    assert (done, again["history"]) == ([0, 1], half["history"])
    parts = evaluate(words, tmp_path / "parts")
    assert done == list(range(8))
    whole = evaluate(words, tmp_path / "whole")
    assert parts["history"] == whole["history"]
    assert [row["epoch"] for row in parts["history"]] == [1.0, 2.0]
    assert not any("trained for" in fact for fact in facts(parts))
    assert 1000 < whole["seconds"] < 2000 < parts["seconds"] < 3000


def test_a_checkpoint_belongs_to_encoder_and_data_and_not_to_their_paths(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init_ranks()
    run, short = write_encoder(tmp_path / "run", seed=3), ("--epochs", "1", "--warmup-epochs", "0")
    words = arguments(home, tmp_path / "x.json", *short, "--encoder", str(run))
    first = evaluate(words, tmp_path / "x")
    monkeypatch.chdir(tmp_path)
    names = [os.path.relpath(home / name) for name in ("train", "val")]
    relative = ["--encoder", "run", "--train", names[0], "--val", names[1]]
    with monkeypatch.context() as patch:
        patch.setattr(finetune.Finetuning, "train_step", None)  # all is done
        assert evaluate([*words, *relative], Path("x"))["history"] == first["history"]
    write_encoder(tmp_path / "other", seed=4)
    with pytest.raises(UserError, match="another encoder; remove it"):
        evaluate([*words, "--encoder", "other"], tmp_path / "x")
    info = run / "encoder/encoder.json"  # the same weights, to be given other pixels
    info.write_text(json.dumps(json.loads(info.read_text()) | {"mean": [0.1, 0.2, 0.3]}))
    with pytest.raises(UserError, match=r"another mean \(.*now \[0.1, 0.2, 0.3\]"):
        evaluate(words, tmp_path / "x")


@pytest.mark.parametrize("name", ["train", "val"])
def test_other_images_of_the_same_sizes_are_not_resumed_on(
    home: Path, tmp_path: Path, name: str
) -> None:
    init_ranks()
    short = ("--epochs", "2", "--warmup-epochs", "0", "--batch-size", "8", "--stop-epoch", "1")
    words = arguments(home, tmp_path / "x.json", *short, f"--{name}", str(tmp_path / name))
    write_shards(tmp_path / name, *coloured_images(12, 6, seed=3), level=0)
    evaluate(words, tmp_path / "x")
    before = read_manifest(tmp_path / name).index_sha256
    shutil.rmtree(tmp_path / name)
    write_shards(tmp_path / name, *coloured_images(12, 6, seed=4), level=0)
    assert read_manifest(tmp_path / name).index_sha256 == before
    what = {"train": "training", "val": "validation"}[name]
    with pytest.raises(UserError, match=f"holds a training with another {what} images; remove"):
        evaluate(words, tmp_path / "x")


def test_a_checkpoint_that_does_not_know_its_pixels_or_images_is_resumed(tmp_path: Path) -> None:
    """Earlier versions recorded neither mean nor std, nor more than the index of the images."""
    Checkpoints(tmp_path, {"epochs": 3}).save(2, lambda folder: "")
    settings = {"epochs": 3, "mean": [0.5] * 3, "std": [0.5] * 3, "training images": "ab"}
    assert Checkpoints(tmp_path, settings).load(lambda folder: None)["step"] == 2
    with pytest.raises(UserError, match="another epochs"):
        Checkpoints(tmp_path, settings | {"epochs": 4}).load(lambda folder: None)


def test_a_result_whose_checkpoints_are_gone_is_not_replaced(home: Path, tmp_path: Path) -> None:
    """They may be removed for room; the same command trains again, another one is refused."""
    init_ranks()
    half = ["--fraction", "0.6", "--epochs", "1", "--warmup-epochs", "0", "--max-steps", "1"]
    words = [*arguments(home, tmp_path / "x.json"), *half, "--encoder", "random",
             "--arch", "vit_tiny_patch16_224", "--options", json.dumps(OPTIONS)]  # fmt: skip

    def prepared(*more: str) -> None:
        finetune.prepare(finetune.build_parser().parse_args([*words, *more]))

    write_result(tmp_path / "x.json", evaluate(words, tmp_path / "x"))
    prepared("--base-lr", "0.1")  # which the checkpoint refuses
    shutil.rmtree(tmp_path / "x")
    prepared()
    for more, said in (
        (("--base-lr", "0.1"), r"base_lr \(0\.05, now 0\.1\)"),
        (("--max-steps", "2"), r"max_steps \(1, now 2\)"),
        (("--samples-per-epoch", "70"), r"samples_per_epoch \(null, now 70\)"),
        (("--crop-area", "0.4"), r"crop_area \(0\.08, now 0\.4\)"),
        (("--seed", "1"), r"seed \(0, now 1\)"),
    ):
        with pytest.raises(UserError, match=f"x.json: holds a result with another {said}; remove"):
            prepared(*more)


def test_few_images_are_drawn_with_replacement(home: Path, tmp_path: Path) -> None:
    """12 images make an epoch of 70 draws, 4 batches of 16, each draw with its own crop."""
    init_ranks()
    few = write_shards(tmp_path / "few", *coloured_images(12, 6, seed=1))
    words = arguments(home, tmp_path / "x", "--train", str(few), "--epochs", "2")
    words += ["--warmup-epochs", "1", "--samples-per-epoch", "70"]
    s, session = asked(words)
    plan = finetune_plan.plan_training(s, tmp_path, ALONE)
    assert (plan.steps, plan.total) == (4, 8)
    run = finetune.Finetuning(s, plan, session)
    epochs: list[list[torch.Tensor]] = [[], []]
    for batch in run.loader(0):
        epochs[batch.epoch].append(batch)
    run.engine.destroy()
    for batches in epochs:
        drawn = torch.cat([batch.sample for batch in batches])
        assert len(drawn) == 64
        counts = torch.bincount(drawn, minlength=12)
        assert counts.min() < 4 < 7 < counts.max()  # replaced: not five or six of each
        images = torch.cat([batch.image for batch in batches])[drawn == counts.argmax()]
        assert len(torch.unique(images, dim=0)) > 1
    result = evaluate(words, tmp_path / "x")
    assert result["content"].keys() == {"train", "val"}
    assert result["settings"]["samples_per_epoch"] == 70
    assert [row["epoch"] for row in result["history"]] == [1.0, 2.0]


def test_a_training_is_not_resumed_in_another_precision(home: Path, tmp_path: Path) -> None:
    """As after a job that began on a GPU and continues without one."""
    init_ranks()
    words = arguments(home, tmp_path / "x", "--epochs", "2", "--warmup-epochs", "1")
    evaluate([*words, "--stop-epoch", "0.5"], tmp_path / "x")
    config = json.loads(ZERO2.read_text())
    config["torch_autocast"] = {"enabled": True}
    (tmp_path / "autocast.json").write_text(json.dumps(config))
    other = [*words, "--ds_config", str(tmp_path / "autocast.json")]
    with pytest.raises(UserError, match="a training with precision fp32, this one has autocast"):
        evaluate(other, tmp_path / "x")


def test_a_folder_where_another_process_trains_is_left_alone(home: Path, tmp_path: Path) -> None:
    """Two rates side by side, say, without an --output of their own."""
    init_ranks()
    s, session = asked(arguments(home, tmp_path / "x", "--fraction", "0.5"))
    with held_by_another(tmp_path / "x"):
        with pytest.raises(UserError, match=r"another run holds this folder .*choose another --"):
            finetune.evaluate(s, session, tmp_path / "x")
        assert [path.name for path in (tmp_path / "x").iterdir()] == ["lock"]


def test_another_choice_of_labels_replaces_the_one_before(home: Path, tmp_path: Path) -> None:
    counts = []
    for words in (("0.3",), ("0.5",), ("0.5", "--subset-seed", "1")):
        s, _ = asked(arguments(home, tmp_path / "x", "--fraction", *words))
        manifest = read_manifest(finetune_plan.choose_labels(s, tmp_path, ALONE))
        made = manifest.made["options"]
        assert (made["fraction"], made["seed"]) == (s.fraction, s.subset_seed)
        counts.append(manifest.samples)
        before = (tmp_path / "subset/manifest.json").stat().st_mtime_ns
        finetune_plan.choose_labels(s, tmp_path, ALONE)  # the same one stays
        assert (tmp_path / "subset/manifest.json").stat().st_mtime_ns == before
    assert counts == [22, 36, 36]


def test_the_labels_chosen_before_follow_the_data(home: Path, tmp_path: Path) -> None:
    before = Path(shutil.copytree(home / "train", tmp_path / "before"))
    s, _ = asked(arguments(home, tmp_path / "x", "--fraction", "0.3"))
    finetune_plan.choose_labels(replace(s, train=str(before)), tmp_path, ALONE)
    after = before.rename(tmp_path / "after")
    path = finetune_plan.choose_labels(replace(s, train=str(after)), tmp_path, ALONE)
    assert read_manifest(path).folder == str(after)
    (tmp_path / "subset/mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.txt: .*; move it, or choose another --output"):
        finetune_plan.choose_labels(replace(s, train=str(home / "train")), tmp_path, ALONE)
    assert (tmp_path / "subset/mine.txt").read_text() == "mine"


def test_the_default_configuration_is_found_from_any_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_ds_config(Settings("", "").ds_config) == read_ds_config(ZERO2)


def distilled() -> torch.nn.Module:
    torch.manual_seed(3)
    model = timm.create_model("deit_base_distilled_patch16_224", num_classes=0, **OPTIONS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_a_distilled_deit_is_finetuned_on_the_mean_of_its_patches(
    home: Path, tmp_path: Path
) -> None:
    init_ranks()
    encoder = distilled()
    info = EncoderInfo("deit_base_distilled_patch16_224.x", OPTIONS, (), (), {})
    model = build_classifier(encoder, info, 5, drop_path=0.1).eval()
    torch.nn.init.normal_(model.head.weight)
    pixels = torch.randn(3, 3, 16, 16)
    last: list[torch.Tensor] = []
    encoder.blocks[-1].register_forward_hook(lambda m, i, output: last.append(output))
    with torch.no_grad():
        encoder.forward_features(pixels)
        mean = last[0][:, 2:].mean(dim=1)  # after the cls and the distillation token
        normal = torch.nn.functional.layer_norm(mean, (32,), eps=1e-6)
        torch.testing.assert_close(
            model(pixels), normal @ model.head.weight.T, rtol=1e-4, atol=1e-4
        )
    groups = layer_groups(model, weight_decay=0.05, layer_decay=0.75)
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found[id(model.reg_token)] == (0.75**3, 0.0)
    torch.save({"model": encoder.state_dict()}, tmp_path / "deit.pth")
    words = arguments(home, tmp_path / "x", "--encoder", str(tmp_path / "deit.pth"))
    words += ["--arch", "deit_base_distilled_patch16_224", "--options", json.dumps(OPTIONS)]
    result = evaluate([*words, "--max-steps", "2"], tmp_path / "x")
    assert result["encoder"]["arch"] == "deit_base_distilled_patch16_224"
    again, _ = read_classifier(tmp_path / "x")
    assert again(pixels).shape == (3, 6)


def test_a_finetuned_classifier_says_its_pixels_and_how_it_is_taken(home, tmp_path: Path) -> None:
    _, model = model_of(home)
    classes = tuple(map(str, range(7)))
    _, info = read_encoder(home / "run")
    write_classifier(tmp_path / "ft", model.state_dict(), info, classes)
    file = tmp_path / "ft/classifier.safetensors"
    arch = {"arch": info["arch"], "options": OPTIONS}
    _, found = load_encoder(file, **arch)  # of timm they would be 0.5
    assert (found["mean"], found["std"]) == (info["mean"], info["std"])
    assert "0.229,0.224,0.225 of classifier.json" in found["note"]
    overlay = {"pretrained_cfg_overlay": {"mean": [0.1, 0.2, 0.3]}}
    _, found = load_encoder(file, arch=info["arch"], options={**OPTIONS, **overlay})
    assert found["mean"] == [0.1, 0.2, 0.3]
    with pytest.raises(UserError, match=r"ft: is a classifier .*export.py \S+ --format run OUT"):
        load_encoder(tmp_path / "ft")


@pytest.mark.parametrize("stop_at", [3, 4], ids=["within an epoch", "at its end"])
def test_a_signal_saves_once_and_resuming_equals_never_stopping(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    init_ranks()
    saved, done, train_step, save = [], [], finetune.Finetuning.train_step, Checkpoints.save

    def kill_at(self: finetune.Finetuning, step: int, micro: object) -> torch.Tensor:
        done.append(step)
        if len(done) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, step, micro)

    def count(self: Checkpoints, step: int, *rest: object, **more: object) -> None:
        saved.append(step)
        save(self, step, *rest, **more)

    monkeypatch.setattr(finetune.Finetuning, "train_step", kill_at)
    monkeypatch.setattr(Checkpoints, "save", count)
    words = arguments(home, tmp_path / "stopped", "--epochs", "2", "--warmup-epochs", "1")
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with pytest.raises(SystemExit) as stopped:
            evaluate(words, tmp_path / "a")
        assert stopped.value.code == PREEMPTED
        assert saved == [stop_at]
        resumed, whole = (evaluate(words, tmp_path / name) for name in ("a", "b"))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert resumed["history"] == whole["history"]
    assert done == [*range(8), *range(8)]


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: Container[int]) -> list:
    """Make the head's gradient NaN in the given backward passes; the count of those so far."""
    build, passes = finetune.build_classifier, []

    def build_and_hook(*args: object, **more: object) -> torch.nn.Module:
        model = build(*args, **more)

        def poison(gradient: torch.Tensor) -> torch.Tensor:
            passes.append(len(passes))
            return gradient * float("nan") if passes[-1] in steps else gradient

        model.head.weight.register_hook(poison)
        return model

    monkeypatch.setattr(finetune, "build_classifier", build_and_hook)
    return passes


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], stage: int,
) -> None:  # fmt: skip
    init_ranks()
    passes = poisoned(monkeypatch, (2, 3, 7))
    config = str(ZERO2.with_name(f"zero{stage}.json"))
    words = arguments(home, tmp_path / "x.json", "--ds_config", config, "--epochs", "2")
    words += ["--warmup-epochs", "1"]
    evaluate([*words, "--stop-epoch", "1"], tmp_path / "x")
    result = evaluate(words, tmp_path / "x")  # resumes
    assert len(passes) == 8
    assert result["nonfinite_steps"] == 3
    said = capsys.readouterr().out
    assert f"resumes from {tmp_path}/x/checkpoints, at step 4 of 8\n" in said
    assert "warning: the last step was skipped, since the gradient was not fini" in said
    model, _ = read_classifier(tmp_path / "x")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    untouched, _ = read_encoder(home / "run")  # the other five steps have trained
    assert not torch.equal(model.blocks[1].attn.qkv.weight, untouched.blocks[1].attn.qkv.weight)


def test_many_skipped_steps_in_a_row_stop_finetuning(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init_ranks()
    poisoned(monkeypatch, range(3, 100))
    with pytest.raises(UserError, match=r"steps 4 to 13 in a row .*use a lower --base-lr"):
        evaluate(arguments(home, tmp_path / "x.json"), tmp_path / "x")


@pytest.mark.parametrize("stage", [0, 2])
def test_a_loss_that_is_not_finite_stops_the_command_and_no_accuracy_is_written(
    home: Path, tmp_path: Path, stage: int
) -> None:
    spoil_encoder(home / "run", tmp_path / "run")
    config = str(ZERO2.with_name(f"zero{stage}.json"))
    words = arguments(home, tmp_path / "x.json", "--ds_config", config)
    words[words.index("--encoder") + 1] = str(tmp_path / "run")
    done = command(finetune, *words)
    assert done.returncode == DIVERGED
    assert "error: the loss of finetuning is not finite in step 1; use a lower" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.json").exists()
    assert not (tmp_path / "x/classifier.json").exists()


def test_a_last_step_that_is_too_large_has_no_accuracy(home: Path, tmp_path: Path) -> None:
    init_ranks()
    words = arguments(home, tmp_path / "x.json", "--max-steps", "1", "--warmup-epochs", "0")
    with pytest.raises(UserError, match="the classifier's outputs of it are not finite"):
        evaluate([*words, "--base-lr", "1e30"], tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--batch-size", "128"), "too few for --batch-size 128"),
        (("--batch-size", "15", "--mixup", "1"), "--batch-size 15: mixup and cutmix pair .* of 2,"),
        (("--batch-size", "15", "--cutmix", "1"), "and 15 per rank is odd"),
        (("--batch-size", "0"), "--batch-size 0: must be at least 1"),
        (("--ds_config", str(ZERO2.with_name("zero3.json"))), "ZeRO stage 3"),
        (("--fraction", "2"), "--fraction 2: must be above 0 and at most 1"),
        (("--fraction", "0.5", "--subset", "names.txt"), "--subset and --fraction both choose"),
        (("--subset", "names.txt"), "names.txt: no such file"),
        (("--ds_config", "zero0", "--precision", "bf16"), "--precision bf16 needs ZeRO stage 1"),
        (("--batch-size", "128", "--samples-per-epoch", "100"), "--samples-per-epoch 100: too few"),
        (("--samples-per-epoch", "0"), "--samples-per-epoch 0: must be at least 1"),
        (("--stop-epoch", "0"), "--stop-epoch 0: must be above 0"),
        (("--validate-epochs", "0"), "--validate-epochs 0: must be at least 1"),
        (("--epochs", "0.1", "--warmup-epochs", "0"), "--epochs 0.1: less than a step, with 4"),
        (("--epochs", "0"), "--epochs 0: must be above 0"),
        (("--epochs", "nan"), "--epochs nan: must be finite"),
        (("--base-lr", "nan"), "--base-lr nan: must be finite"),
        (("--base-lr", "0"), "--base-lr 0: must be above 0"),
        (("--base-lr", "1e31"), "--base-lr 1e.31: must be above 0 and at most 1e.30"),
        (("--layer-decay", "0"), "--layer-decay 0: must be above 0 and at most 1"),
        (("--drop-path", "1"), "--drop-path 1: must be at least 0 and below 1"),
        (("--erasing", "2"), "--erasing 2: must be at least 0 and at most 1"),
        (("--smoothing", "1"), "--smoothing 1: must be at least 0 and below 1"),
        (("--weight-decay", "-1"), "--weight-decay -1: must be at least 0"),
        (("--randaugment", "rind-m9"), "randaugment 'rind-m9' is not a policy"),
        (("--val", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_sentence(
    home: Path, tmp_path: Path, change: tuple[str, str], words: str
) -> None:
    init_ranks()
    with pytest.raises(UserError, match=words):
        evaluate(arguments(home, tmp_path / "x.json", *change), tmp_path / "x")


def test_few_labels_are_a_share_of_each_class(home: Path, tmp_path: Path) -> None:
    s, _ = asked(arguments(home, tmp_path / "x.json", "--fraction", "0.3"))
    train = finetune_plan.choose_labels(s, tmp_path, ALONE)
    assert train == str(tmp_path / "subset")
    labels = read_manifest(train).index["label"]
    assert np.bincount(labels).tolist() == [4, 4, 4, 4, 3, 3]  # of 12, 12, 12, 12, 11, 11
    assert s.name == "finetune-30percent"


def test_a_checkpoint_is_not_saved_where_another_training_is_by_now(tmp_path: Path) -> None:
    folder = tmp_path / "result"
    checkpoints = Checkpoints(folder, {"epochs": 3}, hold(folder, ALONE))
    shutil.rmtree(folder)
    with held_by_another(folder):
        with pytest.raises(UserError, match="another run holds this folder"):
            checkpoints.save(2, lambda folder: "")
        assert [path.name for path in folder.iterdir()] == ["lock"]
