"""Runs the `decodax` command: generate, bench, convert, methods, plan, train.

Only what handles Ctrl-C and the standard streams is imported at first; the commands, and JAX with them, come after.
"""

import sys

from decodax.cli import interrupts, platforms, streams

__all__ = ["main"]


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    streams.prepare()
    interrupts.install()
    platforms.leave_out_absent_tpus()
    try:
        from decodax.cli.app import app

        app(prog_name="decodax")
        code: int | str | None = 0
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:  # where no thread watches: on Windows
        code = interrupts.INTERRUPTED
    except OSError as error:  # raised by --help, say
        if not streams.is_of_stdout(error):
            raise
        code = 1
    code = streams.finish(code)
    interrupts.leave_if_asked(code)
    sys.exit(code)
