"""An audit in a report: headline and quality of the lock, attacks, unlocks, searches, limits.

All figures are taken from the summary (lockkit/attack/summary.py); none is computed here. Curves show the best run of
each attack, from the file rows.jsonl beside the summary.
"""

from __future__ import annotations

import json
from pathlib import Path

from lockkit.attack.target import RESOURCE_TITLES as RESOURCES
from lockkit.attack.target import lowest_amplification, run_name
from lockkit.errors import UsageError
from lockkit.report.page import Curve, Section, Table, measured_on, number
from lockkit.report.sections import reports

SHOWN_LINES = 7  # lines in colour; more could not be distinguished
CONSEQUENCE = (
    "Every figure is the cost of this lock against these attacks. It says nothing about attacks that were not tried. "
    "If the original weights are public, a lock adds no cost."
)


@reports("lockkit-attack-summary/2", place=0)
def audit_sections(summary: dict, path: Path) -> list[Section]:
    """The sections from summary.json and the rows beside it.

    Raises:
        UsageError: the rows are broken.
    """
    found, rows = [_headline(summary)], _rows(summary, path.with_name("rows.jsonl"))
    for task, figures in summary["tasks"].items():
        runs = [row for row in rows if row["task"] == task and row.get("curve")]
        found.append(_task(task, figures, runs))
    optional = [_unlocks(summary), _layers(summary), _searches(summary)]
    return [*found, *(section for section in optional if section is not None), _limits(summary)]


def _rows(summary: dict, file: Path) -> list[dict]:
    """The rows of the summary. The file may have more rows, from other settings.

    An incomplete last line is ignored: an audit is writing it, or was interrupted.
    """
    rows: dict[str, dict] = {}
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        for count, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
            try:
                row = json.loads(line)
                rows[row["key"]] = row
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{file}, line {count}, is not a row ({error}): remove it, or change DIR") from error
    return [rows[key] for key in summary.get("row_keys", []) if key in rows]


def _headline(summary: dict) -> Section:
    quality = summary["quality"]
    section = Section(f"Audit of {summary['locked']}", warning=summary["first_line"])
    best = [found for resource in RESOURCES if (found := _best(summary, resource))]
    if not best:
        section.warning = (
            "No valid attack reached a target, so this audit does not show what the lock costs an attacker."
        )
    section.figures = [
        ("perplexity of the lock, over the original's", number(quality["perplexity_ratio"], ".4f")),
        ("KL divergence from original to lock, nats per token", number(quality["locked"]["kl_to_original"], ".5f")),
        *best,
        *_figures_of_the_lock(summary),
    ]
    section.text = [
        "Cost to reach the held-out loss that a fine-tune of the original reaches: the cheapest attack on the lock, "
        f"over the cheapest on the original. Budget: {summary['budget']}.",
        measured_on(quality.get("fidelity", {}).get("text")),
        CONSEQUENCE,
    ]
    head = ["resource", "task", "against the best of these attacks", "on the lock", "on the original", "over seeds"]
    rows = [
        [name, task, found["says"], found["best_attack"] or "–", found["best_attack_original"], _seeds(found)]
        for resource, name in RESOURCES.items()
        for task, figures in summary["tasks"].items()
        if (found := figures["amplification"].get(resource))
    ]
    section.tables.append(Table(head, rows))
    return section


def _best(summary: dict, resource: str) -> tuple[str, str] | None:
    """The lowest amplification of a resource over all tasks."""
    lowest = lowest_amplification(summary, resource)
    if lowest is None:
        return None
    task, best = lowest
    if best["value"] is None:
        return RESOURCES[resource], best["says"]
    return (
        f"{RESOURCES[resource]} ({task}), against {best['best_attack']}",
        f"costs {best['value']:.2f} times as much",
    )


def _figures_of_the_lock(summary: dict) -> list[tuple[str, str]]:
    depth, figures = summary["effective_depth"], []
    figures.append((f"effective depth: blocks of {depth['depth']} within KL {depth['kl_limit']}", depth["says"]))
    for name, key in (
        ("unlock ratio; 1 is ideal for the owner", "unlock_ratio"),
        ("owner's advantage", "owner_advantage"),
    ):
        caveat = summary[key].get("caveat")
        figures.append((f"{name} ({caveat})" if caveat else name, summary[key]["says"]))
    return figures


def _seeds(found: dict) -> str:
    """Mean and spread of the headline over seeds."""
    seeds = found.get("seeds")
    if not seeds:
        return "one seed only"
    missed = seeds["seeds"] - seeds["reached"]["locked"]
    return f"{seeds['seeds']} seeds: mean {seeds['mean']:.2f}, {seeds['lowest']:.2f} to {seeds['highest']:.2f}" + (
        f"; {missed} did not reach the target" if missed else ""
    )


def _task(task: str, figures: dict, runs: list[dict]) -> Section:
    section = Section(f"Attacks on the task {task}", part=True)
    count = figures["left_out_as_distillation_text"]
    section.text.append(
        f"Held-out loss of the original: {figures['start_loss']:.3f}; after the reference fine-tune: "
        f"{figures['reference_loss']:.3f}; target {figures['target_loss']:.3f}. Costs in the table are the lowest at which "
        f"the target was reached on the lock. {'1 document was' if count == 1 else f'{count} documents were'} left out because "
        f"{'it is' if count == 1 else 'they are'} part of the distillation text. SHA-256 of training rows: "
        f"{figures['train_sha256'][:12]}, of held-out rows: {figures['held_out_sha256'][:12]}."
    )
    losses = {line["attack"]: line["best_loss_locked"] for line in figures["attacks"]}
    if losses.get("full-ft") is not None and losses.get("trainer") is not None:
        section.text.append(
            f"Two training loops: the baseline reached a loss of {losses['full-ft']:.4f} on the lock, and of "
            f"{losses['trainer']:.4f} with Hugging Face's Trainer."
        )
    section.text += _attention_only(figures)
    head = [
        *("attack", "control", "runs: original, lock", "best loss: original", "lock"),
        *("tokens", "GFLOP", "seconds", "peak MB", "saved MB"),
    ]
    section.tables.append(Table(head, [_attack_cells(line) for line in figures["attacks"]]))
    for resource in ("tokens", "flops", "seconds"):
        section.curves.append(_loss_curve(resource, figures, runs))
    return section


def _attention_only(figures: dict) -> list[str]:
    """A paragraph on the attention-only bound, if it was measured."""
    bounds = figures.get("attention_only_bound") or {}
    said = [
        f"{bound['value']:.2f} in {name}"
        for key, name in RESOURCES.items()
        if (bound := bounds.get(key)) and bound["value"] is not None
    ]
    if not said:
        return []
    return [
        "A bound for every lock of this shape: the cost of fine-tuning everything but the chains (frozen-dlr), over the "
        f"cheapest attack on the original, is {', '.join(said)}. As long as the chains compute the same function, their "
        "weights cannot make this attack more expensive."
    ]


def _attack_cells(line: dict) -> list[str]:
    control = line["says"] or ("valid" if line["valid"] else "–")
    if line["control_won_back"] is not None:
        control += f", {max(0.0, line['control_won_back']):.0%} recovered"
    cells = [
        line["attack"], control, f"{line['trials_original']}, {line['trials_locked']}",
        number(line["best_loss_original"], ".3f"), number(line["best_loss_locked"], ".3f"),
    ]  # fmt: skip
    cost = line["locked"]
    if cost is None:
        return cells + (["> budget", *["–"] * 4] if line["trials_locked"] else ["–"] * 5)
    return [
        *cells, number(cost["tokens"], ",.0f"), _giga(cost["flops"]), number(cost["seconds"], ",.1f"),
        f"{cost['peak_tensor_bytes'] / 1e6:,.0f}", f"{cost['saved_bytes'] / 1e6:,.1f}",
    ]  # fmt: skip


def _giga(operations: float | None) -> str:
    return number(operations and operations / 1e9, ",.0f")


def _loss_curve(resource: str, figures: dict, runs: list[dict]) -> Curve:
    """The best run of each attack on the lock, the best few in colour, and the reference on the original."""
    best: dict[str, dict] = {}
    for row in sorted(runs, key=lambda row: row["mean_loss_over_log_budget"]):
        name = run_name(row) if row["model"] == "locked" else f"{row['attack']} on the original"
        if row["model"] == "locked" or row["attack"] == "full-ft":
            best.setdefault(name, row)
    valid = {line["attack"] for line in figures["attacks"] if line["valid"]}
    lines = {name: _points(row, resource) for name, row in best.items()}
    reference = [name for name in lines if name.endswith(" on the original")]
    shown = [name for name in lines if name in valid][:SHOWN_LINES]
    return Curve(
        f"Held-out loss against {RESOURCES[resource]}",
        RESOURCES[resource],
        "loss, nats per label",
        {name: lines[name] for name in reference + shown},
        log=True,
        dashed=reference,
        muted={name: points for name, points in lines.items() if name not in reference + shown},
        level=("target", figures["target_loss"]),
    )


def _points(row: dict, resource: str) -> list[tuple[float, float]]:
    return [(point[resource], point["loss"]) for point in row["curve"] if point[resource] and point["step"]]


def _unlocks(summary: dict) -> Section | None:
    unlocks, depth = summary["unlocks"], summary["effective_depth"]
    if not unlocks:
        return None
    section = Section("Unlocks", part=True)
    section.text.append(
        f"The lock has {depth['depth']} blocks per chain. Fewest stages of a closed-form unlock within a KL divergence of "
        f"{depth['kl_limit']} nats per token: {depth['says']}; within 5 % of the lock's perplexity: "
        f"{depth['says_within_5_percent']}."
    )
    rows = [
        [
            label, "valid" if found["valid"] else "attack invalid", str(found["blocks"]),
            number(found["perplexity"], ".3f"), number(found["kl_to_lock"], ".5f"),
            number(found["cost"]["tokens"]), _giga(found["cost"]["flops"]), number(found["cost"]["seconds"], ",.1f"),
        ]
        for label, found in unlocks.items()
    ]  # fmt: skip
    head = ["unlock", "control", "blocks", "perplexity", "KL to the lock", "tokens", "GFLOP", "seconds"]
    section.tables.append(Table(head, rows))
    stages = [(float(count), kl) for count, kl in depth["kl_by_stages"].items()]
    if stages:
        level = ("limit", depth["kl_limit"])
        section.curves.append(
            Curve("Closed-form unlocks", "stages", "KL to the lock", {"best": stages}, True, True, level=level)
        )
    section.curves += _redistillation(unlocks)
    return section


def _redistillation(unlocks: dict[str, dict]) -> list[Curve]:
    """KL against tokens for all re-distillations. Closed-form unlocks are points in the same plot."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for label, found in unlocks.items():
        curve = found["notes"].get("curve") or []
        finite = [(point["tokens"], point["kl_to_lock"]) for point in curve if point["kl_to_lock"] is not None]
        if finite:
            lines[label] = finite
    if not lines:
        return []
    points: dict[str, list[tuple[float, float]]] = {}
    for found in unlocks.values():
        one_shot = found["blocks"] == 1 and found["valid"] and not found["notes"].get("curve")
        if one_shot and found["cost"]["tokens"] and found["kl_to_lock"] is not None:  # the axes are logarithmic
            points.setdefault(found["attack"], []).append((found["cost"]["tokens"], found["kl_to_lock"]))
    ends = sorted(lines, key=lambda label: lines[label][-1][1])
    shown = {label: lines[label] for label in ends[: SHOWN_LINES - len(points)]}
    muted = {label: lines[label] for label in lines if label not in shown}
    return [Curve("Re-distillation", "tokens", "KL to the lock", points | shown, True, True, muted=muted)]


def _layers(summary: dict) -> Section | None:
    layers = [(row["layer"], row["nmse"]) for row in summary["lock"]["layers"] if row["nmse"] is not None]
    if not layers:
        return None
    section = Section("The lock's own error", part=True)
    section.curves.append(Curve("Error of each layer's chain", "layer", "NMSE", {"NMSE": layers}, bars=True))
    return section


def _searches(summary: dict) -> Section | None:
    """The lowest loss so far against the number of trials, for lock and original."""
    by_attack: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for sweep in summary["sweeps"]:
        points = [(point["trial"], point["loss"]) for point in sweep["best_so_far"] if point["loss"] is not None]
        title = f"{sweep['attack']}, {sweep['task']}"
        by_attack.setdefault(title, {})[sweep["model"]] = points
    if not by_attack:
        return None
    section = Section("Searches", part=True)
    section.text.append(
        f"{summary['sweeps'][0]['budget']} trials per attack and model. The curves show the lowest held-out loss so far."
    )
    section.curves = [
        Curve(title, "trial", "best loss so far", lines, dashed=["original"]) for title, lines in by_attack.items()
    ]
    return section


def _limits(summary: dict) -> Section:
    runs = summary["runs"]
    section = Section("Assumptions and limits", part=True)
    tried = ", ".join(f"{count} {status}" for status, count in runs["by_status"].items())
    section.text = [
        f"Adversary: {summary['adversary']}.",
        f"Budget: {summary['budget']}.",
        f"These figures would be falsified by {summary['falsified_by']}.",
        "Not tried: " + ("; ".join(summary["not_tried"]) or "none; all attacks of lockkit were run") + ".",
        f"{runs['rows']} runs ({tried}). {runs['reused_from_controls']} of them, on the original, are from other audits.",
    ]
    head = ["run", "on", "task", "ended", "note"]
    rows = [
        [row["attack"], row["model"], row["task"] or "–", row["status"], row["note"] or "–"]
        for row in runs["not_finished"]
    ]
    section.tables.append(Table(head, rows))
    probes = [[row["attack"], _settings(row["config"]), _outcome(row)] for row in summary["probes"]]
    section.tables.append(Table(["measured on the lock", "settings", "outcome"], probes))
    return section


def _settings(config: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in config.items()) or "–"


def _outcome(row: dict) -> str:
    if row["status"] != "finished":
        return f"{row['status']}: {row['note']}"
    if "held_out" in row:
        return "; ".join(
            f"{task}: loss {number(found['original'], '.3f')} (original), {number(found['locked'], '.3f')} (lock)"
            for task, found in row["held_out"].items()
        )
    verdict = "measured"
    if row.get("passed") is not None:
        verdict = "the weights were recovered" if row["passed"] else "not recovered"
    return verdict + (f" (NMSE of logits {number(row['logits_nmse'], '.1e')})" if "logits_nmse" in row else "")
