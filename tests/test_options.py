"""Each command-line option is a field of a config class: the same name, default and description."""

from __future__ import annotations

import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import pytest
import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typer.models import OptionInfo
from typer.testing import CliRunner

from lockkit.attack.config import AuditConfig
from lockkit.bench.config import BenchConfig
from lockkit.cli.app import COMMANDS, make_app
from lockkit.cli.options import Given, config_class_of, typer_command
from lockkit.errors import UsageError
from lockkit.lock.config import LockConfig
from lockkit.settings import option_of, plain_words, validated


class Colour(StrEnum):
    red = "red"
    blue = "blue"


class Toy(BaseModel):
    """One field of every kind that a config class may have."""

    model_config = ConfigDict(extra="forbid")

    max_steps: int = Field(7, ge=1, description="Steps to take.")
    rates: list[Annotated[float, Field(gt=0)]] = Field([0.5, 1.5], min_length=1, description="Rate.")
    mode: Literal["slow", "fast"] = Field("slow", description="How.")
    size: Literal[16, 32] | None = Field(None, description="Size.")
    colours: list[Colour] = Field([Colour.red], description="Colour.")
    careful: bool = Field(False, description="With care.")
    folder: Path | None = Field(None, description="Where.")


def run(command, *arguments: str):
    app = typer.Typer(rich_markup_mode=None)
    app.command()(typer_command(command))
    return CliRunner().invoke(app, arguments)


def config_of(*arguments: str) -> Toy:
    seen = []

    def toy(name: Annotated[str, typer.Argument()], config: Toy) -> None:
        seen.append((name, config))

    outcome = run(toy, "x", *arguments)
    if outcome.exception is not None:
        raise outcome.exception
    assert seen[0][0] == "x"
    return seen[0][1]


def test_options_become_the_configuration():
    assert config_of() == Toy()
    arguments = "--max-steps 9 --rate 2 --rate 3 --mode fast --size 32 --colour blue --careful --folder a/b"
    assert config_of(*arguments.split()) == Toy(
        max_steps=9, rates=[2, 3], mode="fast", size=32, colours=[Colour.blue], careful=True, folder=Path("a/b")
    )


@pytest.mark.parametrize(
    "arguments", ["--max-steps 0", "--rate 1 --rate -1", "--mode slowly", "--size 17", "--colour green"]
)
def test_a_value_out_of_range_is_refused_with_the_name_of_its_option(arguments):
    option, *_, value = arguments.split()
    with pytest.raises(UsageError) as error:
        config_of(*arguments.split())
    assert str(error.value).startswith(f"{option}: ") and value in str(error.value)


def test_errors_of_the_python_api_name_the_same_options():
    for wrong in ([], [1.0, -1.0], "many"):
        with pytest.raises(UsageError, match=r"^--rate: "):
            validated(Toy, {"rates": wrong})


def test_a_command_may_take_the_options_that_were_given():
    seen = []

    def toy(given: Given[Toy], config: Annotated[str | None, typer.Option("--config")] = None) -> None:
        seen.append((given, config))

    assert run(toy, "--rate", "2", "--careful", "--config", "x").exit_code == 0
    assert run(toy).exit_code == 0
    assert seen == [({"rates": [2.0], "careful": True}, "x"), ({}, None)]


def test_help_shows_choices_defaults_and_what_may_be_repeated():
    def toy(config: Toy) -> None: ...

    words = " ".join(run(toy, "--help").stdout.split())
    for line in (
        "--max-steps <int> Steps to take. [default: 7]",
        "--rate <float> Rate. May be repeated. [default: 0.5, 1.5]",
        "--mode <slow|fast> How. [default: slow]",
        "--size <16|32> Size.",
        "--colour <red|blue> Colour. May be repeated. [default: red]",
        "--careful With care.",
        "--folder <path> Where.",
    ):
        assert line in words


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_each_setting_has_its_option_and_each_option_its_setting(command, cli):
    hints = get_type_hints(command, include_extras=True)
    settings = [
        (option_of(config, name), field)
        for hint in hints.values()
        if (config := config_class_of(hint))
        for name, field in config.model_fields.items()
    ]
    infos = [info for hint in hints.values() for info in get_args(hint)[1:] if isinstance(info, OptionInfo)]
    own = [name for info in infos for name in (info.default, *info.param_decls)]  # Typer keeps the first name there
    parameters = typer.main.get_command(make_app()).commands[command.__name__].params
    common = {"-q", "--quiet", "-v", "--verbose", "--debug"}
    options = [name for parameter in parameters for name in parameter.opts if name.startswith("-")]
    assert common <= set(options)
    options = [name for name in options if name not in common]
    assert sorted(options) == sorted([*own, *(option for option, _ in settings)])

    help_text = cli(command.__name__, "--help").out
    for option in options:
        assert f"  {option} " in help_text or f"  {option}\n" in help_text  # never cut
    for option, field in settings:
        assert field.description and "".join(field.description.split()) in "".join(help_text.split()), option


def test_singular_options_are_those_of_lists():
    assert option_of(BenchConfig, "batch_sizes") == "--batch-size"
    assert option_of(AuditConfig, "learning_rates") == "--learning-rate"
    assert option_of(AuditConfig, "seeds") == "--seeds"  # a number, not a list
    assert option_of(LockConfig, "end_to_end_tokens") == "--end-to-end-tokens"


def test_help_answers_without_the_heavy_libraries():
    code = (
        "import sys\nfrom lockkit.cli.app import COMMANDS, make_app\n"
        "for arguments in [], *([command.__name__] for command in COMMANDS):\n"
        "    make_app()([*arguments, '--help'], standalone_mode=False)\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_a_truth_value_is_no_number():
    """YAML reads `yes`, `on` and `true` as True, which pydantic takes for 1."""
    for wrong, option in (
        ({"max_steps": True}, "--max-steps"),
        ({"rates": [0.5, True]}, "--rate"),
        ({"size": True}, "--size"),
    ):
        with pytest.raises(UsageError, match=f"^{option}: must be .*, not "):
            validated(Toy, wrong)
    assert validated(Toy, {"careful": True}).careful


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max_steps": 0}, "--max-steps: must be at least 1, not 0"),
        ({"max_steps": 1.5}, "--max-steps: must be a whole number, not 1.5"),
        ({"rates": [0.5, 0]}, "--rate: must be more than 0, not 0"),
        ({"rates": ["x"]}, "--rate: must be a number, not 'x'"),
        ({"rates": []}, "--rate: must have at least 1 value, not []"),
        ({"rates": 3}, "--rate: must be a list, not 3"),
        ({"mode": "off"}, "--mode: must be 'slow' or 'fast', not 'off'"),
        ({"careful": "maybe"}, "--careful: must be true or false, not 'maybe'"),
        ({"folder": 3}, "--folder: must be a path, not 3"),
        ({"max_step": 3}, "unknown setting 'max_step' in the configuration: did you mean max_steps?"),
        ({"zzz": 3}, "unknown setting 'zzz' in the configuration"),
    ],
)
def test_errors_are_in_plain_words(values, expected):
    with pytest.raises(UsageError) as error:
        validated(Toy, values)
    assert str(error.value) == expected


def test_a_value_of_several_types_gets_one_message():
    class Either(BaseModel):
        stop: int | list[str] | None = None

    with pytest.raises(ValidationError) as error:
        Either(stop={})
    assert plain_words(error.value.errors()) == "must be a whole number or a list"
