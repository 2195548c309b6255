"""CKA against exact oracles: the U-statistic by loops, and the full set as one batch."""

import itertools
import json
from pathlib import Path

import numpy as np
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
from torch import Tensor

from eval import cka
from eval.shared.options import settings_of
from eval.shared.session import session_of
from pipeline.distributed import Ranks
from pipeline.errors import UserError

COUNT = 48


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cka")
    write_shards(folder / "val", *coloured_images(COUNT, 6, seed=2))
    write_encoder(folder / "run")
    return folder


def parse(home: Path, *more: str) -> cka.argparse.Namespace:
    common = ["--encoder", home / "run", "--val", home / "val", "--workers", 0]
    return cka.build_parser().parse_args([str(v) for v in (*common, *more)])


def evaluate(home: Path, *more: str, ranks: Ranks = ALONE) -> dict:
    args = parse(home, *more)
    return cka.evaluate(settings_of(cka.Settings, args), session_of(args, ranks))


def test_defaults_are_those_of_the_figure(home: Path) -> None:
    s = settings_of(cka.Settings, parse(home))
    assert s.mask_ratios == pytest.approx((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
    assert (s.pool, s.hsic, s.batch_size, s.images) == ("kept-in-both", "unbiased", 256, 0)


def by_loops(first: Tensor, second: Tensor) -> float:
    """Unbiased HSIC as a U-statistic: the mean over all ordered quadruples of distinct images."""
    k, m = (first @ first.T).tolist(), (second @ second.T).tolist()
    quadruples = list(itertools.permutations(range(len(k)), 4))
    total = sum(k[a][b] * (m[a][b] + m[c][d] - 2 * m[a][c]) for a, b, c, d in quadruples)
    return total / len(quadruples)


def test_hsic_is_the_u_statistic() -> None:
    torch.manual_seed(0)
    first = torch.randn(7, 3, dtype=torch.float64) + 5
    second = torch.randn(7, 4, dtype=torch.float64) - 3
    for a, b in ((first, second), (first, first), (second, second)):
        assert cka.hsic(cka.gram(a), cka.gram(b)).item() == pytest.approx(by_loops(a, b), rel=1e-9)


def test_hsic_is_unbiased_and_cka_is_one_for_equal_features() -> None:
    torch.manual_seed(1)
    independent = torch.randn(4000, 8, 5), torch.randn(4000, 8, 5)
    values = cka.hsic(cka.gram(independent[0]), cka.gram(independent[1]))
    assert abs(values.mean()) < 4 * values.std() / 4000**0.5
    x = torch.randn(20, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    k, m = cka.gram(x), cka.gram(3 * x @ rotation + 1)  # CKA ignores rotation, scale and mean
    assert (cka.hsic(k, m) / (cka.hsic(k, k) * cka.hsic(m, m)).sqrt()).item() == pytest.approx(1)


def plain_cka(first: Tensor, second: Tensor) -> float:
    """Unbiased CKA of two feature sets by U-centring (Szekely and Rizzo 2014)."""

    def centred(feature: Tensor) -> Tensor:
        k = feature.double() @ feature.double().T
        n = len(k)
        k.fill_diagonal_(0)
        k = k - k.sum(0) / (n - 2) - k.sum(1)[:, None] / (n - 2) + k.sum() / ((n - 1) * (n - 2))
        return k.fill_diagonal_(0)

    a, b = centred(first), centred(second)
    return float((a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt())


def biased_cka(first: Tensor, second: Tensor) -> float:
    """Biased CKA by its published form: tr(K H L H) with H = 1 - 11'/n (Kornblith et al. 2019)."""
    n = len(first)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    k, m = (centre @ (x.double() @ x.double().T) @ centre for x in (first, second))
    return float((k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt())


ORACLES = {"unbiased": plain_cka, "biased": biased_cka}


def pooled(tokens: Tensor, pool: str, kept: Tensor, full: bool) -> Tensor:
    """Features by a plain loop over the images, of [b, 1 + L, D]."""
    if pool == "cls":
        return tokens[:, 0]
    if pool == "all-kept" or not full:
        return tokens[:, 1:].mean(1)
    return torch.stack([image[1:][rows].mean(0) for image, rows in zip(tokens, kept, strict=True)])


def test_the_biased_estimator_is_a_trace_and_its_bias_is_that_of_small_batches() -> None:
    torch.manual_seed(3)
    first, second = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    k, m = (first + 4) @ (first + 4).T, (second - 2) @ (second - 2).T  # not centred
    centre = torch.eye(6, dtype=torch.float64) - 1 / 6
    expected = torch.trace(k @ centre @ m @ centre) / 25
    assert cka.biased_hsic(k, m).item() == pytest.approx(expected.item(), rel=1e-12)
    independent = torch.randn(500, 8, 5), torch.randn(500, 8, 5)
    grams = [cka.gram(x) for x in independent]
    assert cka.biased_hsic(*grams).mean() > 1
    assert abs(cka.hsic(*grams).mean()) < 0.3


@pytest.mark.parametrize("hsic", ["unbiased", "biased"])
@pytest.mark.parametrize("pool", ["kept-in-both", "all-kept", "cls"])
def test_one_batch_of_everything_is_the_exact_value(home: Path, pool: str, hsic: str) -> None:
    words = ("--pool", pool, "--hsic", hsic, "--batch-size", COUNT, "--mask-ratios", 0.3, 0.8)
    result = evaluate(home, *words)
    assert result["content"].keys() == {"val"}
    assert (result["pool"], result["hsic"]) == (pool, hsic)
    assert {"pool": pool, "hsic": hsic, "cka": result["cka"]} in result["variants"]
    assert len({(v["pool"], v["hsic"]) for v in result["variants"]}) == 6
    session = session_of(parse(home, *words), ALONE)
    vit = session.vit
    batch = next(iter(session.loader(home / "val", COUNT)))
    pixels = session.normalise(batch.image)
    seen: list[Tensor] = []
    for block in vit.blocks:  # what timm's own forward computes, seen from outside
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        vit(pixels)
        full = list(seen)
        for row, ratio in enumerate((0.3, 0.8)):
            kept = cka.kept_patches(batch.sample, 16, ratio, 0)
            part = cka.block_features(vit, pixels, kept)
            for number in range(2):
                x, y = (pooled(t[number], pool, kept, t is full) for t in (full, part))
                assert result["cka"][row][number] == pytest.approx(ORACLES[hsic](x, y), abs=2e-5)


def test_dropped_patches_do_not_reach_the_encoder(home: Path) -> None:
    vit = session_of(parse(home), ALONE).vit
    torch.manual_seed(0)
    pixels, sample = torch.randn(3, 3, 16, 16), torch.tensor([4, 9, 11])
    kept = cka.kept_patches(sample, 16, 0.7, seed=0)
    assert kept.shape == (3, 16 - 11)
    again = cka.kept_patches(sample.flip(0), 16, 0.7, seed=0).flip(0)
    assert torch.equal(kept, again)  # by sample, not by position in the batch
    hidden = torch.ones(3, 16, dtype=torch.bool).scatter_(1, kept, False)
    grid = hidden.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(grid, torch.randn_like(pixels), pixels)
    with torch.no_grad():
        for a, b in zip(
            cka.block_features(vit, pixels, kept),
            cka.block_features(vit, other, kept),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
        everything = torch.arange(16).expand(3, 16)
        for a, b in zip(
            cka.block_features(vit, pixels, everything),
            cka.block_features(vit, pixels, None),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def work(ranks: Ranks, home: str) -> None:
    result = evaluate(Path(home), "--batch-size", 16, ranks=ranks)
    (Path(home) / f"rank{ranks.rank}.json").write_text(json.dumps(result))


def test_minibatches_on_two_ranks_give_the_value_of_one(home: Path) -> None:
    on_two_ranks(work, str(home))
    alone = evaluate(home, "--batch-size", 16)
    exact = evaluate(home, "--batch-size", COUNT)
    assert alone["ratios"] == pytest.approx([n / 10 for n in range(1, 10)])
    for rank in (0, 1):
        result = json.loads((home / f"rank{rank}.json").read_text())
        torch.testing.assert_close(torch.tensor(result["cka"]), torch.tensor(alone["cka"]))
    error = (torch.tensor(alone["cka"]) - torch.tensor(exact["cka"])).abs()
    assert error.max() < 0.15  # an estimate from 3 batches of 16


def test_another_seed_drops_other_patches(home: Path, tmp_path: Path) -> None:
    """Of noise, whose patches are unlike; those of one colour have a CKA of 1 whatever is kept."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 20, 3)).astype(np.uint8)
    write_shards(tmp_path / "val", noise, np.arange(16) % 2)
    words = ("--val", tmp_path / "val", "--batch-size", 16, "--mask-ratios", 0.5)
    found = [evaluate(home, *words, "--seed", n)["cka"] for n in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_bad_input_is_one_sentence(home: Path) -> None:
    with pytest.raises(UserError, match="--batch-size 3: must be at least 4"):
        evaluate(home, "--batch-size", 3)
    with pytest.raises(UserError, match="has 48 images, fewer than --batch-size 64"):
        evaluate(home, "--batch-size", 64)
    with pytest.raises(UserError, match="--images 8 are fewer than --batch-size 16"):
        evaluate(home, "--batch-size", 16, "--images", 8)
    with pytest.raises(UserError, match=r"--mask-ratios 0 0.5: each must be above 0 and below 1"):
        evaluate(home, "--batch-size", 16, "--mask-ratios", 0.0, 0.5)
    with pytest.raises(UserError, match=r"--mask-ratios 0.99: leaves none of 16 patches"):
        evaluate(home, "--batch-size", 16, "--mask-ratios", 0.5, 0.99)
    spoil_encoder(home / "run", home / "spoilt")
    with pytest.raises(UserError, match="features of the encoder are not finite"):
        evaluate(home, "--batch-size", 16, "--encoder", home / "spoilt")
