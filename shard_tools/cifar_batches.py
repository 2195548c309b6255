"""The official batches of CIFAR-10, python and binary version, read without running anything.

Source of the formats: https://www.cs.toronto.edu/~kriz/cifar.html. A batch of the python version is
a pickle, and loading a pickle can run any code. Here every class or function that a pickle names is
replaced by a stand-in of this file that only keeps data; what is not on the short list of those
that the official batches need is refused, and so is any array but one of uint8.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from shard_tools.cli import ToolError

SIDE = 32  # pixels
PIXELS = 3 * SIDE * SIDE  # bytes of an image: all reds by rows, then greens, then blues
LARGEST = 64 << 20  # bytes of a file; an official batch has 31 MB


class Batch(NamedTuple):
    """images: uint8 [N, 32, 32, 3]; labels: class numbers, int [N]."""

    images: np.ndarray
    labels: np.ndarray


class _Type:
    """Stands for numpy.dtype('u1')."""

    def __init__(self, code: object, *_: object) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError("an array that is not uint8")

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which uint8 has none of."""


class _Array:
    """Stands for a numpy array until its content is there."""

    array: np.ndarray

    def __setstate__(self, state: object) -> None:
        """state: (version, shape, type, whether columns come first, bytes)."""
        match state:
            case (int(), tuple() as shape, _Type(), False | 0, bytes() | str() as data):
                content = data.encode("latin1") if isinstance(data, str) else data
                self.array = np.frombuffer(content, np.uint8).reshape(shape)
            case _:
                raise pickle.UnpicklingError("an array that is not uint8 by rows")


class _ArrayClass:
    """Stands for the class numpy.ndarray, which a pickle only hands to `_reconstruct`."""


def _reconstruct(kind: object, *_: object) -> _Array:
    if kind is not _ArrayClass:
        raise pickle.UnpicklingError("an array of a class of its own")
    return _Array()


def _encode(text: object, coding: object = "latin1") -> bytes:
    """Bytes as Python 3 writes them into a pickle of protocol 2."""
    if not isinstance(text, str) or coding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("bytes in an unknown coding")
    return text.encode("latin1")


# What a pickle may name → what it gets.
_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _ArrayClass,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
}


# The opcodes that dictionaries, lists, tuples, text, bytes, numbers and arrays are made of.
_OPCODES = (
    *("PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "NONE"),
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("GET", "BINGET", "LONG_BINGET"),
)


# Python's own class and not C's: there a few bytes can ask for gigabytes of memo.
class _Unpickler(pickle._Unpickler):
    """Builds dicts, lists, tuples, strings, numbers and uint8 arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch needs")
        return _KNOWN[module, name]

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], _Array | _Type):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("it changes what is not an array")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)  # type: ignore[arg-type]

    dispatch: ClassVar[Any] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
        for name in _OPCODES
    } | {pickle.BUILD[0]: load_build}


def read_pickle(data: bytes, name: str) -> dict[str, Any]:
    """A pickled dictionary of the python version with text as keys; bytes stay bytes.

    ToolError names the file where it is no such dictionary or names anything else.
    """
    try:
        found = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(found, dict):
            raise pickle.UnpicklingError("it holds no dictionary")
        return {_text(key): value for key, value in found.items()}
    except Exception as error:  # a damaged pickle raises anything
        known = isinstance(error, pickle.UnpicklingError | EOFError)
        reason = str(error) if known and str(error) else f"damaged: {type(error).__name__}"
        raise ToolError(f"{name}: not a batch of CIFAR-10's python version ({reason})") from error


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if not isinstance(value, str):
        raise pickle.UnpicklingError("a name that is not text")
    return value


def python_batch(data: bytes, name: str, classes: int) -> Batch:
    """A batch of the python version, of images of the classes 0 … classes - 1."""
    found = read_pickle(data, name)
    if "fine_labels" in found:
        raise ToolError(f"{name}: is of CIFAR-100; give CIFAR-10")
    array, labels = found.get("data"), found.get("labels")
    if not isinstance(array, _Array) or not isinstance(labels, list):
        raise ToolError(f"{name}: has no `data` and `labels` as CIFAR-10's batches do")
    pixels = getattr(array, "array", np.empty(0))
    return _batch(pixels, labels, name, classes)


def binary_batch(data: bytes, name: str, classes: int) -> Batch:
    """A batch of the binary version: per image a byte of label and 3072 of pixels."""
    if not data or len(data) % (1 + PIXELS):
        raise ToolError(
            f"{name}: {len(data)} bytes are not images of CIFAR-10 of {1 + PIXELS} bytes each"
        )
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + PIXELS)
    return _batch(rows[:, 1:], rows[:, 0].tolist(), name, classes)


def _batch(pixels: np.ndarray, labels: list[Any], name: str, classes: int) -> Batch:
    if pixels.shape != (len(labels), PIXELS) or not labels:
        raise ToolError(
            f"{name}: pixels of shape {list(pixels.shape)} and {len(labels)} labels; should be "
            f"[labels, {PIXELS}]"
        )
    if not all(type(label) is int and 0 <= label < classes for label in labels):
        raise ToolError(f"{name}: has a label that is not from 0 to {classes - 1}")
    images = pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return Batch(images, np.array(labels))


def python_classes(data: bytes, name: str) -> list[str]:
    """The names of the classes, of batches.meta."""
    names = read_pickle(data, name).get("label_names")
    if not isinstance(names, list) or not names:
        raise ToolError(f"{name}: has no label_names as CIFAR-10's does")
    try:
        return check_classes([_text(value) for value in names], name)
    except (ValueError, pickle.UnpicklingError) as error:
        raise ToolError(f"{name}: label_names are not text") from error


def binary_classes(data: bytes, name: str) -> list[str]:
    """The names of the classes, of batches.meta.txt: a line each."""
    try:
        names = [line.strip() for line in data.decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ToolError(f"{name}: not text") from error
    names = [line for line in names if line]  # the official file ends with empty ones
    if not names:
        raise ToolError(f"{name}: names no classes")
    return check_classes(names, name)


def check_classes(names: list[str], file: str) -> list[str]:
    """Names of classes, which become folders. ToolError for two that are the same, and for one that
    is no name of a folder."""
    for at, name in enumerate(names):
        if name in names[:at]:
            raise ToolError(f"{file}: names the class {name!r} twice")
        if not name.isprintable() or "/" in name or name.strip(". ") == "":
            raise ToolError(
                f"{file}: a class is called {name!r}, which cannot be the name of a folder"
            )
    return names
