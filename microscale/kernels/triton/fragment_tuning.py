"""How the decode GEMM is cut into programs and warps: by what was measured on this kind of GPU, else by a rule.

A file of measurements per kind of GPU is shipped in `tunings/`; `microscale tune` writes one of this machine to the
user's cache folder, which goes before it and is kept per version of microscale and Triton. Nothing is tuned on a call.
A cut changes the order of FP32 additions, and nothing else.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from microscale.numerics.fragments import DEPTH
from microscale.spec.format import FormatSpec

SHIPPED = Path(__file__).parent / "tunings"
KERNEL = "2"  # changes with the kernel, so that no old measurement speaks for a new one
PROGRAMS_PER_SM = {1: 7, 2: 6, 4: 4, 8: 2}  # that the rule aims at, by rows of x / 8
UNITS, WARPS = 2, 4
MEASURED = (9, 0)  # the architecture of the shipped measurements
DEFAULT_SMS = 132


class Tuning(NamedTuple):
    """A warp takes `units` x 16 rows of the weight at a time. Of a program, `across` warps lie along the rows, `along`
    share K; K is split among `splits` programs."""

    units: int
    across: int
    along: int
    splits: int


def key_of(fmt: FormatSpec, eights: int, columns: int, depth: int) -> str:
    """Return what a measurement is filed under: bits of an element, block, rows of x / 8, and the weight's shape."""
    block = fmt.block if fmt.block < DEPTH else 32  # of whole rows there are no scales to read: as the nearest
    return f"{fmt.element.width}/{block} {eights} {columns}x{depth}"


def slug(device_name: str) -> str:
    """Return a device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


def cache_file(device_name: str) -> Path:
    """Return where `microscale tune` puts what it measured."""
    return Path.home() / ".cache" / "microscale" / f"tuning-{slug(device_name)}.json"


def find(fmt: FormatSpec, eights: int, columns: int, depth: int, device: torch.device) -> Tuning:
    """Return the cut for x of up to `eights` x 8 rows and a weight [columns, depth]."""
    return _find(fmt, eights, columns, depth, *_facts(device))


@functools.lru_cache(maxsize=4096)
def _find(
    fmt: FormatSpec, eights: int, columns: int, depth: int, name: str, sms: int, capability: tuple[int, int]
) -> Tuning:
    measured = _table(name).get(key_of(fmt, eights, columns, depth))
    return by_rule(fmt, eights, columns, depth, sms, capability) if measured is None else Tuning(*measured)


@functools.cache
def _facts(device: torch.device) -> tuple[str, int, tuple[int, int]]:
    if device.type != "cuda":
        return "none", DEFAULT_SMS, MEASURED
    found = torch.cuda.get_device_properties(device)
    return found.name, found.multi_processor_count, (found.major, found.minor)


@functools.cache
def _table(name: str) -> dict[str, Any]:
    """What was measured on a kind of GPU: the shipped file, overridden by the user's."""
    found: dict[str, Any] = {}
    shipped = SHIPPED / f"{slug(name)}.json"
    if shipped.exists():
        found |= json.loads(shipped.read_text())["cuts"]
    mine = cache_file(name)
    if mine.exists():
        try:
            saved = json.loads(mine.read_text())
        except ValueError:  # half a file: as good as none
            return found
        if saved.get("versions") == versions():
            found |= saved.get("cuts", {})
    return found


def forget() -> None:
    """Read the files again at the next call."""
    _table.cache_clear()
    _find.cache_clear()


def versions() -> dict[str, str]:
    """Return the versions that measurements hold for."""
    import triton

    return {"kernel": KERNEL, "triton": triton.__version__}


def by_rule(fmt: FormatSpec, eights: int, columns: int, depth: int, sms: int, capability: tuple[int, int]) -> Tuning:
    """Return four warps side by side and as many splits of K as fill the SMs: where the measurements lie, nearly.

    With 64 rows of x, 4 bits and two units the compiler spills registers elsewhere than where it was measured.
    """
    small = eights == 8 and fmt.element.width == 4 and capability[0] != MEASURED[0]
    units = 1 if small else UNITS
    tiles = -(-columns // (16 * units * WARPS))
    wanted = PROGRAMS_PER_SM[eights] * sms / max(1, tiles)
    return Tuning(units, WARPS, 1, max(1, min(round(wanted), depth // 64 // 4, 16)))


def candidates(eights: int, columns: int, depth: int) -> list[Tuning]:
    """Return the cuts that `microscale tune` measures."""
    made = []
    for units in (2, 4) if eights < 8 else (2,):  # else registers spill
        for across, along in ((1, 4), (2, 2), (4, 1), (1, 8), (2, 4), (4, 2), (8, 1)):
            tiles = -(-columns // (16 * units * across))
            for splits in (1, 2, 3, 4, 6, 8, 12, 16):
                enough = tiles * splits >= 96 and depth // 64 // splits >= 2 * along
                if enough and (splits == 1 or tiles * splits <= 12 * DEFAULT_SMS):
                    made.append(Tuning(units, across, along, splits))
    return made
