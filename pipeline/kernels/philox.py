"""Counter-based random numbers: Philox4x32-10.

Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
A word depends on nothing but (seed, epoch, sample, stream, index), so every device, rank and
worker that asks for it gets the same bits:

    key     = (low, high) 32 bits of the seed
    counter = (stream << 16 | index // 4, epoch, low, high 32 bits of the sample number)

and word `index` is output number index % 4 of that counter.
"""

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85

# A number, or int64 [] on the device of the samples, which a CUDA graph reads when it is replayed.
Epoch = int | Tensor


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * x, in int64 without ever leaving 63 bits."""
    low, high = constant * (x & 0xFFFF), constant * (x >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _MASK32


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten Philox rounds. Counter words and results are int64 tensors that hold 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_a, low_a = _multiply(_ROUND_A, c0)
        high_b, low_b = _multiply(_ROUND_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_A) & _MASK32, (k1 + _KEY_B) & _MASK32
    return c0, c1, c2, c3


def on_device(epoch: Epoch, sample: Tensor) -> Tensor:
    """An epoch as kernels read it: int64 [] on the device of the sample numbers."""
    return epoch if isinstance(epoch, Tensor) else torch.full((), epoch, device=sample.device)


def check_key(sample: Tensor, seed: int, epoch: Epoch) -> None:
    """Raise ValueError unless (sample, seed, epoch) fit the counter; an epoch on the device is not
    read."""
    if sample.dtype != torch.int64 or sample.dim() != 1:
        raise ValueError(
            f"sample numbers must be an int64 tensor [B], not {sample.dtype} {list(sample.shape)}"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in 0 .. 2**63 - 1, not {seed}")
    if isinstance(epoch, int) and not 0 <= epoch <= _MASK32:
        raise ValueError(f"epoch must be in 0 .. 2**32 - 1, not {epoch}")


def words(sample: Tensor, *, seed: int, epoch: Epoch, stream: int, count: int) -> Tensor:
    """Uniform 32-bit words for each sample.

    sample: int64 [B], numbers in the manifest (>= 0). Returns int64 [B, count] in 0 .. 2**32 - 1.
    Raises ValueError for a key that does not fit the counter.
    """
    check_key(sample, seed, epoch)
    if not 0 <= stream < 2**16 or not 1 <= count <= 2**18:
        raise ValueError(
            f"stream must be below 65536 and count in 1 .. 262144, not {stream} and {count}"
        )
    blocks = (count + 3) // 4
    block = torch.arange(blocks, device=sample.device) + (stream << 16)
    low, high = (sample & _MASK32)[:, None], (sample >> 32)[:, None]
    zero = torch.zeros_like(low + block)
    counter = (block + zero, zero + epoch, low + zero, high + zero)
    outputs = philox(counter, (seed & _MASK32, seed >> 32))
    return torch.stack(outputs, dim=-1).flatten(1)[:, :count]


def uniform(sample: Tensor, *, seed: int, epoch: Epoch, stream: int, count: int) -> Tensor:
    """Uniform numbers for each sample: float32 [B, count] in [0, 1), multiples of 2**-24."""
    drawn = words(sample, seed=seed, epoch=epoch, stream=stream, count=count)
    return (drawn >> 8).to(torch.float32) * 2.0**-24
