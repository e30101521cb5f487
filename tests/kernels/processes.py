"""Runs the modules beside it in processes of their own, and what they cover."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

COVERAGE = json.loads(Path(__file__).with_name("coverage.json").read_text())  # the docs show it; the suite runs it


def lines(module: str, *args: str, timeout: int = 900, **environment: str) -> list[dict[str, object]]:
    """Run a module in a process of its own and parse the JSON lines it prints."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "ignore", "-m", module, *args]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def fast(values: Iterable[Any], *chosen: int) -> list[Any]:
    """Parameters of a test, of which all but the `chosen` ones, by place, are slow: a sample for every change."""
    return [v if i in chosen else pytest.param(v, marks=pytest.mark.slow) for i, v in enumerate(values)]


def architectures(kernel: str) -> list[int]:
    """The compute capabilities, times ten, that a kernel is compiled for."""
    return COVERAGE[kernel]["compiled"]
