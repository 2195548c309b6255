"""Matrix product of two tiles, the same on a device and under Triton's interpreter."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total):
    """total + a @ b, all in fp32 where the operands are, which three TF32 products are not: the
    tensor cores cut bits off as they add up.

    The interpreter holds bf16 as bare bits and multiplies those; a product of two 16-bit floats
    is exact in fp32, so widening them there changes nothing else.
    """
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
