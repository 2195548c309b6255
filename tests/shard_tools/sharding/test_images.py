from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_corpus import black_png, chunk, corpus, tiff
from PIL import Image, ImageOps, features
from shard_samples import SMALL, encode, image_tree, jpeg, make, picture, psnr, read_samples, report

from shard_tools.image_file import Conversion, ImageFault
from shard_tools.make_shards import main
from shard_tools.manifest import read_manifest
from shard_tools.sharding.images import ImageSettings, check_image
from shard_tools.verify_shards import verify


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """One class folder of files that are not what their name says, but can be used."""
    exif = Image.Exif()
    exif[0x0112] = 6
    adobe = encode(picture(5, mode="CMYK"), quality=95)
    kinds = {
        "plain.JPEG": jpeg(1),
        "png.JPEG": encode(picture(2), "PNG"),
        "gif.jpg": encode(picture(3).quantize(255), "GIF"),
        "rgba.png": encode(picture(4, mode="RGBA"), "PNG"),
        "cmyk.JPEG": adobe,
        "rotated.jpg": encode(picture(6), quality=90, exif=exif),
        "grey.jpg": encode(picture(7, mode="L"), quality=90),
        "deep.png": encode(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG"),
        "bitmap.JPG": encode(picture(8), "BMP"),
        "strip.tif": encode(picture(8), "TIFF"),
        "progressive.jpg": encode(picture(9), progressive=True, quality=90),
    }
    folder = tmp_path / "odd" / "class"
    folder.mkdir(parents=True)
    for name, data in kinds.items():
        (folder / name).write_bytes(data)
    (folder / "Thumbs.db").write_bytes(b"x")
    return folder.parent


def test_content_decides_and_conversions_are_reported(odd: Path, tmp_path: Path) -> None:
    dest = make(odd, tmp_path / "d", "--gray16", "full")
    samples = {json.loads(sample["json"])["name"]: sample for sample in read_samples(dest)}
    same = {"plain.JPEG", "rotated.jpg", "grey.jpg", "progressive.jpg"}
    converted = {
        "png.JPEG": "PNG to JPEG",
        "gif.jpg": "GIF to JPEG",
        "rgba.png": "PNG to JPEG",
        "cmyk.JPEG": "CMYK to RGB",
        "deep.png": "PNG to JPEG, 16 to 8 bits (full)",
        "bitmap.JPG": "BMP to JPEG",
        "strip.tif": "TIFF to JPEG",
    }
    assert len(samples) == len(same) + len(converted)
    expected = {f"class/{name}": ("converted", reason) for name, reason in converted.items()}
    expected["class/Thumbs.db"] = ("ignored", "not an image by its name")
    assert report(dest) == expected
    assert read_manifest(dest).made["report"]["converted"] == len(converted)
    for name in same:
        assert samples[f"class/{name}"]["jpg"] == (odd / "class" / name).read_bytes()
    for name in converted:
        stored = Image.open(io.BytesIO(samples[f"class/{name}"]["jpg"]))
        assert stored.format == "JPEG"
        assert json.loads(samples[f"class/{name}"]["json"])["converted"] == converted[name]
        if name == "deep.png":  # 16 bit: 40000 of 65535 is 156 of 255
            assert abs(np.asarray(stored).astype(int) - 156).max() <= 1
        else:
            assert psnr(stored.convert("RGB"), Image.open(odd / "class" / name).convert("RGB")) > 33


def test_orientation_is_recorded_and_not_applied(odd: Path, tmp_path: Path) -> None:
    for options in ([], ["--quality", "90"]):
        dest = make(odd, tmp_path / f"d{len(options)}", *options, "--on-error", "skip")
        manifest = read_manifest(dest)
        number = manifest.names.index("class/rotated.jpg")
        row = manifest.index[number]
        assert (row["orientation"], row["width"], row["height"]) == (6, 24, 18)
        assert json.loads(read_samples(dest)[number]["json"])["orientation"] == 6
        others = np.delete(manifest.index["orientation"], number)
        assert set(others.tolist()) == {1}


def test_reencoded_images_keep_the_orientation_they_had(tmp_path: Path) -> None:
    """Whoever applies EXIF sees the source's picture, and verify finds what the index says."""
    (tmp_path / "s" / "c").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        (tmp_path / "s" / "c" / f"{kind}.jpg").write_bytes(
            encode(picture(6, (80, 60)), kind, exif=exif)
        )
    dest = make(tmp_path / "s", tmp_path / "d", "--resize-shorter", "30")
    assert verify(str(dest), decode=True, workers=1) == ([], [])
    manifest = read_manifest(dest)
    for name, row, sample in zip(manifest.names, manifest.index, read_samples(dest), strict=True):
        stored = Image.open(io.BytesIO(sample["jpg"]))
        # Pillow itself turns a TIFF as it decodes.
        expected = (1, 30, 40) if "TIFF" in name else (6, 40, 30)
        assert (row["orientation"], row["width"], row["height"]) == expected
        assert stored.getexif().get(0x0112, 1) == expected[0]
        upright = ImageOps.exif_transpose(stored)
        source = ImageOps.exif_transpose(Image.open(tmp_path / "s" / name))
        assert psnr(upright, source.resize(upright.size, Image.Resampling.BICUBIC)) > 30


GREY16 = np.array([[0, 1000], [2000, 4095]], np.uint16)


@pytest.mark.parametrize(
    ("values", "kind", "how", "expected"),
    [
        (GREY16, "PNG", "full", [[0, 4], [8, 16]]),
        (GREY16, "PNG", "fit", [[0, 62], [125, 255]]),
        (GREY16, "TIFF", "fit", [[0, 62], [125, 255]]),
        (GREY16 + 100, "TIFF", "fit", [[0, 62], [125, 255]]),
        (GREY16 * 16, "TIFF", "full", [[0, 62], [125, 255]]),
        (GREY16.astype(np.int32) - 2000, "TIFF", "fit", [[0, 62], [125, 255]]),
        (GREY16.astype(np.int32), "TIFF", "full", "have no full range; --gray16 fit"),
        ((GREY16 / 4095).astype(np.float32), "TIFF", "fit", [[0, 62], [125, 255]]),
        ((GREY16 / 4095).astype(np.float32), "TIFF", "full", "have no full range; --gray16 fit"),
        (np.float32([[0, 1], [np.nan, 2]]), "TIFF", "fit", "not finite"),
        (np.full((2, 2), 700, np.uint16), "PNG", "fit", [[0, 0], [0, 0]]),
    ],
)
def test_deep_values_become_8_bits_as_asked(values, kind, how, expected) -> None:
    data = encode(Image.fromarray(values), kind)
    with pytest.raises(ImageFault, match=r"--gray16 full .* or fit"):
        check_image(data, ImageSettings())
    settings = ImageSettings(conversion=Conversion(gray16=how), quality=100)
    if isinstance(expected, str):
        with pytest.raises(ImageFault, match=expected):
            check_image(data, settings)
        return
    stored = Image.open(io.BytesIO(check_image(data, settings).data))
    assert stored.mode == "L"
    assert np.abs(np.asarray(stored).astype(int) - expected).max() <= 2


def test_deep_colours_have_their_full_range_only() -> None:
    data, _ = corpus()["png 16 bits, rgb"]
    stored = check_image(data, ImageSettings(conversion=Conversion(gray16="full")))
    assert psnr(Image.open(io.BytesIO(stored.data)), picture(3, (61, 45))) > 33
    assert stored.converted == "PNG to JPEG, 16 to 8 bits (full)"
    with pytest.raises(ImageFault, match="in 3 channels; convert it to 8 bits first"):
        check_image(data, ImageSettings(conversion=Conversion(gray16="fit")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "palette"])
@pytest.mark.parametrize(
    ("how", "colour"), [("drop", (200, 100, 0)), ("white", (255,) * 3), ("black", (0,) * 3)]
)
def test_transparent_pixels_become_what_was_asked(kind: str, how: str, colour) -> None:
    image = Image.new("RGBA", (16, 16), (200, 100, 0, 0))
    if kind == "palette":
        image = image.convert("RGB").quantize(2)
        data = encode(image, "PNG", transparency=image.getpixel((0, 0)))
    elif kind == "GIF":
        image = image.convert("RGB").quantize(2)
        data = encode(image, "GIF", transparency=image.getpixel((0, 0)))
    else:
        data = encode(image, kind)
    with pytest.raises(ImageFault, match=r"has transparent pixels; .*--alpha"):
        check_image(data, ImageSettings())
    checked = check_image(data, ImageSettings(conversion=Conversion(alpha=how)))
    stored = np.asarray(Image.open(io.BytesIO(checked.data)))
    assert np.abs(stored.astype(int) - colour).max() <= 3
    assert checked.converted.endswith(f"to JPEG, alpha ({how})")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_grey_of_few_bits(bits: int) -> None:
    """All of the value 1, as optipng packs it; Pillow compares 1 with what it has scaled."""
    row = int(f"{1:0{bits}b}" * 16, 2).to_bytes(2 * bits, "big")
    data = grey_png(bits, b"\0\1", row)
    with pytest.raises(ImageFault, match="has transparent pixels"):
        check_image(data, ImageSettings())
    black = check_image(data, ImageSettings(conversion=Conversion(alpha="black")))
    assert not np.asarray(Image.open(io.BytesIO(black.data))).any()
    check_image(grey_png(bits, b"\0\0", row), ImageSettings())


def grey_png(bits: int, transparent: bytes, row: bytes) -> bytes:
    """16 x 1 pixels."""
    chunks = {
        b"IHDR": struct.pack(">II5B", 16, 1, bits, 0, 0, 0, 0),
        b"tRNS": transparent,
        b"IDAT": zlib.compress(b"\0" + row),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*about) for about in chunks.items())


def test_a_transparent_deep_colour_is_no_colour_of_8_bits() -> None:
    data, _ = corpus()["png 16 bits, rgb"]
    colour = data[:33] + chunk(b"tRNS", bytes(6)) + data[33:]
    for how in (None, "white", "black"):
        with pytest.raises(ImageFault, match="with transparency; --alpha drop"):
            check_image(colour, ImageSettings(conversion=Conversion("full", how)))
    check_image(colour, ImageSettings(conversion=Conversion("full", "drop")))


def test_a_black_png_is_not_inflated_beyond_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megabytes of zeros deflate to a kilobyte each."""
    seen = 0

    class Counting:
        def __init__(self) -> None:
            self.inner, self.eof, self.unconsumed_tail = decompressobj(), False, b""

        def decompress(self, data: bytes, most: int) -> bytes:
            nonlocal seen
            out = self.inner.decompress(data, most)
            self.eof, self.unconsumed_tail = self.inner.eof, self.inner.unconsumed_tail
            seen += len(out)
            return out

    decompressobj = zlib.decompressobj
    monkeypatch.setattr(zlib, "decompressobj", Counting)
    check_image(black_png((8, 8), False, -(64 << 20)), ImageSettings())
    assert 0 < seen <= 1 << 20


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_black_png_has_all_its_rows(interlaced: bool) -> None:
    """Pillow leaves the rows black for which it finds no data."""
    for size in ((width, height) for width in (1, 2, 4, 5, 9) for height in (1, 2, 3, 5, 9)):
        check_image(black_png(size, interlaced, 0), ImageSettings())
        with pytest.raises(ImageFault, match="truncated"):
            check_image(black_png(size, interlaced, 1 + size[0]), ImageSettings())


def test_uncompressed_tiffs_of_other_layouts() -> None:
    """Pillow's own reader takes the first for RGBX, the bytes of the others for 8-bit values."""
    ycbcr = tiff([bytes([150, 100, 160]) * 16] * 8, (16, 8), {262: (6,), 530: (1, 1)})
    planes = [struct.pack("<128H", *[257 * value] * 128) for value in (200, 90, 30)]
    deep = tiff(planes, (16, 8), {258: (16,) * 3, 278: (8,), 284: (2,)})
    grey = {258: (8,), 262: (0,), 277: (1,), 278: (8,), 284: (2,)}
    inverse = tiff([b"\x37" * 128], (16, 8), grey)
    settings = ImageSettings(quality=100, conversion=Conversion(gray16="full"))
    for data, colour in ((ycbcr, (195, 137, 100)), (deep, (200, 90, 30)), (inverse, (200,) * 3)):
        stored = Image.open(io.BytesIO(check_image(data + bytes(500), settings).data))
        assert np.abs(np.asarray(stored.convert("RGB")).astype(int) - colour).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM"])
def test_any_damage_ends_in_an_image_or_a_reason(kind: str) -> None:
    """Random bytes in every format: never another exception, never an unreadable result."""
    draw = np.random.default_rng(0)
    whole = encode(picture(1).quantize() if kind == "GIF" else picture(1), kind)
    faults = 0
    for _ in range(150):
        data = bytearray(whole)
        for place in draw.integers(0, min(len(data), 600), draw.integers(1, 6)):
            data[place] = draw.integers(256)
        data = data[: draw.integers(len(data) // 2, len(data) * 2)]
        try:
            checked = check_image(bytes(data), ImageSettings())
        except ImageFault as fault:
            assert str(fault)  # noqa: PT017
            faults += 1
            continue
        image = Image.open(io.BytesIO(checked.data))
        image.load()
        assert image.size == (checked.width, checked.height)
        assert image.mode in ("L", "RGB")
    assert 0 < faults <= 150
    assert (faults == 150) == (kind == "PNG")  # which has checksums


@pytest.mark.skipif(features.check("webp"), reason="this Pillow reads WebP")
def test_webp_without_a_decoder_is_named() -> None:
    with pytest.raises(ImageFault, match="WebP image, which this build of Pillow cannot read"):
        check_image(b"RIFF\x24\0\0\0WEBPVP8 " + bytes(24), ImageSettings())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"this is text", "not an image in a known format"),
        (jpeg(1, (64, 64))[:-300], "truncated"),
        (jpeg(1, (64, 64))[:-2], "truncated"),
        (jpeg(1, (64, 64))[:40] + b"\xff\xd9", ""),
        (encode(picture(1, (64, 64)), "PNG")[:-60], "truncated"),
        (encode(picture(1, (64, 64)), "PNG")[:60], ""),
    ],
)
def test_unusable_images_are_refused_or_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, reason: str
) -> None:
    source = image_tree(tmp_path / "s", {"a": 3, "b": 3})
    (source / "a" / "bad.JPEG").write_bytes(data)
    assert main([str(source), str(tmp_path / "d"), *SMALL]) == 2
    errors = capsys.readouterr().err.splitlines()[-1]
    assert errors.startswith(f"error: {source}/a/bad.JPEG: ")
    assert reason in errors
    assert not (tmp_path / "d" / "manifest.json").exists()
    # The same job resumes when the user decides to leave the image out.
    make(source, tmp_path / "d", "--resume", "--on-error", "skip")
    ((name, (what, listed)),) = report(tmp_path / "d").items()
    assert (name, what) == ("a/bad.JPEG", "skipped")
    assert reason in listed
    assert "a/bad.JPEG" not in read_manifest(tmp_path / "d").names
    assert read_manifest(tmp_path / "d").samples == 6


def test_a_damaged_jpeg_that_still_decodes_is_kept_and_reported(tmp_path: Path) -> None:
    source = image_tree(tmp_path / "s", {"a": 2})
    data = jpeg(3, (64, 64))
    damaged = data[:-2] + b"\x11" * 64 + data[-2:]  # extraneous bytes before the end
    (source / "a" / "odd.JPEG").write_bytes(damaged)
    dest = make(source, tmp_path / "d")
    what, reason = report(dest)["a/odd.JPEG"]
    assert what == "damaged"
    assert "extraneous bytes" in reason
    assert read_manifest(dest).samples == 3


def test_headers_only_is_a_choice_that_sees_less(tmp_path: Path) -> None:
    source = image_tree(tmp_path / "s", {"a": 2})
    data = jpeg(3, (64, 64))
    scan = data.rindex(b"\xff\xda") + 40  # the second half of the picture is lost
    (source / "a" / "bad.JPEG").write_bytes(data[:scan] + b"\xff\xd9")
    assert main([str(source), str(tmp_path / "d"), *SMALL, "--on-error", "skip"]) == 0
    assert [what for what, _ in report(tmp_path / "d").values()] in (["skipped"], ["damaged"])
    dest = make(source, tmp_path / "e", "--check", "headers")
    assert read_manifest(dest).samples == 3
    assert report(dest) == {}
    (source / "a" / "bad.JPEG").write_bytes(data[:-40])  # a cut is seen in any case
    assert main([str(source), str(tmp_path / "f"), *SMALL, "--check", "headers"]) == 2


def test_resizing_and_quality(tmp_path: Path) -> None:
    source = tmp_path / "s"
    (source / "a").mkdir(parents=True)
    for name, size in (("wide", (300, 100)), ("high", (90, 200)), ("small", (40, 30))):
        (source / "a" / f"{name}.jpg").write_bytes(jpeg(1, size))
    expected = {
        ("--resize-shorter", "60"): [(180, 60), (60, 133), (40, 30)],
        ("--max-side", "100"): [(100, 33), (45, 100), (40, 30)],
        ("--resize-shorter", "60", "--max-side", "90"): [(90, 30), (40, 90), (40, 30)],
        ("--quality", "50"): [(300, 100), (90, 200), (40, 30)],
    }
    for number, (options, sizes) in enumerate(expected.items()):
        dest = make(source, tmp_path / f"d{number}", *options)
        manifest = read_manifest(dest)
        found = {
            name: (int(row["width"]), int(row["height"]))
            for name, row in zip(manifest.names, manifest.index, strict=True)
        }
        assert [found[f"a/{name}.jpg"] for name in ("wide", "high", "small")] == sizes
        image = manifest.made["options"]["image"]
        for flag, value in zip(options[::2], options[1::2], strict=True):
            assert image[flag[2:].replace("-", "_")] == int(value)
        for name, sample in zip(manifest.names, read_samples(dest), strict=True):
            stored = Image.open(io.BytesIO(sample["jpg"]))
            assert stored.size == found[name]
            original = Image.open(source / name)
            reference = original.resize(stored.size, Image.Resampling.BICUBIC)
            assert psnr(stored, reference) > 30
            unchanged = sample["jpg"] == (source / name).read_bytes()
            assert unchanged == (name == "a/small.jpg" and options[0] != "--quality")
