"""The attentive probe: its equation as a plain loop, what it finds that a mean loses, and ranks."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from eval_helpers import (
    ALONE,
    coloured_images,
    on_two_ranks,
    spoil_encoder,
    write_encoder,
    write_shards,
)

from eval import attentive
from eval.attentive import AttentiveProbe, Heads, Settings
from eval.shared.options import settings_of
from eval.shared.session import EvalSession, session_of
from pipeline.distributed import Ranks
from pipeline.errors import UserError
from shard_tools.manifest import read_manifest

SHORT = ("--steps", "30", "--batch-size", "16", "--workers", "0", "--rates", "1e-3", "1e-2",
         "--decays", "0")  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run with an encoder of random weights, and shards of coloured images."""
    folder = tmp_path_factory.mktemp("attentive")
    write_encoder(folder / "run")
    write_shards(folder / "train", *coloured_images(60, 3, seed=1))
    write_shards(folder / "val", *coloured_images(21, 3, seed=2))
    return folder


def parse(home: Path, *words: object):
    names = ["--encoder", home / "run", "--train", home / "train", "--val", home / "val"]
    return attentive.build_parser().parse_args([str(w) for w in (*names, *SHORT, *words)])


def evaluate(home: Path, folder: Path, *words: object, ranks: Ranks = ALONE) -> dict:
    args = parse(home, *words)
    return attentive.evaluate(settings_of(Settings, args), session_of(args, ranks), folder)


def plain(probe: AttentiveProbe, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of one image, [L, D] → [classes], head by head and token by token."""
    width = tokens.shape[1]
    size = width // probe.heads
    kv = tokens @ probe.kv.weight.T + probe.kv.bias
    pooled = []
    for head in range(probe.heads):
        channels = slice(head * size, (head + 1) * size)
        query, key, value = probe.query[channels], kv[:, :width], kv[:, width:]
        scores = [query @ token[channels] / math.sqrt(size) for token in key]
        total = sum(torch.exp(score) for score in scores)
        parts = zip(scores, value, strict=True)
        pooled.append(sum(torch.exp(score) / total * token[channels] for score, token in parts))
    return probe.head.weight @ torch.cat(pooled) + probe.head.bias


@pytest.mark.parametrize(("width", "heads"), [(128, 2), (48, 1)])
def test_logits_and_gradients_are_those_of_the_plain_loop(width, heads):
    torch.manual_seed(0)
    probe = AttentiveProbe(width, 5).double()
    assert probe.heads == heads
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.normal_(std=0.3)
    tokens, label = torch.randn(3, 7, width, dtype=torch.float64), torch.tensor([1, 4, 0])
    loops = torch.stack([plain(probe, image) for image in tokens])
    logits = probe(tokens)
    torch.testing.assert_close(logits, loops)
    names = [name for name, _ in probe.named_parameters()]
    ours, theirs = (
        torch.autograd.grad(torch.nn.functional.cross_entropy(x, label), list(probe.parameters()))
        for x in (logits, loops)
    )
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert a.abs().max() > 0, name
        torch.testing.assert_close(a, b, msg=name)


def test_weights_start_small_and_biases_at_zero():
    torch.manual_seed(0)
    probe = AttentiveProbe(384, 50)
    for weight in (probe.query, probe.kv.weight, probe.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not probe.kv.bias.any()
    assert not probe.head.bias.any()


def test_schedule_against_its_formula():
    rates = [attentive.learning_rate(2.0, step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90))
    assert attentive.learning_rate(2.0, 0, 1, 0.0) == 2.0


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1, 7)])
def test_micro_batches_add_up_to_the_mean_loss_of_the_batch(sizes):
    s = Settings("", "", batch_size=8, steps=4, rates=(1e-3,), decays=(0.0,))
    heads = Heads(16, 3, s, torch.device("cpu"))
    torch.manual_seed(0)
    tokens, label = torch.randn(8, 4, 16), torch.arange(8) % 3
    expected = torch.nn.functional.cross_entropy(heads.probes[0](tokens), label)
    (slope,) = torch.autograd.grad(expected, heads.probes[0].head.weight)
    micro = zip(tokens.split(sizes), label.split(sizes), strict=True)
    torch.testing.assert_close(heads.step(0, micro, ALONE)[0], expected.detach())
    torch.testing.assert_close(heads.probes[0].head.weight.grad, slope)


def test_a_step_is_adamws_with_the_pairs_rate_and_decay_and_the_sum_over_ranks():
    """First steps of warm-up by the published formula, on two ranks that have the same images."""

    class Twice:
        device = torch.device("cpu")

        def sum(self, value: torch.Tensor) -> torch.Tensor:
            return 2 * value

    s = Settings("", "", batch_size=8, steps=20, warmup=0.2, rates=(0.01, 0.1), decays=(0.0, 0.5))
    heads = Heads(16, 3, s, torch.device("cpu"))
    torch.manual_seed(0)
    tokens, label = torch.randn(4, 4, 16), torch.arange(4) % 3
    first = heads.probes[0].head.weight.detach().double()
    theirs = [(first.clone(), torch.zeros_like(first), torch.zeros_like(first)) for _ in s.pairs]
    for step in range(3):
        slopes = []
        for probe in heads.probes:  # the mean of the global batch, which has each image twice
            loss = torch.nn.functional.cross_entropy(probe(tokens), label)
            slopes.append(torch.autograd.grad(loss, probe.head.weight)[0].double())
        heads.step(step, [(tokens, label)], Twice())
        for number, ((peak, decay), slope) in enumerate(zip(s.pairs, slopes, strict=True)):
            w, m, v = theirs[number]
            rate = peak * (step + 1) / 4
            m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
            ahead = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            w = w - rate * decay * w - rate * ahead
            theirs[number] = (w, m, v)
            weight = heads.probes[number].head.weight
            torch.testing.assert_close(weight.detach().double(), w, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(weight.grad.double(), slope, rtol=1e-4, atol=1e-6)


def test_training_crops_are_those_of_supervised_training(home, monkeypatch):
    class Asked(Exception):
        pass

    def ask(config, *_):
        assert (config.crop.scale, config.crop.flip) == ((0.08, 1.0), True)
        raise Asked

    monkeypatch.setattr(attentive, "train_loader", ask)
    args = parse(home)
    with pytest.raises(Asked):
        next(
            attentive.training_tokens(session_of(args, ALONE), settings_of(Settings, args), "here")
        )


def test_a_tenth_of_the_images_is_held_out():
    assert [attentive.held_out_count(n) for n in (3, 94, 96, 1000)] == [1, 9, 10, 100]


def test_it_finds_what_a_mean_of_the_patches_loses():
    """One token in sixteen has the label; the others are noise of three times its size."""
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, (2048,), generator=generator)
    tokens = 0.3 * torch.randn(2048, 16, 64, generator=generator)
    tokens[:, :, 0] = 0.0  # the mark of the token that counts
    spot = torch.randint(0, 16, (2048,), generator=generator)
    rows = torch.arange(2048)
    tokens[rows, spot, 0] = 10.0
    tokens[:, :, 1] *= 10
    tokens[rows, spot, 1] = 2.0 * sign - 1
    settings = Settings("", "", steps=300, batch_size=128, rates=(1e-2,), decays=(0.0,))
    heads = Heads(64, 2, settings, torch.device("cpu"))
    for step in range(settings.steps):
        piece = slice(step % 15 * 128, step % 15 * 128 + 128)
        heads.step(step, [(tokens[piece], sign[piece])], ALONE)
    right = heads.probes[0](tokens[1920:]).argmax(1) == sign[1920:]
    mean = tokens.mean(1)
    weight = torch.linalg.lstsq(mean[:1920], (2.0 * sign[:1920] - 1)[:, None]).solution
    linear = (mean[1920:] @ weight)[:, 0].sign() == 2.0 * sign[1920:] - 1
    assert right.float().mean() > 0.95
    assert linear.float().mean() < 0.75


def test_result_names_what_was_chosen_and_how(home):
    result = evaluate(home, home / "out")
    assert result["protocol"] == "attentive-probe"
    assert result["images"] == 21
    assert result["top1"] > 60
    assert result["top1"] == next(
        row["validation"] for row in result["grid"] if row["lr"] == result["lr"]
    )
    best = max(row["selection"] for row in result["grid"])
    assert best == next(r["selection"] for r in result["grid"] if r["lr"] == result["lr"])
    assert result["content"].keys() == {"train", "val"}
    assert result["base_lr_chosen_on"] == "6 images of held-out training images (best of 2)"
    kept, held_out = (
        json.loads(next((home / "out").glob(f"{name}-*/manifest.json")).read_text())
        for name in ("kept", "held-out")
    )
    assert sum(s["samples"] for s in kept["shards"]) == 54
    assert sum(s["samples"] for s in held_out["shards"]) == 6


def test_what_was_stopped_begins_from_the_start(home, tmp_path, monkeypatch):
    """After a kill within the training, as after none: the same grid, no file twice."""
    step = attentive.Heads.step

    def stopped(self, number, micro, ranks):
        if number == 10:
            raise KeyboardInterrupt
        return step(self, number, micro, ranks)

    with monkeypatch.context() as patch:
        patch.setattr(attentive.Heads, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate(home, tmp_path / "x")
    left = sorted(path.relative_to(tmp_path / "x") for path in (tmp_path / "x").rglob("*"))
    again, whole = (evaluate(home, tmp_path / name) for name in ("x", "whole"))
    assert again["grid"] == whole["grid"]
    assert again["train_loss"] == whole["train_loss"]
    assert left == sorted(p.relative_to(tmp_path / "x") for p in (tmp_path / "x").rglob("*"))


def _two(ranks, home, output):
    result = evaluate(Path(home), Path(output) / "probe", ranks=ranks)
    Path(output, f"{ranks.rank}.json").write_text(json.dumps(result["grid"]))


def test_features_of_the_validation_set_that_are_not_finite(home, monkeypatch):
    """As of an encoder that overflows on some images; their answer would be class 0."""
    tokens_of = EvalSession.patch_tokens

    def patch_tokens(self, pixels):
        tokens = tokens_of(self, pixels)
        return tokens.index_fill(0, torch.tensor([0]), math.nan) if len(pixels) == 21 else tokens

    monkeypatch.setattr(EvalSession, "patch_tokens", patch_tokens)
    with pytest.raises(UserError, match=r"val: the encoder's features of it are not finite"):
        evaluate(home, home / "nan", "--micro-batch", "32")


def test_two_ranks_give_the_result_of_one(home, tmp_path):
    on_two_ranks(_two, str(home), str(tmp_path))
    alone = evaluate(home, tmp_path / "alone")
    for rank in range(2):
        grid = json.loads((tmp_path / f"{rank}.json").read_text())
        assert grid == alone["grid"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--steps", "0"), "^--steps 0: must be at least 1"),
        (("--micro-batch", "0"), "^--micro-batch 0: must be at least 1"),
        (("--warmup", "1"), "^--warmup 1: must be"),
        (("--rates", "0"), "^--rates 0: must be above 0"),
        (("--rates", "1e38"), r"^--rates 1e\+38: must be above 0 and at most 1e\+30"),
        (("--decays", "1e7"), r"^--decays 1e\+07: must be at least 0 and at most 1e\+06"),
        (("--batch-size", "64"), "54 training images are fewer than --batch-size"),
        (("--train", "nowhere"), "nowhere: no such folder"),
        (("--rates", "1e30"), "no head of the attentive probe has a finite loss"),
    ],
)
def test_bad_input_is_one_sentence(home, words, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        evaluate(home, tmp_path, *words)


def test_the_largest_rate_and_decay_are_no_overflow(home, tmp_path):
    with pytest.raises(UserError, match="finite loss: lower --rates, or take an encoder with fin"):
        evaluate(home, tmp_path, "--rates", "1e30", "--decays", "1e6", "--steps", "2")


def test_features_that_are_not_finite_are_named_at_once(home, tmp_path, monkeypatch):
    spoil_encoder(home / "run", tmp_path / "spoilt")
    monkeypatch.setattr(Heads, "step", lambda *_: pytest.fail("trained on them"))
    with pytest.raises(UserError, match="train: the encoder's features of it are not finite"):
        evaluate(home, tmp_path / "out", "--encoder", tmp_path / "spoilt")


def parts(train: Path, folder: Path) -> tuple[str, str]:
    return attentive.split(read_manifest(train), folder, 0, ALONE)


def test_what_was_kept_follows_the_data_and_is_made_whole(home, tmp_path):
    before = Path(shutil.copytree(home / "train", tmp_path / "before"))
    kept, held_out = parts(before, tmp_path / "out")
    stamps = [Path(part, "manifest.json").stat().st_mtime_ns for part in (kept, held_out)]
    assert parts(before, tmp_path / "out") == (kept, held_out)
    assert stamps == [Path(p, "manifest.json").stat().st_mtime_ns for p in (kept, held_out)]
    samples = read_manifest(kept).index.tolist()
    after = before.rename(tmp_path / "after")
    parts(after, tmp_path / "out")
    assert read_manifest(kept).folder == str(after)
    for name in ("manifest.json", "index.bin"):
        Path(kept, name).unlink()
        parts(after, tmp_path / "out")
        assert read_manifest(kept).index.tolist() == samples
    Path(kept, "manifest.json").unlink()
    Path(kept, "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.txt: .*; move it, or choose another --output"):
        parts(after, tmp_path / "out")
    assert Path(kept, "mine.txt").read_text() == "mine"


def test_a_pair_that_diverges_has_no_accuracy_and_the_others_keep_theirs(home, tmp_path):
    mixed = evaluate(home, tmp_path, "--rates", "1e30", "1e-2")
    alone = evaluate(home, tmp_path, "--rates", "1e-2")
    assert mixed["grid"][0] == {"lr": 1e30, "weight_decay": 0.0, "diverged": True}
    assert mixed["grid"][1:] == alone["grid"]
    assert mixed["top1"] == alone["top1"]
    assert mixed["base_lr_chosen_on"].endswith("(best of 2, of which 1 diverged)")


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        attentive.build_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    for flag in ("--steps", "--batch-size", "--warmup", "--rates", "--decays", "--select"):
        assert flag in text
