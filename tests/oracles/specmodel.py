"""A second implementation of every shipped block format, in numpy, written from the specification alone.

It never imports microscale, and computes in another way on purpose: encoding is a search in the sorted table of
representable values (float64, exact) instead of bit arithmetic, exponents come from `frexp` instead of masks. All
arithmetic that the specification does in fp32 is done on numpy float32 arrays, one operation a line, so that each
rounding is visible.

Policies the specification leaves open, as the project decided them: a NaN or Inf poisons its own block (scale NaN)
and nothing else; the outer amax is taken over finite values; code clamping of integers is symmetric.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

F32 = np.float32
FLT_MAX = np.finfo(F32).max


def as_float64(x):
    """Exact upcast; quiet about signalling NaNs."""
    with np.errstate(invalid="ignore"):
        return np.asarray(x, np.float64)


# --------------------------------------------------------------------------------------------------- elements
@dataclass(frozen=True)
class Float:
    """A float element: sign bit (or none), exponent, mantissa."""

    exponent: int
    mantissa: int
    bias: int
    top: int  # largest finite code (without sign)
    nan: int | None = None  # code of NaN, if it has one
    inf: int | None = None  # code of Inf, if it has one
    signed: bool = True

    @property
    def bits(self):
        return self.signed + self.exponent + self.mantissa

    @property
    def emax(self):
        """Exponent of the largest power of two."""
        return (self.top >> self.mantissa) - self.bias

    @property
    def max(self):
        return float(self.grid[-1])

    @cached_property
    def grid(self):
        """Decoded finite magnitudes, float64, index = code."""
        code = np.arange(self.top + 1)
        exponent, mantissa = code >> self.mantissa, code & ((1 << self.mantissa) - 1)
        subnormal = np.ldexp(mantissa.astype(np.float64), 1 - self.bias - self.mantissa)
        normal = np.ldexp((mantissa + (1 << self.mantissa)).astype(np.float64), exponent - self.bias - self.mantissa)
        return np.where(exponent == 0, subnormal, normal)

    def table(self):
        """Float32 value of all 2**bits codes."""
        half = np.full(1 << (self.bits - self.signed), np.nan)
        half[: self.top + 1] = self.grid
        if self.inf is not None:
            half[self.inf] = np.inf
        return (np.concatenate([half, -half]) if self.signed else half).astype(F32)

    def encode(self, x):
        """Round to nearest, ties to the even code, saturate; -0 and the sign of underflow are kept."""
        x = as_float64(x)
        magnitude = np.abs(x)
        middle = (self.grid[1:] + self.grid[:-1]) / 2
        low, high = np.searchsorted(middle, magnitude, "left"), np.searchsorted(middle, magnitude, "right")
        code = np.where(low % 2 == 0, low, high)  # they differ only on a tie, by one
        code = np.where(np.isnan(x), self.top if self.nan is None else self.nan, code)
        sign = np.signbit(x) & ~np.isnan(x)
        if self.signed:
            return (code | (sign.astype(code.dtype) << (self.bits - 1))).astype(np.uint8)
        return np.where(sign, 0, code).astype(np.uint8)


@dataclass(frozen=True)
class Int:
    """A symmetric two's complement integer with `frac` fraction bits."""

    bits: int
    frac: int
    emax = 0

    @property
    def mantissa(self):
        """Mantissa bits in the sense of the `even` rule."""
        return self.bits - 2

    @property
    def max(self):
        return (2 ** (self.bits - 1) - 1) / 2**self.frac

    def table(self):
        code = np.arange(1 << self.bits)
        return (np.where(code >> (self.bits - 1), code - (1 << self.bits), code) / 2**self.frac).astype(F32)

    def encode(self, x):
        x = as_float64(x)
        top = 2 ** (self.bits - 1) - 1
        value = np.clip(np.rint(np.where(np.isnan(x), np.inf, x) * 2**self.frac), -top, top)
        return (value.astype(np.int64) & ((1 << self.bits) - 1)).astype(np.uint8)


@dataclass(frozen=True)
class Codebook:
    """Sorted values, the code is the index; a tie goes to the even code."""

    values: tuple

    @property
    def bits(self):
        return (len(self.values) - 1).bit_length()

    @property
    def max(self):
        return max(abs(v) for v in self.values)

    def table(self):
        return np.array(self.values, F32)

    def encode(self, x):
        x = as_float64(x)
        grid = self.table().astype(np.float64)
        middle = (grid[1:] + grid[:-1]) / 2
        low, high = np.searchsorted(middle, x, "left"), np.searchsorted(middle, x, "right")
        return np.where(np.isnan(x), len(grid) - 1, np.where(low % 2 == 0, low, high)).astype(np.uint8)


# QLoRA (arXiv:2305.14314), appendix E
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

ELEMENTS = {
    "e4m3": Float(4, 3, 7, top=0x7E, nan=0x7F),
    "e5m2": Float(5, 2, 15, top=0x7B, nan=0x7F, inf=0x7C),
    "e2m3": Float(2, 3, 1, top=0x1F),
    "e3m2": Float(3, 2, 3, top=0x1F),
    "e2m1": Float(2, 1, 1, top=0x07),
    "ue5m3": Float(5, 3, 15, top=0xFE, nan=0xFF, signed=False),
    "mxint8": Int(8, 6),
    "mxint4": Int(4, 2),
    "int4": Int(4, 0),
    "nf4": Codebook(NF4),
}


# ---------------------------------------------------------------------------------------------------- formats
@dataclass(frozen=True)
class Format:
    """Element, block along K, scale encoding, and the optional fp32 outer scale ("tensor" or "row")."""

    element: str
    block: int
    scale: str
    outer: str | None = None
    scale_max: float = 448.0
    candidates: tuple = (1.0,)
    metric: str | None = None


FORMATS = {
    "mxfp8": Format("e4m3", 32, "e8m0"),
    "mxfp8_e5m2": Format("e5m2", 32, "e8m0"),
    "mxfp6": Format("e2m3", 32, "e8m0"),
    "mxfp6_e3m2": Format("e3m2", 32, "e8m0"),
    "mxfp4": Format("e2m1", 32, "e8m0"),
    "mxint8": Format("mxint8", 32, "e8m0"),
    "mxint4": Format("mxint4", 32, "e8m0"),
    "nvfp4": Format("e2m1", 16, "e4m3", "tensor"),
    "nvfp4_1level": Format("e2m1", 16, "e4m3"),
    "nvfp4_row": Format("e2m1", 16, "e4m3", "row"),
    "nvfp4_4over6": Format("e2m1", 16, "e4m3", "tensor", 256.0, (1.0, 1.5), "mse"),
    "nvfp4_4over6_mae": Format("e2m1", 16, "e4m3", "tensor", 256.0, (1.0, 1.5), "mae"),
    "nvint4": Format("int4", 16, "e4m3", "tensor"),
    "fp4_ue5m3": Format("e2m1", 16, "ue5m3"),
    "fp8_block128": Format("e4m3", 128, "fp32"),
    "nf4": Format("nf4", 64, "fp32"),
}


@dataclass
class Quantized:
    """What the model predicts. `poisoned` marks elements whose block held a NaN or Inf: their code is out of scope."""

    codes: np.ndarray  # uint8, shape of x
    scales: np.ndarray  # float32 [..., R, ceil(K / block)]
    outer: np.ndarray | None  # float32, () or [..., R, 1]
    values: np.ndarray  # float32, shape of x
    poisoned: np.ndarray  # bool, shape of x


# ------------------------------------------------------------------------------------------------ scale rules
def mx_exponent(amax, element, rule):
    """The exponent E of the E8M0 scale 2^E, from the fp32 amax of a block (numerics.md section 2)."""
    with np.errstate(all="ignore"):
        quotient = amax / F32(element.max)  # one fp32 rounding, subnormals kept
    fraction, exponent = np.frexp(amax.astype(np.float64))  # amax = fraction * 2^exponent, 0.5 <= fraction < 1
    floor_log2, mantissa = exponent.astype(np.int64) - 1, fraction * 2
    if rule == "floor":
        result = floor_log2 - element.emax
    elif rule == "ceil":
        result = floor_log2 + (mantissa > 1) - element.emax
    elif rule == "even":
        result = floor_log2 + (mantissa >= 2 - 2.0 ** -(element.mantissa + 1)) - element.emax
    elif rule == "rceil":
        fraction, exponent = np.frexp(quotient.astype(np.float64))
        result = exponent.astype(np.int64) - (fraction == 0.5)
        return np.where(quotient == 0, -127, np.clip(result, -127, 127))
    return np.where(amax == 0, -127, np.clip(result, -127, 127))


def outer_encode_scale(amax, top):
    """S_enc = min(top / amax, FLT_MAX), 1 for an all-zero tensor; fp32."""
    with np.errstate(all="ignore"):
        return np.where(amax == 0, F32(1), np.minimum(F32(top) / amax, FLT_MAX)).astype(F32)


def reciprocal(scale):
    """min(1 / scale, FLT_MAX) in fp32."""
    with np.errstate(all="ignore"):
        return np.minimum(F32(1) / scale, FLT_MAX)


def scale_round(scale, kind):
    """RNE of an fp32 value to the scale encoding, saturating, zero allowed; back as fp32."""
    if kind == "fp32":
        return np.maximum(scale, F32(2.0**-126))
    spec = ELEMENTS[kind]
    return spec.table()[spec.encode(scale)]


# ----------------------------------------------------------------------------------------------------- blocks
class Grid:
    """Cuts [..., R, K] into tiles of rows x cols, zero padded: [N, R/rows, K/cols, rows, cols], and back."""

    def __init__(self, shape, rows, cols, block):
        self.shape, self.rows, self.cols, self.block = shape, rows, cols, block
        self.R, self.K = (1, *shape)[-2:]
        self.N = int(np.prod(shape[:-2]))
        self.tiles_r, self.tiles_c = -(-self.R // rows), -(-self.K // cols)

    def split(self, x):
        x = x.reshape(self.N, self.R, self.K)
        pad = (self.tiles_r * self.rows - self.R, self.tiles_c * self.cols - self.K)
        x = np.pad(x, ((0, 0), (0, pad[0]), (0, pad[1])))
        return x.reshape(self.N, self.tiles_r, self.rows, self.tiles_c, self.cols).swapaxes(2, 3)

    def join(self, tiles):
        x = tiles.swapaxes(2, 3).reshape(self.N, self.tiles_r * self.rows, self.tiles_c * self.cols)
        return np.ascontiguousarray(x[:, : self.R, : self.K]).reshape(self.shape)

    def spread(self, per_tile):
        """A value per tile, repeated to one per element."""
        tile = (self.N, self.tiles_r, self.tiles_c, self.rows, self.cols)
        return self.join(np.broadcast_to(per_tile[..., None, None], tile))

    def spread_rows(self, per_row):
        """A value per row [N, R, 1], in the shape that broadcasts against tiles (rows == 1)."""
        return per_row.reshape(self.N, self.tiles_r, 1)


def block_error(error, metric):
    """Sum of |d| or d*d in fp32: along a row one by one, then over the rows as a tree of halves (TE's order)."""
    error = error * error if metric == "mse" else np.abs(error)
    total = np.zeros(error.shape[:-1], F32)
    for i in range(error.shape[-1]):
        total = total + error[..., i]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


def quantize(x, format, rule=None, block=None, tile=None):
    """Quantize float32 `x` (rank >= 1) in `format`; `rule` is the MX scale rule, `tile` the region of one amax."""
    spec = FORMATS[format]
    element = ELEMENTS[spec.element]
    block = block or spec.block
    rows, cols = tile or (1, block)
    grid = Grid(x.shape, rows, cols, block)
    tiles = grid.split(x.astype(F32))
    poisoned = ~np.isfinite(tiles).all((-1, -2))
    tiles = np.where(poisoned[..., None, None], F32(0), tiles)
    amax = np.abs(tiles).max((-1, -2))
    outer = None
    with np.errstate(all="ignore"):
        if spec.scale == "e8m0":
            scale = np.ldexp(F32(1), mx_exponent(amax, element, rule)).astype(F32)
            codes = element.encode(tiles.astype(np.float64) / scale[..., None, None].astype(np.float64))
        elif spec.outer is None:
            scale = scale_round(amax / F32(element.max), spec.scale)
            codes = element.encode(tiles * reciprocal(scale)[..., None, None])
        else:
            finite = np.where(np.isfinite(x), np.abs(x), F32(0)).astype(F32)
            top_amax = finite.max() if spec.outer == "tensor" else finite.max(-1, keepdims=True)
            encode_scale = outer_encode_scale(top_amax, element.max * spec.scale_max)
            outer = F32(1) / encode_scale
            per_tile = (lambda v: v) if spec.outer == "tensor" else grid.spread_rows
            codes, scale = two_level(tiles, amax, spec, per_tile(top_amax), per_tile(encode_scale), per_tile(outer))
    scale = np.where(poisoned, F32(np.nan), scale)
    codes, scale, poisoned = grid.join(codes), grid.spread(scale), grid.spread(poisoned)
    with np.errstate(all="ignore"):
        values = element.table()[codes] * scale
        if outer is not None:
            values = values * outer
    return Quantized(codes, scale[..., ::block], outer, values, poisoned)


def two_level(tiles, amax, spec, outer_amax, encode_scale, outer):
    """TransformerEngine's order of operations (peers.md 2.3): codes and decoded block scales of each tile."""
    element = ELEMENTS[spec.element]
    if spec.metric is None:
        factor = encode_scale * (F32(1) / F32(element.max))
        bases = [amax * factor]
    else:
        base = (amax / F32(element.max)) * encode_scale
        bases = [F32(multiplier) * base for multiplier in spec.candidates]
    best = None
    for base in bases:
        scale = scale_round(base, spec.scale)
        codes = element.encode(tiles * reciprocal(scale * outer)[..., None, None])
        if spec.metric is None:
            return codes, scale
        product = element.table()[codes] * scale[..., None, None]
        product = product * np.asarray(outer_amax)[..., None, None]
        product = product / F32(element.max * spec.scale_max)
        error = block_error(product - tiles, spec.metric)
        if best is None:
            best = codes, scale, error
        else:
            better = error < best[2]
            best = (
                np.where(better[..., None, None], codes, best[0]),
                np.where(better, scale, best[1]),
                np.where(better, error, best[2]),
            )
    return best[:2]
