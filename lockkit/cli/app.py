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
from pydantic import ValidationError
from typer.exceptions import TyperException

from lockkit.cli.attack import attack
from lockkit.cli.bench import bench
from lockkit.cli.card import card
from lockkit.cli.console import lost_output, tolerant_output
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
from lockkit.settings import plain_words

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
    """Run the program. Only this module turns errors into exit codes."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    with tolerant_output():
        code = _run()
        lost = lost_output()
        if lost is not None and not isinstance(lost, BrokenPipeError):  # whoever closes a pipe has read enough
            _fail(f"cannot print to standard output ({lost.strerror}): redirect it elsewhere", 2)
        sys.exit(code)


def _run() -> int:
    """Run the command. Returns its exit code, or exits with an error."""
    try:
        code = make_app()(standalone_mode=False)
    except GateFailed as error:
        _fail(str(error), 1)
    except LockkitError as error:
        _fail(_with_notes(str(error), error), 2)
    except _Interrupted as error:
        _fail(_with_notes(f"{error}: nothing half-written is left", error), 2)
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
    return code or 0


def _with_notes(message: str, error: BaseException) -> str:
    """A message with what a command has added to its error, such as how to resume."""
    return "; ".join([message, *getattr(error, "__notes__", [])])


def _bad_use(error: TyperException) -> NoReturn:
    """Print Typer's message in one line. For a program without arguments, that message is the help."""
    if type(error).__name__ == "NoArgsIsHelpError":  # a private class of Typer
        print(error.format_message(), file=sys.stderr)
        sys.exit(2)
    context = getattr(error, "ctx", None)
    # Some errors do not know their command, but then the command's name was right.
    command = next((f" {name}" for name in sys.argv if name in {command.__name__ for command in COMMANDS}), "")
    program = context.command_path if context else f"lockkit{command}"
    message = error.format_message().rstrip(".")
    if isinstance(error.__cause__, ValidationError):
        message = message.replace(getattr(error, "message", message), plain_words(error.__cause__.errors()))
    _fail(f"{message} (see `{program} --help`)", 2)


def _fail(message: str, code: int) -> NoReturn:
    if _debug:
        import traceback

        traceback.print_exc()
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)  # in a file's name
    print(f"lockkit: {line}", file=sys.stderr)
    sys.exit(code)
