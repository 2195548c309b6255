"""Every decoder against Pillow: kinds of files, rectangles, damage."""

import contextlib
import io
import itertools
import struct

import numpy as np
import pytest
from flat_jpeg import flat_jpeg
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_samples import encode
from skimage import data as photographs

from pipeline.data import jpeg as decode
from pipeline.data.crops import Box, CentreCrop, Crop
from pipeline.data.jpeg import DecodeError, available, decoder
from pipeline.errors import UserError
from shard_tools.image_file import ImageFault, read_header

PICTURE = Image.fromarray(photographs.coffee()).resize((90, 70))
DECODERS = available()
FAST = [name for name in DECODERS if name != "pillow"]
SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
needs_extension = pytest.mark.skipif(
    decode._jpegcrop is None, reason="the extension is not built (no compiler or no jpeglib.h)"
)


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(photographs.astronaut()).crop((60, 0, 310, 187))


def run(name: str, data: bytes, box: Box | None = None, size: int = 64, flip: bool = False,
        interpolation: str = "bicubic") -> np.ndarray:  # fmt: skip
    out = np.full((size, size, 3), 77, np.uint8)
    choose = lambda w, h: (box or Box(0, 0, w, h), flip)  # noqa: E731
    decoder(name)[1](data, choose, out, interpolation)
    return out


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-6)))


def test_auto_is_the_fastest() -> None:
    assert decoder()[0] == DECODERS[0]
    assert DECODERS[-1] == "pillow"
    with pytest.raises(UserError, match="decoder 'x' is not available here: use auto or one of"):
        decoder("x")


@pytest.mark.parametrize("name", FAST)
def test_random_crops_equal_pillows(name: str, photograph: Image.Image) -> None:
    data, rng = encode(photograph, quality=95), np.random.default_rng(0)
    figures = []
    for _ in range(60):
        box, flip = Crop(64).choose(rng.random(Crop.UNIFORMS).tolist())(*photograph.size)
        figures.append(psnr(run(name, data, box, flip=flip), run("pillow", data, box, flip=flip)))
    assert np.median(figures) > 60
    assert min(figures) > 50


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [1, 7, 200, 500])
def test_sizes_up_and_down(name, size, interpolation, photograph) -> None:
    data = encode(photograph, quality=90)
    for box in (None, Box(100, 50, 101, 51), Box(0, 0, 3, 187), Box(241, 180, 250, 187)):
        ours = run(name, data, box, size, True, interpolation)
        theirs = run("pillow", data, box, size, True, interpolation)
        assert np.abs(ours.astype(int) - theirs).max() <= 3, box
        assert psnr(ours, theirs) > 50


KINDS = list(itertools.product(SUBSAMPLINGS, (False, True), ("RGB", "L")))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(("subsampling", "progressive", "mode"), KINDS)
def test_kinds_of_jpeg(name, subsampling, progressive, mode, photograph) -> None:
    options = {"subsampling": SUBSAMPLINGS[subsampling], "progressive": progressive}
    data = encode(photograph.convert(mode), quality=90, **options)
    for box in (None, Box(37, 41, 150, 171), Box(16, 16, 80, 80), Box(200, 9, 250, 187)):
        ours, theirs = run(name, data, box), run("pillow", data, box)
        assert np.abs(ours.astype(int) - theirs).max() <= 3, box
        assert psnr(ours, theirs) > 50


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_no_colour_jpeg_is_decoded_as_by_pillow(name: str, photograph) -> None:
    files = {
        "cmyk": encode(photograph.convert("CMYK")),
        "png": encode(photograph, "PNG"),
        "rgba png": encode(photograph.convert("RGBA"), "PNG"),
        "palette": encode(photograph.quantize(16), "PNG"),
        "gif": encode(photograph, "GIF"),
        "bmp": encode(photograph, "BMP"),
    }
    for kind, data in files.items():
        expected = Image.open(io.BytesIO(data)).convert("RGB").resize((64, 64), 3)
        assert np.array_equal(run(name, data), np.asarray(expected)), kind


@needs_extension
@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 70), height=st.integers(1, 70), size=st.integers(1, 40),
    subsampling=st.sampled_from([0, 1, 2, "4:1:1"]), progressive=st.booleans(),
    restart=st.integers(0, 3), corners=st.tuples(*[st.floats(0, 1)] * 4),
    inside=st.booleans(), flip=st.booleans(), cubic=st.booleans(), grey=st.booleans(),
)  # fmt: skip
def test_any_rectangle_of_any_picture(
    width, height, size, subsampling, progressive, restart, corners, inside, flip, cubic, grey
) -> None:
    """The extension against Pillow, and its AVX-512, AVX2 and scalar loops."""
    rng = np.random.default_rng(width * 71 + height)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    picture = small.resize((width, height), Image.Resampling.BICUBIC)
    data = encode(
        picture.convert("L" if grey else "RGB"), quality=85, subsampling=subsampling,
        progressive=progressive, restart_marker_rows=restart,
    )  # fmt: skip
    x, y = sorted(corners[:2]), sorted(corners[2:])
    if inside:
        left, top = int(x[0] * (width - 1)), int(y[0] * (height - 1))
        right, bottom = (
            left + 1 + int(x[1] * (width - left - 1)),
            top + 1 + int(y[1] * (height - top - 1)),
        )
    else:
        left, right, top, bottom = x[0] * width, x[1] * width, y[0] * height, y[1] * height
        if right - left < 0.5 or bottom - top < 0.5:
            left, top, right, bottom = 0, 0, width, height
    box = Box(left, top, right, bottom, inside)
    kind = "bicubic" if cubic else "bilinear"
    ours, theirs = (
        run("jpegcrop", data, box, size, flip, kind),
        run("pillow", data, box, size, flip, kind),
    )
    assert np.abs(ours.astype(int) - theirs).max() <= 4
    for simd in (0, 1):
        other = np.zeros_like(ours)
        decode._jpegcrop.decode(
            data, other, size, left, top, right, bottom, inside, flip, cubic, simd
        )
        assert np.array_equal(ours, other)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (257, 256), (40, 900)])
def test_centre_crop_is_resize_then_crop(name, shape, photograph) -> None:
    picture = photograph.resize(shape, Image.Resampling.BICUBIC)
    data = encode(picture, quality=95)
    crop = CentreCrop(image_size=56, resize=64)
    box, flip = crop(*shape)
    ours = run(name, data, box, 56, flip)
    wide, high = 64 * shape[0] // min(shape), 64 * shape[1] // min(shape)
    left, top = round((wide - 56) / 2), round((high - 56) / 2)
    resized = Image.open(io.BytesIO(data)).resize((wide, high), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((left, top, left + 56, top + 56)))
    assert psnr(ours, expected) > 50


def test_impossible_crops_fall_back_to_the_centre() -> None:
    for width, height in ((1, 1), (1, 5000), (5000, 1), (3, 2)):
        box, _ = Crop().choose([0.999] * 23)(width, height)
        assert 0 <= box.left < box.right <= width
        assert 0 <= box.top < box.bottom <= height
    with pytest.raises(UserError, match="resize 200 is smaller than image_size 224"):
        CentreCrop(224, 200)


@pytest.mark.parametrize("name", DECODERS)
def test_truncated_files_are_errors(name: str, photograph: Image.Image) -> None:
    data = encode(photograph, quality=80)
    for length in [0, 1, 2, 3, 20, 200, 400, 700, len(data) // 2, len(data) - 200]:
        with pytest.raises(DecodeError) as error:
            run(name, data[:length])
        assert str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\0" * 500, b"\xff\xd8" * 90]
)
def test_no_images(name: str, data: bytes) -> None:
    with pytest.raises(DecodeError):
        run(name, data)


@pytest.mark.parametrize("name", DECODERS)
def test_decompression_bombs_are_refused(name: str, photograph: Image.Image) -> None:
    data = encode(photograph.resize((64, 64)))
    at = data.index(b"\xff\xc0") + 5  # height and width in the frame header
    bomb = data[:at] + struct.pack(">HH", 60000, 60000) + data[at + 4 :]
    with pytest.raises(DecodeError, match=r"60000x60000 pixels are more than|exceeds limit"):
        run(name, bomb)


def test_the_limit_of_pixels_is_the_last_that_is_accepted() -> None:
    data = flat_jpeg(16, 16)
    at = data.index(b"\xff\xc0") + 5
    sizes = {(9459, 9459): True, (9460, 9459): False, (1, 65_500): True, (1, 65_501): False}
    for (height, width), good in sizes.items():
        declared = data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]
        if good:
            header = read_header(declared)
            assert (header.width, header.height) == (width, height)
        else:
            with pytest.raises(ImageFault, match=f"{width}x{height} pixels"):
                read_header(declared)


def many_scans(count: int) -> bytes:
    """A valid baseline colour file with one scan per component, the first one `count` times."""
    grey = encode(PICTURE.convert("L").resize((16, 16)))
    frame, start = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    tables_end = frame + 2 + struct.unpack(">H", grey[frame + 2 : frame + 4])[0]
    components = bytes([3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    header = b"\xff\xc0" + struct.pack(">HBHH", 17, 8, 16, 16) + components
    scan = [
        b"\xff\xda\0\x08\x01" + bytes([c, 0, 0, 63, 0]) + grey[start + 10 : -2] for c in (1, 2, 3)
    ]
    file = grey[:frame] + header + grey[tables_end:start] + scan[0] * count + scan[1] + scan[2]
    return file + b"\xff\xd9"


@pytest.mark.parametrize("name", DECODERS)
def test_too_many_scans_are_refused(name: str) -> None:
    seen, wanted = (
        run(*case).astype(int) for case in ((name, many_scans(3)), ("pillow", many_scans(1)))
    )
    assert np.abs(seen - wanted).max() <= 1  # Pillow and pillow-simd round differently
    with pytest.raises(DecodeError, match="more than 500 scans"):
        run(name, many_scans(600))


@needs_extension
def test_the_extension_refuses_wrong_arguments(photograph: Image.Image) -> None:
    data, out = encode(photograph), np.zeros((8, 8, 3), np.uint8)
    call = decode._jpegcrop.decode
    for corners in (
        (-1, 0, 5, 5),
        (0, 0, 251, 5),
        (5, 0, 5, 5),
        (0, 6, 5, 5),
        (float("nan"), 0, 5, 5),
    ):
        with pytest.raises(ValueError, match="rectangle outside the 250x187 picture"):
            call(data, out, 8, *corners, True, False, True)
    for corners in ((0, 0, 0.5, 0.5), (249.7, 186.2, 250, 187), (1e-9, 0, 2e-9, 187)):
        call(data, out, 8, *corners, True, False, True)  # fractions inside: the pixels they touch
    for size in (0, 7, 9, -8, 2**30):
        with pytest.raises(TypeError):
            call(data, out, size, 0, 0, 5, 5, True, False, True)
    for wrong in (bytes(192), out[:, ::2]):
        with pytest.raises((TypeError, BufferError, ValueError)):
            call(data, wrong, 8, 0, 0, 5, 5, True, False, True)


VICTIMS = [
    encode(PICTURE, quality=70, **options)
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1})
] + [encode(PICTURE.convert("L")), encode(PICTURE.convert("CMYK"))]


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    victim=st.sampled_from(VICTIMS),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.floats(0.02, 1),
    corner=st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)),
)
@example(victim=VICTIMS[1], edits=[(0.5, 255), (0.51, 0xDA)], cut=1.0, corner=(0, 0))
def test_damage_never_ends_the_process(name, victim, edits, cut, corner) -> None:
    """Pixels or DecodeError, whatever the bytes: most edits hit headers and tables."""
    data = bytearray(victim[: max(4, int(len(victim) * cut))])
    for place, value in edits:
        data[2 + int((len(data) - 3) * place**2)] = value
    crop = lambda w, h: (Box(int(corner[0] * w), int(corner[1] * h), w, h), False)  # noqa: E731
    out = np.zeros((24, 24, 3), np.uint8)
    with contextlib.suppress(DecodeError):
        decoder(name)[1](bytes(data), crop, out, "bicubic")


def test_fallback_decodes_without_the_extension(photograph: Image.Image) -> None:
    """What a machine without a compiler uses gives the same pictures."""
    data, box = encode(photograph, quality=95), Box(20, 30, 180, 170)
    pictures = [run(name, data, box) for name in DECODERS]
    for picture in pictures[1:]:
        assert psnr(picture, pictures[0]) > 50
