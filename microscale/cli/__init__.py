"""The command `microscale`: each subcommand is a thin call of one library function.

Data goes to stdout, progress and errors to stderr; `--json` makes stdout one JSON document. A user's error is one line
and a hint, with exit code 2. Nothing here imports torch before a command needs it.
"""

from microscale.cli.app import app, main

__all__ = ["app", "main"]
