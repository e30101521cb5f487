"""Input families: functions (rng, shape) -> float32. Between them they hit every branch of every scale rule.

Boundary values are placed as the amax of a 16-element chunk (each other element is smaller), so that the amax of any
block or tile built from whole chunks is a boundary value too.
"""

import numpy as np

F32 = np.float32
ELEMENT_MAX = (448.0, 57344.0, 7.5, 28.0, 6.0, 127 / 64, 1.75, 7.0)
CHUNK = 16


def _ulps(x, n):
    """x moved by n fp32 units in the last place, away from zero for positive n."""
    return (np.asarray(x, F32).view(np.int32) + np.asarray(n, np.int32)).view(F32)


def _with_amax(rng, amax):
    """Fill chunks [..., n] -> [..., n * 16]: one random element of each is +-amax, the others are below 0.97 * amax."""
    filled = rng.uniform(-0.97, 0.97, (*amax.shape, CHUNK)).astype(F32) * amax[..., None]
    where = rng.integers(0, CHUNK, (*amax.shape, 1))
    sign = rng.choice(np.array([-1, 1], F32), (*amax.shape, 1))
    np.put_along_axis(filled, where, amax[..., None] * sign, -1)
    return filled.reshape(*amax.shape[:-1], -1)


def _chunks(shape):
    return (*shape[:-1], -(-shape[-1] // CHUNK))


def _fit(x, shape):
    return np.ascontiguousarray(x[..., : shape[-1]], F32)


def _row_exponent(rng, shape, low=-12, high=12):
    """A power of two per row; chunks of a row share it, so that their amaxes compete inside larger blocks."""
    return np.ldexp(F32(1), rng.integers(low, high + 1, (*shape[:-1], 1))).astype(F32)


def normal(rng, shape):
    return rng.standard_normal(shape).astype(F32)


def normal_small(rng, shape):
    return (rng.standard_normal(shape) * 2.0**-20).astype(F32)


def normal_large(rng, shape):
    return (rng.standard_normal(shape) * 3000).astype(F32)


def laplace(rng, shape):
    return rng.laplace(size=shape).astype(F32)


def student_t(rng, shape):
    return rng.standard_t(3, shape).astype(F32)


def uniform(rng, shape):
    return rng.uniform(-1, 1, shape).astype(F32)


def zeros(rng, shape):
    return np.zeros(shape, F32)


def zero_rows(rng, shape):
    """Rows and chunks of zeros among normal data."""
    keep = np.repeat(rng.random(_chunks(shape)) < 0.6, CHUNK, -1) & (rng.random((*shape[:-1], 1)) < 0.8)
    return normal(rng, shape) * _fit(keep, shape)


def outliers(rng, shape):
    """One element per row up to 2e5 times the rest: block scales fall to subnormals and to zero."""
    x = normal(rng, shape)
    where = rng.integers(0, shape[-1], (*shape[:-1], 1))
    np.put_along_axis(x, where, np.exp(rng.uniform(0, np.log(2e5), where.shape)).astype(F32), -1)
    return x


def powers_of_two(rng, shape):
    sign = rng.choice(np.array([-1, 1], F32), shape)
    return np.ldexp(sign, rng.integers(-14, 15, shape)).astype(F32)


def near_power_of_two(rng, shape):
    """amax = 2^k and its neighbours, in units in the last place of fp32, fp16 and bf16."""
    step = rng.choice([-(1 << 16), -(1 << 13), -1, 0, 1, 1 << 13, 1 << 16], _chunks(shape))
    return _fit(_with_amax(rng, _ulps(np.broadcast_to(_row_exponent(rng, shape), _chunks(shape)), step)), shape)


def near_element_max(rng, shape):
    """amax = max * 2^k and its neighbours, for the maximum of every element."""
    top = rng.choice(np.array(ELEMENT_MAX, F32), (*shape[:-1], 1)) * _row_exponent(rng, shape, -14, 0)
    step = rng.choice([-(1 << 16), -(1 << 13), -1, 0, 1, 1 << 13, 1 << 16], _chunks(shape))
    return _fit(_with_amax(rng, _ulps(np.broadcast_to(top, _chunks(shape)), step)), shape)


def near_even_threshold(rng, shape):
    """amax around (2 - 2^-(m+1)) * 2^k, where the rule `even` changes, for m = 1, 2, 3 and 6."""
    mantissa = rng.choice([1, 2, 3, 6], (*shape[:-1], 1))
    top = (2 - 2.0 ** -(mantissa + 1)).astype(F32) * _row_exponent(rng, shape, -14, 0)
    step = rng.choice([-(1 << 16), -(1 << 13), -1, 0, 1, 1 << 13, 1 << 16], _chunks(shape))
    return _fit(_with_amax(rng, _ulps(np.broadcast_to(top, _chunks(shape)), step)), shape)


def element_ties(rng, shape):
    """Exact ties of an element grid with m mantissa bits, some off by an ulp; amax of the chunk is 1.5 * 2^k."""
    mantissa = rng.choice([0, 1, 2, 3, 6], (*shape[:-1], 1))
    exponent = rng.integers(-6, 1, shape)
    odd = 2 * rng.integers(0, 2**mantissa, shape) + 1
    x = np.ldexp(1 + odd / 2.0 ** (mantissa + 1), exponent).astype(F32)
    x = np.minimum(_ulps(x, rng.choice([-1, 0, 0, 0, 1], shape)), F32(1.5)) * rng.choice(np.array([-1, 1], F32), shape)
    x[..., ::CHUNK] = 1.5
    return x * _row_exponent(rng, shape, -6, 6)


def element_subnormal_ties(rng, shape):
    """Ties and near ties among the subnormals of each element, down to underflow; amax of the chunk is 1.5."""
    lowest = rng.choice([-1, -3, -4, -6, -9, -16], (*shape[:-1], 1))
    half_steps = rng.integers(0, 9, shape)
    x = np.ldexp(half_steps / 2, lowest - rng.integers(0, 3, (*shape[:-1], 1))).astype(F32)
    x = _ulps(x, np.where(x == 0, 0, rng.choice([-1, 0, 0, 1], shape))) * rng.choice(np.array([-1, 1], F32), shape)
    x[..., ::CHUNK] = 1.5
    return x


def fp32_subnormals(rng, shape):
    """Every bit pattern of |x| < 2^-126, and rows just above."""
    bits = rng.integers(0, 1 << 23, shape) >> rng.integers(0, 23, (*shape[:-1], 1))
    bits = bits + np.where(rng.random((*shape[:-1], 1)) < 0.2, 1 << 22, 0)
    return (bits.astype(np.int32).view(F32)) * rng.choice(np.array([-1, 1], F32), shape)


def tiny(rng, shape):
    return (rng.standard_normal(shape) * 1e-38 * 2.0 ** rng.integers(-3, 8, (*shape[:-1], 1))).astype(F32)


def scale_floor(rng, shape):
    """amax around 2^-127 * 2^emax and max * 2^-127: where E8M0 codes 0, 1 and 2 meet."""
    top = rng.choice(np.array([1.0, 4.0, 16.0, 256.0, 32768.0, *ELEMENT_MAX]), (*shape[:-1], 1))
    amax = np.broadcast_to((top * 2.0 ** rng.integers(-129, -124, top.shape)).astype(F32), _chunks(shape))
    return _fit(_with_amax(rng, _ulps(amax, rng.integers(-2, 3, amax.shape))), shape)


def huge(rng, shape):
    return (rng.uniform(-1, 1, shape) * 3.4e38 * 2.0 ** -rng.integers(0, 3, (*shape[:-1], 1))).astype(F32)


def mixed_magnitudes(rng, shape):
    """Each element has its own exponent, over 48 binades."""
    return np.ldexp(rng.standard_normal(shape), rng.integers(-24, 24, shape)).astype(F32)


def negative_zero(rng, shape):
    """Signed zeros, and values that underflow from either side."""
    x = rng.choice(np.array([-0.0, 0.0, -1e-30, 1e-30, -1.0, 1.0], F32), shape, p=[0.3, 0.3, 0.1, 0.1, 0.1, 0.1])
    return np.where(rng.random((*shape[:-1], 1)) < 0.2, F32(-0.0), x)


def nvfp4_scale_ties(rng, shape):
    """Block amax exactly between two E4M3 scales (6 * midpoint, representable in bf16), tensor amax 2688 * 2^k."""
    significand = 2 * rng.integers(8, 16, _chunks(shape)) + 1  # midpoints have 5 significant bits
    exponent = rng.integers(-10, 4, _chunks(shape))
    amax = np.minimum(6 * np.ldexp(significand.astype(F32), exponent), F32(2688))
    x = _fit(_with_amax(rng, amax.astype(F32)), shape)
    x[..., 0] = 2688
    return x * F32(2.0**-9)


def nvfp4_element_ties(rng, shape):
    """Two-level ties: block scales are exact E4M3 values, elements are midpoints of the E2M1 grid times them."""
    scale = np.ldexp(rng.integers(8, 16, _chunks(shape)).astype(F32), rng.integers(-6, 6, _chunks(shape)))
    grid = np.array([0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0], F32)
    x = rng.choice(np.concatenate([grid, -grid]), (*_chunks(shape), CHUNK))
    x[..., 0] = 6
    x = _fit((x * scale[..., None]).reshape(*_chunks(shape)[:-1], -1), shape)
    x[..., 0] = 2688
    return x


def nonfinite(rng, shape):
    """Normal data where about one chunk in six holds a NaN or an Inf."""
    x = normal(rng, shape)
    hit = rng.random(shape) < 0.01
    return np.where(hit, rng.choice(np.array([np.nan, np.inf, -np.inf], F32), shape), x)


FAMILIES = {
    f.__name__: f
    for f in (
        normal, normal_small, normal_large, laplace, student_t, uniform, zeros, zero_rows, outliers, powers_of_two,
        near_power_of_two, near_element_max, near_even_threshold, element_ties, element_subnormal_ties,
        fp32_subnormals, tiny, scale_floor, huge, mixed_magnitudes, negative_zero, nvfp4_scale_ties,
        nvfp4_element_ties, nonfinite,
    )
}  # fmt: skip
