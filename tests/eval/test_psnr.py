"""PSNR against plain loops, at any number of ranks; picture grids show what they name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_helpers import ALONE, MEAN, STD, coloured_images, on_two_ranks, write_shards
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_recipe

from eval import psnr, reconstruct
from eval.shared.command import run_command
from eval.shared.options import settings_of
from pipeline.config.recipe import RECIPES, dump_recipe
from pipeline.data.loader import eval_loader
from pipeline.distributed import Ranks
from pipeline.errors import UserError
from pipeline.method.objective import build_objective
from pipeline.weights.interop import to_mae
from pipeline.weights.reconstructor import load_reconstructor


def write_run(folder: Path, name: str, *overrides: str, blind: bool = False) -> Path:
    """A run folder with initial weights; blind: its decoder predicts zero everywhere."""
    recipe = tiny_recipe(name, *overrides)
    objective, _ = build_objective(recipe)
    state = {k: v.clone().contiguous() for k, v in objective.state_dict().items()}
    if blind:
        for key in ("weight", "bias"):
            state[f"measure.decoder.head.{key}"].zero_()
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    save_file(state, folder / "model.safetensors")
    torch.save({"model": to_mae(objective)}, folder / "mae.pth") if name == "mae" else None
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("psnr")
    write_shards(folder / "val", *coloured_images(21, 3, seed=2))
    write_run(folder / "mae", "mae")
    write_run(folder / "blind", "mae", blind=True)
    write_run(folder / "plain", "rmae", "measure.norm_pix=false", blind=True)
    write_run(folder / "cmae", "cmae")
    return folder


def parse(home, run, *more):
    words = ["--encoder", home / run, "--val", home / "val", "--workers", "0", *more]
    return psnr.build_parser().parse_args([str(word) for word in words])


def evaluate(home, run, *more, ranks=ALONE):
    return psnr.evaluate(settings_of(psnr.Settings, parse(home, run, *more)), ranks)


def plain_psnr(home, run, guess):
    """(hidden, image) by loops over patches; guess(original patch, 0 … 1) → predicted patch."""
    model = load_reconstructor(home / run)
    batch = next(iter(eval_loader(home / "val", batch_size=21, rank=0, world=1, image_size=16,
                                  workers=0)))  # fmt: skip
    visible, _ = model.mask(batch.sample, 0.75, 0)
    figures = []
    for image, shown in zip(batch.image.double().numpy() / 255, visible.tolist(), strict=True):
        errors = []
        for p in range(16):
            r, c = 4 * (p // 4), 4 * (p % 4)
            cut = image[r : r + 4, c : c + 4]
            if p not in shown:
                errors.append(np.square(np.clip(guess(cut), 0, 1) - cut).mean())
        assert len(errors) == 12
        figures.append([-10 * np.log10(np.mean(errors)), -10 * np.log10(np.sum(errors) / 16)])
    return np.mean(figures, axis=0)


def mean_colour(patch):
    """A patch is normalised by one mean over all its values, after the channels' own."""
    mean, std = np.array(MEAN), np.array(STD)
    return ((patch - mean) / std).mean() * std + mean


def test_true_statistics_give_a_blind_decoder_the_means_of_the_patches(home):
    result = evaluate(home, "blind")
    hidden, image = plain_psnr(home, "blind", mean_colour)
    assert result["hidden"] == pytest.approx(hidden, abs=1e-3)
    assert result["image"] == pytest.approx(image, abs=1e-3)
    assert result["images"] == 21
    assert result["content"].keys() == {"val"}
    assert "true mean and deviation" in result["statistics"]


def test_without_norm_pix_nothing_is_given_back(home):
    """Zero is then the data set's mean colour, whatever the patch."""
    result = evaluate(home, "plain")
    expected = plain_psnr(home, "plain", lambda patch: np.array(MEAN))
    assert [result["hidden"], result["image"]] == pytest.approx(expected, abs=1e-3)
    assert "as they are" in result["statistics"]


def test_predictions_that_are_not_finite_have_no_psnr_and_no_picture(home):
    state = load_file(home / "mae/model.safetensors")
    state["measure.decoder.head.bias"][0] = float("nan")
    (home / "lost").mkdir()
    (home / "lost/recipe.yaml").write_text((home / "mae/recipe.yaml").read_text())
    save_file(state, home / "lost/model.safetensors")
    with pytest.raises(UserError, match="lost: its predictions are not finite"):
        evaluate(home, "lost")
    model, image = load_reconstructor(home / "lost"), torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(UserError, match="lost: its predictions are not finite"):
        reconstruct.draw(model, image, torch.arange(1), 0.75, seed=0)


def test_predictions_are_clipped_and_perfect_ones_are_finite():
    image = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    inverse = torch.tensor([[0, 1, 2, 3]])  # two visible, two hidden, patch 2
    far = torch.full((1, 4, 4, 3), -9.0)
    assert psnr.squared_errors(image, far, inverse, 2, 2).tolist() == [[0, 0]]
    far[0, 2:, :2] = 0.5  # patch 2: one of two hidden ones
    assert psnr.squared_errors(image, far, inverse, 2, 2).tolist() == [[0.125, 0.0625]]
    assert psnr.decibel(torch.tensor(0.0)).item() == pytest.approx(100)


def work(ranks: Ranks, home: str) -> None:
    result = evaluate(Path(home), "mae", "--micro-batch", "4", ranks=ranks)
    (Path(home) / f"{ranks.rank}.json").write_text(json.dumps(result))


def test_ranks_batches_and_layouts_change_nothing(home):
    alone = evaluate(home, "mae")
    on_two_ranks(work, str(home))
    results = [json.loads((home / f"{rank}.json").read_text()) for rank in (0, 1)]
    words = ["--recipe", str(RECIPES / "mae.yaml")]
    for line in (home / "mae/recipe.yaml").read_text().splitlines():
        key, _, value = line.partition(": ")
        words += ["--set", f"{key}={value}"] if key == "batch_size" else []
    words += ["--set", "encoder.arch=vit_tiny_patch16_224", "--set", "encoder.image_size=16"]
    options = "{patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}"
    words += ["--set", f"encoder.options={options}", "--set", "data.partitions=4"]
    words += ["--set", "measure.decoder={width: 8, depth: 1, heads: 2}"]
    results.append(evaluate(home, "mae/mae.pth", *words))
    for result in results:
        assert result["images"] == 21
        assert result["image"] == pytest.approx(alone["image"], abs=2e-4)
        assert result["hidden"] == pytest.approx(alone["hidden"], abs=2e-4)


def test_the_grid_has_its_four_columns_and_says_what_it_shows(home, tmp_path, monkeypatch, capsys):
    output = tmp_path / "grid.png"
    words = ["--encoder", home / "mae", "--data", home / "val", "--images", 3, "--output", output]
    monkeypatch.setattr("sys.argv", ["reconstruct.py", *map(str, words)])
    run_command(reconstruct.main)
    printed = capsys.readouterr().out
    assert "3 images, original | masked | reconstruction | reconstruction + visible; " in printed
    assert "true mean and deviation" in printed
    model = load_reconstructor(home / "mae")
    batch = next(iter(eval_loader(home / "val", batch_size=3, rank=0, world=1, image_size=16,
                                  workers=0)))  # fmt: skip
    visible, inverse = model.mask(batch.sample, 0.75, 0)
    masked, whole, pasted = model.pictures(batch.image, visible, inverse)
    sheet = np.asarray(Image.open(output))
    side = reconstruct.SMALLEST
    for row in range(3):
        top = reconstruct.LINE + row * (side + reconstruct.MARGIN)
        for column, pictures in enumerate((batch.image, masked, whole, pasted)):
            left = reconstruct.MARGIN + column * (side + reconstruct.MARGIN)
            cut = sheet[top : top + side : 7, left : left + side : 7]
            assert np.array_equal(cut, pictures[row].numpy()), (row, column)
    seen = (batch.image == pasted).all(-1)
    assert seen.float().mean() > 0.24


def test_pictures_from_files(home, tmp_path):
    Image.fromarray(coloured_images(1, 1, seed=0)[0][0]).save(tmp_path / "a.jpg")
    words = ["--encoder", home / "plain", "--files", tmp_path / "a.jpg", "--output", "x.png"]
    args = reconstruct.build_parser().parse_args(list(map(str, words)))
    model = load_reconstructor(args.encoder)
    images = reconstruct.read_files(args.files, model.size)
    sheet, note = reconstruct.draw(model, *images, 0.75, args.seed)
    assert sheet.height == 3 * reconstruct.LINE + reconstruct.SMALLEST + reconstruct.MARGIN
    assert note == "75% masked; pixels as predicted"
    chosen = (reconstruct.COLUMNS[3], reconstruct.COLUMNS[0])
    fewer, _ = reconstruct.draw(model, *images, 0.75, args.seed, chosen)
    whole, part = np.asarray(sheet), np.asarray(fewer)
    step = reconstruct.SMALLEST + reconstruct.MARGIN
    rows = slice(reconstruct.LINE, reconstruct.LINE + reconstruct.SMALLEST)
    assert part.shape[1] == 2 * step + reconstruct.MARGIN
    for column, number in enumerate((3, 0)):
        mine, theirs = column * step, number * step
        assert np.array_equal(part[rows, mine : mine + step], whole[rows, theirs : theirs + step])


def test_a_file_that_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    for name, fault in (("a.png", "a.png will not decode"), ("none.png", "none.png: cannot be r")):
        with pytest.raises(UserError, match=fault):
            reconstruct.read_files([str(tmp_path / name)], 16)


def test_files_are_read_as_training_reads_them(tmp_path):
    """16 bits and floats have no scale; transparency none either."""
    gray = np.full((20, 20), 40_000, np.uint16)
    Image.fromarray(gray).save(tmp_path / "deep.png")
    Image.fromarray(gray.astype(np.float32)).save(tmp_path / "float.tiff")
    Image.new("RGBA", (20, 20), (9, 9, 9, 99)).save(tmp_path / "glass.png")
    for name in ("deep.png", "float.tiff", "glass.png"):
        with pytest.raises(UserError, match=f"{name} will not decode"):
            reconstruct.read_files([str(tmp_path / name)], 16)


def test_no_input_is_written_over(tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (20, 20)).save(picture)
    for words, fault in (
        (["--output", f"{tmp_path}/../{tmp_path.name}/a.png"], "a.png: is one of --files"),
        (["--output", "b.png", "--columns", "original", "original"], "names one twice"),
    ):
        words = ["--encoder", "x", "--files", str(picture), *words]
        with pytest.raises(UserError, match=fault):
            reconstruct.prepare(reconstruct.build_parser().parse_args(words))


def test_other_masks_and_sizes_have_results_of_their_own(home):
    names = {}
    for words in ((), ("--mask-ratio", "0.25"), ("--resize", "20")):
        words = ["--encoder", str(home / "plain"), "--val", str(home / "val"), *words]
        names[words[-1]] = psnr.prepare(psnr.build_parser().parse_args(words))[1].name
    expected = ["psnr.json", "psnr-mask0.25.json", "psnr-resize20.json"]
    assert list(names.values()) == expected


def test_a_result_of_other_settings_is_not_replaced(home, tmp_path):
    output = tmp_path / "psnr.json"
    output.write_text(json.dumps(evaluate(home, "plain")))
    psnr.prepare(parse(home, "plain", "--output", output, "--mask-ratio", "0.75"))
    for run, words, said in (
        ("plain", ("--mask-ratio", "0.5"), r"mask_ratio \(0.75, now 0.5\)"),
        ("plain", ("--seed", "1"), r"seed \(0, now 1\)"),
        ("mae", (), "encoder"),
    ):
        with pytest.raises(UserError, match=f"holds a result with another {said}.*; remove it"):
            psnr.prepare(parse(home, run, "--output", output, *words))


@pytest.mark.parametrize(
    ("run", "more", "sentence"),
    [
        ("cmae", [], "its measure is infonce: no decoder"),
        ("nowhere", [], "nowhere"),
        ("mae/mae.pth", [], "needs --recipe"),
        ("mae/recipe.yaml", ["--recipe", str(RECIPES / "mae_vits.yaml")], "cannot be read"),
        ("mae", ["--micro-batch", "0"], "--micro-batch 0: must be at least 1"),
        ("mae", ["--mask-ratio", "1"], "--mask-ratio 1.0: must leave some of the 16 patches"),
    ],
)
def test_bad_input_is_one_sentence(home, run, more, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluate(home, run, *more)
