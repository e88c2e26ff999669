"""The `lockkit` program: its commands and its exit codes.

Exit codes: 0 success, 1 a gate failed, 2 bad use or bad input (one line on standard error;
a traceback only with `--debug`).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from lockkit.cli.attack import attack
from lockkit.cli.bench import bench
from lockkit.cli.card import card
from lockkit.cli.env import env
from lockkit.cli.export import export
from lockkit.cli.generate import generate
from lockkit.cli.kernel import kernel
from lockkit.cli.lock import lock
from lockkit.cli.options import typer_command
from lockkit.cli.plan import plan
from lockkit.cli.push import push
from lockkit.cli.report import report
from lockkit.cli.serve import serve
from lockkit.cli.sign import sign
from lockkit.cli.verify import verify
from lockkit.errors import GateFailed, LockkitError

# All commands, in the order in which `lockkit --help` lists them. A command has the name of its function.
COMMANDS = (plan, lock, export, verify, kernel, bench, attack, generate, serve, report, card, sign, push, env)

_debug = False


def _print_version(wanted: bool) -> None:
    if wanted:
        from lockkit.version import __version__

        typer.echo(f"lockkit {__version__}")
        raise typer.Exit


def _common_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when a command fails.")] = False,
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

    The help is plain text, because Typer's panels print `<bool>` for a flag and cut a long option at 80 columns.
    """
    app = typer.Typer(
        name="lockkit",
        help="Lock a pretrained language model, export it to ONNX, and verify that the export is the same model.\n\n"
        "The usual order of commands: plan, lock, export, verify, serve.",
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
    """Hide the notices and warnings of libraries. Their errors are still raised."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM. Not a KeyboardInterrupt, for which Typer has its own message and exit code."""


def _interrupt(number: int, _frame: object) -> None:
    if number == signal.SIGTERM:
        raise _Interrupted("stopped by SIGTERM, from a scheduler or because another worker stopped")
    raise _Interrupted("interrupted")


def main() -> None:
    """Run the program. Only this function turns errors into exit codes."""
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
    except TyperException as error:  # an unknown option, a value of the wrong type, ...
        _bad_use(error)
    except Exception as error:
        if _debug:
            raise
        # The errors of Python, CUDA and the CPU allocator.
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "not enough memory" in str(error):
            _fail("out of memory: lower --batch-tokens or --block-tokens, or use a machine with more memory", 2)
        reason = " ".join(str(error).split())[:300]
        _fail(f"unexpected {type(error).__name__}: {reason} (run again with --debug before the command for details)", 2)
    sys.exit(code or 0)


def _bad_use(error: TyperException) -> NoReturn:
    """Print Typer's message in one line. For a program without arguments, that message is the help."""
    if type(error).__name__ == "NoArgsIsHelpError":  # a private class of Typer
        print(error.format_message(), file=sys.stderr)
        sys.exit(2)
    context = getattr(error, "ctx", None)
    program = context.command_path if context else "lockkit"
    _fail(f"{error.format_message().rstrip('.')} (see `{program} --help`)", 2)


def _fail(message: str, code: int) -> NoReturn:
    if _debug:
        import traceback

        traceback.print_exc()
    print(f"lockkit: {message}", file=sys.stderr)
    sys.exit(code)
