"""How a global batch is shared among the ranks of an evaluation that trains."""

import math

from pipeline.errors import UserError

PARTITIONS = 64  # of the order of the samples, times the odd part of the batch


def check_batch(batch_size: int, world: int, pairs: bool = False) -> None:
    """UserError where --batch-size cannot be split evenly over the ranks; it names what can, in
    pairs of images where those are needed."""
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be at least 1")
    if batch_size % world:
        each = 2 * world if pairs else world
        below = batch_size // each * each
        near = [str(n) for n in (below, below + each) if n]
        raise UserError(
            f"--batch-size {batch_size} cannot be split over {world} ranks; {' or '.join(near)} can"
        )


def partitions_of(batch_size: int, world: int) -> int:
    """Partitions of the order of the samples (pipeline/data/order.py), which the ranks share.

    Of the batch alone wherever the power of two in `world` is at most 64: the order of the
    samples, and so the result, is then the same at any number of ranks.
    """
    odd = batch_size // (batch_size & -batch_size)
    return math.lcm(math.gcd(batch_size, PARTITIONS) * odd, world)


def micro_batch_of(batch_size: int, world: int, most: int) -> int:
    """The largest number of images, at most `most`, that divides a rank's share of the batch."""
    share = batch_size // world
    return max(n for n in range(1, min(share, most) + 1) if share % n == 0)
