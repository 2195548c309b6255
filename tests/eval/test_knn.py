"""The k-NN vote against a plain loop, and the same result on two ranks."""

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from eval_helpers import (
    ALONE,
    coloured_images,
    on_ranks,
    on_two_ranks,
    spoil_encoder,
    write_encoder,
    write_shards,
)

from eval import knn
from eval.shared.options import settings_of
from eval.shared.session import EvalSession, session_of
from pipeline.distributed import Ranks
from pipeline.errors import UserError
from pipeline.runtime.same_run import data_identity
from shard_tools.manifest import read_manifest


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("knn")
    write_shards(folder / "train", *coloured_images(70, 6, seed=1))
    write_shards(folder / "val", *coloured_images(37, 6, seed=2))
    write_encoder(folder / "run")
    return folder


def parse(home: Path, *more: str) -> knn.argparse.Namespace:
    common = ["--encoder", home / "run", "--train", home / "train", "--val", home / "val"]
    return knn.build_parser().parse_args([str(v) for v in (*common, "--workers", 0, *more)])


def test_a_result_that_another_command_wrote_meanwhile_is_not_replaced(
    home, tmp_path, monkeypatch, capsys
):
    output, voted = tmp_path / "knn.json", knn.evaluate
    mine, other = (parse(home, "--k", k, "--output", str(output)) for k in ("3", "5"))

    def slow(settings: knn.Settings, session: EvalSession) -> dict:
        result = voted(settings, session)
        if not output.exists():
            theirs = voted(settings_of(knn.Settings, other), session)
            output.write_text(json.dumps(theirs))
        return result

    monkeypatch.setattr(knn, "evaluate", slow)
    monkeypatch.setattr(knn, "build_parser", lambda: Namespace(parse_args=lambda: mine))
    with pytest.raises(UserError, match=r"holds a result with another k \(5, now 3\)"):
        knn.main()
    assert json.loads(output.read_text())["settings"]["k"] == 5
    lost = capsys.readouterr().out.partition("not written: ")[2]
    assert json.loads(lost)["settings"]["k"] == 3
    output.unlink()
    other = mine  # the same settings twice are one result
    knn.main()
    assert json.loads(output.read_text())["settings"]["k"] == 3


def evaluate(home: Path, *more: str, ranks: Ranks = ALONE) -> dict:
    args = parse(home, *more)
    return knn.evaluate(settings_of(knn.Settings, args), session_of(args, ranks, args.feature))


@pytest.mark.parametrize("k", [1, 3, 7])
def test_vote_is_the_plain_sum(k: int) -> None:
    torch.manual_seed(k)
    query, feature, label = torch.randn(5, 4), torch.randn(9, 4), torch.randint(0, 3, (9,))
    votes = knn.vote(query, feature, label, 3, k=k, temperature=0.07)
    for row, q in zip(votes.tolist(), query.double().tolist(), strict=True):
        cosines = []
        for number, f in enumerate(feature.double().tolist()):
            dot = sum(a * b for a, b in zip(q, f, strict=True))
            cosines.append((dot / math.hypot(*q) / math.hypot(*f), int(label[number])))
        expected = [0.0, 0.0, 0.0]
        best = max(cosines)[0]
        for cosine, of in sorted(cosines, reverse=True)[:k]:
            expected[of] += math.exp((cosine - best) / 0.07)
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (9, 0.07), (9, 0.5), (40, 2.0)])
def test_the_accuracy_is_that_of_a_plain_loop(home, monkeypatch, k, temperature) -> None:
    generator = torch.Generator().manual_seed(0)
    label, truth = torch.arange(70) % 6, torch.arange(37) % 6
    centre = torch.randn(6, 5, generator=generator)
    feature = centre[label] + 1.5 * torch.randn(70, 5, generator=generator)
    query = centre[truth] + 1.5 * torch.randn(37, 5, generator=generator)
    sets = {str(home / "train"): (feature, label), str(home / "val"): (query, truth)}
    monkeypatch.setattr(EvalSession, "extract", lambda _, folder, *__: sets[str(folder)])
    first = fifth = 0
    for q, right in zip(query.double(), truth.tolist(), strict=True):
        near = [(float(q @ f / q.norm() / f.norm()), int(n))
                for f, n in zip(feature.double(), label, strict=True)]  # fmt: skip
        votes = dict.fromkeys(range(6), 0.0)
        for cosine, of in sorted(near, reverse=True)[:k]:
            votes[of] += math.exp(cosine / temperature)
        order = [of for of in sorted(votes, key=lambda of: -votes[of]) if votes[of] > 0]
        first += order[0] == right
        fifth += right in order[:5]
    result = evaluate(home, "--k", str(k), "--temperature", str(temperature))
    assert (result["top1"], result["top5"]) == (round(first / 0.37, 3), round(fifth / 0.37, 3))
    assert result["content"] == {
        part: data_identity(read_manifest(home / part))[:12] for part in ("train", "val")
    }


def test_the_nearest_decides_at_any_temperature() -> None:
    feature, label = torch.tensor([[0.0, 1.0], [0.5, 1.0]]), torch.tensor([1, 2])
    votes = knn.vote(torch.tensor([[1.0, 0.0]]), feature, label, 3, k=2, temperature=1e-4)
    assert votes.tolist() == [[0, 0, 1]]


def test_a_class_without_a_vote_is_no_answer(home: Path, tmp_path: Path) -> None:
    image, label = coloured_images(37, 6, seed=2)
    write_shards(tmp_path / "val", image, (label + 1) % 6)  # so that the nearest is wrong
    result = evaluate(home, "--k", "1", "--val", str(tmp_path / "val"))
    assert (result["top1"], result["top5"]) == (0, 0)


def test_protocol_and_result(home: Path) -> None:
    args = parse(home)
    assert (args.k, args.temperature, args.feature) == (20, 0.07, "cls")
    result = evaluate(home, "--feature", "mean_patch", "--k", "5")
    assert result["images"] == 37
    assert result["top1"] > 60  # chance is 16.7
    assert result["top5"] >= result["top1"]


def work(ranks: Ranks, home: str) -> None:
    result = evaluate(Path(home), ranks=ranks)
    (Path(home) / f"rank{ranks.rank}.json").write_text(json.dumps(result))


def test_two_ranks_give_the_result_of_one(home: Path) -> None:
    on_two_ranks(work, str(home))
    alone = evaluate(home)
    for rank in (0, 1):
        result = json.loads((home / f"rank{rank}.json").read_text())
        assert [result[k] for k in ("top1", "top5", "images", "ranks")] == [
            alone["top1"], alone["top5"], 37, 2,
        ]  # fmt: skip


def test_ranks_may_be_more_than_the_images(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "home")
    shutil.rmtree(tmp_path / "home/val")
    write_shards(tmp_path / "home/val", *coloured_images(1, 1, seed=2), classes=6)
    on_ranks(3, work, str(tmp_path / "home"))
    alone = evaluate(tmp_path / "home")
    for rank in range(3):
        result = json.loads((tmp_path / f"home/rank{rank}.json").read_text())
        assert [result["top1"], result["images"]] == [alone["top1"], 1]


def test_features_that_are_not_finite_have_no_accuracy(home: Path, tmp_path: Path) -> None:
    spoil_encoder(home / "run", tmp_path / "run")
    with pytest.raises(UserError, match="train: the encoder's features of it are not finite"):
        evaluate(home, "--encoder", str(tmp_path / "run"))


def test_too_many_neighbours_are_refused(home: Path) -> None:
    with pytest.raises(UserError, match="--k 71: must be between 1 and 70"):
        evaluate(home, "--k", "71")
    for words, bound in (("--temperature 0", "above 0"), ("--micro-batch 0", "at least 1")):
        with pytest.raises(UserError, match=f"{words}: must be {bound}"):
            evaluate(home, *words.split())
