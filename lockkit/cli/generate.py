"""`lockkit generate`: text from one model, or from two for comparison."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lockkit.cli.console import console, errors, lost_output
from lockkit.generate import GenerateConfig, Generation, TextModel, first_difference, open_model, sampling_of
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
    which they differ. The model's generation_config.json says whether and how to sample, unless
    options do.

    Examples:

    \b
        lockkit generate demo --prompt "def read_lines(path):"
        lockkit generate demo locked-onnx --prompt "import os"
        lockkit generate locked-onnx --prompt - --temperature 0.8 < prompt.txt
        lockkit generate ./my-model --chat --prompt "What is ONNX?" --top-p 0.9
    """
    text = _standard_input() if prompt == "-" else _argument(prompt)
    first = _open(model, config, "MODEL")
    other = _open(second, config, "SECOND") if second is not None else None
    _say_what_is_unused([model for model in (first, other) if model is not None], config)
    if other is None:
        generation = generate_text(first, text, config, _stream)
        print()
        _say_if_cut(first, generation)
        return

    generations = generate_text(first, text, config), generate_text(other, text, config)
    console.print(_side_by_side(first, other, *generations))
    for opened, generation in zip((first, other), generations, strict=True):
        _say_if_cut(opened, generation)


def _open(name: str, config: GenerateConfig, option: str) -> TextModel:
    """Load a model, and say how it runs where that is not plain."""
    model = open_model(name, config.provider, option, not config.no_cuda_graphs)
    for note in model.notes:
        errors.print(f"{name} runs {note}", soft_wrap=True)
    return model


def _say_what_is_unused(models: list[TextModel], config: GenerateConfig) -> None:
    """Say which options have no effect on these models: what they do by default is known only now."""
    if "seed" in config.model_fields_set and all(sampling_of(model, config).temperature == 0 for model in models):
        errors.print("--seed has no effect: the most likely token is taken; --temperature 1 samples", soft_wrap=True)
    for model in models:
        device = getattr(model.runner, "device", None)  # of PyTorch; an export on another provider was refused
        if device is not None and device.type != config.provider.row.torch_device:
            errors.print(
                f"{model.name} runs on the {device.type.upper()}: PyTorch has no {config.provider} here", soft_wrap=True
            )


def _say_if_cut(model: TextModel, generation: Generation) -> None:
    if generation.stopped == "context":
        errors.print(
            f"the text of {model.name} ends here: with the prompt, it fills the model's {model.context:,} positions",
            soft_wrap=True,
        )


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
