"""Puts `tests/` on the import path: `from oracles import specmodel`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
