"""The one door to Pillow: what it raises, of any kind, is the image's fault."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from PIL import UnidentifiedImageError

from shard_tools.image_file.header import ImageFault


@contextlib.contextmanager
def calling_pillow(kind: str) -> Iterator[None]:
    """Wrap calls of Pillow, and nothing of relaxmim's own, whose bugs would pass for bad files.

    Its decoders raise many kinds of exception; its remarks (on EXIF, say) are dropped. MemoryError
    says nothing about the image and passes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except MemoryError:
            raise
        except UnidentifiedImageError:
            reason = f"a {kind} file that is damaged or of a kind that Pillow cannot read"
            raise ImageFault(reason) from None
        except Exception as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            raise ImageFault(reason) from error
