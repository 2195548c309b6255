"""Every kind of image file through every tool: one verdict, one picture."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from flat_jpeg import flat_jpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from image_corpus import WORDS, corpus
from PIL import Image
from shard_samples import SMALL, encode, flipped, picture, read_samples, report, tar_of

from pipeline.data.crops import Box
from pipeline.data.jpeg import DecodeError, available, decoder
from shard_tools import index_shards, make_shards
from shard_tools.image_file import ImageFault
from shard_tools.manifest import read_manifest
from shard_tools.sharding.images import ImageSettings, check_image
from shard_tools.verify_shards import verify

KEYS = {f"{number:03d}": name for number, name in enumerate(corpus())}  # safe as file names
each_file = pytest.mark.parametrize("name", list(corpus()))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of the corpus in one class folder, sharded with the bad ones left out."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "s" / "c").mkdir(parents=True)
    for key, name in KEYS.items():
        (folder / "s" / "c" / f"{key}.jpg").write_bytes(corpus()[name][0])
    options = [str(folder / "s"), str(folder / "d"), *SMALL, "--on-error", "skip"]
    assert make_shards.main(options) == 0
    return folder / "d"


@pytest.fixture(scope="module")
def adopted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adopted")
    tar_of(folder / "t.tar", {f"{key}.jpg": corpus()[name][0] for key, name in KEYS.items()})
    assert index_shards.main([str(folder), "--workers", "1", "--on-error", "skip"]) == 0
    return folder


def crop(how: str, data: bytes, box: Box | None = None) -> np.ndarray:
    out = np.zeros((32, 32, 3), np.uint8)
    decoder(how)[1](data, lambda w, h: (box or Box(0, 0, w, h), False), out, "bicubic")
    return out


def test_sharding_gives_every_file_its_verdict(made: Path) -> None:
    found = {KEYS[name[2:5]]: entry for name, entry in report(made).items()}
    samples = {KEYS[json.loads(s["json"])["name"][2:5]]: s["jpg"] for s in read_samples(made)}
    for name, (data, verdict) in corpus().items():
        what, reason = found.get(name, ("same", ""))
        if verdict in ("same", "converted", "damaged"):
            assert what == verdict, (name, reason)
            assert (samples[name] == data) == (verdict != "converted"), name
        else:
            assert what == "skipped", (name, what)
            assert verdict in reason or verdict in WORDS, (name, reason)
            assert name not in samples
    assert verify(str(made), decode=True, workers=1)[0] == []


def test_headers_only_keeps_what_is_undecodable(tmp_path: Path) -> None:
    (tmp_path / "s" / "c").mkdir(parents=True)
    for key in ("jpeg plain", "jpeg broken table"):
        (tmp_path / "s" / "c" / f"{key}.jpg").write_bytes(corpus()[key][0])
    arguments = [str(tmp_path / "s"), str(tmp_path / "d"), *SMALL, "--check", "headers"]
    assert make_shards.main(arguments) == 0
    assert read_manifest(tmp_path / "d").made["pixels"]["images"] == 1
    assert len(verify(str(tmp_path / "d"), decode=True, workers=1)[0]) == 1


def test_adopting_and_verifying_give_the_same_verdicts(adopted: Path) -> None:
    found = {KEYS[key.rpartition("/")[2]]: reason for key, (_, reason) in report(adopted).items()}
    faults, remarks = verify(str(adopted), decode=True, workers=1)
    rows = read_manifest(adopted).index
    assert len(rows) == len(corpus()) - len(found)
    for name, (_, verdict) in corpus().items():
        key = next(key for key, other in KEYS.items() if other == name)
        about = f"sample {key!r}: "
        faulty = any(about in fault for fault in faults)
        assert any(about in remark for remark in remarks) == (verdict == "damaged"), name
        if verdict in WORDS:
            assert name not in found, (name, found[name])
            assert faulty == (verdict == "undecodable"), (name, faults)
        else:
            assert verdict in found[name], name


@each_file
def test_every_decoder_gives_the_same_verdict(name: str) -> None:
    data, verdict = corpus()[name]
    for how in available():
        if verdict in ("same", "converted", "damaged"):
            crop(how, data)
        else:
            with pytest.raises(DecodeError) as error:
                crop(how, data)
            assert verdict in str(error.value) or verdict in WORDS


@each_file
def test_the_decoders_agree_with_what_pillow_reads(name: str) -> None:
    data, verdict = corpus()[name]
    if verdict not in ("same", "converted"):
        return
    image = Image.open(io.BytesIO(data)) if not re.search("broken|short|junk", name) else None
    width, height = (61, 45) if image is None else image.size
    boxes = [Box(0, 0, width, height)]
    if min(width, height) > 40:
        boxes += [Box(17, 13, 50, 40), Box(40, 20, 61, 45), Box(0, 30, 9, 45)]
    for box in boxes:
        crops = [crop(how, data, box).astype(int) for how in available()]
        if image is not None:
            corners = (box.left, box.top, box.right, box.bottom)
            exact = image.convert("RGBA").convert("RGB") if image.info else image.convert("RGB")
            crops.append(np.asarray(exact.crop(corners).resize((32, 32), 3)).astype(int))
        for other in crops[1:]:
            assert np.abs(crops[0] - other).max() <= 6, box
            assert np.abs(crops[0] - other).mean() < 1, box


def small(kind: str, **options: object) -> bytes:
    return encode(picture(1, (17, 61)), kind, **options)


SMALL_FILES = {
    "baseline": small("JPEG", quality=60),
    "progressive": small("JPEG", quality=60, progressive=True),
    "4:1:1": small("JPEG", quality=60, subsampling="4:1:1", restart_marker_rows=1),
    "grey": encode(picture(1, (17, 61), "L"), quality=60),
    "cmyk": encode(picture(1, (17, 61), "CMYK"), quality=60),
    "scans": flat_jpeg(17, 61, [(2, 2), (1, 1), (1, 1)], interleaved=False),
    "png": small("PNG"),
    "palette": encode(picture(1, (17, 61)).quantize(8), "PNG"),
}


def verdict(how: str, data: bytes, box: Box | None = None) -> np.ndarray | None:
    """The crop, or None where it is refused."""
    try:
        return crop(how, data, box)
    except DecodeError as error:
        assert str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        return None


def test_a_deflated_tiff_with_any_bit_of_its_data_flipped_is_refused() -> None:
    data = small("TIFF", compression="tiff_adobe_deflate")
    image = Image.open(io.BytesIO(data))
    (start,), (length,) = (image.tag_v2[tag] for tag in (273, 279))
    for at in range(start, start + length):
        with pytest.raises(ImageFault):
            check_image(flipped(data, 8 * at + at % 8), ImageSettings())


@pytest.mark.parametrize("kind", list(SMALL_FILES))
@settings(max_examples=150, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255), cut=st.booleans())
def test_damage_anywhere_is_refused_or_decoded_alike(
    kind: str, at: float, value: int, cut: bool
) -> None:
    """One byte changed, or the file cut: what is stored has the pixels that every decoder reads,
    wherever the crop is, and PNGs, which have checksums, are never wrong."""
    whole = SMALL_FILES[kind]
    place = int(at * len(whole))
    data = whole[:place] if cut else bytes(
        byte ^ value if number == place else byte for number, byte in enumerate(whole)
    )  # fmt: skip
    try:
        checked = check_image(data, ImageSettings())
    except ImageFault:
        checked = None
    assert checked is None or not cut
    if checked and not checked.converted:
        assert checked.data == data
    if kind in ("png", "palette"):
        assert checked is None
    for box in (None, Box(0, 0, 5, 4)):
        crops = [verdict(how, data, box) for how in available()]
        assert all((c is None) == (checked is None) for c in crops)
        for other in crops[1:] if checked else ():
            if not checked.damage:  # coefficients out of range are clipped in several ways
                assert np.abs(crops[0].astype(int) - other).mean() < 1
