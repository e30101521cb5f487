"""Checkpoints: read, quantize on disk, save, load, inspect. One module a dialect (see `dialect.Dialect`)."""

from microscale.interop.checkpoint import Checkpoint
from microscale.interop.convert import quantize_checkpoint
from microscale.interop.dialect import find_dialect, list_dialects
from microscale.interop.inspection import CheckpointReport, inspect
from microscale.interop.loading import load
from microscale.interop.saving import save

__all__ = [
    "Checkpoint",
    "CheckpointReport",
    "find_dialect",
    "inspect",
    "list_dialects",
    "load",
    "quantize_checkpoint",
    "save",
]
