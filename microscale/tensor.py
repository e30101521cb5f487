"""`BlockScaledTensor`: the one wrapper subclass, for every format, layout and axis.

    value[..., i] = (decode(qdata)[..., i] * decode(scale)[..., i // block]) * outer_scale       along `meta.axis`

Parts and their shapes for a logical tensor [..., R, K] blocked along the last axis (for another axis, the same
dimensions moved there):
  qdata        uint8 [..., R, ceil(K/block) * block bytes]; K is padded inside to whole blocks, shape stays logical
  scale        [..., R, ceil(K/block)] (layout strided) or one swizzle_32_4_4 blob per matrix [..., n]; uint8 codes, or
               float32/bfloat16 for a scale dtype of that width
  outer_scale  float32, shape () or one dimension per logical dimension, broadcastable to the scales; None counts as 1
Layout `fragments` (`microscale.prepare`) is that of a matrix whose qdata and scale keep their shapes, not their order;
or of experts [E, N, K], which are the matrix [E * N, K] in that order.

The subclass law: `op(q).dequantize()` equals `op(q.dequantize())`, or the op raises and names the way out. The ops it
takes are a closed list (`microscale.ops.aten`); nothing dequantizes on its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from microscale.errors import InputError
from microscale.numerics import codec, fragments, layout, packing
from microscale.spec.format import FormatSpec

_make = torch.Tensor._make_wrapper_subclass
_through_torch = torch._C._disabled_torch_function_impl
bare = torch._C.DisableTorchFunctionSubclass
"""A context: within it torch reads attributes of a BlockScaledTensor without asking its `__torch_function__`."""

FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""Torch's functions that need not always go through its dispatcher, as `microscale.ops.aten` runs them; each gives None
where the call must go that way after all."""


_EXACT = {None: "", True: ":exact", False: ":inexact"}
_EXACT_OF = {text.removeprefix(":"): flag for flag, text in _EXACT.items()}


@dataclasses.dataclass(frozen=True)
class Meta:
    """What the bytes mean: the format, the blocked dimension (negative index), and how the scales are laid out.

    `exact_rows` is what `microscale.prepare` found: whether every row along the blocked dimension is E4M3 numbers times
    one power of two, so that FP8 tensor cores can multiply it as it is; None if nobody looked.
    """

    format: FormatSpec
    axis: int = -1
    layout: str = layout.STRIDED
    exact_rows: bool | None = None

    def pack(self) -> str:
        """Return one line of text that `unpack` reads; it crosses operator and pickle boundaries."""
        return f"{self.axis}|{self.layout}{_EXACT[self.exact_rows]}|{self.format.key}"

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def unpack(text: str) -> Meta:
        """Return the Meta that `pack` wrote, one object per text."""
        axis, kind, key = text.split("|", 2)
        scale_layout, _, exact = kind.partition(":")
        return Meta(FormatSpec.from_key(key), int(axis), scale_layout, _EXACT_OF[exact])


class BlockScaledTensor(torch.Tensor):
    """A tensor stored as block-scaled codes. Make one with `microscale.quantize`; see the module for the layout."""

    qdata: torch.Tensor
    scale: torch.Tensor
    outer_scale: torch.Tensor | None
    meta: Meta
    _turned: tuple[Any, ...] | None = None
    """What `microscale.ops.compute` keeps of the transposed parts; it sees for itself whether they are still these."""

    @staticmethod
    def __new__(
        cls: type[BlockScaledTensor],
        qdata: torch.Tensor,
        scale: torch.Tensor,
        outer_scale: torch.Tensor | None,
        meta: Meta,
        shape: tuple[int, ...] | torch.Size,
        dtype: torch.dtype,
    ) -> BlockScaledTensor:
        """Wrap parts; `shape` is logical, `dtype` what `dequantize()` gives. Unchecked: `quantize` is the door."""
        strides = None if qdata.is_contiguous() else _strides(tuple(shape), qdata)
        if torch.is_inference_mode_enabled() and not qdata.is_inference():
            with torch.inference_mode(False):  # a view of a normal tensor is normal: torch sets its version counter
                self = _make(cls, shape, strides=strides, dtype=dtype, device=qdata.device)
        else:
            self = _make(cls, shape, strides=strides, dtype=dtype, device=qdata.device)
        self.qdata, self.scale, self.outer_scale, self.meta = qdata, scale, outer_scale, meta
        return self

    # -- the format --

    @property
    def format(self) -> FormatSpec:
        """The format of the stored bytes."""
        return self.meta.format

    @property
    def block_axis(self) -> int:
        """The blocked dimension, as a negative index."""
        return self.meta.axis

    @property
    def scale_layout(self) -> str:
        """`strided`, `swizzle_32_4_4`, or `fragments` of a prepared weight."""
        return self.meta.layout

    @property
    def stored_bytes(self) -> int:
        """Bytes of qdata, scales and outer scale together."""
        parts = [self.qdata, self.scale] + ([] if self.outer_scale is None else [self.outer_scale])
        return sum(t.numel() * t.element_size() for t in parts)

    # -- reading --

    def codes(self) -> torch.Tensor:
        """Return the element codes, unpacked: uint8, the logical shape (ints are two's complement in the low bits)."""
        axis = self.meta.axis
        rows = self.to_layout(layout.STRIDED).qdata if self.meta.layout == layout.FRAGMENTS else self.qdata
        rows = rows.movedim(axis, -1)
        return packing.unpack(rows, self.format.element.width, self.shape[axis]).movedim(-1, axis)

    def scales(self) -> torch.Tensor:
        """Return the decoded block scales: float32, the logical shape with the blocked dimension ceil(K/block) long.

        The outer scale is not in it.
        """
        return codec.decode(self.strided_scale(), self.format.scale)

    def strided_scale(self) -> torch.Tensor:
        """Return the stored scales in layout `strided`, unswizzled if they are blobs."""
        if self.meta.layout == layout.STRIDED:
            return self.scale
        if self.meta.layout == layout.FRAGMENTS:
            return fragments.scale_from_fragments(self.scale.movedim(self.meta.axis, -1), self.format.block).movedim(
                -1, self.meta.axis
            )
        axis = self.meta.axis
        rows = list(self.shape)
        size = rows.pop(axis)
        blocks = -(-size // self.format.block)
        matrix = layout.unswizzle(self.scale, rows[-1] if rows else 1, blocks)
        return matrix.reshape(*rows, blocks).movedim(-1, axis)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the values as a plain tensor of `dtype` (default: the tensor's own), rounded once from FP32."""
        from microscale import ops

        return ops.dequantize(self, dtype)

    # -- other forms of the same values --

    def to_layout(self, scale_layout: str) -> BlockScaledTensor:
        """Return the same values with scales in layout `strided` or `swizzle_32_4_4`, or a matrix as `fragments`.

        Experts [E, N, K], or [E, K, N] transposed, have the fragments of the matrix [E * N, K].

        Raises InputError for another layout, or for what has no fragments; `microscale.prepare` also asks whether
        they can be used.
        """
        known = (*layout.LAYOUTS, layout.FRAGMENTS)
        if scale_layout not in known:
            raise InputError(f"unknown scale layout {scale_layout!r}", f"use {' or '.join(known)}")
        if scale_layout == self.meta.layout:
            return self
        if self.meta.layout == layout.FRAGMENTS:
            return self._reordered(fragments.restore, layout.STRIDED).to_layout(scale_layout)
        scale = self.strided_scale()
        if scale_layout == layout.FRAGMENTS:
            if not self._has_fragments():
                raise InputError(
                    f"{self!r} has no layout fragments",
                    "it takes a matrix whose sizes are multiples of 64, in 4, 6 or 8 bits, with blocks of 16 or 32 and "
                    "scales of 8 bits that leave bfloat16 numbers, or with one FP32 scale for each row; or experts of "
                    "such matrices, but for FP32 scales of rows",
                )
            plain = self.replace(scale=scale, meta=dataclasses.replace(self.meta, layout=layout.STRIDED))
            return plain._reordered(fragments.order, layout.FRAGMENTS)
        if scale_layout == layout.SWIZZLED:
            rows = scale.movedim(self.meta.axis, -1)
            scale = layout.swizzle(rows if rows.dim() > 1 else rows[None])
        return self.replace(scale=scale, meta=dataclasses.replace(self.meta, layout=scale_layout))

    def _has_fragments(self) -> bool:
        """Whether layout `fragments` is one for this format and shape."""
        axis, dims = self.meta.axis, self.dim()
        if dims not in (2, 3) or axis < -2 or not self.numel():
            return False
        size, rows = self.shape[axis], self.shape[-3 - axis]
        return fragments.fits(self.format, rows, size, experts=dims == 3)

    def _reordered(self, how: Callable[..., tuple[torch.Tensor, torch.Tensor]], scale_layout: str) -> BlockScaledTensor:
        """Return the same with qdata and scale as `how` orders them, which takes the blocked dimension last."""
        axis = self.meta.axis
        rows = (self.qdata.movedim(axis, -1), self.scale.movedim(axis, -1), self.format, self.shape[axis])
        qdata, scale = (t.movedim(-1, axis) for t in how(*rows))
        return self.replace(qdata=qdata, scale=scale, meta=dataclasses.replace(self.meta, layout=scale_layout))

    def as_dtype(self, dtype: torch.dtype) -> BlockScaledTensor:
        """Return the same bytes with another dtype for `dequantize()`.

        Unlike `.to(dtype)`, which must equal converting the dequantized values, this also goes from narrow to wide.
        """
        return self.replace(dtype=dtype)

    def replace(self, **changes: Any) -> BlockScaledTensor:
        """Return a copy with some of qdata, scale, outer_scale, meta, shape, dtype changed."""
        parts: dict[str, Any] = {
            "qdata": self.qdata, "scale": self.scale, "outer_scale": self.outer_scale,
            "meta": self.meta, "shape": self.shape, "dtype": self.dtype,
        }  # fmt: skip
        return BlockScaledTensor(**{**parts, **changes})

    # -- torch protocol --

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Show shape, format, layout and bits per value; never data, so that printing costs nothing."""
        outer = "" if self.outer_scale is None else f", outer_scale={list(self.outer_scale.shape)}"
        axis = "" if self.meta.axis == -1 else f", block_axis={self.meta.axis}"
        return (
            f"BlockScaledTensor(shape={list(self.shape)}, format={self.format.name}, "
            f"bits_per_value={self.format.bits_per_value:g}, layout={self.meta.layout}{axis}{outer}, "
            f"dtype={self.dtype}, device={self.device})"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Meta, torch.dtype]]:
        """Name the inner tensors, for torch.compile and FSDP."""
        names = ["qdata", "scale"] + ([] if self.outer_scale is None else ["outer_scale"])
        return names, (self.meta, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, torch.Tensor], context: tuple[Meta, torch.dtype], outer_size: Any, outer_stride: Any
    ) -> BlockScaledTensor:
        """Rebuild from `__tensor_flatten__`."""
        meta, dtype = context
        return BlockScaledTensor(parts["qdata"], parts["scale"], parts.get("outer_scale"), meta, outer_size, dtype)

    def _stable_hash_for_caching(self) -> str:
        """Identify the subclass metadata for torch.compile's on-disk cache."""
        return f"{self.meta.pack()}|{self.dtype}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as parts and one line of text, so that `torch.load(weights_only=True)` needs one allowed function."""
        is_parameter = bool(getattr(self, "_is_param", False))
        parts = (self.qdata, self.scale, self.outer_scale)
        return rebuild, (*parts, self.meta.pack(), tuple(self.shape), self.dtype, is_parameter)

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockScaledTensor:
        """Copy the parts; a Parameter stays one."""
        copy = self.clone()
        result = torch.nn.Parameter(copy, requires_grad=False) if getattr(self, "_is_param", False) else copy
        memo[id(self)] = result
        return result  # type: ignore[return-value]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer a function of FUNCTIONS that need not go through torch; all else goes on as if this were not here.

        torch.compile never asks it, as it traces wrapper subclasses by their parts.
        """
        short = FUNCTIONS.get(func)
        if short is not None:
            made = short(*args, **kwargs) if kwargs else short(*args)
            if made is not None:
                return made
        if len(types) > 1:
            others = tuple(kind for kind in types if not issubclass(kind, BlockScaledTensor))
            for kind in others:  # they need not know of this class, which has no wish of its own
                made = kind.__torch_function__(func, others, args, kwargs or {})
                if made is not NotImplemented:
                    return made
            if others:
                return NotImplemented
        return _through_torch(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Look the op up in the closed list of `microscale.ops.aten`."""
        return _ops().dispatch(func, args, kwargs or {})


@functools.cache
def _ops() -> Any:
    from microscale.ops import aten

    return aten


def rebuild(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    outer_scale: torch.Tensor | None,
    meta: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    is_parameter: bool = False,
) -> torch.Tensor:
    """Make a BlockScaledTensor from its pickled parts."""
    tensor = BlockScaledTensor(qdata, scale, outer_scale, Meta.unpack(meta), shape, dtype)
    return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _strides(shape: tuple[int, ...], qdata: torch.Tensor) -> tuple[int, ...]:
    """Strides of the logical tensor: dense, in the memory order of qdata's dimensions; expanded dimensions have 0."""
    inner = qdata.stride()
    if len(shape) == 2 and inner[0] and inner[1]:  # what follows, in few steps: every linear layer's
        return (max(shape[1], 1), 1) if inner[0] >= inner[1] else (1, max(shape[0], 1))
    strides, step = [0] * len(shape), 1
    for d in sorted(range(len(shape)), key=lambda d: (-inner[d], d), reverse=True):
        if inner[d] == 0 and shape[d] != 1:
            continue
        strides[d] = step
        step *= max(shape[d], 1)
    return tuple(strides)


torch.serialization.add_safe_globals([rebuild])
