"""Restart markers: the same pixels in every decoder, and rectangles as JPEGs of their own."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from flat_jpeg import segment
from image_corpus import corpus
from PIL import Image
from shard_samples import encode, tars_of

from pipeline.data import jpeg
from pipeline.data.crops import Box
from shard_tools.image_file import (
    CAN_CUT,
    GROWTH,
    ImageFault,
    cut,
    cut_out,
    find_pieces,
    read_header,
)
from shard_tools.make_shards import main
from shard_tools.manifest import read_manifest
from shard_tools.subset import main as subset
from shard_tools.verify_shards import main as verify

pytestmark = pytest.mark.skipif(not CAN_CUT, reason="_jpegmarkers.c is not built")
SIZE = (210, 140)


def photo(mode: str = "RGB", size: tuple[int, int] = SIZE, **options: object) -> bytes:
    """A JPEG with detail everywhere, so that pieces cost little of it."""
    draw = np.random.default_rng(size[0])
    shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
    image = Image.fromarray(draw.normal(128, 40, shape).clip(0, 255).astype(np.uint8), mode=mode)
    return encode(image, **{"quality": 90, **options})


SOURCES = {
    "4:4:4": photo(subsampling=0),
    "4:2:2": photo(subsampling=1),
    "4:2:0": photo(subsampling=2),
    "grey": photo("L"),
    "of prime width": photo(subsampling=0, size=(8 * 29, 90)),
    "optimal": photo(optimize=True, subsampling=0),
    "with profile": photo(subsampling=0, icc_profile=b"p" * 900, comment=b"remark"),
    "marked by row": photo(subsampling=0, restart_marker_rows=1),
    "with a tail": photo(subsampling=0) + b"\xff\xda" * 50,
    "rgb": photo(keep_rgb=True, subsampling=0),
}
DECODERS = {
    "Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
    "simplejpeg": lambda data: simplejpeg.decode_jpeg(data, "RGB"),
}


def pieces_of(data: bytes):
    return find_pieces(data, read_header(data))


@pytest.mark.parametrize("name", SOURCES)
def test_only_the_coding_changes(name: str) -> None:
    data = SOURCES[name]
    made = cut(data)
    assert made.reason == ""
    assert len(made.data) <= len(data) + len(data) // GROWTH
    assert pieces_of(made.data).interval == made.interval > 0
    for decode in DECODERS.values():
        assert (decode(made.data) == decode(data)).all()
    before, after = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(made.data))
    assert (before.info, before.applist) == (after.info, after.applist)
    assert before.quantization == after.quantization
    tail = data[data.rindex(b"\xff\xd9") :] if name != "with a tail" else b"\xff\xda" * 50
    assert made.data.endswith(tail)
    assert cut(made.data).reason == "has restart markers"
    assert cut(made.data).interval == made.interval


def test_every_kind_of_file_keeps_its_pixels() -> None:
    """Of the corpus only what is plain baseline is touched, and nothing is lost."""
    reasons = {}
    for name, (data, _) in corpus().items():
        made = cut(data)
        reasons[name] = made.reason
        if made.reason:
            assert made.data == data
        else:
            assert (DECODERS["Pillow"](made.data) == DECODERS["Pillow"](data)).all(), name
    assert reasons["jpeg progressive"] == "progressive"
    assert reasons["jpeg scans 444"] == "several scans"
    assert reasons["jpeg cut, with an end"] == "too small to cut"  # before its codes are read
    assert reasons["jpeg RGB SOF c9"] == "unusual frame"
    assert reasons["jpeg sampling 442"] == "unusual sampling factors"
    assert reasons["jpeg cmyk"] == "unusual frame"
    assert reasons["jpeg fill bytes"] == "disorderly segments"
    assert reasons["jpeg mpo"] == "several pictures"
    assert reasons["png rgb"] == reasons["text"] == reasons["empty"] == "not a JPEG"


def test_damage_is_left_alone() -> None:
    """Whatever libjpeg would remark on stays byte for byte as it is."""
    whole, draw = cut(SOURCES["4:2:0"]).data, np.random.default_rng(0)
    start, kinds = whole.index(b"\xff\xda"), set()
    for data in (SOURCES["4:4:4"], whole):
        for _ in range(60):
            damaged = bytearray(data)
            at = int(draw.integers(start, len(data) - 2))
            damaged[at : at + 2] = draw.bytes(draw.integers(0, 4))
            made = cut(bytes(damaged))
            kinds.add(made.reason)
            if made.reason:
                assert made.data == damaged
            else:
                pixels = DECODERS["Pillow"](bytes(damaged))
                assert (DECODERS["Pillow"](made.data) == pixels).all()
    assert "damaged" in kinds
    assert cut(whole[:-2]).reason == cut(whole[: len(whole) // 2]).reason == "damaged"


@pytest.mark.parametrize(
    ("mode", "subsampling", "width", "interval"),
    [
        ("RGB", 0, 504, 9),  # a divisor of 63, about 8 MCUs of 8 pixels
        ("RGB", 0, 376, 8),  # 47 has none
        ("RGB", 2, 500, 4),  # 4 MCUs of 16 pixels
        ("L", None, 336, 7),
        ("RGB", 0, 100, 0),  # less than two pieces
    ],
)
def test_how_long_a_piece_is(mode: str, subsampling: int | None, width: int, interval: int) -> None:
    options = {} if subsampling is None else {"subsampling": subsampling}
    made = cut(photo(mode, (width, 40), quality=96, **options))
    assert made.interval == interval
    assert (made.reason == "too small to cut") == (interval == 0)


def test_pieces_cost_at_most_a_fiftieth() -> None:
    flat = encode(Image.new("RGB", (800, 800), "red"), subsampling=0)
    assert cut(flat).reason == "too small to cut"
    coarse = photo("L", (800, 400), quality=15)
    pieces = pieces_of(cut(coarse).data)
    assert pieces.interval > 8
    assert 0.8 < len(pieces.begins) * 4 / (len(coarse) / 50) <= 1


@pytest.mark.parametrize("name", SOURCES)
def test_a_rectangle_is_a_jpeg_of_its_own(name: str) -> None:
    """Max difference 0 in every decoder, and less to read."""
    data, draw, smaller = cut(SOURCES[name]).data, np.random.default_rng(1), 0
    pieces = pieces_of(data)
    whole = {key: decode(data) for key, decode in DECODERS.items()}
    wide, high = pieces.header.width, pieces.header.height
    for _ in range(60):
        left, right = np.sort(draw.choice(wide + 1, 2, replace=False)).tolist()
        top, bottom = np.sort(draw.choice(high + 1, 2, replace=False)).tolist()
        part = cut_out(data, pieces, left, top, right, bottom)
        smaller += len(part.data) < 0.7 * len(data)
        for key, decode in DECODERS.items():
            pixels = decode(part.data)
            assert pixels.shape[:2] == (part.height, part.width)
            x, y = part.left, part.top
            seen = pixels[top - y : bottom - y, left - x : right - x]
            assert (seen == whole[key][top:bottom, left:right]).all()
        inner = read_header(part.data)
        assert (inner.width, inner.height, inner.plain) == (part.width, part.height, True)
        assert cut(part.data).reason in ("has restart markers", "too small to cut")
    assert (smaller > 10) == (name != "of prime width")


def test_pieces_of_whole_rows() -> None:
    data = photo(subsampling=2, restart_marker_rows=3)
    whole, pieces = DECODERS["Pillow"](data), pieces_of(data)
    part = cut_out(data, pieces, 50, 70, 70, 74)
    assert (part.left, part.top, part.width, part.height) == (0, 48, SIZE[0], 48)
    assert (DECODERS["Pillow"](part.data)[22:26] == whole[70:74]).all()
    assert len(part.data) < 0.6 * len(data)


@pytest.mark.parametrize("box", [(-1, 0, 9, 9), (0, 0, 211, 9), (9, 0, 9, 9), (0, 50, 9, 40)])
def test_a_rectangle_is_inside_the_picture(box: tuple[int, int, int, int]) -> None:
    data = cut(SOURCES["4:4:4"]).data
    with pytest.raises(ValueError, match="outside the 210x140 picture"):
        cut_out(data, pieces_of(data), *box)


def test_huge_pictures_stay() -> None:
    """Their coefficients would take gigabytes."""
    data = bytearray(SOURCES["4:4:4"])
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (8192).to_bytes(2, "big") + (4097).to_bytes(2, "big")
    assert cut(bytes(data)).reason == "too large"
    data[at : at + 4] = (8192).to_bytes(2, "big") + (4096).to_bytes(2, "big")
    assert cut(bytes(data)).reason == "too small to cut"


def test_a_part_has_the_margin_that_chroma_needs() -> None:
    sizes = {}
    for name in ("4:4:4", "4:2:0"):
        data = cut(SOURCES[name]).data
        pieces = pieces_of(data)
        unit = pieces.interval * pieces.across
        part = cut_out(data, pieces, unit, 64, 2 * unit, 64 + pieces.down)
        sizes[name] = (part.left, part.top, part.width / unit, part.height)
    assert sizes["4:4:4"] == (cut(SOURCES["4:4:4"]).interval * 8, 64, 1, 8)
    assert sizes["4:2:0"][0] == 0
    assert sizes["4:2:0"][1::2] == (48, 48)


def edited(data: bytes, how: str) -> bytes:
    """A file whose restart markers are not what its header announces."""
    marks = [at for at in range(len(data) - 1) if data[at] == 0xFF and 0xD0 <= data[at + 1] < 0xD8]
    at, interval = marks[len(marks) // 2], data.index(b"\xff\xdd") + 4
    number = bytes([0xD0 + (data[at + 1] + 1) % 8])
    return {
        "wrong number": data[: at + 1] + number + data[at + 2 :],
        "missing": data[:at] + data[at + 2 :],
        "extra": data[: at + 2] + data[at : at + 2] + data[at + 2 :],
        "moved": data[: at - 3] + data[at : at + 2] + data[at - 3 : at] + data[at + 2 :],
        "inside stuffed data": data[: at - 4] + b"\xff\0" + data[at : at + 2] + data[at - 4 : at]
        + data[at + 2 :],
        "unstuffed": data[: at - 2] + b"\xff\xd1" + data[at:],
        "interval 0": data[:interval] + b"\0\0" + data[interval + 2 :],
        "another interval": data[:interval] + b"\0\x05" + data[interval + 2 :],
        "no interval": data[: interval - 4] + data[interval + 2 :],
        "the last one missing": data[: marks[-1]] + data[marks[-1] + 2 :],
        "fill byte": data[:at] + b"\xff" + data[at:],
        "interval that does not divide": photo(subsampling=0, restart_marker_blocks=7),
    }[how]  # fmt: skip


@pytest.mark.parametrize(
    "how",
    [
        "wrong number", "missing", "extra", "moved", "inside stuffed data", "unstuffed",
        "interval 0", "another interval", "no interval", "the last one missing", "fill byte",
        "interval that does not divide",
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", ["4:4:4", "4:2:0"])
def test_markers_that_are_not_where_they_should_be(how: str, source: str) -> None:
    """Every decoder of ours gives the pixels of libjpeg's decode of the whole file, or refuses."""
    data = edited(cut(SOURCES[source]).data, how)
    box, seen = Box(64, 40, 164, 140), []
    for name in jpeg.available():
        out = np.zeros((100, 100, 3), np.uint8)
        try:
            jpeg.decoder(name)[1](data, lambda *_: (box, False), out, "bicubic")
        except ImageFault:
            continue
        seen.append(out)
    assert all((out == seen[0]).all() for out in seen)
    with contextlib.suppress(ImageFault):
        whole = jpeg.decode(data, read_header(data)).convert("RGB")
        assert all((out == np.asarray(whole)[40:140, 64:164]).all() for out in seen)
    sound = how in ("fill byte", "interval that does not divide")
    assert (pieces_of(data) is not None) == (sound or how in ("moved", "inside stuffed data"))
    assert len(seen) == len(jpeg.available()) or not sound


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of every kind in two classes, and shards of them with and without markers."""
    home = tmp_path_factory.mktemp("markers")
    files = {**SOURCES, "progressive": photo(progressive=True), "small": encode(
        Image.new("RGB", (32, 32))), "cut": cut(SOURCES["4:2:0"]).data}  # fmt: skip
    for number, (name, data) in enumerate(files.items()):
        place = home / "images" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name.replace(':', '')}.jpg").write_bytes(data)
    png = encode(Image.open(io.BytesIO(SOURCES["4:4:4"])), "PNG")
    (home / "images/class0/drawing.png").write_bytes(png)
    for name, options in {"plain": [], "marked": ["--restart-markers"]}.items():
        arguments = [home / "images", home / name, "--shard-size", "100KiB", "--workers", "0"]
        assert main([*map(str, arguments), *options]) == 0
    return home


def images_of(folder: Path) -> dict[str, bytes]:
    """Name → stored bytes."""
    manifest = read_manifest(folder)
    shard, rows = manifest.locate(np.arange(manifest.samples))
    files = {}
    for name, tar, row in zip(manifest.names, shard, rows, strict=True):
        data = Path(manifest.path(int(tar))).read_bytes()
        files[name] = data[row["offset"] : row["offset"] + row["length"]]
    return files


def test_shards_hold_the_same_pictures(folder: Path) -> None:
    plain, marked = images_of(folder / "plain"), images_of(folder / "marked")
    assert plain.keys() == marked.keys()
    rows = dict(zip(read_manifest(folder / "marked").names, read_manifest(folder / "marked").index,
                    strict=True))  # fmt: skip
    for name, data in plain.items():
        pixels = DECODERS["Pillow"](data)
        assert (DECODERS["Pillow"](marked[name]) == pixels).all()
        found = pieces_of(marked[name])
        assert rows[name]["interval"] == (found.interval if found else 0)
        kept = name.split("/")[-1] in ("progressive.jpg", "small.jpg", "cut.jpg")
        assert (marked[name] == data) == kept
    sizes = [shard.bytes for shard in read_manifest(folder / "marked").shards]
    assert max(sizes) <= 100 << 10


def test_the_manifest_counts_them(folder: Path, capsys: pytest.CaptureFixture) -> None:
    made = read_manifest(folder / "marked").made
    added = len(SOURCES) + 1
    left = {"has restart markers": 1, "progressive": 1, "too small to cut": 1}
    assert made["restart_markers"] == {"images": added + 1, "added": added, "left": left}
    assert made["options"]["image"]["restart_markers"] is True
    plain = read_manifest(folder / "plain").made
    assert "restart_markers" not in plain
    assert "restart_markers" not in plain["options"]["image"]
    assert verify([str(folder / "marked"), "--decode", "--workers", "0"]) == 0
    assert f"restart markers in {added + 1}: sound" in capsys.readouterr().out


def test_several_workers_write_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    arguments = [str(folder / "images"), str(tmp_path / "d"), "--shard-size", "100KiB"]
    assert main([*arguments, "--workers", "2", "--restart-markers"]) == 0
    assert tars_of(tmp_path / "d") == tars_of(folder / "marked")


def test_a_subset_knows_of_them(folder: Path, tmp_path: Path) -> None:
    """By index and as a copy; the rest is counted too."""
    counts = []
    for name, options in {"a": ["--count", "5"], "b": ["--count", "5", "--rest"],
                          "c": ["--count", "5", "--copy", "--workers", "0"]}.items():  # fmt: skip
        assert subset([str(folder / "marked"), str(tmp_path / name), *options]) == 0
        manifest = read_manifest(tmp_path / name)
        counts.append(manifest.made["restart_markers"]["images"])
        assert counts[-1] == np.count_nonzero(manifest.index["interval"])
        assert verify([str(tmp_path / name), "--workers", "0"]) == 0
    assert counts[0] + counts[1] == len(SOURCES) + 2
    assert counts[2] == counts[0]
    assert subset([str(folder / "plain"), str(tmp_path / "d"), "--count", "5"]) == 0
    assert "restart_markers" not in read_manifest(tmp_path / "d").made


def test_verify_finds_markers_of_another_interval(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shard_tools.verify_shards.find_pieces", lambda *_: None)
    assert verify([str(folder / "marked"), "--workers", "0"]) == 1
    assert "its restart markers are not 9 MCUs apart, as the index says" in capsys.readouterr().out


def test_without_the_extension(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("shard_tools.make_shards.CAN_CUT", False)
    assert main([str(folder / "images"), str(tmp_path / "d"), "--restart-markers"]) == 2
    assert "_jpegmarkers.c, which is not built" in capsys.readouterr().err


def test_a_profile_that_looks_like_tables_is_kept() -> None:
    data, tables = SOURCES["4:4:4"], b"\xff\xc4\0\x1f" * 9
    assert tables in cut(data[:2] + segment(0xE5, tables) + data[2:]).data
