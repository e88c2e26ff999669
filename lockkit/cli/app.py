"""The `lockkit` program: its commands and its exit codes.

Exit codes: 0 success, 1 a gate failed, 2 bad use or bad input (one line on standard error;
a traceback only with `--debug`).
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from typer.core import TyperCommand
from typer.exceptions import TyperException

from lockkit.cli.attack import attack
from lockkit.cli.bench import bench
from lockkit.cli.card import card
from lockkit.cli.console import errors, lost_output, tolerant_output
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
from lockkit.cli.web import web
from lockkit.errors import GateFailed, LockkitError
from lockkit.settings import plain_words

# All commands, in the order in which `lockkit --help` lists them. A command has the name of its function.
COMMANDS = (plan, lock, export, verify, kernel, bench, attack, generate, serve, report, card, sign, web, push, env)

# How to install what a plain installation lacks, by the name of the module.
_PACKAGES = dict.fromkeys(
    ("onnxruntime", "onnxruntime_genai"), "pip install 'lockkit[cpu]', or 'lockkit[gpu]' for an NVIDIA GPU"
)

_debug = False


def _print_version(wanted: bool) -> None:
    if wanted:
        from lockkit.version import __version__

        typer.echo(f"lockkit {__version__}")
        raise typer.Exit


def _print_help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


_Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print results and errors only, no progress.")]
_Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Print what the libraries say, too.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when a command fails.")]


def _program_options(
    context: typer.Context,
    quiet: _Quiet = False,
    verbose: _Verbose = False,
    debug: _Debug = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands between `lockkit` and the command."""
    global _debug
    _debug, errors.quiet = False, False
    _print_help(context)
    if not (debug or verbose):
        quiet_libraries()
    _common_options(quiet, verbose, debug)


def _common_options(quiet: _Quiet = False, verbose: _Verbose = False, debug: _Debug = False) -> None:
    """What every command takes, too."""
    global _debug
    _debug = _debug or debug
    errors.quiet = errors.quiet or quiet
    if errors.quiet or not sys.stderr.isatty():  # else the Hub's client shows the progress of a download
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if verbose or debug:
        loud_libraries()


class _Command(TyperCommand):
    """A command whose help names the type of an argument that may be repeated as that of an option: `<path>...`."""

    def get_help(self, ctx: Any) -> str:
        return re.sub(
            r"<list\[(\w+)\]>", lambda found: f"<{found[1].lower()}>...".ljust(len(found[0])), super().get_help(ctx)
        )


def make_app() -> typer.Typer:
    """The program with all its commands.

    The help is plain text, because Typer's panels print `<bool>` for a flag and cut a long option at 80 columns.
    """
    app = typer.Typer(
        name="lockkit",
        help="Lock a pretrained language model, export it to ONNX, and verify that the export is the same model.\n\n"
        "The usual order of commands: plan, lock, export, verify, serve.",
        callback=_program_options,
        invoke_without_command=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for command in COMMANDS:
        app.command(cls=_Command)(typer_command(command, _common_options))
    return app


def quiet_libraries() -> None:
    """Hide the notices and warnings of libraries. Their errors are still raised."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    for kind in (FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=kind)


class _Once(logging.Filter):
    """Drops a message that was logged before."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.getMessage() not in self._seen
        self._seen.add(record.getMessage())
        return new


class _Unshown(logging.Filter):
    """Drops the records of libraries that have a handler of their own. Some hand them on to the root logger as well:
    transformers does where `CI` is set.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None and logger is not logging.root:
            if any(not isinstance(handler, logging.NullHandler) for handler in logger.handlers):
                return False
            logger = logger.parent
        return True


def loud_libraries() -> None:
    """Show the notices and warnings of libraries: undo `quiet_libraries`."""
    import warnings

    os.environ["TRANSFORMERS_VERBOSITY"] = "info"
    for name in ("transformers.configuration_utils", "transformers.generation.configuration_utils"):
        logging.getLogger(name).addFilter(_Once())  # a command reads a configuration at each of its steps
    warnings.filterwarnings("default")
    handler = logging.StreamHandler()
    handler.addFilter(_Unshown())
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", handlers=[handler])


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM. Not a KeyboardInterrupt, for which Typer has its own message and exit code."""


def _interrupt(number: int, _frame: object) -> None:
    if number == signal.SIGTERM:
        raise _Interrupted("stopped by SIGTERM (a scheduler, a time limit, or a worker that stopped)")
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
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing in _PACKAGES:
            _fail(f"this needs {missing}, which is not installed: {_PACKAGES[missing]}", 2)
        # The errors of Python, CUDA and the CPU allocator.
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "not enough memory" in str(error):
            _fail("out of memory: lower --batch-tokens or --block-tokens, or use a machine with more memory", 2)
        reason = " ".join(str(error).split())[:300]
        _fail(f"unexpected {type(error).__name__}: {reason} (run again with --debug for details)", 2)
    return code or 0


def _with_notes(message: str, error: BaseException) -> str:
    """A message with what a command has added to its error, such as how to resume."""
    return "; ".join([message, *getattr(error, "__notes__", [])])


def _bad_use(error: TyperException) -> NoReturn:
    """Print Typer's message in one line, with the nearest name for one that does not exist."""
    context = getattr(error, "ctx", None)
    # Some errors do not know their command, but then the command's name was right.
    command = next((f" {name}" for name in sys.argv if name in {command.__name__ for command in COMMANDS}), "")
    program = context.command_path if context else f"lockkit{command}"
    message = error.format_message().rstrip(".")
    if hasattr(error, "option_name") and hasattr(error, "possibilities"):  # an unknown option
        near = difflib.get_close_matches(error.option_name, error.possibilities or [], 1)
        message = f"No such option: {error.option_name}" + (f": did you mean {near[0]}?" if near else "")
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
