"""The linear probe follows MAE's protocol, and its result does not depend on the ranks."""

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_helpers import (
    ALONE,
    MEAN,
    OPTIONS,
    SIZE,
    STD,
    SlowTimer,
    coloured_images,
    command,
    held_by_another,
    on_two_ranks,
    spoil_encoder,
    write_encoder,
    write_shards,
)
from PIL import Image
from safetensors.torch import load_file
from signals import interruptible
from torch import nn

from eval import linprobe
from eval.shared import linprobe_plan
from eval.shared.command import run_command
from eval.shared.features import normalise
from eval.shared.lars_probe import Probe, Training
from eval.shared.metrics import count_correct
from eval.shared.options import settings_of
from eval.shared.results import write_result
from eval.shared.session import EvalSession, session_of
from pipeline.distributed import Ranks
from pipeline.errors import DIVERGED, UserError
from pipeline.weights.run import read_encoder

RATE = {"mae": ("--base-lr", "20"), "cached": ()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (70 images), val/ (37 images, not divisible by 2) and run/."""
    folder = tmp_path_factory.mktemp("linprobe")
    write_shards(folder / "train", *coloured_images(70, 6, seed=1))
    write_shards(folder / "val", *coloured_images(37, 6, seed=2))
    write_encoder(folder / "run")
    return folder


def arguments(home: Path, *more: str) -> list[str]:
    common = ["--encoder", home / "run", "--train", home / "train", "--val", home / "val"]
    small = ["--epochs", "4", "--warmup-epochs", "1", "--batch-size", "32", "--workers", "0"]
    return [str(value) for value in [*common, *small, *more]]


def parse(home: Path, *more: str) -> linprobe.argparse.Namespace:
    return linprobe.build_parser().parse_args(arguments(home, *more))


def settings(home: Path, *more: str) -> linprobe.Settings:
    return settings_of(linprobe.Settings, parse(home, *more))


def session(home: Path, *more: str, ranks: Ranks = ALONE) -> EvalSession:
    args = parse(home, *more)
    return session_of(args, ranks, args.feature)


def evaluate(home: Path, folder: Path, *more: str, ranks: Ranks = ALONE) -> dict:
    """What the command line computes."""
    return linprobe.evaluate(settings(home, *more), session(home, *more, ranks=ranks), folder)


def training(rates: tuple[float, ...], steps: int = 10, batch: int = 512) -> Training:
    probe = Probe(8, 5, heads=len(rates))
    return Training(probe, rates, batch=batch, steps=steps, epochs=90, warmup=10)


def test_defaults_are_maes() -> None:
    args = linprobe.build_parser().parse_args(["--encoder", "", "--train", "", "--val", ""])
    assert settings_of(linprobe.Settings, args) == linprobe.Settings("", "")
    assert (args.epochs, args.warmup_epochs, args.batch_size) == (90, 10, 16384)
    assert (args.base_lr, args.feature, args.protocol) == (0.1, "cls", "mae")


def test_learning_rate_at_given_steps() -> None:
    peak, epochs, warmup, steps = 0.1 * 512 / 256, 90, 10, 10
    schedule = training((0.1,), steps=steps, batch=512)

    def plain(step: int) -> float:
        epoch = step / steps
        if epoch < warmup:
            return peak * epoch / warmup
        return peak / 2 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))

    for step in (0, 1, 50, 99, 100, 101, 500, 899):
        assert schedule.rate(step) == pytest.approx(plain(step), rel=1e-12)
    assert schedule.rate(0) == 0
    assert schedule.rate(100) == pytest.approx(peak)
    assert schedule.rate(500) == pytest.approx(peak / 2)
    assert schedule.rate(900) == pytest.approx(0, abs=1e-12)


def test_lars_follows_the_plain_formula_and_exempts_biases() -> None:
    torch.manual_seed(0)
    under_test = training((0.3, 2.0), steps=1, batch=256)
    feature, label = torch.randn(11, 6, 8), torch.randint(0, 5, (11, 6))
    weights = list(under_test.probe.weight.detach().double().clone())
    biases = [torch.zeros(5, dtype=torch.float64) for _ in weights]
    speeds = [
        [torch.zeros_like(w), torch.zeros_like(b)] for w, b in zip(weights, biases, strict=True)
    ]
    for step in range(11):
        x = feature[step].double()
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
        for head, base in enumerate((0.3, 2.0)):
            rate = base * step / 10  # warm-up with one step per epoch and batch 256
            z = x @ weights[head].T + biases[head]
            delta = (z.softmax(1) - nn.functional.one_hot(label[step], 5)) / len(x)
            slope = delta.T @ x
            slope *= 0.001 * weights[head].norm() / slope.norm()
            for part, value in enumerate((slope, delta.sum(0))):
                speeds[head][part] = 0.9 * speeds[head][part] + value
            weights[head] = weights[head] - rate * speeds[head][0]
            biases[head] = biases[head] - rate * speeds[head][1]
        under_test.step(step, feature[step], label[step])
    probe = under_test.probe
    for head in (0, 1):
        torch.testing.assert_close(probe.weight[head].double(), weights[head], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(probe.bias[head].double(), biases[head], rtol=1e-4, atol=1e-7)


def test_weights_that_are_zero_learn_by_the_plain_rate() -> None:
    under_test = training((0.1,), steps=1, batch=256)
    with torch.no_grad():
        under_test.probe.weight.zero_()
    slope = torch.randn(1, 5, 8)
    under_test._update(10, slope, torch.zeros(1, 5))  # the peak, 0.1
    torch.testing.assert_close(under_test.probe.weight.detach(), -0.1 * slope)


def test_a_tenth_is_held_out_of_the_images_that_are_kept() -> None:
    kept, out = linprobe.held_out(96, seed=3)
    assert len(out) == 10  # 9.6, rounded
    assert sorted([*kept.tolist(), *out.tolist()]) == list(range(96))


def test_training_crops_show_8_to_100_percent(home: Path, monkeypatch) -> None:
    class Asked(Exception):
        pass

    def ask(config, *_):
        assert (config.crop.scale, config.crop.flip) == ((0.08, 1.0), True)
        raise Asked

    monkeypatch.setattr(linprobe, "train_loader", ask)
    s = settings(home)
    with pytest.raises(Asked):
        next(linprobe.global_features(session(home), s, linprobe_plan.make_plan(s, 1), 0))


def test_probe_has_plain_batch_norm_and_small_weights() -> None:
    probe = Probe(96, 400, heads=2, seed=3)
    assert probe.norm.weight is None
    assert probe.norm.bias is None
    assert probe.norm.eps == 1e-6
    names = {name for name, _ in probe.named_parameters()}
    assert names == {"weight", "bias"}
    assert probe.weight[0].std().item() == pytest.approx(0.01, rel=0.02)
    assert torch.equal(probe.weight[0], probe.weight[1])
    assert not probe.bias.any()
    feature = torch.randn(5, 96)
    normal = (feature - feature.mean(0)) / (feature.var(0, unbiased=False) + 1e-6).sqrt()
    with torch.no_grad():
        expected = torch.stack(
            [normal @ w.T + b for w, b in zip(probe.weight, probe.bias, strict=True)]
        )
        torch.testing.assert_close(probe(feature), expected, rtol=1e-4, atol=1e-5)


def test_validation_takes_the_running_statistics_of_the_features(home: Path) -> None:
    """A tenth of each batch's mean and unbiased variance; no batch of validation changes them."""
    torch.manual_seed(4)
    probe, x = Probe(32, 6, seed=3), 2 * torch.randn(9, 32) + 1
    probe(x)
    mean, var = 0.1 * x.mean(0), 0.9 + 0.1 * x.var(0, unbiased=True)
    torch.testing.assert_close(probe.norm.running_mean, mean)
    torch.testing.assert_close(probe.norm.running_var, var)
    opened = session(home)
    feature, label = opened.extract(home / "val", "cls", 37)
    with torch.no_grad():
        centre = feature.mean(0) - mean  # far from the mean of a batch of validation
        probe.weight.normal_()
        logits = (feature - mean) / (var + 1e-6).sqrt() @ probe.weight[0].T
        by_batch = (feature - feature.mean(0)) / (feature.var(0) + 1e-6).sqrt() @ probe.weight[0].T
        assert centre.abs().max() > 0.1
        assert not torch.equal(logits.argmax(1), by_batch.argmax(1))
    found = linprobe.score({"cls": probe}, opened, settings(home))["cls"]
    hits = logits.argsort(dim=1, descending=True) == label[:, None]
    assert found["images"] == 37
    assert found["top1"] == round(hits[:, 0].sum().item() / 0.37, 3)
    assert found["top5"] == round(hits[:, :5].sum().item() / 0.37, 3)
    torch.testing.assert_close(probe.norm.running_mean, mean)


def test_heads_do_not_touch_each_other() -> None:
    torch.manual_seed(1)
    feature, label = torch.randn(5, 6, 8), torch.randint(0, 5, (5, 6))
    together, alone = training((0.3, 2.0)), training((2.0,))
    for step in range(5):
        together.step(step + 1, feature[step], label[step])
        alone.step(step + 1, feature[step], label[step])
    torch.testing.assert_close(together.probe.weight[1], alone.probe.weight[0])
    assert not torch.allclose(together.probe.weight[0], alone.probe.weight[0])


def test_a_head_is_the_same_bit_for_bit_however_many_others_there_are(home: Path) -> None:
    """So it does not matter how the grid is shared among ranks."""
    s = settings(home, "--protocol", "cached", "--epochs", "20")
    torch.manual_seed(2)
    feature, label = torch.randn(64, 24), torch.randint(0, 5, (64,))
    together, _ = linprobe.train_heads(feature, label, (0.1, 3.0, 100.0), s, 5)
    for number, rate in enumerate((0.1, 3.0, 100.0)):
        alone, _ = linprobe.train_heads(feature, label, (rate,), s, 5)
        assert torch.equal(together.weight[number], alone.weight[0])
        assert torch.equal(together.bias[number], alone.bias[0])


def test_counts_top1_and_top5() -> None:
    logits = torch.arange(12.0).repeat(3, 1)
    assert count_correct(logits, torch.tensor([11, 7, 6])).tolist() == [1, 2, 3]
    assert count_correct(logits[:, :3], torch.tensor([2, 0, 1])).tolist() == [1, 3, 3]


def test_crop_is_tensorflows() -> None:
    crop = linprobe.ProbeCrop(image_size=8, scale=(0.08, 1.0))
    random = np.random.default_rng(0)
    areas = []
    for _ in range(500):
        box, _ = crop.choose(random.random(23).tolist())(60, 40)
        assert 0 <= box.left < box.right <= 60
        assert 0 <= box.top < box.bottom <= 40
        areas.append((box.right - box.left) * (box.bottom - box.top) / 2400)
    assert min(areas) < 0.12
    assert max(areas) > 0.9
    # The full area at ratio 1 is a 49 by 49 square: too high for 40 rows, cut off and not redrawn.
    uniform = [1.0 - 1e-9, 0.5] + [0.0] * 21
    box, flip = crop.choose(uniform)(60, 40)
    assert (box.left, box.top, box.right, box.bottom) == (0, 0, 49, 40)
    assert flip


def test_features_are_those_of_the_evaluation_crop(home: Path) -> None:
    feature, label = session(home).extract(home / "val", "mean_patch", 16)
    image, expected_label = coloured_images(37, 6, seed=2)
    reference, _ = read_encoder(home / "run")
    resize = round(SIZE * 256 / 224)  # 18: the shorter side of 24 x 20 becomes 18
    for number in (0, 17, 36):
        picture = Image.fromarray(image[number]).resize((18, resize * 24 // 20), Image.BICUBIC)
        left, top = (picture.width - SIZE) // 2, round((picture.height - SIZE) / 2)
        pixels = np.asarray(picture)[top : top + SIZE, left : left + SIZE] / 255
        pixels = torch.tensor((pixels - MEAN) / STD).float().permute(2, 0, 1)[None]
        with torch.no_grad():
            tokens = reference.forward_features(pixels)[0]
        error = (feature[number] - tokens[1:].mean(0)).abs().max() / tokens.abs().max()
        assert error < 0.05  # resizing 8-bit pixels rounds
    assert label.tolist() == expected_label.tolist()


def test_pixels_are_normalised_channel_by_channel() -> None:
    image = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    pixels = normalise(image, (0.5, 0.1, 0.25), (0.25, 0.5, 2.0), torch.device("cpu"))
    expected = torch.tensor([-0.5 / 0.25, (0.2 - 0.1) / 0.5, (1 - 0.25) / 2.0])
    torch.testing.assert_close(pixels[0, :, 0, 0], expected)


def test_encoder_is_frozen_and_random_differs(home: Path, tmp_path: Path) -> None:
    before, _ = read_encoder(home / "run")
    one = session(home)
    vit, info = one.vit, one.info.record
    assert not vit.training
    assert not any(p.requires_grad for p in vit.parameters())
    evaluate(home, tmp_path)
    after, _ = read_encoder(home / "run")
    for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    two = session(home, "--random", "--seed", "5")
    other, other_info = two.vit, two.info.record
    assert (info["random"], other_info["random"], other_info["random_seed"]) == (False, True, 5)
    assert not torch.allclose(vit.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


def test_cached_and_augmented_runs_learn_something(home: Path, tmp_path: Path) -> None:
    easy = ("--epochs", "60", "--feature", "mean_patch")
    cached = evaluate(home, tmp_path, "--protocol", "cached", *easy)
    assert cached["top1"] > 60  # chance is 16.7
    assert [row["base_lr"] for row in cached["grid"]] == list(linprobe_plan.GRID)
    best = next(row for row in cached["grid"] if row["base_lr"] == cached["base_lr"])
    assert best["held_out"] == max(row["held_out"] for row in cached["grid"])
    assert (cached["top1"], cached["top5"]) == (best["validation"], best["validation_top5"])
    assert "held-out" in cached["base_lr_chosen_on"]
    optimistic = ("--protocol", "cached", "--select", "validation", *easy)
    scored = evaluate(home, tmp_path, *optimistic)
    assert scored["top1"] == max(row["validation"] for row in scored["grid"])
    assert "optimistic" in scored["base_lr_chosen_on"]
    augmented = evaluate(home, tmp_path, "--base-lr", "100", *easy)
    assert augmented["top1"] > 60
    assert augmented["images"] == cached["images"] == 37


def work(ranks: Ranks, home: str) -> None:
    for protocol in ("mae", "cached"):
        words = ("--protocol", protocol, *RATE[protocol])
        result = evaluate(Path(home), Path(home) / f"two-{protocol}", *words, ranks=ranks)
        (Path(home) / f"{protocol}-{ranks.rank}.json").write_text(json.dumps(result))


def test_a_folder_where_another_process_trains_is_left_alone(home: Path, tmp_path: Path) -> None:
    with (
        held_by_another(tmp_path / "x"),
        pytest.raises(UserError, match=r"another run holds this folder .*choose another --"),
    ):
        evaluate(home, tmp_path / "x", "--base-lr", "20")


def test_resuming_equals_never_stopping(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped by Ctrl-C in the middle of an epoch, and again by the end of --max-steps' trial."""
    monkeypatch.setattr(linprobe, "Timer", SlowTimer)
    words = ("--base-lr", "20")
    whole = evaluate(home, tmp_path / "whole", *words)
    step = Training.step

    def stop_at_five(training: Training, number: int, *batch: torch.Tensor) -> torch.Tensor:
        if number == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(training, number, *batch)

    monkeypatch.setattr(Training, "step", stop_at_five)
    with interruptible(), pytest.raises(SystemExit) as stopped:
        evaluate(home, tmp_path / "parts", *words)
    assert stopped.value.code == 85
    assert "stopped by SIGINT: saved at step 5 of 8; the same" in capsys.readouterr().out
    assert (tmp_path / "parts/checkpoints/latest").read_text() == "step-00000005\n"
    left = tmp_path / "parts/checkpoints/.step-00000006"  # by a kill
    left.mkdir()
    seen = []
    monkeypatch.setattr(Training, "step", lambda t, n, *b: (seen.append(n), step(t, n, *b))[1])
    parts = evaluate(home, tmp_path / "parts", *words)
    assert seen == [5, 6, 7]
    assert "parts/checkpoints, at step 5 of 8\n" in capsys.readouterr().out
    assert not left.exists()
    names = ("top1", "top5", "train_loss")
    assert [parts[n] for n in names] == [whole[n] for n in names]
    assert 1000 < whole["seconds"] < 2000 < parts["seconds"] < 3000
    saved = [
        load_file(tmp_path / n / "checkpoints/step-00000008/probe.safetensors")
        for n in ("whole", "parts")
    ]
    assert all(torch.equal(saved[0][k], saved[1][k]) for k in saved[0])
    assert set(saved[0]) >= {"norm.running_mean", "weight", "bias", "speed.w", "speed.b"}
    again = evaluate(home, tmp_path / "parts", *words)  # all is done
    assert "parts/checkpoints, at step 8 of 8; no step is left\n" in capsys.readouterr().out
    assert [again[n] for n in names] == [whole[n] for n in names]
    with pytest.raises(UserError, match="another base_lr"):
        evaluate(home, tmp_path / "parts", "--base-lr", "2")
    probe = tmp_path / "parts/checkpoints/step-00000008/probe.safetensors"
    content = bytearray(probe.read_bytes())
    content[-1] ^= 1
    probe.write_bytes(content)
    with pytest.raises(UserError, match=f"{probe}: damaged .*remove .* to start from scratch"):
        evaluate(home, tmp_path / "parts", *words)


def test_two_ranks_give_the_result_of_one(home: Path) -> None:
    on_two_ranks(work, str(home))
    for protocol in ("mae", "cached"):
        words = ("--protocol", protocol, *RATE[protocol])
        alone = evaluate(home, home / f"one-{protocol}", *words)
        for rank in (0, 1):
            result = json.loads((home / f"{protocol}-{rank}.json").read_text())
            assert result["ranks"] == 2
            assert result["images"] == alone["images"] == 37
            assert (result["top1"], result["top5"]) == (alone["top1"], alone["top5"])
            if protocol == "mae":
                assert result["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)
            else:
                assert result["grid"] == alone["grid"]


def test_features_of_the_validation_set_that_are_not_finite(home, monkeypatch):
    """As of an encoder that overflows on some images; their answer would be class 0."""
    features_of = EvalSession.all_features

    def all_features(self, pixels, names):
        found = features_of(self, pixels, names)
        rows = torch.tensor([0] if len(pixels) == 37 else [])
        return [feature.index_fill(0, rows.long(), math.nan) for feature in found]

    monkeypatch.setattr(EvalSession, "all_features", all_features)
    with pytest.raises(UserError, match=r"val: the encoder's features of it are not finite"):
        evaluate(home, home / "nan", "--micro-batch", "64", *RATE["mae"])


@pytest.mark.parametrize("protocol", ["mae", "cached"])
def test_features_probed_beside_are_those_probed_alone(
    home: Path, tmp_path: Path, protocol: str
) -> None:
    words = ("--protocol", protocol, *RATE[protocol], "--feature", "cls")
    both = evaluate(home, tmp_path / "both", *words, "--also", "mean_patch")
    cls, mean = (
        evaluate(home, tmp_path / name, *words, "--feature", name) for name in ("cls", "mean_patch")
    )
    assert both["settings"]["also"] == ("mean_patch",)
    assert "also" not in cls["settings"]
    names = ("top1", "top5", "images") + (("base_lr", "grid") if protocol == "cached" else ())
    assert [both[n] for n in ("feature", *names)] == [cls[n] for n in ("feature", *names)]
    (row,) = both["also"]
    assert [row[n] for n in ("feature", *names)] == [mean[n] for n in ("feature", *names)]
    assert cls["top1"] != mean["top1"]
    if protocol == "mae":  # resumed: both are there
        assert evaluate(home, tmp_path / "both", *words, "--also", "mean_patch")["also"] == [row]
        with pytest.raises(UserError, match="another also"):
            evaluate(home, tmp_path / "both", *words)


def test_a_feature_is_probed_once_and_must_be_there(home: Path, tmp_path: Path) -> None:
    for also in (("cls",), ("mean_patch", "mean_patch")):
        with pytest.raises(UserError, match=r"--also .*: each feature once"):
            evaluate(home, tmp_path, "--also", *also)
    options = json.dumps(OPTIONS | {"class_token": False, "global_pool": "avg"})
    words = ("--encoder", "random", "--arch", "vit_base_patch16_224", "--options", options)
    with pytest.raises(UserError, match="has no cls token"):
        evaluate(home, tmp_path, *words, "--feature", "mean_patch", "--also", "cls")


def test_command_writes_its_result(home: Path) -> None:
    done = command(linprobe, *arguments(home, "--max-steps", "2", "--local_rank", "0"))
    assert done.returncode == 0, done.stderr
    result = json.loads((home / "run/eval/linprobe-mae.json").read_text())
    assert result["protocol"] == "linprobe-mae"
    assert result["encoder"]["recipe"] == "mae"
    assert result["content"].keys() == {"train", "val"}
    assert result["settings"]["max_steps"] == 2
    assert f"top-1 {result['top1']:.2f} %" in done.stdout


def test_a_rate_that_diverges_has_no_accuracy_and_the_others_keep_theirs(
    home: Path, tmp_path: Path
) -> None:
    def grid(*rates: str) -> dict:
        return evaluate(home, tmp_path, "--protocol", "cached", "--grid", *rates)

    mixed, kept = grid("1e30", "0.1", "1e38", "1"), grid("0.1", "1")
    rows = mixed["grid"]
    assert [rows[0], rows[2]] == [{"base_lr": r, "diverged": True} for r in (1e30, 1e38)]
    assert [rows[1], rows[3]] == kept["grid"]
    assert (mixed["top1"], mixed["base_lr"]) == (kept["top1"], kept["base_lr"])
    assert mixed["base_lr_chosen_on"].endswith("(best of 4, of which 2 diverged)")
    assert kept["base_lr_chosen_on"].endswith("(best of 2)")
    json.dumps(mixed, allow_nan=False)
    with pytest.raises(UserError, match="not finite at the end at base learning rate 1e"):
        grid("1e30", "1e38")


@pytest.mark.parametrize(
    ("images", "select", "refused"),
    [(2, "held-out", True), (2, "validation", False), (3, "held-out", False)],
)  # fmt: skip
def test_a_cached_probe_needs_two_images_to_train_on(
    home: Path, tmp_path: Path, images: int, select: str, refused: bool
) -> None:
    train = write_shards(tmp_path / "few", *coloured_images(images, 6, seed=1), classes=6)
    words = ("--protocol", "cached", "--train", str(train), "--select", select)
    if refused:
        with pytest.raises(UserError, match=f"{images} training images, .* needs at least 2"):
            evaluate(home, tmp_path / "x", *words)
    else:
        assert evaluate(home, tmp_path / "x", *words)["images"] == 37


def test_a_checkpoint_belongs_to_the_encoder_and_not_to_its_path(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_encoder(tmp_path / "run", seed=3)
    first = evaluate(home, tmp_path / "out", "--encoder", str(run))
    monkeypatch.chdir(tmp_path)
    names = [os.path.relpath(home / name) for name in ("train", "val")]
    words = ("--encoder", "run/encoder", "--train", names[0], "--val", names[1])
    monkeypatch.setattr(Training, "step", None)  # all is done
    assert evaluate(home, tmp_path / "out", *words)["top1"] == first["top1"]
    with pytest.raises(UserError, match=r"a training with another resize \(null, now 40\); remove"):
        evaluate(home, tmp_path / "out", *words, "--resize", "40")
    info = run / "encoder/encoder.json"  # the same weights, to be given other pixels
    info.write_text(json.dumps(json.loads(info.read_text()) | {"std": [0.1, 0.2, 0.3]}))
    with pytest.raises(UserError, match=r"a training with another std \(.*now \[0.1, 0.2, 0.3\]"):
        evaluate(home, tmp_path / "out", *words)
    shutil.rmtree(run)
    write_encoder(run, seed=4)
    with pytest.raises(UserError, match="a training with another encoder; remove it"):
        evaluate(home, tmp_path / "out", "--encoder", str(run))
    other = ("--encoder", str(home / "run"), "--train", str(home / "val"), "--val",
             str(home / "train"), "--batch-size", "16")  # fmt: skip
    with pytest.raises(UserError, match=r"batch_size \(32, now 16\), encoder, train, val; remove"):
        evaluate(home, tmp_path / "out", *other)


def test_other_images_of_the_same_sizes_are_not_resumed_on(home: Path, tmp_path: Path) -> None:
    words = ("--train", str(tmp_path / "train"), "--epochs", "2", "--batch-size", "8")
    write_shards(tmp_path / "train", *coloured_images(16, 6, seed=3), level=0)
    evaluate(home, tmp_path / "out", *words)
    shutil.rmtree(tmp_path / "train")
    write_shards(tmp_path / "train", *coloured_images(16, 6, seed=4), level=0)
    with pytest.raises(UserError, match="a training with another training images; remove it"):
        evaluate(home, tmp_path / "out", *words)


def test_a_result_whose_checkpoints_are_gone_is_not_replaced(home: Path, tmp_path: Path) -> None:
    def prepared(*more: str) -> None:
        linprobe.prepare(parse(home, "--output", str(tmp_path / "x"), *more))

    write_result(tmp_path / "x.json", evaluate(home, tmp_path / "x"))
    prepared("--base-lr", "7")  # which the checkpoint refuses
    shutil.rmtree(tmp_path / "x")
    prepared()
    for more, said in (
        (("--base-lr", "7"), r"base_lr \(0\.1, now 7\.0\)"),
        (("--max-steps", "3"), r"max_steps \(null, now 3\)"),
        (("--feature", "mean_patch"), "feature"),
    ):
        with pytest.raises(UserError, match=f"x.json: holds a result with another {said}"):
            prepared(*more)


@pytest.mark.parametrize("protocol", ["mae", "cached"])
def test_features_that_are_not_finite_stop_the_command_and_no_accuracy_is_written(
    home: Path, tmp_path: Path, protocol: str
) -> None:
    words_of = {"mae": "the loss or the weights of the probe are not finite"}
    words_of["cached"] = f"{home / 'train'}: the encoder's features of it are not finite"
    spoil_encoder(home / "run", tmp_path / "run")
    words = arguments(home, "--protocol", protocol, "--output", str(tmp_path / "x.json"))
    words[words.index("--encoder") + 1] = str(tmp_path / "run")
    done = command(linprobe, *words)
    assert done.returncode == {"mae": DIVERGED, "cached": 2}[protocol]
    assert f"error: {words_of[protocol]}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--batch-size", "128"), "has 70 samples, too few for --batch-size 128"),
        (("--encoder", "nowhere"), "nowhere"),
        (("--val", "nowhere"), "nowhere: no such folder"),
        (("--epochs", "0"), "--epochs 0: must be at least 1"),
        (("--batch-size", "1"), "--batch-size 1: the batch norm needs"),
        (("--base-lr", "nan"), "--base-lr nan: must be finite"),
        (("--base-lr", "0"), "--base-lr 0: must be above 0"),
        (("--grid", "1", "inf"), r"--grid \[1.0, inf\]: must be finite"),
        (("--warmup-epochs", "-1"), "--warmup-epochs -1: must be from 0 to below --epochs 4, or"),
        (("--warmup-epochs", "10"), "--warmup-epochs 10: must be from 0 to below --epochs 4, or"),
    ],
)
def test_bad_input_is_one_sentence(
    home: Path, tmp_path: Path, change: tuple[str, str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        evaluate(home, tmp_path, *change)


def test_bad_input_ends_the_command_with_two(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments_ = arguments(home, "--train", str(home))
    monkeypatch.setattr(sys, "argv", ["linprobe.py", *arguments_])
    # The command leaves the ranks at its end; other tests of this process are still in them.
    monkeypatch.setattr("eval.shared.cli.dist.is_initialized", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        run_command(linprobe.main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(
        f"error: {home}: holds folders of shards; give one of them"
    )
