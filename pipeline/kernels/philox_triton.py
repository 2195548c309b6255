"""`philox.py` inside Triton kernels."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def philox_words(seed, epoch, sample, block):
    """Words 4 i .. 4 i + 3 of a sample's stream, where `block` is stream << 16 | i; the shapes of
    `sample` and `block` are broadcast. Four uint32 tensors."""
    block = (block + 0 * sample).to(tl.uint32)
    epoch_word = block * 0 + epoch.to(tl.uint32)
    low = block * 0 + (sample & 0xFFFFFFFF).to(tl.uint32)
    high = block * 0 + (sample >> 32).to(tl.uint32)
    return tl.philox(seed, block, epoch_word, low, high)


@triton.jit
def uniforms(seed, epoch, sample, stream, quad):
    """Numbers 4 quad .. 4 quad + 3 of `philox.uniform`, for each sample: four fp32 tensors."""
    w0, w1, w2, w3 = philox_words(seed, epoch, sample, (stream << 16) + quad)
    scale = 1.0 / (1 << 24)
    return (
        (w0 >> 8).to(tl.float32) * scale,
        (w1 >> 8).to(tl.float32) * scale,
        (w2 >> 8).to(tl.float32) * scale,
        (w3 >> 8).to(tl.float32) * scale,
    )
