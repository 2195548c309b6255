"""The walk over entropy-coded data: what it calls sound, libjpeg decodes without a warning."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from flat_jpeg import flat_jpeg
from hypothesis import given
from hypothesis import strategies as st
from image_corpus import corpus
from PIL import Image
from shard_samples import encode, picture

from shard_tools.image_file import ImageFault, read_header, sound, sound_until
from shard_tools.sharding.images import CheckedImage, ImageSettings, check_image, decode_fully

pytestmark = pytest.mark.skipif(sound._jpegcheck is None, reason="the walk is not built")

# Kinds that most collections consist of: for these libjpeg must not be asked.
WALKED = (
    "plain", "grey", "one pixel", "restart", "rgb", "oriented", "extended", "thumbnail",
    "trailing zeros", "trailing cut jpeg", "mpo", "broken exif", "short jfif", "sampling 420",
    "sampling 422", "sampling 440", "sampling 411", "sampling 442", "sampling grey 33",
)  # fmt: skip
OTHERS = ("progressive", "scans 444", "motion jpeg", "fill bytes", "junk between segments")


def noisy(size: tuple[int, int], quality: int, mode: str = "RGB", **options: object) -> bytes:
    """A picture whose blocks have up to 64 coefficients, and codes of up to 16 bits."""
    draw = np.random.default_rng(quality)
    shape = (size[1], size[0], 3) if mode == "RGB" else size[::-1]
    picture = draw.normal(128, 60, shape) * draw.integers(0, 2, (size[1], 1, 1)[: len(shape)])
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8), mode=mode)
    return encode(image, quality=quality, **options)


FILES = {
    "4:2:0": noisy((40, 24), 70),
    "4:4:4": noisy((24, 24), 96, subsampling=0, optimize=True),
    "4:2:2, restarts": noisy((40, 24), 50, subsampling=1, restart_marker_blocks=1),
    "4:1:1, restarts": noisy((64, 16), 30, subsampling="4:1:1", restart_marker_rows=1),
    "grey": noisy((24, 24), 100, "L"),
    "smooth": encode(picture(1, (17, 61)), quality=60, optimize=True),
    "flat": flat_jpeg(17, 61, [(1, 2), (1, 1), (1, 1)]),
}


def end_of(data: bytes) -> int:
    (end,) = sound_until([data])
    return end


def warned(data: bytes) -> bool:
    """Whether libjpeg has a remark on a file, or it is refused before libjpeg sees it."""
    checked = verdict(data)
    return isinstance(checked, str) or bool(checked.damage)


def verdict(data: bytes) -> CheckedImage | str:
    try:
        return check_image(data, ImageSettings())
    except ImageFault as fault:
        return str(fault)


def damaged(data: bytes, count: int) -> list[bytes]:
    """`data` with one to three bytes changed, lost or doubled, mostly in the scan."""
    draw = np.random.default_rng(len(data))
    files = []
    for _ in range(count):
        made = bytearray(data)
        for _ in range(draw.integers(1, 4)):
            at = int(draw.integers(2, len(made)) if draw.random() < 0.7 else draw.integers(2, 700))
            at = min(at, len(made) - 1)
            kind = draw.integers(4)
            if kind == 0:
                del made[at]
            elif kind == 1:
                made.insert(at, made[at])
            else:
                made[at] ^= 1 << draw.integers(8) if kind == 2 else draw.integers(256)
        files.append(bytes(made))
    return files


def test_what_the_corpus_holds() -> None:
    for name in WALKED:
        data, word = corpus()[f"jpeg {name}"]
        assert word == "same"
        end = end_of(data)
        assert data[end : end + 2] == b"\xff\xd9", name
        header = read_header(data)
        assert read_header(data, sound=end) == header, name
    for name, (data, word) in corpus().items():
        with contextlib.suppress(ImageFault):
            read_header(data)
            assert end_of(data) < 0 or word in ("same", "converted"), name
    assert all(end_of(corpus()[f"jpeg {name}"][0]) < 0 for name in OTHERS)


@pytest.mark.parametrize("name", list(FILES))
def test_damage_is_found_as_libjpeg_finds_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the walk and without, every damaged file gets the same verdict and the same remark."""
    whole = FILES[name]
    assert end_of(whole) == len(whole) - 2
    files = [*damaged(whole, 1500), *(whole[:n] for n in range(0, len(whole), 7))]
    ends = sound_until(files)
    assert ends == [end_of(data) for data in files]  # whatever is walked beside it
    calls = [end >= 0 for end in ends]
    with_walk = [verdict(data) for data in files]
    monkeypatch.setattr(sound, "_jpegcheck", None)
    assert [verdict(data) for data in files] == with_walk
    fine = [not warned(data) for data in files]
    assert not any(call and not good for call, good in zip(calls, fine, strict=True))
    assert sum(calls) > 50  # a quantiser, an extra bit: nothing that could be seen
    assert sum(fine) < 0.7 * len(files)


def test_each_bit_of_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FILES["4:2:0"]
    start = whole.index(b"\xff\xda") + 14
    for bit in range(8 * start, 8 * len(whole), 3):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        if end_of(bytes(data)) >= 0:
            with monkeypatch.context() as patch:
                patch.setattr(sound, "_jpegcheck", None)
                assert not warned(bytes(data)), bit


def test_each_symbol_of_a_huffman_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another symbol behind a code: too many bits, an unknown run, an end, a row of zeros."""
    files = []
    for whole in (FILES["smooth"], FILES["4:2:2, restarts"]):
        at = whole.index(b"\xff\xc4")
        for place in range(at + 4, whole.index(b"\xff\xda")):
            for symbol in (0x0B, 0x0F, 0x5D, 0x50, 0x00, 0xF0):
                files.append(whole[:place] + bytes([symbol]) + whole[place + 1 :])
    called = [data for data in files if end_of(data) >= 0]
    assert 0 < len(called) < 0.7 * len(files)
    monkeypatch.setattr(sound, "_jpegcheck", None)
    assert not any(warned(data) for data in called)


def test_a_sound_file_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("shard_tools.image_file.sound.simplejpeg.decode_jpeg", decode)
    data = FILES["4:4:4"]
    assert check_image(data, ImageSettings()) == CheckedImage(data, 24, 24)
    assert decode_fully(data, end_of(data)) == ""
    with pytest.raises(AssertionError):
        check_image(corpus()["jpeg progressive"][0], ImageSettings())


def test_files_are_walked_together_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any number, sound or not, of any length."""
    whole = list(FILES.values())
    cut = [data[:-9] for data in whole]
    files = [*whole[:3], b"", *cut, *whole, *whole[::-1], b"GIF89a", whole[0]]
    expected = [len(data) - 2 if data in whole else -1 for data in files]
    for count in range(len(files) + 1):
        assert sound_until(files[:count]) == expected[:count]
    monkeypatch.setattr(sound, "_TOGETHER", 4)
    for limit in (1, 3000, 1 << 20):
        monkeypatch.setattr(sound, "_BYTES", limit)
        walked = list(sound.walk_ahead((data, number) for number, data in enumerate(files)))
        assert walked == list(zip(files, expected, range(len(files)), strict=True))
    assert list(sound.walk_ahead([(whole[0], "a")], walk=False)) == [(whole[0], -1, "a")]


@given(
    data=st.lists(st.sampled_from([b"\xff", b"\0", b"\xd0", b"\xd7", b"\xd8", b"\1", b"a"])),
    start=st.integers(0, 30),
)
def test_the_extension_finds_the_same_markers(data: list[bytes], start: int) -> None:
    joined = b"".join(data)
    assert sound._jpegcheck.next_marker(joined, start) == sound.search_marker(joined, start)


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xda\0\2", bytes(50)])
def test_what_is_hardly_a_file(data: bytes) -> None:
    assert end_of(data) == -1


def test_remarks_of_libjpeg_on_segments_are_kept() -> None:
    """A JFIF of another revision and an unknown Adobe transform are remarks of libjpeg."""
    data = FILES["smooth"]
    at = data.index(b"JFIF\0") + 5
    assert end_of(data[:at] + b"\2" + data[at + 1 :]) == -1
    adobe = b"\xff\xee\0\x0eAdobe\0d\0\0\0\0"
    ends = [end_of(data[:2] + adobe + bytes([n]) + data[2:]) for n in range(4)]
    assert [end >= 0 for end in ends] == [True, True, False, False]
