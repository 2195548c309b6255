"""What a sample of a tar says about itself: its image, label, name and synset."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pipeline.errors import UserError
from shard_tools.sharding.found import LONGEST_IMAGE
from shard_tools.sharding.tables import MOST_CLASSES
from shard_tools.tar import Sample, read_range

# Fields that hold the image of a sample, in the order of preference.
IMAGE_FIELDS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "tif", "tiff", "bmp", "gif"),
    *("ppm", "pgm", "pbm", "pnm"),
)
_IMAGE_NAMES = ("image", "img", "input")  # also `input.jpg`, where no field is just `jpg`
_NAME_KEYS = ("name", "filename", "url", "key")  # of the json, for the original name
# What looks like a label where neither `cls` nor the json's `label` is there.
_LABEL_WORDS = ("cls", "class", "label", "labels", "target", "category", "synset", "wnid")
_LABEL_KEYS = (*_LABEL_WORDS, "class_id", "class_index", "class_idx", "class_name", "label_id")
_UNLABELLED = "; --unlabelled takes the images without labels"
# Bytes; int() takes 4300 digits at most.
_LONGEST_CLS, _LONGEST_JSON = 4096, 64 << 20


class SampleFault(UserError):
    """A sample that cannot be used; the text is the reason, without its key."""


@dataclass(frozen=True)
class StoredSample:
    """image: (offset, bytes) in the tar. label: class index, -1 = none. name: the original name
    that the json gives, else the key. synset: of the json, "" = not given."""

    image: tuple[int, int]
    label: int
    name: str
    synset: str


def describe(
    handle: int, sample: Sample, *, image_fields: Sequence[str] = (), unlabelled: bool = False
) -> StoredSample:
    """Read the small fields of one sample of an open tar. SampleFault, the reason, if it cannot be
    used. image_fields: see `image_field`; unlabelled: whatever looks like a label is ignored."""
    if sample.problem:
        raise SampleFault(sample.problem)
    image = sample.fields[image_field(sample, image_fields)]
    if image[1] > LONGEST_IMAGE:
        raise SampleFault(f"its image is {image[1]} bytes long, the limit is {LONGEST_IMAGE}")
    about = read_json(handle, sample)
    label = -1
    if not unlabelled:
        label = read_label(handle, sample, about)
        _check_nothing_unread(sample, about, label)
    name = next((about[key] for key in _NAME_KEYS if isinstance(about.get(key), str)), sample.key)
    return StoredSample(image, label, printable(name), read_synset(about))


def image_field(sample: Sample, wanted: Sequence[str] = ()) -> str:
    """Name of the field that holds the image: the first of `wanted` (in lower case, `*` stands for
    anything), by default the first of IMAGE_FIELDS, or one such as `input.jpg`.

    SampleFault where there is none, or several that fit equally well.
    """
    for pattern in wanted or IMAGE_FIELDS:
        fitting = [name for name in sample.fields if fnmatchcase(name, pattern)]
        if fitting:
            return _only(fitting)
    held = printable(", ".join(sorted(sample.fields)))
    if wanted:
        raise SampleFault(f"has no field {' or '.join(wanted)}, only {held}")
    fitting = [
        name
        for name in sample.fields
        if name.split(".")[0] in _IMAGE_NAMES and name.split(".", 1)[-1] in IMAGE_FIELDS
    ]
    if not fitting:
        raise SampleFault(f"has no image, only {held}; --image-field names the field of the image")
    return _only(fitting)


def _only(fitting: list[str]) -> str:
    if len(fitting) > 1:
        raise SampleFault(
            f"has {len(fitting)} images, {' and '.join(sorted(fitting))}; --image-field chooses one"
        )
    return fitting[0]


def stored_labels(classes: Sequence[str], stored: Sequence[str]) -> tuple[int, ...]:
    """By label the number of the class among `stored`, as the tars have it (-1: not there); empty
    where labels were not renumbered."""
    if not stored or tuple(classes) == tuple(stored):
        return ()
    numbers = {name: number for number, name in enumerate(stored)}
    return tuple(numbers.get(name, -1) for name in classes)


Candidates = list[tuple[Sample, str]]


def images_by_offset(samples: Iterable[Sample]) -> dict[int, Candidates]:
    """(sample, field) by the offset of the field's data. Several begin at one offset where links
    lead there."""
    found: dict[int, Candidates] = {}
    for sample in samples:
        for name, (offset, _) in sample.fields.items():
            found.setdefault(offset, []).append((sample, name))
    return found


def take_candidate(handle: int, candidates: Candidates, label: int) -> tuple[Sample, str]:
    """The sample that a row of the index means, and the field of its image: the first with this
    label in the tar. It is taken away from the others at its offset, if there are any."""
    for number, (sample, _) in enumerate(candidates[:-1]):
        with suppress(SampleFault):
            if read_label(handle, sample, read_json(handle, sample)) == label:
                return candidates.pop(number)
    return candidates[0] if len(candidates) == 1 else candidates.pop()


def read_json(handle: int, sample: Sample) -> dict[str, Any]:
    """The object in the field `json`; {} where there is none. SampleFault where it is damaged."""
    if "json" not in sample.fields:
        return {}
    try:
        about = json.loads(_read_small(handle, sample, "json", _LONGEST_JSON))
    except (ValueError, RecursionError) as error:
        raise SampleFault(f"its json cannot be read ({error})") from error
    return about if isinstance(about, dict) else {}


def read_label(handle: int, sample: Sample, about: dict[str, Any]) -> int:
    """Class index: the number in `cls`, else `label` of the json, else -1.

    SampleFault where it is no class index, and where both differ.
    """
    given = about.get("label")
    number = given if type(given) is int and 0 <= given < MOST_CLASSES else None
    if "cls" in sample.fields:
        text = _read_small(handle, sample, "cls", _LONGEST_CLS).decode("ascii", "replace").strip()
        if not text.isdecimal() or int(text) >= MOST_CLASSES:
            raise SampleFault(f"its cls is {text[:40]!r}, not a class index")
        if number is not None and number != int(text):
            raise SampleFault(f"its cls is {text}, its json says label {number}")
        return int(text)
    if given is not None:
        if number is None:
            raise SampleFault(f"its json has label {given!r:.60}, not a class index{_UNLABELLED}")
        return number
    return -1


def _check_nothing_unread(sample: Sample, about: dict[str, Any], label: int) -> None:
    """SampleFault for a sample without a label that has something that looks like one."""
    if label >= 0:
        return
    field = next((name for name in sample.fields if name.split(".")[0] in _LABEL_WORDS), "")
    key = next((key for key in _LABEL_KEYS if about.get(key) is not None), "")
    if field or key:
        what = f"a field {field!r}" if field else f"{key!r} in its json"
        raise SampleFault(
            f"has no label that is read (cls, or label in json) but {what}{_UNLABELLED}"
        )


def read_synset(about: dict[str, Any]) -> str:
    synset = about.get("synset")
    return printable(synset) if isinstance(synset, str) else ""


def printable(text: str) -> str:
    """One line of UTF-8; bytes of a tar that are no UTF-8 become escapes."""
    return " ".join(text.split("\n")).encode("utf-8", "backslashreplace").decode()


def _read_small(handle: int, sample: Sample, name: str, limit: int) -> bytes:
    if sample.fields[name][1] > limit:
        raise SampleFault(f"its {name} is {sample.fields[name][1]} bytes long")
    return read_range(handle, sample.fields[name])
