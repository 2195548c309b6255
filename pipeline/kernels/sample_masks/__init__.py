"""Which patches the two views T1 and T2 show.

Every position l of a sample draws a Philox word w[l]; the K smallest are visible, as in
`select_visible`, with the draw fused into the kernel.

A mask is a pure function of (seed, epoch, sample number, view): the same bits on every device,
for any batch, rank or worker count.
"""

from torch import Tensor

from pipeline.kernels import backend, philox
from pipeline.kernels.philox import Epoch
from pipeline.kernels.sample_masks.reference import POLICIES, Masks, sample_masks_reference


def view_sizes(length: int, visible: tuple[int, int], policy: str) -> tuple[int, int]:
    """(K1, K2) under a policy; ValueError where they contradict it. K2 = 0: what it implies."""
    first, second = visible
    if policy not in POLICIES:
        raise ValueError(f"masking policy must be one of {', '.join(POLICIES)}, not {policy!r}")
    if not 1 <= length < 2**16 or not 1 <= first <= length:
        raise ValueError(f"cannot show {first} of {length} patches: need 1 <= K1 <= L < 65536")
    implied = {"random": 0, "complement": length - first, "none": length}.get(policy, second)
    if policy != "random" and second not in (0, implied):
        raise ValueError(
            f"policy {policy} with L={length}, K1={first} shows {implied} patches in the second "
            f"view, not {second}"
        )
    if policy in ("complement", "independent") and not 1 <= implied <= length:
        raise ValueError(
            f"policy {policy} needs 1 <= K2 <= {length} visible patches, not {implied}"
        )
    return first, implied


def sample_masks(
    sample: Tensor, *, seed: int, epoch: Epoch, length: int, visible: tuple[int, int], policy: str
) -> Masks:
    """Draw the visible sets of both views.

    sample: int64 [B]; length: L patches; visible: (K1, K2), K2 = 0 meaning what the policy gives.
    policy: `random` (T1 only, MAE), `complement` (T2 shows what T1 hides), `independent` (T2 has
    its own draw of K2), `none` (T2 hides nothing).
    Returns Masks. Raises ValueError for sizes that contradict the policy.
    """
    philox.check_key(sample, seed, epoch)
    sizes = view_sizes(length, visible, policy)
    if backend.implementation() == "triton":
        from pipeline.kernels.sample_masks.triton import sample_masks_triton as run
    else:
        run = sample_masks_reference
    return run(sample, seed=seed, epoch=epoch, length=length, visible=sizes, policy=policy)
