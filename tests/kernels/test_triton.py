"""The generic Triton kernels without a GPU: interpreted against the reference."""

import importlib.util

import pytest

import microscale as ms
from tests.kernels.processes import fast, lines

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
FORMATS = ms.list_formats()


@pytest.mark.parametrize("formats", fast([FORMATS[::2], [*FORMATS[1::2], "user"]], 0), ids=["even", "odd and user"])
def test_interpreted_kernels_equal_the_reference(formats):
    """Every format x rule x rounding x layout x input dtype, ragged and strided: codes, scales, values, bit for bit."""
    rows = lines("tests.kernels.interpreted", *formats)
    assert [r for r in rows if "error" in r] == []
    assert rows[-1]["checked"] > 100
