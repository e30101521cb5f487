"""Structural operations on BlockScaledTensor parts: what slicing, joining and reshaping mean for codes and scales.

qdata and scale have the logical dimensions, except that the blocked one counts bytes and blocks. So an operation on
another dimension applies to both parts as it is; on the blocked dimension it applies in units of blocks, or raises.
Swizzled scales are unswizzled first unless the operation leaves their matrices alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from microscale.errors import InputError, UnsupportedOpError
from microscale.numerics import layout
from microscale.tensor import BlockScaledTensor

Parts = Callable[[torch.Tensor], torch.Tensor]


def blocked(q: BlockScaledTensor) -> int:
    """Return the blocked dimension as a non-negative index."""
    return q.block_axis + q.dim()


def dimension(q: torch.Tensor, dim: int, extra: int = 0) -> int:
    """Return `dim` as a non-negative index; raises IndexError as torch does."""
    rank = q.dim() + extra
    if not -rank <= dim < rank:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], but got {dim})")
    return dim % rank


def strided(q: BlockScaledTensor) -> BlockScaledTensor:
    """Return q with strided scales."""
    return q.to_layout(layout.STRIDED)


def apply(
    q: BlockScaledTensor, f: Parts, shape: Sequence[int], axis: int, outer: Parts | None = None
) -> BlockScaledTensor:
    """Apply `f` to qdata and scale, `outer` (default f) to an outer scale with dimensions; `axis` is non-negative."""
    scale = q.outer_scale
    if scale is not None and scale.dim():
        scale = (outer or f)(scale)
    meta = dataclasses.replace(q.meta, axis=axis - len(shape))
    return q.replace(qdata=f(q.qdata), scale=f(q.scale), outer_scale=scale, meta=meta, shape=tuple(shape))


def every_part(q: BlockScaledTensor, f: Parts) -> BlockScaledTensor:
    """Apply `f`, which keeps shapes, to all parts in whatever layout.

    But where `f` makes a transposed prepared weight dense, its tiles would no longer be: then of the plain order.
    """
    qdata = f(q.qdata)
    if q.scale_layout == layout.FRAGMENTS and not qdata.movedim(q.block_axis, -1).is_contiguous():
        q = strided(q)
        qdata = f(q.qdata)
    outer = None if q.outer_scale is None else f(q.outer_scale)
    return q.replace(qdata=qdata, scale=f(q.scale), outer_scale=outer)


def permute(q: BlockScaledTensor, dims: Sequence[int]) -> BlockScaledTensor:
    """Reorder dimensions."""
    order = [dimension(q, d) for d in dims]
    axis = blocked(q)
    shape, new_axis = [q.shape[d] for d in order], order.index(axis)
    rest = [d for d in order if d != axis]
    if q.scale_layout == layout.SWIZZLED and rest == sorted(rest):
        # The matrices of a swizzled scale are [the other dimensions in order] x blocks: they have not moved.
        outer = q.outer_scale.permute(order) if q.outer_scale is not None and q.outer_scale.dim() else q.outer_scale
        meta = dataclasses.replace(q.meta, axis=new_axis - len(shape))
        return q.replace(qdata=q.qdata.permute(order), outer_scale=outer, meta=meta, shape=tuple(shape))
    if q.scale_layout != layout.FRAGMENTS or order[:-2] != list(range(q.dim() - 2)):  # whose matrices are only turned
        q = strided(q)
    return apply(q, lambda t: t.permute(order), shape, new_axis)


def transpose(q: BlockScaledTensor, first: int, second: int) -> BlockScaledTensor:
    """Swap two dimensions."""
    order = list(range(q.dim()))
    i, j = dimension(q, first), dimension(q, second)
    order[i], order[j] = order[j], order[i]
    return permute(q, order)


def _outer_slice(q: BlockScaledTensor, dim: int, f: Parts) -> Parts:
    """`f` for an outer scale: where it has size 1 along `dim` there is nothing to cut."""
    return lambda t: t if t.shape[dim] == 1 and q.shape[dim] != 1 else f(t)


def slice_(
    q: BlockScaledTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> BlockScaledTensor:
    """Cut [start:end:step] along a dimension; along the blocked one, at block boundaries and without a step."""
    dim, size = dimension(q, dim), q.shape[dim]
    start, end, step = slice(start, None if end is None or end > size else end, step).indices(size)
    end = max(start, end)
    length = -(-(end - start) // step)
    shape = [*q.shape[:dim], length, *q.shape[dim + 1 :]]
    if length == size and step == 1:
        return every_part(q, torch.Tensor.detach)
    q, axis = strided(q), blocked(q)
    if dim != axis:

        def cut(t: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.slice.Tensor(t, dim, start, end, step)

        return apply(q, cut, shape, axis, _outer_slice(q, dim, cut))
    block = q.format.block
    if step != 1 or (length and (start % block or (end % block and end != size))):
        raise UnsupportedOpError(
            f"slice [{start}:{end}:{step}] of dimension {dim} is not on the block boundaries of {q.format.name}",
            f"slice at multiples of {block}, or dequantize() first",
        )
    first, last = (start // block, -(-end // block)) if length else (0, 0)
    return _cut_blocks(q, axis, first, last, shape)


def _cut_blocks(q: BlockScaledTensor, axis: int, first: int, last: int, shape: Sequence[int]) -> BlockScaledTensor:
    size = q.format.block_bytes
    outer = q.outer_scale
    if outer is not None and outer.dim() and outer.shape[axis] != 1:
        outer = outer.narrow(axis, first, last - first)
    qdata = q.qdata.narrow(axis, first * size, (last - first) * size)
    scale = q.scale.narrow(axis, first, last - first)
    return q.replace(qdata=qdata, scale=scale, outer_scale=outer, shape=tuple(shape))


def select(q: BlockScaledTensor, dim: int, index: int) -> BlockScaledTensor:
    """Take one index of a dimension other than the blocked one."""
    dim, axis = dimension(q, dim), blocked(q)
    if dim == axis:
        raise UnsupportedOpError(
            f"select on dimension {dim}, along which the blocks of {q.format.name} run",
            "dequantize() first, or slice whole blocks",
        )
    if not -q.shape[dim] <= index < q.shape[dim]:
        raise IndexError(f"select(): index {index} out of range for size {q.shape[dim]} at dimension {dim}")
    shape = [*q.shape[:dim], *q.shape[dim + 1 :]]
    index %= q.shape[dim]
    return apply(
        strided(q), lambda t: t.select(dim, index), shape, axis - (dim < axis),
        lambda t: t.select(dim, 0 if t.shape[dim] == 1 else index),
    )  # fmt: skip


def unsqueeze(q: BlockScaledTensor, dim: int) -> BlockScaledTensor:
    """Insert a dimension of size 1."""
    dim, axis = dimension(q, dim, extra=1), blocked(q)
    shape = [*q.shape[:dim], 1, *q.shape[dim:]]
    return apply(strided(q), lambda t: t.unsqueeze(dim), shape, axis + (dim <= axis))


def squeeze(q: BlockScaledTensor, dims: Sequence[int] | None = None) -> BlockScaledTensor:
    """Drop dimensions of size 1, all or the named ones; the blocked dimension cannot go."""
    named = range(q.dim()) if dims is None else {dimension(q, d) for d in dims}
    gone, axis = sorted(d for d in named if q.shape[d] == 1), blocked(q)
    if axis in gone:
        raise UnsupportedOpError(f"squeeze of dimension {axis}, along which the blocks run", "dequantize() first")
    shape = [n for d, n in enumerate(q.shape) if d not in gone]
    return apply(strided(q), lambda t: t.squeeze(gone), shape, axis - sum(d < axis for d in gone))


def expand(q: BlockScaledTensor, sizes: Sequence[int]) -> BlockScaledTensor:
    """Broadcast to `sizes` (-1 keeps a size); the blocked dimension cannot grow."""
    lead = len(sizes) - q.dim()
    if lead < 0:
        raise InputError(f"expand to {list(sizes)}: fewer dimensions than {list(q.shape)}")
    shape = list(torch.broadcast_shapes(tuple(q.shape)))
    full = [*sizes[:lead], *(n if s == -1 else s for n, s in zip(shape, sizes[lead:], strict=True))]
    axis = blocked(q) + lead
    if full[axis] != q.shape[q.block_axis]:
        raise UnsupportedOpError(f"expand of dimension {axis}, along which the blocks run", "dequantize() first")

    def grow(t: torch.Tensor) -> torch.Tensor:
        return t.expand([*full[:axis], t.shape[axis - lead], *full[axis + 1 :]])

    return apply(strided(q), grow, full, axis, lambda t: t.reshape(*(1,) * lead, *t.shape))


def index(q: BlockScaledTensor, indices: Sequence[torch.Tensor | None]) -> BlockScaledTensor:
    """Advanced indexing with integer or boolean tensors on dimensions other than the blocked one."""
    flat: list[torch.Tensor | None] = []
    for i in indices:
        flat.extend(i.nonzero(as_tuple=True) if i is not None and i.dtype in (torch.bool, torch.uint8) else [i])
    used, axis = [d for d, i in enumerate(flat) if i is not None], blocked(q)
    if axis in used:
        raise UnsupportedOpError(
            f"indexing dimension {axis}, along which the blocks of {q.format.name} run",
            "dequantize() first, or index another dimension",
        )
    q = strided(q)
    rank = len(torch.broadcast_shapes(*(i.shape for i in flat if i is not None)))
    together = used == list(range(used[0], used[-1] + 1))
    before = sum(d < axis for d in used)
    new_axis = axis - before + (rank if before or not together else 0)

    def take(t: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.index.Tensor(t, flat)

    def take_outer(t: torch.Tensor) -> torch.Tensor:
        sizes = [q.shape[d] if d in used else n for d, n in enumerate(t.shape)]
        return take(t.expand(sizes))

    probe = take(q.scale)
    shape = list(probe.shape)
    shape[new_axis] = q.shape[axis]
    return apply(q, take, shape, new_axis, take_outer)


def cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> BlockScaledTensor:
    """Join tensors of one storage format; along the blocked dimension all but the last must be whole blocks."""
    parts = [t for t in tensors if isinstance(t, BlockScaledTensor)]
    if len(parts) != len(tensors):
        raise UnsupportedOpError("cat of quantized and plain tensors", "quantize all of them, or dequantize() all")
    first = parts[0]
    dim, axis, block = dimension(first, dim), blocked(first), first.format.block
    for other in parts[1:]:
        _check_joinable(first, other, dim)
    if dim == axis and any(p.shape[dim] % block for p in parts[:-1]):
        raise UnsupportedOpError(
            f"cat along the blocked dimension of lengths that are no multiple of {block}", "dequantize() first"
        )
    parts = [strided(p) for p in parts]
    shape = list(first.shape)
    shape[dim] = sum(p.shape[dim] for p in parts)
    qdata, scale = (torch.cat([getattr(p, name) for p in parts], dim) for name in ("qdata", "scale"))
    found = [p.meta.exact_rows for p in parts]
    exact = None if dim == axis or None in found else all(found)  # rows that join may span more exponents
    meta = dataclasses.replace(parts[0].meta, exact_rows=exact)
    outer = _cat_outer(parts, dim)
    return parts[0].replace(qdata=qdata, scale=scale, outer_scale=outer, meta=meta, shape=tuple(shape))


def _check_joinable(a: BlockScaledTensor, b: BlockScaledTensor, dim: int) -> None:
    if a.format.storage != b.format.storage or (a.outer_scale is None) != (b.outer_scale is None):
        raise UnsupportedOpError(f"cat of {a.format.name} and {b.format.name}", "requantize to one format")
    if a.dim() != b.dim() or a.block_axis != b.block_axis or a.dtype != b.dtype:
        raise UnsupportedOpError(
            "cat of tensors that differ in rank, blocked dimension or dtype", "make them agree first"
        )
    if any(n != m for d, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)) if d != dim):
        raise InputError(f"cat along dimension {dim} of shapes {list(a.shape)} and {list(b.shape)}")


def _cat_outer(parts: Sequence[BlockScaledTensor], dim: int) -> torch.Tensor | None:
    """Outer scales of joined tensors: each keeps its own, spread along `dim` in units of the scales."""
    outers = [p.outer_scale for p in parts if p.outer_scale is not None]
    if not outers or (all(o is outers[0] for o in outers) and outers[0].dim() == 0):
        return outers[0] if outers else None
    rank = parts[0].dim()
    full = [o if o.dim() else o.reshape((1,) * rank) for o in outers]
    sizes = [max(o.shape[d] for o in full) for d in range(rank)]
    spread = [o.expand([*sizes[:dim], p.scale.shape[dim], *sizes[dim + 1 :]]) for o, p in zip(full, parts, strict=True)]
    return torch.cat(spread, dim)


# -- reshape -----------------------------------------------------------------------------------------------------------


def _segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split two shapes of equal product into the finest pairs of runs with equal products (lists of dimensions)."""
    pairs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = ([i], []) if i < len(old) else ([], [])
        i += bool(left)
        if j < len(new):
            right.append(j)
            j += 1
        while math.prod(old[d] for d in left) != math.prod(new[d] for d in right):
            if math.prod(old[d] for d in left) < math.prod(new[d] for d in right):
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        pairs.append((left, right))
    return pairs


def _new_axis(q: BlockScaledTensor, left: list[int], right: list[int], new: Sequence[int]) -> int | None:
    """Where the blocked dimension goes when its run of dimensions becomes `right`; None if blocks would be cut."""
    axis, block = blocked(q), q.format.block
    size = q.shape[axis]
    long_left = [d for d in left if q.shape[d] != 1 or d == axis]
    long_right = [d for d in right if new[d] != 1]
    if long_left == [axis] and ([new[d] for d in long_right] == [size] or (size == 1 and right)):
        return long_right[0] if long_right else right[-1]
    whole = size % block == 0 and long_right and new[long_right[-1]] % block == 0
    return long_right[-1] if long_left[-1] == axis and whole else None


def reshape(q: BlockScaledTensor, sizes: Sequence[int]) -> BlockScaledTensor:
    """Give the tensor another shape of the same elements in the same order, where no block is cut."""
    new = _infer(q.numel(), sizes)
    if q.numel() == 0:
        return _empty(q, new)
    q, axis = strided(q), blocked(q)
    runs = _segments(q.shape, new)
    left, right = next(pair for pair in runs if axis in pair[0])
    new_axis = _new_axis(q, left, right, new)
    if new_axis is None:
        raise UnsupportedOpError(
            f"view of {list(q.shape)} as {list(new)} would cut blocks of {q.format.block} along dimension {axis}",
            "dequantize() first, or keep the blocked dimension a multiple of the block",
        )
    run = math.prod(q.shape[d] for d in left)

    def move(t: torch.Tensor) -> torch.Tensor:
        per_block = t.shape[axis]  # bytes or blocks along the old blocked dimension
        length = per_block if new[new_axis] == q.shape[axis] else per_block * new[new_axis] // q.shape[axis]
        return t.reshape([*new[:new_axis], length, *new[new_axis + 1 :]])

    def move_outer(t: torch.Tensor) -> torch.Tensor:
        sizes, target = list(t.shape), [1] * len(new)
        for old_dims, new_dims in runs:
            if all(t.shape[d] == 1 for d in old_dims):
                continue
            for d in old_dims:
                sizes[d] = q.scale.shape[d] if d == axis else q.shape[d]
            for d in new_dims:
                target[d] = new[d]
            if axis in old_dims:
                target[new_axis] = math.prod(sizes[d] for d in old_dims) * new[new_axis] // run
        return t.expand(sizes).reshape(target)

    if new[new_axis] > q.shape[axis]:  # rows join
        q = q.replace(meta=dataclasses.replace(q.meta, exact_rows=None))
    return apply(q, move, new, new_axis, move_outer)


def _infer(count: int, sizes: Sequence[int]) -> list[int]:
    known = math.prod(s for s in sizes if s != -1)
    new = [count // known if s == -1 and known else s for s in sizes]
    if math.prod(new) != count or list(sizes).count(-1) > 1:
        raise RuntimeError(f"shape '{list(sizes)}' is invalid for input of size {count}")
    return new


def _empty(q: BlockScaledTensor, shape: Sequence[int]) -> BlockScaledTensor:
    """A tensor without elements, blocked along its last dimension."""
    blocks = -(-shape[-1] // q.format.block) if shape else 0
    outer = q.outer_scale
    outer = None if outer is None else outer.new_ones(()) if outer.numel() != 1 else outer.reshape(())
    meta = dataclasses.replace(q.meta, axis=-1, layout=layout.STRIDED)
    qdata = q.qdata.new_empty((*shape[:-1], blocks * q.format.block_bytes))
    scale = q.scale.new_empty((*shape[:-1], blocks))
    return q.replace(qdata=qdata, scale=scale, outer_scale=outer, meta=meta, shape=tuple(shape))


def _check_prepared(source: BlockScaledTensor) -> None:
    """Raise InputError for values that a prepared tensor cannot take, because its kernels do not decode them."""
    from microscale.ops.prepare import check

    try:
        check(source)
    except InputError as error:
        raise InputError(f"copy_ into a prepared weight: {error}", 'restore it by .to_layout("strided")') from None


def copy_(target: BlockScaledTensor, source: Any) -> BlockScaledTensor:
    """Overwrite target's bytes by source's; both must be of one format, shape and orientation."""
    if not isinstance(source, BlockScaledTensor):
        raise UnsupportedOpError("copy_ of a plain tensor into a quantized one", "quantize it first")
    same = (target.format.storage, target.shape, target.block_axis, target.dtype)
    if same != (source.format.storage, source.shape, source.block_axis, source.dtype):
        raise UnsupportedOpError(
            f"copy_ of {source!r} into {target!r}", "format, shape, blocked dimension and dtype must agree"
        )
    if (target.outer_scale is None) != (source.outer_scale is None):
        raise UnsupportedOpError(f"copy_ of {source.format.name} into {target.format.name}", "requantize first")
    if target.scale_layout == layout.FRAGMENTS and source.scale_layout != layout.FRAGMENTS:
        _check_prepared(source)
    source = source.to_layout(target.scale_layout)
    if target.outer_scale is not None and source.outer_scale is not None:
        if target.outer_scale.dim() < source.outer_scale.dim() and source.outer_scale.numel() > 1:
            raise UnsupportedOpError("copy_ of several outer scales into one", "requantize first")
        target.outer_scale.copy_(source.outer_scale if target.outer_scale.dim() else source.outer_scale.reshape(()))
    if target.meta.exact_rows != source.meta.exact_rows:
        target.meta = dataclasses.replace(target.meta, exact_rows=source.meta.exact_rows)
    target.qdata.copy_(source.qdata)
    target.scale.copy_(source.scale)
    return target
