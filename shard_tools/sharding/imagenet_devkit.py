"""Labels of ImageNet's validation images from its development kit (ILSVRC2012_devkit_t12).

`data/ILSVRC2012_validation_ground_truth.txt` holds one ILSVRC2012_ID per image in name order, and
`data/meta.mat` the table from ILSVRC2012_ID to synset (fields 0 and 1 of each row of `synsets`;
field 4 is the number of children, 0 for the 1000 classes).
"""

from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path

from shard_tools.cli import ToolError

TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"


def validation_synsets(devkit: Path) -> list[str]:
    """Synset of each validation image, in the order of the image names."""
    import scipy.io

    truth, meta = (_read(devkit, name) for name in (TRUTH, META))
    try:
        rows = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        synsets = {int(row[0]): str(row[1]) for row in rows if int(row[4]) == 0}
        return [synsets[int(line)] for line in truth.decode().split()]
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ToolError(f"{devkit}: {TRUTH} and {META} do not fit together ({error!r})") from error


def _read(devkit: Path, name: str) -> bytes:
    """One file of the kit, given as a folder or as a tar(.gz)."""
    if devkit.is_dir():
        path = devkit / name
        if not path.is_file():
            raise ToolError(f"{path}: is missing from the development kit")
        return path.read_bytes()
    try:
        with tarfile.open(devkit) as archive:
            for member in archive:
                if member.isreg() and member.name.endswith(name):
                    file = archive.extractfile(member)
                    return file.read() if file else b""
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        why = "not a tar" if isinstance(error, tarfile.ReadError) else str(error)  # of many lines
        raise ToolError(
            f"{devkit}: cannot be read as the folder or archive ILSVRC2012_devkit_t12 ({why})"
        ) from error
    raise ToolError(f"{devkit}: does not hold {name}")
