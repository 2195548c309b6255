"""The k-NN vote against a plain loop, and the same result on two ranks."""

import json
import math
from pathlib import Path

import pytest
import torch
from eval_helpers import ALONE, coloured_images, on_two_ranks, write_encoder, write_shards

from eval import knn
from pipeline.distributed import Ranks
from pipeline.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("knn")
    write_shards(folder / "train", *coloured_images(70, 6, seed=1))
    write_shards(folder / "val", *coloured_images(37, 6, seed=2))
    write_encoder(folder / "run")
    return folder


def parse(place: Path, *more: str) -> knn.argparse.Namespace:
    common = ["--encoder", place / "run", "--train", place / "train", "--val", place / "val"]
    return knn.build_parser().parse_args([str(v) for v in (*common, "--workers", 0, *more)])


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
        for cosine, of in sorted(cosines, reverse=True)[:k]:
            expected[of] += math.exp((cosine - 1) / 0.07)
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_protocol_and_result(place: Path) -> None:
    args = parse(place)
    assert (args.k, args.temperature, args.feature) == (20, 0.07, "cls")
    result = knn.evaluate(parse(place, "--feature", "mean_patch", "--k", "5"), ALONE)
    assert result["images"] == 37
    assert result["top1"] > 60  # chance is 16.7
    assert result["top5"] >= result["top1"]


def work(ranks: Ranks, place: str) -> None:
    result = knn.evaluate(parse(Path(place)), ranks)
    (Path(place) / f"rank{ranks.rank}.json").write_text(json.dumps(result))


def test_two_ranks_give_the_result_of_one(place: Path) -> None:
    on_two_ranks(work, str(place))
    alone = knn.evaluate(parse(place), ALONE)
    for rank in (0, 1):
        result = json.loads((place / f"rank{rank}.json").read_text())
        assert [result[k] for k in ("top1", "top5", "images", "ranks")] == [
            alone["top1"], alone["top5"], 37, 2,
        ]  # fmt: skip


def test_too_many_neighbours_are_refused(place: Path) -> None:
    with pytest.raises(UserError, match="--k 71: must lie between 1 and 70"):
        knn.evaluate(parse(place, "--k", "71"), ALONE)
