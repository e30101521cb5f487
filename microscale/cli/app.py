"""The typer application: its commands, and the one place where an error becomes one line, a hint and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from microscale import __version__
from microscale.cli import bench, checkpoints, dispatching, doctor, specs, tune
from microscale.errors import MicroscaleError

# typer bundles its own copy of click in some versions and imports it in others; its classes are the same either way.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]
_USER_ERROR = 2
_INTERRUPTED = 130


COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "formats": (specs.formats, "microscale formats nvfp4"),
    "recipes": (specs.recipes, "microscale recipes nvfp4_dynamic"),
    "compare": (
        checkpoints.compare,
        "microscale compare my_model/ --formats mxfp4,nvfp4 --inputs texts.txt --html report.html",
    ),
    "quantize": (checkpoints.quantize, "microscale quantize my_model/ my_model_nvfp4/ --recipe nvfp4_weight_only"),
    "inspect": (checkpoints.inspect, "microscale inspect my_model_nvfp4/"),
    "plan": (checkpoints.plan, "microscale plan my_model/ --recipe nvfp4_weight_only"),
    "explain": (
        dispatching.explain,
        "microscale explain matmul --format nvfp4 --shape 64x4096x11008 --device cpu",
    ),
    "doctor": (doctor.doctor, "microscale doctor"),
    "bench": (bench.bench, "microscale bench quantize --device cuda --formats mxfp8,nvfp4"),
    "tune": (tune.tune, "microscale tune --formats mxfp4,nvfp4 --shapes 28672x8192 --jobs 8"),
    "schema": (specs.schema_, "microscale schema format -o format.schema.json"),
}
"""Every command: the function that runs it, and the example of its help."""


class _Group(TyperGroup):
    """A group whose `main` reports every user error the same way, from the shell and from tests."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, then exit: 0, the command's own code, 2 for a user's error, 130 when interrupted."""
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
            sys.stdout.flush()
        except MicroscaleError as error:
            code = _fail(error.message, error.hint)
        except _ClickException as error:
            code = _usage(error)
        except (typer.Abort, KeyboardInterrupt):
            code = _fail("interrupted", code=_INTERRUPTED)
        except OSError as error:
            if error.errno == errno.EPIPE:  # `microscale formats | head` is no error
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                code = 0
            else:
                where = f"{error.filename}: " if error.filename is not None else ""
                code = _fail(f"{where}{error.strerror or error}", "check the path and its permissions")
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, hint: str = "", code: int = _USER_ERROR) -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"  hint: {hint}", file=sys.stderr)
    return code


def _usage(error: Any) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "microscale"
    if type(error).__name__ == "NoArgsIsHelpError":
        print(context.get_help() if context is not None else str(error), file=sys.stderr)
        return _USER_ERROR
    text = " ".join(error.format_message().split())
    return _fail(text[:1].lower() + text[1:].rstrip("."), f"{path} --help shows how it is used")


app = typer.Typer(
    name="microscale",
    cls=_Group,
    help="Microscaling number formats for PyTorch: look at them, compare them on a model, quantize a checkpoint.",
    epilog="\b\nExample:\n  microscale plan my_model/ --recipe nvfp4_weight_only",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"microscale {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Take the options that stand before the command."""


for _name, (_function, _example) in COMMANDS.items():
    app.command(_name, epilog=f"\b\nExample:\n  {_example}")(_function)


def main() -> None:
    """Run the command line with `sys.argv` and exit."""
    app(prog_name="microscale")
