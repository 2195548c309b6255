"""Every stream of the counter-based generator (`philox.py`) that something draws from.

Two consumers with one number would draw the same words, so a new one takes a new number here.
Where a stream is drawn for T1 (0) and T2 (1), the view is added to it.
"""

from enum import IntEnum


class Stream(IntEnum):
    """Numbers of streams, below 2**16."""

    MASK = 0  # + view
    JITTER = 16  # + view, or 2 for both views' image
    CUTMIX = 32  # + view
    PREDICTED = 48  # which masked patches are reconstructed
    OCCLUSION = 77  # which patches are dropped from evaluated images
