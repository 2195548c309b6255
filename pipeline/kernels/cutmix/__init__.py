"""CutMix's box (Yun et al. 2019, Eq. 2): inside it, a neighbour in the batch is seen.

    lambda, centre ~ U(0, 1)        side = sqrt(1 - lambda)
    h = floor(side H) // 2,  w = floor(side W) // 2
    box = [floor(cy H) - h, floor(cy H) + h) x [floor(cx W) - w, floor(cx W) + w)

cut at the border; drawn per image and view.
"""

from torch import Tensor

from pipeline.kernels import backend, philox
from pipeline.kernels.cutmix.reference import cutmix_reference
from pipeline.kernels.patches import grid_of
from pipeline.kernels.philox import Epoch
from pipeline.kernels.streams import Stream


def cutmix(
    image: Tensor, sample: Tensor, probability: float, *, seed: int, epoch: Epoch, view: int
) -> Tensor:
    """Show, in a box of each image, the same place of its neighbour.

    image: uint8 [B,H,W,3], any strides; sample: int64 [B]; probability: share of the images that
    get a box; view: 0 for T1, which takes from the next image of the batch, 1 for T2, which takes
    from the one before. Returns uint8 [B,H,W,3], contiguous. Raises ValueError for shapes that do
    not fit.
    """
    grid_of(image, 1)
    philox.check_key(sample, seed, epoch)
    if len(sample) != len(image):
        raise ValueError(f"{len(sample)} sample numbers for {len(image)} images")
    if view not in (0, 1):
        raise ValueError(f"view must be 0 or 1, not {view}")
    if backend.implementation() == "triton":
        from pipeline.kernels.cutmix.triton import cutmix_triton as run
    else:
        run = cutmix_reference
    step = 1 if view == 0 else -1
    stream = Stream.CUTMIX + view
    return run(image, sample, probability, seed=seed, epoch=epoch, stream=stream, step=step)
