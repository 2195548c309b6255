"""Our reader of Huffman codes against libjpeg's: the same pixels, the same damage found."""

import contextlib
import io

import numpy as np
import pytest
from flat_jpeg import flat_jpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from image_corpus import corpus
from PIL import Image
from shard_samples import encode

from pipeline.data import jpeg

pytestmark = pytest.mark.skipif(jpeg._jpegcrop is None, reason="the extension is not built")
READ = ("plain", "grey", "one pixel", "restart", "rgb", "sampling 420", "sampling 440")
OTHERS = ("progressive", "scans 444")  # of several scans: libjpeg reads them
SIZE = 24


def noisy(size: tuple[int, int], quality: int, mode: str = "RGB", **options: object) -> bytes:
    """A picture whose blocks have none to 64 coefficients, and codes of up to 16 bits."""
    draw = np.random.default_rng(quality)
    shape = (size[1], size[0], 3) if mode == "RGB" else size[::-1]
    strength = draw.choice([0, 3, 20, 90], (size[1] // 8 + 1, size[0] // 8 + 1))
    strength = np.kron(strength, np.ones((8, 8)))[: size[1], : size[0]]
    noise = draw.normal(0, 1, shape) * (strength[..., None] if mode == "RGB" else strength)
    image = Image.fromarray((128 + noise).clip(0, 255).astype(np.uint8), mode=mode)
    return encode(image, quality=quality, **options)


FILES = {
    "4:4:4": noisy((90, 70), 96, subsampling=0, optimize=True),
    "4:4:4, finest": noisy((90, 70), 100, subsampling=0),
    "4:2:0": noisy((90, 70), 80, optimize=True),
    "4:2:2, restarts": noisy((90, 70), 60, subsampling=1, restart_marker_blocks=1),
    "4:4:4, restarts": noisy((90, 70), 90, subsampling=0, restart_marker_blocks=5),
    "4:1:1, restarts": noisy((90, 70), 30, subsampling="4:1:1", restart_marker_rows=1),
    "grey": noisy((90, 70), 100, "L"),
    "grey, restarts": noisy((90, 70), 75, "L", restart_marker_blocks=4),
}


def run(data: bytes, corners: tuple[int, int, int, int], entropy: bool) -> tuple[object, bool]:
    """(the pixels, or what is wrong with the file; whether it was our reader that read it)."""
    out = np.full((SIZE, SIZE, 3), 77, np.uint8)
    try:
        ours = jpeg._jpegcrop.decode(data, out, SIZE, *corners, True, False, True, True, entropy)
    except (ValueError, OverflowError) as error:
        return str(error), False
    return out.tobytes(), ours


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(list(FILES)), corners=st.tuples(*[st.floats(0, 1)] * 4))
def test_any_rectangle_has_libjpegs_pixels(name: str, corners: tuple[float, ...]) -> None:
    (left, right), (top, bottom) = sorted(corners[:2]), sorted(corners[2:])
    box = (int(left * 89), int(top * 69), int(right * 89) + 1, int(bottom * 69) + 1)
    pixels, ours = run(FILES[name], box, True)
    assert ours
    assert (pixels, False) == run(FILES[name], box, False)


def test_every_kind_of_file_has_libjpegs_pixels() -> None:
    read = set()
    for name, (data, _) in corpus().items():
        with contextlib.suppress(ValueError, OverflowError):
            width, height = jpeg._jpegcrop.size(data)
            seen, ours = run(data, (0, 0, width, height), True)
            assert seen == run(data, (0, 0, width, height), False)[0], name
            read |= {name} if ours else set()
    assert {f"jpeg {kind}" for kind in READ} <= read
    assert read.isdisjoint(f"jpeg {kind}" for kind in OTHERS)


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(list(FILES)),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_libjpeg_judges_what_is_damaged(name: str, edits: list[tuple[float, int]]) -> None:
    data = bytearray(FILES[name])
    for place, value in edits:
        data[2 + int((len(data) - 3) * place)] = value
    box = (0, 0, 90, 70)
    assert run(bytes(data), box, True)[0] == run(bytes(data), box, False)[0]


def test_what_no_pixel_needs_is_not_read() -> None:
    """Damage between two restart markers matters where a wanted pixel is between them."""
    data, row, interval = FILES["4:4:4, restarts"], 12, 5  # MCUs
    marks = [at for at in range(len(data) - 1) if data[at] == 0xFF and 0xD0 <= data[at + 1] < 0xD8]
    assert len(marks) == -(-row * 9 // interval) - 1
    box, untouched = (0, 40, 8, 48), 0
    clean, _ = run(data, box, True)
    for piece, at in enumerate(marks[:-1], 1):
        mcus = [divmod(piece * interval + i, row) for i in range(interval)]
        damaged = data[: at + 2] + b"\xaa" * 6 + data[at + 8 :]
        seen, _ = run(damaged, box, True)
        assert (seen == clean) == ((5, 0) not in mcus)  # 4:4:4 needs no neighbours
        untouched += seen == clean
    assert untouched > 3


BLOCKS = {"restart_marker_blocks": 3}
SAMPLED = {
    "4:4:4": noisy((90, 70), 90, subsampling=0),
    "4:4:4, restarts": noisy((90, 70), 90, subsampling=0, **BLOCKS),
    "4:2:2": noisy((90, 70), 90, subsampling=1),
    "4:2:2, restarts": noisy((90, 70), 90, subsampling=1, **BLOCKS),
    "4:2:0": noisy((90, 70), 90, subsampling=2),
    "4:2:0, restarts": noisy((90, 70), 90, subsampling=2, **BLOCKS),
    "4:4:0": flat_jpeg(90, 70, [(1, 2), (1, 1), (1, 1)]),
    "4:1:1": flat_jpeg(90, 70, [(4, 1), (1, 1), (1, 1)]),
}


@pytest.mark.parametrize("kind", SAMPLED)
def test_a_rectangle_has_the_pixels_of_the_whole_picture(kind: str) -> None:
    """At its own size, so that no filter hides a difference."""
    data = SAMPLED[kind]
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    draw = np.random.default_rng(0)
    places = [(1, left, top) for left in (0, 89) for top in range(70)]
    for size in draw.integers(1, 40, 150).tolist():
        places.append((size, *(int(draw.integers(0, side - size + 1)) for side in (90, 70))))
    for size, left, top in places:
        out = np.zeros((size, size, 3), np.uint8)
        corners = (left, top, left + size, top + size)
        assert jpeg._jpegcrop.decode(data, out, size, *corners, True, False, True)
        assert (out == whole[top : top + size, left : left + size]).all()
