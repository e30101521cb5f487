"""SiLU and RMSNorm with the same bits on every device: FP32, IEEE operations in one fixed order, no library function.

`exp`, `sigmoid` and `rsqrt` of a library differ between devices in the last bit, and a bit is enough to move a code. So
both are written here as additions, multiplications, fused multiply-adds, one division and one square root:

    exp(-x)  x clamped to [-88, 20]: n = rint(-x * log2 e), r = x + n * ln 2 in two steps, a polynomial of degree 6
             for exp(-r) by Horner, times 2**n by adding n to the exponent bits; within 0.9 ulp of the exact value.
    silu(x)  x * (1 / (1 + exp(-x))), within 3 ulp; 0 * x where the sigmoid is below 2**-126, that is for x < -87.33.
             NaN and -Inf give NaN, Inf gives Inf, -0 gives -0, as in torch.
    rms      1 / sqrt(sum(x**2) / K + eps), the sum in the order that `sum_of_squares` states.

A fused multiply-add rounds once, and every GPU has it in one instruction. Torch has none for tensors, so
`fused_multiply_add` computes it from FP64 with rounding to odd, which is exact.
"""

from __future__ import annotations

import torch

# All constants are FP32 numbers.
LOG2_E = 1.4426950216293335
LN2_HIGH, LN2_LOW = 0.6931471824645996, -1.9046542121259336e-09  # their sum is ln(2) to 48 bits
ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, which then stands in the low bits
# exp(-r) for |r| <= ln(2) / 2, from r**6 down to r**0: minimax in relative error, 3e-9.
EXP = (
    0.0013814597623422742,
    -0.008368716575205326,
    0.04166838899254799,
    -0.1666651964187622,
    0.4999999403953552,
    -1.0,
    1.0,
)
X_MIN, X_MAX = -88.0, 20.0  # of exp(-x): 1 + exp(-20) is 1, and 1 / (1 + exp(88)) counts as 0
SIGMOID_TINY = 2.0**126  # denominators above it have a subnormal reciprocal, which counts as 0

# The order of a row's sum: runs of 16 elements, one to each of 256 lanes; a run is two octets.
RUN, OCTET, LANES = 16, 8, 256


def fused_multiply_add(a: torch.Tensor, b: torch.Tensor | float, c: torch.Tensor | float) -> torch.Tensor:
    """Return FP32 a * b + c, rounded once. Numbers must be FP32 values; shapes broadcast."""
    wide_b = b.to(torch.float64) if isinstance(b, torch.Tensor) else b
    wide_c = c.to(torch.float64) if isinstance(c, torch.Tensor) else c
    product = a.to(torch.float64) * wide_b  # exact: 48 bits
    total = product + wide_c
    # What the addition lost (Knuth); where it lost anything, the last bit of an FP64 that is rounded again must be 1.
    part = total - product
    lost = (product - (total - part)) + (wide_c - part)
    bits = total.view(torch.int64)
    toward = torch.where((lost > 0) == (total > 0), 1, -1)
    odd = torch.where((lost.abs() > 0) & (bits & 1 == 0), bits + toward, bits)
    return odd.view(torch.float64).to(torch.float32)


def silu(x: torch.Tensor) -> torch.Tensor:
    """Return x * sigmoid(x) of FP32 x, same shape; see the module for its bits and its ends."""
    clamped = x.clamp(X_MIN, X_MAX)
    shifted = fused_multiply_add(clamped, -LOG2_E, ROUND)
    n = shifted - ROUND
    r = fused_multiply_add(n, LN2_LOW, fused_multiply_add(n, LN2_HIGH, clamped))
    power = torch.full_like(r, EXP[0])
    for coefficient in EXP[1:]:
        power = fused_multiply_add(power, r, coefficient)
    exponential = (power.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)
    denominator = exponential + 1.0
    return x * torch.where(denominator > SIGMOID_TINY, 0.0, denominator.reciprocal())


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, both of one dtype and shape: FP32 inside, rounded once to that dtype."""
    return (silu(gate.to(torch.float32)) * up.to(torch.float32)).to(gate.dtype)


def sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Return the FP32 sums of squares of rows x [..., K], shape [..., 1].

    A row, filled up with zeros, is [chunks, 256 lanes, 2, 8]. Every lane has 8 accumulators, which take in x**2 by a
    fused multiply-add, chunk by chunk and in a chunk twice. The 2048 accumulators are then added in a tree of
    neighbours: 0 and 1, 2 and 3, and so on, level by level.
    """
    x = torch.nn.functional.pad(x.to(torch.float32), (0, -x.shape[-1] % (RUN * LANES)))
    parts = x.unflatten(-1, (x.shape[-1] // (RUN * LANES), LANES, RUN // OCTET, OCTET))
    total = torch.zeros_like(parts[..., 0, :, 0, :])
    for chunk in range(parts.shape[-4]):
        for octet in range(parts.shape[-2]):
            part = parts[..., chunk, :, octet, :]
            total = fused_multiply_add(part, part, total)
    total = total.flatten(-2)
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    return total


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x**2) + eps) * weight over the last axis of x [..., K], weight [K]; x's shape and dtype.

    (x * (1 / sqrt(sum / K + eps))) * weight in FP32, rounded once to x's dtype.
    """
    values, total = x.to(torch.float32), sum_of_squares(x)
    size, small = (torch.full((), v, dtype=torch.float32, device=x.device) for v in (x.shape[-1], eps))
    # Torch's FP32 square root on CPUs is off by a bit for one number in five; that of FP64, rounded again, is exact.
    values = values * (total / size + small).to(torch.float64).sqrt().to(torch.float32).reciprocal()
    if weight is not None:
        values = values * weight.to(torch.float32)
    return values.to(x.dtype)
