"""The `lockkit` program: its commands, and what it does with errors.

Exit codes: 0 success, 1 a gate failed, 2 bad use or bad input (one line on standard error;
a traceback only with `--debug`).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from lockkit.cli.attack import attack
from lockkit.cli.bench import bench
from lockkit.cli.env import env
from lockkit.cli.export import export
from lockkit.cli.generate import generate
from lockkit.cli.kernel import kernel
from lockkit.cli.lock import lock
from lockkit.cli.options import typer_command
from lockkit.cli.plan import plan
from lockkit.cli.report import report
from lockkit.cli.serve import serve
from lockkit.cli.verify import verify
from lockkit.errors import GateFailed, LockkitError

# All commands, in the order `lockkit --help` lists them; a command has its function's name.
COMMANDS = (plan, lock, export, verify, kernel, bench, attack, generate, serve, report, env)

_debug = False


def _print_version(wanted: bool) -> None:
    if wanted:
        from lockkit.version import __version__

        typer.echo(f"lockkit {__version__}")
        raise typer.Exit


def _common_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    global _debug
    _debug = debug
    if not debug:
        quiet_libraries()


def make_app() -> typer.Typer:
    """The program with all its commands.

    The help is plain text: Typer's panels print `<bool>` for a flag, and cut a long option at 80 columns.
    """
    app = typer.Typer(
        name="lockkit",
        help="Lock a pretrained language model, export it to ONNX, and prove it is the same model.\n\n"
        "A model flows one way: plan, lock, export, verify, serve.",
        callback=_common_options,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        add_completion=False,
    )
    for command in COMMANDS:
        app.command()(typer_command(command))
    return app


def quiet_libraries() -> None:
    """Keep the notices of libraries out of a user's terminal; errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


class _Interrupted(BaseException):
    """Ctrl-C, or a scheduler's SIGTERM. Not KeyboardInterrupt, which Typer would report in its own words and code."""


def _interrupt(number: int, _frame: object) -> None:
    if number == signal.SIGTERM:
        raise _Interrupted("told to stop, by a scheduler or because another worker stopped")
    raise _Interrupted("interrupted")


def main() -> None:
    """Run the program; the only place that turns errors into exit codes."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = make_app()(standalone_mode=False)
    except GateFailed as error:
        _fail(str(error), 1)
    except LockkitError as error:
        _fail("; ".join([str(error), *getattr(error, "__notes__", [])]), 2)
    except _Interrupted as error:
        _fail(f"{error}: nothing half-written is left; run the same command again to resume", 2)
    except Exception as error:
        if hasattr(error, "format_message"):  # Typer's own: an unknown option, a value of the wrong type, ...
            _bad_use(error)
        if _debug:
            raise
        # Python's, CUDA's and the CPU allocator's way of saying it.
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "not enough memory" in str(error):
            _fail("out of memory: lower --batch-tokens or --block-tokens, or use a machine with more", 2)
        reason = " ".join(str(error).split())[:300]
        _fail(f"unexpected {type(error).__name__}: {reason} (run again with --debug before the command for details)", 2)
    sys.exit(code or 0)


def _bad_use(error: Exception) -> None:
    """Typer's complaint in one line; without any argument, the help."""
    if type(error).__name__ == "NoArgsIsHelpError":  # Typer exports no name for it
        error.show()
        sys.exit(2)
    context = getattr(error, "ctx", None)
    program = context.command_path if context else "lockkit"
    _fail(f"{error.format_message().rstrip('.')} (see `{program} --help`)", 2)


def _fail(message: str, code: int) -> None:
    if _debug:
        import traceback

        traceback.print_exc()
    print(f"lockkit: {message}", file=sys.stderr)
    sys.exit(code)
