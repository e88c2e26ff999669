"""`lockkit generate`: text from one model, or from two for comparison."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lockkit.cli.console import console, lost_output
from lockkit.generate import GenerateConfig, Generation, TextModel, first_difference, open_model
from lockkit.generate import generate as generate_text
from lockkit.text import decoded

if TYPE_CHECKING:
    from rich.table import Table


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="`demo`, a model folder, a `.gguf` file, an export, or a Hub id.")
    ],
    second: Annotated[
        str | None, typer.Argument(metavar="SECOND", help="Second model, to compare with the first.")
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue; `-` reads it from standard input.")] = "",
    *,
    config: GenerateConfig,
) -> None:
    """Generate text with one model, or with two side by side.

    A model folder runs in PyTorch, an export in onnxruntime. With one model, the text is printed while
    it is generated, without the prompt. With two, a table shows both texts and the first token in
    which they differ.

    Examples:

    \b
        lockkit generate demo --prompt "def read_lines(path):"
        lockkit generate demo locked-onnx --prompt "import os"
        lockkit generate locked-onnx --prompt - --temperature 0.8 < prompt.txt
    """
    text = _standard_input() if prompt == "-" else _argument(prompt)
    first = open_model(model, config.provider, "MODEL")
    if second is None:
        generate_text(first, text, config, _stream)
        print()
        return

    other = open_model(second, config.provider, "SECOND")
    generations = generate_text(first, text, config), generate_text(other, text, config)
    console.print(_side_by_side(first, other, *generations))


def _standard_input() -> str:
    return decoded(sys.stdin.buffer.read(), "standard input", "--prompt")


def _argument(text: str) -> str:
    """The text of an argument. Where Python takes arguments for ASCII, it is read as UTF-8."""
    with contextlib.suppress(UnicodeError):  # `generate` refuses it
        return os.fsencode(text).decode("utf-8")
    return text


def _stream(text: str) -> None:
    print(text, end="", flush=True)
    if lost_output() is not None:  # nobody reads the rest
        raise typer.Exit


def _side_by_side(model: TextModel, other: TextModel, first: Generation, second: Generation) -> Table:
    """A table with one column per model. Text after the first difference is highlighted."""
    from rich.table import Table
    from rich.text import Text

    position = first_difference(first, second)
    if position is None:
        caption = f"identical: {len(first.token_ids)} tokens"
    else:
        caption = (
            f"first difference at token {position}: {_token(model, first, position)}, {_token(other, second, position)}"
        )
    table = Table(caption=caption, caption_justify="left", expand=True)
    cells = []
    for opened, generation in ((model, first), (other, second)):
        table.add_column(Text(opened.name), ratio=1, overflow="fold")
        common = generation.characters(position)
        cells.append(Text.assemble(generation.text[:common], (generation.text[common:], "yellow")))
    table.add_row(*cells)
    return table


def _token(model: TextModel, generation: Generation, position: int) -> str:
    if position < len(generation.token_ids):
        return repr(model.tokenizer.decode(generation.token_ids[position : position + 1]))
    return generation.stopped
