"""The Triton kernels without a GPU: interpreted against the reference, and compiled for every architecture."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

import microscale as ms

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
FORMATS = ms.list_formats()


def lines(module: str, *args: str, timeout: int = 900, **environment: str) -> list[dict[str, object]]:
    """Run a module in a process of its own and parse the JSON lines it prints."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "ignore", "-m", module, *args]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("formats", [FORMATS[::2], [*FORMATS[1::2], "user"]], ids=["even", "odd and user"])
def test_interpreted_kernels_equal_the_reference(formats):
    """Every format x rule x rounding x layout x input dtype, ragged and strided: codes, scales, values, bit for bit."""
    rows = lines("tests.kernels.interpreted", *formats)
    assert [r for r in rows if "error" in r] == []
    assert rows[-1]["checked"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100, 103, 120])
def test_kernels_compile(capability, tmp_path):
    """Every format compiles for the architecture without local memory, by the encoder meant for it."""
    rows = lines("tests.kernels.compiled", str(capability), TRITON_CACHE_DIR=str(tmp_path))
    assert {r["format"] for r in rows} == set(FORMATS)
    assert {r["op"] for r in rows} >= {"quantize", "dequantize"}
    assert [r for r in rows if r["local"]] == []
    assert all(str(r["target"]).startswith(f"sm_{capability}") for r in rows)
    native = {e for r in rows for e in r["conversions"] if r["encoder"]}
    if capability >= 90:
        assert any("e4m3x2" in c for c in native) and "max.u16x2" in native
    else:
        assert {r["encoder"] for r in rows} == {0}
