"""The command as a process: the entry points, a closed pipe, and what is not imported."""

import json
import subprocess
import sys

import pytest


def python(*arguments, code=None):
    command = [sys.executable, "-c", code] if code else [sys.executable]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)


def test_python_m_microscale():
    done = python("-m", "microscale", "formats", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert "nvfp4" in [row["name"] for row in json.loads(done.stdout)]


def test_an_error_has_no_traceback():
    done = python("-m", "microscale", "formats", "nvfp5")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown format 'nvfp5'\n  hint: ")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no head there")
def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m microscale schema recipe | head -c 10 >/dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [("formats",), ("formats", "nvfp4", "--json"), ("recipes",), ("schema", "recipe"), ("--help",), ("plan", "--help")],
)
def test_light_commands_do_not_import_torch(arguments):
    code = (
        "import sys, runpy\n"
        "try:\n    runpy.run_module('microscale', run_name='__main__')\n"
        "except SystemExit as exit:\n    assert not exit.code\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = python(*arguments, code=code)
    assert done.stderr == "False\n"
