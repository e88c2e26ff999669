"""The summary of an audit, as written to summary.json. Imports no PyTorch.

Version 3. `upgraded` turns a summary of version 2 into one of version 3, so that reports and cards still read it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from lockkit.attack.sentences import Level
from lockkit.attack.target import RESOURCES, lowest_amplification
from lockkit.measure.records import Figure, Record

SCHEMA = "lockkit-attack-summary/3"
OLD_SCHEMA = "lockkit-attack-summary/2"


class Spent(Record):
    """What a run spent until it reached the target. Peaks of memory are those of the whole run."""

    step: Figure = Field(description="Steps, interpolated between two measured points.")
    tokens: Figure = Field(description="Tokens read, those of an unlock included.")
    flops: Figure = Field(description="Floating-point operations.")
    seconds: Figure = Field(description="Seconds: steps times the median time of one step.")
    peak_tensor_bytes: Figure = Field(description="Peak bytes of live tensors in a step.")
    saved_bytes: Figure = Field(description="Bytes that autograd saves for one backward pass.")


class Run(Record):
    """One run of an attack: the row of rows.jsonl whose key begins with `id`."""

    id: str = Field(description="First characters of the row's key.")
    attack: str = Field(description="Name of the attack; of an unlock also the fine-tune that followed.")
    model: Literal["original", "locked"] = Field(description="The model that was attacked.")
    settings: dict[str, Any] = Field(description="Settings of the run.")
    trained_parameters: int | None = Field(description="Number of trained parameters.")
    best_loss: Figure = Field(description="Lowest held-out loss, nats per label.")
    spent: Spent | None = Field(description="null if the run did not reach the target.")
    seconds_spread: tuple[float, float] | None = Field(
        description="Time of the quickest and of the slowest quarter of steps, over the median."
    )
    general_perplexity_ratio: float | None = Field(
        description="Perplexity on general text after the run, over that of the model before."
    )


class AttackLine(Record):
    """One attack on one task. Each of the two runs is the cheapest in operations, or else the one with the lowest loss."""

    attack: str = Field(description="Name of the attack, see Run.")
    kind: Literal["off the shelf", "informed"] = Field(description="Kind of attacker.")
    family: str = Field(description="Kind of attack.")
    description: str = Field("", description="What the attack does; empty if it was made before this was recorded.")
    valid: bool = Field(description="Whether the positive control passed.")
    says: str = Field(description="Why the attack does not count; empty if it does.")
    trials_original: int = Field(description="Runs on the original.")
    trials_locked: int = Field(description="Runs on the lock.")
    control_won_back: Figure | None = Field(
        description="Of an unlock: share of the original that its control recovered."
    )
    original: Run | None = Field(description="The run on the original that is shown.")
    locked: Run | None = Field(description="The run on the lock that is shown.")


class Seeds(Record):
    """The spread of a ratio over seeds."""

    seeds: int = Field(description="Number of seeds.")
    reached: dict[str, int] = Field(description="Seeds that reached the target, by model.")
    mean: Figure = Field(description="Mean cost on the lock over the mean on the original.")
    standard_deviation: Figure = Field(description="Of the costs on the lock over the mean on the original.")
    lowest: Figure = Field(description="Lowest of them.")
    highest: Figure = Field(description="Highest of them.")


class Amplification(Record):
    """The cost to the target on the lock over that on the original: of the cheapest run on each."""

    value: float | None = Field(description="The ratio; null if there is none.")
    says: str = Field(description="The ratio in words, with as many digits as its spread allows.")
    lowest: float | None = Field(None, description="Lower end of its spread; null if no spread is known.")
    highest: float | None = Field(None, description="Upper end of its spread.")
    at_least: float | None = Field(
        None, description="If no run on the lock reached the target: the ratio is above this."
    )
    best_attack: str | None = Field(description="The attack on the lock.")
    best_attack_original: str | None = Field(description="The attack on the original.")
    locked: float | None = Field(None, description="The cost on the lock.")
    original: float | None = Field(None, description="The cost on the original.")
    locked_run: str | None = Field(None, description="The run on the lock, see Run.")
    original_run: str | None = Field(None, description="The run on the original, see Run.")
    seeds: Seeds | None = Field(None, description="The spread over seeds; null with one seed.")


class Bound(Record):
    """The attention-only bound: no lock that keeps inference can cost more than this (lockkit/attack/ratios.py)."""

    value: float | None = Field(description="The bound; null if it was not measured.")
    says: str = Field(description="The bound in words.")
    value_on_original: float | None = Field(description="The same on the original.")
    locked: float | None = Field(description="Cost of the attention-only fine-tune of the lock.")
    original: float | None = Field(description="Cost of the cheapest attack on the original.")
    best_attack_original: str | None = Field(description="That attack.")


Amplifications = dict[str, Amplification | None]


class TaskSummary(Record):
    """The figures of one task."""

    name: str = Field(description="Public name of the task.")
    documents: int = Field(description="Documents or examples that its rows are made from.")
    left_out_as_distillation_text: int = Field(description="Documents left out because the lock was distilled on them.")
    train_tokens: int = Field(description="Tokens of the rows to train on.")
    train_sha256: str = Field(description="Their hash.")
    held_out_tokens: int = Field(description="Tokens of the held-out rows.")
    held_out_labels: int = Field(description="Labels among them that count.")
    held_out_sha256: str = Field(description="Their hash.")
    start_loss: Figure = Field(description="Held-out loss of the original, nats per label.")
    reference_loss: Figure = Field(description="Lowest held-out loss of the reference fine-tune of the original.")
    target_loss: Figure = Field(description="The loss that attacks have to reach.")
    attacks: list[AttackLine] = Field(description="One entry per attack.")
    runs: list[Run] = Field(description="The runs of the amplifications, one by one.")
    amplification: Amplifications = Field(description="By resource: the cheapest attacks of all.")
    off_the_shelf: Amplifications = Field(description="By resource: the cheapest scripts off the shelf on each model.")
    within_utility: Amplifications = Field(description="By resource: the cheapest runs that keep the model's utility.")
    attention_only_bound: dict[str, Bound | None] = Field(description="By resource.")


class Verdict(Record):
    """What the audit says, in words."""

    level: Level = Field(description="Protection against an informed attacker, by the rules.")
    sentence: str = Field(description="The verdict.")
    missing: list[str] = Field(description="What has to run before the audit can say anything.")
    rules: list[str] = Field(description="The rules that the verdict follows from.")


class AuditedModel(Record):
    """One of the two models of an audit."""

    named: dict[str, str] = Field(
        description="Public names of the model it came from, by the file that gives the name."
    )
    family: str = Field(description="Model type of its family, such as llama; without lockkit's prefix.")
    parameters: int = Field(description="Number of parameters, tied ones once.")
    layers: int = Field(description="Decoder layers.")
    depth: int | None = Field(description="Blocks in each chain; null without chains.")
    dtype: str = Field(
        description="Precision of the model, as transformers reads it with dtype='auto'. Attacks load it in float32."
    )


class Summary(Record):
    """The figures of an audit."""

    schema_version: str = Field(SCHEMA, alias="schema", description="Version of this format.")
    verdict: Verdict = Field(description="What the audit says.")
    first_line: str = Field(description="What is missing; empty if nothing is.")
    locked: str = Field(description="Public name of the lock.")
    original: str = Field(description="Public name of the original.")
    models: dict[Literal["original", "locked"], AuditedModel] | None = Field(
        None, description="What the two models are; null if it was made before this was recorded."
    )
    has_chains: bool = Field(description="Whether the lock is one of lockkit's.")
    quality: dict[str, Any] = Field(description="Perplexity and KL divergences of both models.")
    lock: dict[str, Any] = Field(description="Depth, recipe and the error of each layer.")
    tasks: dict[str, TaskSummary] = Field(description="By task.")
    unlocks: dict[str, dict[str, Any]] = Field(description="Unlocked models, by attack and settings.")
    effective_depth: dict[str, Any] = Field(description="Stages that the chains are worth.")
    unlock_ratio: dict[str, Any] = Field(description="Cost of the cheapest unlock over a re-distillation from scratch.")
    owner_advantage: dict[str, Any] = Field(description="Tokens of a re-distillation from scratch over the lock's own.")
    sweeps: list[dict[str, Any]] = Field(description="Searches over settings.")
    probes: list[dict[str, Any]] = Field(description="Measurements that train nothing.")
    runs: dict[str, Any] = Field(description="Number of rows by status, and those that did not finish.")
    row_keys: list[str] = Field(description="Keys of the rows of this audit in rows.jsonl.")
    rows_written: int | None = Field(
        None, description="Lines of rows.jsonl when this was written; null if it was made before they were counted."
    )
    not_tried: list[str] = Field(description="Attacks that were not tried, with a reason if there is one.")
    adversary: str = Field(description="What the attacker knows and has.")
    budget: str = Field(description="What each attack may spend.")
    falsified_by: str = Field(description="What would show that the figures are wrong.")
    config: dict[str, Any] = Field(description="Settings of the audit.")
    identity: dict[str, Any] = Field(description="Hashes of models and texts.")
    versions: dict[str, str] = Field(description="Versions of lockkit and its libraries.")
    git_hash: str | None = Field(description="Commit of lockkit.")
    created: str = Field(description="Time of the summary, UTC.")


def read_summary(record: dict[str, Any]) -> Summary:
    """The summary in a JSON object of version 3 or 2.

    Raises:
        ValueError: it does not match its schema.
        KeyError, TypeError, AttributeError: an object of version 2 lacks an entry.
    """
    try:
        return Summary.model_validate(upgraded(record) if record.get("schema") == OLD_SCHEMA else record)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def upgraded(old: dict[str, Any]) -> dict[str, Any]:
    """A summary of version 2 as one of version 3. What version 2 did not record is null.

    In version 2 the losses of a line and its costs came from several runs, so these runs have no id.
    """
    tasks = {name: _upgraded_task(figures) for name, figures in old["tasks"].items()}
    new = {key: value for key, value in old.items() if key != "schema"} | {"tasks": tasks, "has_chains": True}
    found = [lowest_amplification(new, resource) for resource in RESOURCES]
    known = [item[1]["value"] for item in found if item and item[1]["value"] is not None]
    sentence = "This audit was made before verdicts. Make it again for one."
    if not known:
        sentence = "No valid attack reached a target, so this audit does not show what the lock costs an attacker."
    verdict: dict[str, Any] = {
        "level": "not measured",
        "sentence": old["first_line"] or sentence,
        "missing": [],
        "rules": [],
    }
    return new | {"schema": SCHEMA, "verdict": verdict}


def _upgraded_task(figures: dict[str, Any]) -> dict[str, Any]:
    def run(line: dict[str, Any], model: str) -> dict[str, Any] | None:
        loss, spent = line[f"best_loss_{model}"], line[model]
        if loss is None:
            return None
        return {
            "id": "–", "attack": line["attack"], "model": model, "settings": {}, "trained_parameters": None,
            "best_loss": loss, "spent": spent and {key: spent.get(key) for key in Spent.model_fields},
            "seconds_spread": None, "general_perplexity_ratio": None,
        }  # fmt: skip

    dropped = ("best_loss_original", "best_loss_locked")
    lines = [
        {key: value for key, value in line.items() if key not in dropped}
        | {"kind": "informed", "original": run(line, "original"), "locked": run(line, "locked")}
        for line in figures["attacks"]
    ]
    nothing: dict[str, None] = dict.fromkeys(RESOURCES)
    return (
        figures
        | {"attacks": lines, "runs": [], "off_the_shelf": nothing, "within_utility": nothing}
        | {"attention_only_bound": figures.get("attention_only_bound") or {}}
    )
