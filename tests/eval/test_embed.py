"""Embeddings: the rows of every kind of source, of ranks and resumed runs; neighbours on a page."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from eval_helpers import (
    ALONE,
    OPTIONS,
    coloured_images,
    on_two_ranks,
    spoil_encoder,
    write_encoder,
    write_shards,
)  # fmt: skip
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file

from eval import embed, retrieve
from eval.shared import embeddings, image_sets
from eval.shared.labels import check_images
from eval.shared.options import settings_of
from eval.shared.session import EvalSession, session_of
from pipeline.distributed import Ranks
from pipeline.errors import UserError

COUNT = 21


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embed")
    image, label = coloured_images(COUNT, 3, seed=1)
    order = np.argsort(label, kind="stable")  # a folder lists class by class
    image, label = image[order], label[order]
    write_shards(folder / "shards", image, label, per_shard=8)
    for number, (pixels, of) in enumerate(zip(image, label, strict=True)):
        path = folder / f"tree/class{of}/{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    lines = [str(p.relative_to(folder)) for p in sorted((folder / "tree").rglob("*.png"))]
    (folder / "list.txt").write_text("\n".join(lines) + "\n\n")
    write_encoder(folder / "run")
    return folder


def session(home: Path, images: str, output: str, *more: str, ranks: Ranks = ALONE) -> tuple:
    common = ["--encoder", home / "run", "--images", home / images, "--workers", 0]
    words = [*common, "--output", home / output, "--micro-batch", 4, *more]
    args = embed.build_parser().parse_args([str(word) for word in words])
    return settings_of(embed.Settings, args), session_of(args, ranks), embed.default_output(args)


def run(home: Path, images: str, output: str, *more: str, ranks: Ranks = ALONE) -> np.ndarray:
    embed.run(*session(home, images, output, *more, ranks=ranks))
    return np.load(home / output / "embeddings.npy", mmap_mode="r")


def pixels_of(home: Path, opened: EvalSession) -> torch.Tensor:
    return torch.cat([pixels for pixels, *_ in opened.batches(home / "shards", 4)])


def test_rows_are_the_features_of_shards_folder_and_list(home: Path) -> None:
    _, opened, _ = session(home, "shards", "unused")
    expected, label = opened.extract(home / "shards", "mean_patch", 4)
    for images in ("shards", "tree", "list.txt"):
        rows = run(home, images, f"out-{images}")
        assert (rows.shape, rows.dtype) == ((COUNT, 32), np.float32)
        np.testing.assert_array_equal(rows, expected.numpy())
    lines = (home / "out-tree/names.txt").read_text().splitlines()
    assert lines[0] == f"class0/000.png\t0\t{home}/tree/class0/000.png"
    assert [int(line.split("\t")[1]) for line in lines] == label.tolist()
    assert (home / "out-shards/names.txt").read_text().splitlines()[9] == (
        f"00000009\t1\t{home}/shards/part-000001.tar"
    )
    assert (home / "out-list.txt/names.txt").read_text().startswith("tree/class0/000.png\t-1\t")


@pytest.mark.parametrize(
    ("feature", "block", "pick"),
    [
        ("cls", 0, lambda t: t[:, 0]),
        ("patches", 0, lambda t: t[:, 1:]),
        ("block:1", 1, lambda t: t[:, 1:].mean(1)),
        ("block:2", 2, lambda t: t[:, 1:].mean(1)),
        ("block:1:cls", 1, lambda t: t[:, 0]),
        ("block:2:patches", 2, lambda t: t[:, 1:]),
    ],
)
def test_each_feature(home: Path, feature: str, block: int, pick) -> None:
    name = f"out-{feature.replace(':', '-')}"
    rows = run(home, "shards", name, "--feature", feature, "--dtype", "float16")
    _, opened, _ = session(home, "shards", "unused")
    vit, x = opened.vit, pixels_of(home, opened)
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    for layer in vit.blocks[: block or len(vit.blocks)]:
        tokens = layer(tokens)
    expected = pick(tokens if block else vit.norm(tokens))
    assert rows.dtype == np.float16
    np.testing.assert_allclose(rows, expected.numpy(), rtol=2e-3, atol=2e-3)


def test_a_killed_run_resumes_and_only_with_the_same_settings(home: Path, monkeypatch) -> None:
    whole = run(home, "tree", "out-whole")
    write, written = embeddings.Writer.write, []

    def stop(self, batch: int, *more) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(batch)
        write(self, batch, *more)

    with monkeypatch.context() as patch:
        patch.setattr(embeddings.Writer, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            run(home, "tree", "out-killed")
    assert not (home / "out-killed/embeddings.npy").exists()
    with pytest.raises(UserError, match="another feature; remove it or choose another --output"):
        run(home, "tree", "out-killed", "--feature", "cls")
    with pytest.raises(UserError, match="not all embeddings are there; rerun"):
        embeddings.read_embeddings(home / "out-killed")
    np.testing.assert_array_equal(run(home, "tree", "out-killed"), whole)
    info = json.loads((home / "out-killed/embeddings.json").read_text())
    assert info["batches_of_this_start"] == 4  # of six
    assert not (home / "out-killed/partial").exists()


def test_a_finished_run_is_left_alone_and_other_weights_refused(home: Path) -> None:
    run(home, "tree", "out-done")
    before = (home / "out-done/embeddings.json").read_bytes()
    assert embed.run(*session(home, "tree", "out-done")) == {}
    assert (home / "out-done/embeddings.json").read_bytes() == before
    with pytest.raises(UserError, match="embeddings with another weights"):
        run(home, "tree", "out-done", "--random")
    shutil.copytree(home / "tree", home / "tree2")
    with pytest.raises(UserError, match="embeddings with another list of images"):
        run(home, "tree2", "out-done")


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_images_that_others_replaced_are_not_taken_for_those_embedded(
    home: Path, tmp_path: Path, kind: str
) -> None:
    def write(seed: int) -> None:
        image, label = coloured_images(4, 2, seed=seed)
        if kind == "shards":
            write_shards(tmp_path / "set", image, label, level=0)
            return
        (tmp_path / "set").mkdir()
        for number, pixels in enumerate(image):
            Image.fromarray(pixels).save(tmp_path / f"set/{number}.png", compress_level=0)

    write(seed=1)
    folder, output = str(tmp_path / "set"), str(tmp_path / "out")
    run(home, folder, output)
    assert embed.run(*session(home, folder, output)) == {}
    shutil.rmtree(folder)
    write(seed=2)
    with pytest.raises(UserError, match="embeddings with another content of images; remove it"):
        run(home, folder, output)
    search = retrieve.Settings(("0",), tmp_path / "out", tmp_path / "page.html")
    with pytest.raises(UserError, match=r"its images were modified or replaced after .*/out was"):
        retrieve.build_page(search)
    for name in ("content of images", "list of images"):  # earlier versions did not record it
        about = json.loads((tmp_path / "out/embeddings.json").read_text())
        about["settings"].pop(name)
        (tmp_path / "out/embeddings.json").write_text(json.dumps(about))
        if name == "content of images":
            assert embed.run(*session(home, folder, output)) == {}
    with pytest.raises(UserError, match="another list of images"):
        run(home, folder, output)


@pytest.mark.parametrize(
    "theirs", ["partial/mine.txt", "partial/embeddings.npy/x", "embeddings.npy", "names.txt"]
)
def test_what_others_wrote_is_refused_and_stays(home: Path, tmp_path: Path, theirs: str) -> None:
    path = tmp_path / theirs
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UserError, match=f"^{tmp_path}/{theirs.removesuffix('/x')}: .*; move it aw"):
        run(home, "tree", str(tmp_path))
    assert path.read_text() == "mine"


def test_what_others_add_meanwhile_stays(home: Path, monkeypatch) -> None:
    def put(*_) -> list[int]:
        (home / "out-added/partial/mine.txt").write_text("mine")
        return []

    with monkeypatch.context() as patch:
        patch.setattr(embed, "damaged_rows", put)
        with pytest.raises(UserError, match=r"partial/mine\.txt: .*; move it away"):
            run(home, "tree", "out-added")
    (home / "out-added/partial/mine.txt").rename(home / "mine.txt")
    assert embed.run(*session(home, "tree", "out-added")) == {}
    assert embeddings.read_embeddings(home / "out-added").rows.shape == (COUNT, 32)


@pytest.mark.parametrize("lost", ["embeddings.npy", "names.txt"])
def test_a_file_that_was_removed_is_written_again(home: Path, lost: str) -> None:
    run(home, "tree", f"out-lost-{lost}")
    path = home / f"out-lost-{lost}" / lost
    before = path.read_bytes()
    path.unlink()
    run(home, "tree", path.parent.name)
    assert path.read_bytes() == before


@pytest.mark.parametrize("when", ["write_json", "remove_own"])
def test_a_run_killed_at_its_end_is_finished(home: Path, monkeypatch, when: str) -> None:
    def stop(path: Path, *_, **__) -> None:
        if (
            path.name in (embeddings.INFO, embeddings.PARTIAL)
            and (path.parent / "names.txt").exists()
        ):
            raise KeyboardInterrupt
        write(path, *_, **__)

    write, output = getattr(embeddings, when), f"out-end-{when}"
    with monkeypatch.context() as patch:
        patch.setattr(embeddings, when, stop)
        with pytest.raises(KeyboardInterrupt):
            run(home, "tree", output)
    run(home, "tree", output)
    assert sorted(p.name for p in (home / output).iterdir()) == [
        "embeddings.json", "embeddings.npy", "names.txt",
    ]  # fmt: skip
    np.testing.assert_array_equal(
        embeddings.read_embeddings(home / output).rows, run(home, "tree", "out-end")
    )


def cut(path: Path, length: int | None = None) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 if length is None else length])


@pytest.fixture(scope="module")
def done(home: Path) -> Path:
    run(home, "tree", "out-of-damaged")
    return home / "out-of-damaged"


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("embeddings.json", cut, "is damaged, or no file of eval/embed.py"),
        ("embeddings.json", lambda p: p.write_text("[1]"), r"\(it says no settings\)"),
        ("embeddings.json", lambda p: p.write_text("{}"), r"\(it says no settings\)"),
        ("embeddings.json", lambda p: p.write_text('{"settings": 1}'), "it says no settings"),
        ("embeddings.json", lambda p: p.write_bytes(b"\xff"), "is damaged, or no file of"),
        ("embeddings.npy", cut, "is damaged"),
        ("embeddings.npy", lambda p: cut(p, 0), "is damaged"),
        ("embeddings.npy", lambda p: cut(p, 30), "is damaged"),
        ("embeddings.npy", lambda p: np.save(p, np.ones(3)), r"holds float64 \[3\], and not"),
    ],
)
def test_damaged_embeddings_are_named(home, done, tmp_path, name, damage, said) -> None:
    folder = shutil.copytree(done, tmp_path / "damaged")
    damage(folder / name)
    before = (folder / name).read_bytes()
    with pytest.raises(UserError, match=f"^{folder / name}: .*{said}.*choose another --output$"):
        run(home, "tree", str(folder))
    with pytest.raises(UserError, match=f"^{folder / name}: .*{said}.*embed the images again$"):
        embeddings.read_embeddings(folder)
    assert (folder / name).read_bytes() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\tb\t/c\n", r"names\.txt, line 1: is not a key, label \(a whole number\) and path"),
        ("a\t0\n", r"names\.txt, line 1: is not a key"),
        ("a\t0\t/c\n", r"names\.txt: 1 names for 21 embeddings"),
        ("", r"names\.txt: 0 names for 21 embeddings"),
    ],
)
def test_damaged_names_are_named(done: Path, tmp_path: Path, text: str, said: str) -> None:
    folder = shutil.copytree(done, tmp_path / "damaged")
    (folder / "names.txt").write_text(text)
    with pytest.raises(UserError, match=said):
        embeddings.read_embeddings(folder)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("settings.json", cut),
        ("settings.json", lambda p: p.write_text("{}")),
        ("done.bin", Path.unlink),
        ("done.bin", cut),
        ("embeddings.npy", Path.unlink),
        ("embeddings.npy", cut),
    ],
)
def test_a_damaged_start_is_named(home: Path, done: Path, tmp_path: Path, name, damage) -> None:
    settings = json.loads((done / "embeddings.json").read_text())["settings"]
    assert embeddings.prepare(tmp_path, settings, (COUNT, 32), "float32")
    damage(tmp_path / "partial" / name)
    with pytest.raises(UserError, match=f"^{tmp_path}/partial/{name}: .*; remove {tmp_path}/part"):
        run(home, "tree", str(tmp_path))


@pytest.mark.parametrize("resize", [0, 400])
@pytest.mark.parametrize("size", [32, 224, 256, 384])
def test_the_crop_is_that_of_every_evaluation(home: Path, size: int, resize: int) -> None:
    vit = SimpleNamespace(patch_embed=SimpleNamespace(img_size=(size, size)))
    opened = EvalSession(vit, None, ALONE, resize=resize)  # type: ignore[arg-type]
    manifest = image_sets.open_images(home / "shards")
    batches = image_sets.load_batches(manifest, opened.crop, [1], 4, 0, skip=False)
    theirs = opened.loader(home / "shards", 4)
    assert torch.equal(next(iter(batches)).image, list(theirs)[1].image)


def test_a_resize_is_followed_and_another_one_refused(home: Path) -> None:
    plain, wide = run(home, "tree", "out-plain"), run(home, "tree", "out-wide", "--resize", "22")
    assert not np.allclose(plain, wide)
    store = embeddings.read_embeddings(home / "out-wide")
    (query,) = retrieve.find_queries(
        retrieve.Settings((str(home / "tree/class1/010.png"),), store.folder, Path("page")), store
    )
    np.testing.assert_allclose(query.feature, wide[10], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="embeddings with another resize; remove it or choose"):
        run(home, "tree", "out-wide", "--resize", "20")


def work(ranks: Ranks, home: str) -> None:
    run(Path(home), "tree", "out-ranks", ranks=ranks)


def test_two_ranks_write_the_rows_of_one(home: Path) -> None:
    on_two_ranks(work, str(home))
    rows = np.load(home / "out-ranks/embeddings.npy")
    np.testing.assert_allclose(rows, run(home, "tree", "out-alone"), rtol=1e-5, atol=1e-6)


def test_a_damaged_image_stops_or_becomes_a_row_of_nan(home: Path) -> None:
    shutil.copytree(home / "tree", home / "damaged")
    path = home / "damaged/class1/009.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"^{path} will not decode.*; --on-error skip makes it a"):
        run(home, "damaged", "out-skip")
    rows = run(home, "damaged", "out-skip", "--on-error", "skip")  # resumes
    assert np.flatnonzero(np.isnan(rows).any(1)).tolist() == [9]
    assert np.isnan(rows[9]).all()
    info = json.loads((home / "out-skip/embeddings.json").read_text())
    assert info["damaged"] == ["class1/009.png"]
    store, drawn = embeddings.read_embeddings(home / "out-skip"), Path("page.html")
    some = retrieve.find_queries(retrieve.Settings((), store.folder, drawn, random=COUNT), store)
    assert [query.row for query in some] == [row for row in range(COUNT) if row != 9]
    with pytest.raises(UserError, match="embeddings with another on_error"):
        run(home, "damaged", "out-skip")


def test_a_link_to_nothing_is_left_out_where_that_is_asked_for(home: Path) -> None:
    shutil.copytree(home / "tree", home / "linked")
    (home / "linked/class0/gone.png").symlink_to("nothing.png")
    with pytest.raises(UserError, match=r"gone\.png: is a link to nothing; --on-error skip leaves"):
        run(home, "linked", "out-linked")
    rows = run(home, "linked", "out-linked", "--on-error", "skip")
    np.testing.assert_array_equal(rows, run(home, "tree", "out-tree"))
    info = json.loads((home / "out-linked/embeddings.json").read_text())
    assert list(info["left_out"]) == ["class0/gone.png"]


def test_relative_paths_are_those_of_another_folder_too(home: Path, monkeypatch) -> None:
    monkeypatch.chdir(home)
    for images, first in (("shards", "shards/part-000000.tar"), ("tree", "tree/class0/000.png")):
        words = ["--encoder", "run", "--images", images, "--workers", "0"]
        args = embed.build_parser().parse_args([*words, "--output", f"out-rel-{images}"])
        settings = settings_of(embed.Settings, args)
        embed.run(settings, session_of(args, ALONE), embed.default_output(args))
        (home / "else").mkdir(exist_ok=True)
        monkeypatch.chdir(home / "else")
        store = embeddings.read_embeddings(f"../out-rel-{images}")
        assert store.paths[0] == str(home / first)
        query = (str(home / "tree/class0/000.png"),)
        page = retrieve.build_page(
            retrieve.Settings(query, store.folder, Path("page.html"), 2, 1, 0)
        )
        assert page.count("<figure") == 3
        monkeypatch.chdir(home)


def test_features_that_no_row_can_hold(home: Path) -> None:
    spoil_encoder(home / "run", home / "spoilt")
    with pytest.raises(UserError, match="features that are not finite; its weights are damaged"):
        run(home, "tree", "out-nan", "--encoder", str(home / "spoilt"))
    with pytest.raises(UserError, match="beyond the range of float16; take --dtype float32"):
        embed.to_rows(torch.full((1, 2), 7e4), "float16", torch.tensor([False]), "x")


@pytest.mark.parametrize("feature", ["block", "block:", "block:0", "block:x", "block:1:max", "x"])
def test_unknown_features_are_refused(feature: str) -> None:
    with pytest.raises(UserError, match=f"--feature {feature}: must be cls, mean_patch"):
        embed.parse_feature(feature)


def test_what_an_encoder_lacks_is_refused(home: Path) -> None:
    with pytest.raises(UserError, match="block:3: this encoder has 2 blocks"):
        run(home, "tree", "out-deep", "--feature", "block:3")
    with pytest.raises(UserError, match="no cls token; take mean_patch"):
        run(home, "tree", "out-avg", "--encoder", "random", "--arch", "vit_tiny_patch16_224",
            "--options", "{class_token: false, global_pool: avg, img_size: 32}",
            "--feature", "block:1:cls")  # fmt: skip


def test_lists_that_name_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.txt: names no image"):
        image_sets.open_images(tmp_path / "empty.txt")
    (tmp_path / "wrong.txt").write_text("gone.jpg\n")
    with pytest.raises(UserError, match=r"gone\.jpg: cannot be read \(No such file"):
        image_sets.open_images(tmp_path / "wrong.txt")
    with pytest.raises(UserError, match="no such file or folder"):
        image_sets.open_images(tmp_path / "nowhere")
    (tmp_path / "x.yaml").write_text("a: 1\n")
    kinds = r"neither shards, a folder, a tar nor a list \(\.csv \.jsonl \.ndjson \.txt\)$"
    with pytest.raises(UserError, match=kinds):
        image_sets.open_images(tmp_path / "x.yaml")


def test_a_suffix_counts_in_any_case(tmp_path: Path) -> None:
    """The labels of LIST.CSV are its own, not the folders of its paths."""
    for name in ("a/x.png", "a/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "LIST.CSV").write_text("path,label\na/x.png,1\na/y.png,0\n")
    found = image_sets.open_images(tmp_path / "LIST.CSV")
    assert found.index["label"].tolist() == [1, 0]
    (tmp_path / "LIST.TXT").write_text("x.png\ny.png\n")
    check_images(tmp_path / "LIST.TXT", tmp_path / "a")
    found = image_sets.open_images(tmp_path / "LIST.TXT", tmp_path / "a")
    assert list(found.names) == ["x.png", "y.png"]


def test_parquet_has_the_rows(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed.run(*session(home, "tree", "out-parquet", "--format", "parquet"))
    table = parquet.read_table(home / "out-parquet/embeddings.parquet")
    assert table.column_names == ["key", "label", "path", "embedding"]
    rows = np.stack(table["embedding"].to_numpy())
    np.testing.assert_array_equal(rows, run(home, "tree", "out-npy"))
    assert table["key"][9].as_py() == "class1/009.png"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow, which is not installed"):
        run(home, "tree", "out-without", "--format", "parquet")


def test_the_command(home: Path) -> None:
    words = ["--encoder", home / "run", "--images", home / "tree", "--workers", "1"]
    command = [sys.executable, embed.__file__, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    found = re.search(
        r"21 × 32 float32 → (.*/run/eval/embeddings-tree-\w{8}-mean_patch)/", done.stdout
    )
    assert found, done.stdout
    assert embeddings.read_embeddings(found[1]).rows.shape == (21, 32)


def test_neighbours_are_those_of_highest_cosine() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    rows[7] = np.nan
    rows[50] = 3 * rows[20]  # the same direction
    query = rows[20]
    cosine = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    expected = [n for n in np.argsort(-cosine, kind="stable") if n not in (7, 20)][:6]
    found = retrieve.nearest(rows, query, 6, leave_out=20)
    assert [row for row, _ in found] == expected
    assert expected[0] == 50
    assert found[0][1] == pytest.approx(1)
    assert [value for _, value in found] == pytest.approx([cosine[n] for n in expected], abs=1e-5)
    assert retrieve.nearest(rows, query, 1)[0][0] == 20
    for chunk in (7, 10):  # the row left out is the last of a chunk, the first of one
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(retrieve, "CHUNK", chunk)
            assert retrieve.nearest(rows, query, 6, leave_out=20) == found


def page(home: Path, store: str, *queries: str, k: int = 4) -> str:
    words = (*queries, "--embeddings", str(home / store), "--k", str(k))
    args = retrieve.build_parser().parse_args(words)
    return retrieve.build_page(
        retrieve.Settings(tuple(args.queries), args.embeddings, home / "page.html", args.k)
    )


def test_the_page_has_a_picture_for_every_neighbour(home: Path) -> None:
    run(home, "tree", "out-page")
    outside = home / "outside.png"
    shutil.copy(home / "tree/class1/010.png", outside)
    text = page(home, "out-page", "class0/000.png", "20", str(outside))
    assert text.count('<img src="data:image/jpeg;base64,') == 3 * 5
    assert not re.search(r"(src|href)=\"(?!data:)", text)  # nothing from outside the page
    assert text.count('class="query"') == 3
    # The file from outside has the pixels of row 10, which is its nearest neighbour.
    own = text[text.index(f"<h2>{outside}</h2>") :]
    assert re.findall(r"<b>([\d.]+)</b> ([^<]+)", own)[0] == ("1.000", "class1/010.png")
    assert "8 neighbours have the label of their query" in text
    assert page(home, "out-page").count("<h2>") == 8  # drawn where none is given


def test_what_cannot_be_searched(home: Path) -> None:
    run(home, "tree", "out-search")
    with pytest.raises(UserError, match=r"nothing\.jpg: no image file, no key of .* 0 to 20"):
        page(home, "out-search", "nothing.jpg")
    run(home, "tree", "out-tokens", "--feature", "patches")
    with pytest.raises(UserError, match="a row per patch; embed with --feature mean_patch"):
        page(home, "out-tokens", "0")
    with pytest.raises(UserError, match="no embeddings there"):
        page(home, "tree", "0")
    path = home / "out-search/embeddings.json"
    path.write_text(path.read_text().replace('"weights": "', '"weights": "f'))
    with pytest.raises(UserError, match=r"other weights than those of .*; embed the images again"):
        page(home, "out-search", str(home / "tree/class0/000.png"))


def test_a_query_of_embeddings_with_the_average_of_the_weights(home: Path) -> None:
    plain, average = ({k: v + n for k, v in load_file(
        home / "run/encoder/encoder.safetensors").items()} for n in (0, 0.01))  # fmt: skip
    torch.save({"model": plain, "state_dict_ema": average}, home / "both.pth")
    words = ["--encoder", str(home / "both.pth"), "--arch", "vit_base_patch16_224",
             "--options", json.dumps(OPTIONS)]  # fmt: skip
    rows = run(home, "tree", "out-average", *words, "--ema")
    assert not np.allclose(rows, run(home, "tree", "out-weights", *words))
    query = str(home / "tree/class1/010.png")
    (found,) = retrieve.find_queries(
        retrieve.Settings((query,), home / "out-average", Path("page.html")),
        embeddings.read_embeddings(home / "out-average"),
    )
    np.testing.assert_allclose(found.feature, rows[10], rtol=1e-4, atol=1e-5)


def test_features_that_are_not_finite_write_nothing(home: Path, tmp_path: Path) -> None:
    spoil_encoder(home / "run", tmp_path / "bad")
    words = ["--encoder", str(tmp_path / "bad")]
    with pytest.raises(UserError, match="gives features that are not finite; its weights are"):
        run(home, "shards", str(tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_rows_that_are_not_finite_are_refused(done: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(done, tmp_path / "copy")
    rows = np.load(folder / "embeddings.npy")
    rows[0, 1] = np.inf
    np.save(folder / "embeddings.npy", rows)
    store = retrieve.read_store(folder)
    with pytest.raises(UserError, match=r"class0/000\.png: its row is not finite"):
        retrieve.rows_of(retrieve.Settings(("0",), folder, Path("page.html")), store)
    np.save(folder / "embeddings.npy", np.full_like(rows, np.nan))
    with pytest.raises(UserError, match=r"embeddings\.npy: no row is finite, so none can be"):
        retrieve.read_store(folder)


@pytest.mark.parametrize("words", [("--seed", "-1"), ("--k", "0"), ("--random", "0")])
def test_numbers_that_are_none(done: Path, capsys, words: tuple[str, str]) -> None:
    with pytest.raises((UserError, SystemExit)) as caught:
        retrieve.prepare(retrieve.build_parser().parse_args(["--embeddings", str(done), *words]))
    said = f"{caught.value} {capsys.readouterr().err}"
    assert words[0] in said
    assert f"{words[1]}: must be" in said


@pytest.mark.parametrize("name", ["names.txt", "embeddings.npy", "cat.png", "page"])
def test_a_page_replaces_no_query_and_no_embeddings(done: Path, name: str) -> None:
    words = ["--embeddings", str(done), "--output", str(done / name)]
    with pytest.raises(UserError, match=rf"{name}: must end in \.html"):
        retrieve.prepare(retrieve.build_parser().parse_args(words))


def test_shards_are_given_as_their_folder(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "shards", tmp_path / "sets/flowers")
    with pytest.raises(UserError, match=rf"sets: holds folders of .*, such as {folder}$"):
        check_images(tmp_path / "sets")
    with pytest.raises(UserError, match=rf"index\.bin: is a file; give the .*, {folder}$"):
        check_images(folder / "index.bin")
    check_images(folder / "part-000000.tar")  # a tar of images like others
    shutil.copytree(home / "tree", tmp_path / "sets/tree")
    check_images(tmp_path / "sets")


def test_a_glance_finds_images_behind_links_and_in_tars(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "set/notes.csv").write_text("a,b\n")
    (tmp_path / "set/cats").symlink_to(tmp_path / "far")
    with pytest.raises(UserError, match="set: holds no images"):
        check_images(tmp_path / "set")
    (tmp_path / "far/tom.JPG").write_bytes(b"x")
    check_images(tmp_path / "set")
    (tmp_path / "far/tom.JPG").rename(tmp_path / "far/n01440764.tar")
    check_images(tmp_path / "set")
