"""The audit: unlocks against known answers, the training loop against PyTorch, resuming, bad input."""

from __future__ import annotations

import csv
import gzip
import json
import math

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

from lockkit.attack.attacks.gradient.full_ft import FullFinetune
from lockkit.attack.attacks.gradient.trainer import TrainerFinetune
from lockkit.attack.attacks.unlocks.closed_form import (
    CollapseConfig,
    LinearisedStack,
    PartialCollapse,
    StackSolve,
)
from lockkit.attack.attacks.unlocks.shorten import prune
from lockkit.attack.config import AuditConfig, audit_config
from lockkit.attack.finetune import FinetuneConfig, batches, finetune
from lockkit.attack.losses import logits_of, task_loss
from lockkit.attack.registry import registry
from lockkit.attack.ridge import Ridge
from lockkit.attack.savers import SAVERS, saver
from lockkit.attack.subjects import Subjects
from lockkit.attack.tasks import BUILT_IN, IGNORED, chat_examples, load_task
from lockkit.attack.unlocking import original_as_chain
from lockkit.errors import UsageError
from lockkit.models.families import decoder_layers
from lockkit.models.load import DEMO, load_tokenizer
from lockkit.settings import option_of
from lockkit.text import documents

SMALL = {
    "device": "cpu",
    "steps": 8,
    "batch_rows": 2,
    "block_tokens": 32,
    "held_out_tokens": 256,
    "evaluation_tokens": 512,
    "unlock_tokens": 1024,
    "redistill_tokens": 1024,
}
ONE_RATE = SMALL | {"learning_rates": [1e-3]}  # without a search for learning rates


def options(settings: dict) -> list[str]:
    """Settings of an audit as options of `lockkit attack`."""
    values = ((name, value if isinstance(value, list) else [value]) for name, value in settings.items())
    return [f"{option_of(AuditConfig, name)}={one}" for name, several in values for one in several]


@pytest.fixture(scope="module")
def bench(originals, locks):
    return Subjects(str(locks("qwen3")), str(originals("qwen3")), audit_config("quick", **ONE_RATE))


def test_ridge_finds_the_weights_that_made_the_data():
    torch.manual_seed(0)
    a, w = torch.randn(400, 7), torch.randn(3, 7)
    ridge = Ridge(intercept=True)
    for index, part in enumerate(a.split(50)):
        ridge.add(part, part @ w.T + 2.0, index % 4 == 3)
    solved, intercept, chosen, error = ridge.solve()
    torch.testing.assert_close(solved, w, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(intercept, torch.full((3,), 2.0), atol=1e-4, rtol=1e-4)
    assert error < 1e-8
    assert chosen == 1e-8


@pytest.mark.parametrize(
    ("attack", "stages"), [(StackSolve, 1), (LinearisedStack, 1), (PartialCollapse, 5), (PartialCollapse, 1)]
)
def test_unlocks_recover_an_original_rewritten_as_a_chain(bench, attack, stages):
    first_layer = "stacked" if attack is StackSolve else "linearised"
    config = CollapseConfig(stages=stages, first_layer=first_layer)
    unlocked = attack(config).unlock(original_as_chain(bench), bench)
    assert bench.quality(unlocked.model).kl_to_original < 1e-3
    assert unlocked.blocks == stages
    assert unlocked.cost.tokens == 1024
    assert unlocked.cost.flops > 0


def test_savers_do_not_change_gradients(bench):
    ids = bench.evaluation[:2, :32]

    def gradients(name: str) -> list[torch.Tensor]:
        model = bench.load("locked")
        with saver(name, model):
            task_loss(logits_of(model, ids), ids).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients("none")
    for name in SAVERS:
        tolerance = 0.05 if name == "compress" else 1e-5
        for a, b in zip(plain, gradients(name), strict=True):
            assert (a - b).norm() <= tolerance * a.norm() + 1e-6, name


def test_the_loop_takes_the_same_steps_as_plain_pytorch(bench):
    task = bench.tasks["signatures"]
    config = FinetuneConfig(steps=8, batch_rows=2, learning_rate=1e-3, schedule="constant", evaluations=1)
    training = FullFinetune(config).prepare(bench.load("locked"), bench)
    result = finetune(training, task, config)

    model = bench.load("locked")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for ids, labels in batches(task.train, 2, 8, seed=0):
        model(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    for a, b in zip(training.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert result.cost.steps == 8
    assert result.cost.tokens == 8 * 2 * 32


@pytest.mark.parametrize("attack", [FullFinetune, TrainerFinetune])
def test_a_model_with_nan_weights_is_refused_before_the_first_step(bench, attack):
    model, task = bench.load("locked"), bench.tasks["signatures"]
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    config = FinetuneConfig(steps=8, batch_rows=2)
    with pytest.raises(FloatingPointError, match="before the first step"):
        attack(config).run(model, bench, task)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_tasks_are_disjoint_from_distillation_and_from_themselves(name):
    tokenizer = load_tokenizer(DEMO)
    task = load_task(name, tokenizer, block_tokens=64, train_tokens=4096, held_out_tokens=2048, distilled_on="stdlib")
    train, held_out = ({tuple(row) for row in part.ids.tolist()} for part in (task.train, task.held_out))
    assert not train & held_out
    used = {document.name for document in documents("stdlib", "distill")}
    assert not used & {document.name for document in documents("stdlib", "finetune")}
    assert (task.held_out.labels[:, 0] == IGNORED).all()


def test_only_the_answer_is_learned():
    tokenizer = load_tokenizer(DEMO)
    task = load_task(
        "signatures", tokenizer, block_tokens=64, train_tokens=1024, held_out_tokens=512, distilled_on=None
    )
    learned = tokenizer.decode(task.train.ids[0][task.train.labels[0] != IGNORED])
    assert learned.startswith('{"name"')
    assert "# Signature" not in learned


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not valid JSON"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"role": "user"}]}', "role"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "assistant"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, says):
    file = tmp_path / "chat.jsonl"
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file.write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(UsageError, match=f"line 2.*{says}"):
        chat_examples(file, load_tokenizer(DEMO))


def test_a_task_of_conversations_in_any_file_of_rows(tmp_path):
    tokenizer, tasks = load_tokenizer(DEMO), []
    turns = [[("human", f"question {n}"), ("gpt", f"answer {n} " * 9)] for n in range(40)]
    rows = [{"conversations": [{"from": role, "value": text} for role, text in chat]} for chat in turns]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chat.parquet")
    with gzip.open(tmp_path / "CHAT.JSONL.GZ", "wt", encoding="utf-8-sig") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for name in ("chat.parquet", "CHAT.JSONL.GZ"):
        sizes = {"block_tokens": 64, "train_tokens": 512, "held_out_tokens": 256}
        tasks.append(load_task(str(tmp_path / name), tokenizer, **sizes, distilled_on=None))
    assert tasks[0].train.sha256() == tasks[1].train.sha256()
    learned = tokenizer.decode(tasks[0].train.ids[0][tasks[0].train.labels[0] != IGNORED])
    assert "answer" in learned and "question" not in learned


def test_a_task_of_text_in_rows(tmp_path):
    file = tmp_path / "notes.csv"
    file.write_text("id,body\n" + "".join(f'{n},"note {n} {"words " * 50}"\n' for n in range(300)))
    sizes = {"block_tokens": 32, "train_tokens": 64, "held_out_tokens": 64}
    task = load_task(
        str(file), load_tokenizer(DEMO), **sizes, distilled_on=str(file), distilled_column="body", column="body"
    )
    assert task.documents > 10 and task.left_out == 0
    assert torch.equal(task.train.ids[:, 1:], task.train.labels[:, 1:])


def test_a_lock_with_a_layer_of_zeros_can_be_pruned(bench):
    chain = decoder_layers(bench.load("locked"))[0].mlp.requires_grad_(False)
    for block in chain.blocks:
        block.down_proj.weight.zero_()
    blocks, _ = prune(chain, torch.randn(64, 32), 0.99)
    assert len(blocks) == 1 and not blocks[0].down.any()


def test_the_quick_suite_runs_and_resumes(cli, originals, locks, tmp_path):
    out = tmp_path / "audit"
    command = ["attack", locks("qwen3"), "--original", originals("qwen3"), "--out", out, *options(ONE_RATE)]
    first = cli(*command)
    assert first.code == 0, first.err
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    wrong = [(row["attack"], row["note"]) for row in rows if row["status"] not in ("finished", "unavailable")]
    assert not wrong
    assert [row["passed"] for row in rows if row["attack"] == "recover-onnx"] == [True]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["schema"] == "lockkit-attack-summary/3"
    assert {row["attack"] for row in rows} == {name for name, attack in registry().items() if attack.in_quick}
    unlock = next(row["unlock"] for row in rows if row["attack"] == "corrected-stack" and row.get("unlock"))
    model = AutoModelForCausalLM.from_pretrained(out / unlock["folder"])
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert math.isfinite(unlock["kl_to_lock"])

    file = out / "rows.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:40])  # interrupted while it wrote the last row
    assert cli(*command).code == 0
    again = file.read_text().splitlines(keepends=True)
    assert again[:-1] == lines[:-1]
    assert json.loads(again[-1])["key"] == json.loads(lines[-1])["key"]


def test_models_that_do_not_match_are_refused(cli, originals, locks, tmp_path):
    lock, out = locks("qwen3"), tmp_path / "out"
    for locked, original, says in [
        (lock, lock, "locked model itself"),
        (lock, originals("llama"), "change --original"),
        (lock, "demo", "hidden_size"),
    ]:
        outcome = cli("attack", locked, "--original", original, "--out", out)
        assert outcome.code == 2
        assert says in outcome.err
        assert not out.exists()


CHAT = [("system", "Be brief."), ("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", "Second.")]
TURN = "<{{ m.role }}>{{ m.content }}<end>\n"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
TEMPLATES = {
    "plain": f"{{% for m in messages %}}{TURN}{{% endfor %}}{PROMPT}",
    "reasoning in the last turn only": "{% for m in messages %}<{{ m.role }}>"
    "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<end>\n{% endfor %}" + PROMPT,
    "reasoning begins in the prompt": f"{{% for m in messages %}}{TURN}{{% endfor %}}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}",
    "the last answer is marked": "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{% if loop.index0 == ns.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<end>\n{% endfor %}"
    + PROMPT,
    "no prompt": f"{{% for m in messages %}}{TURN}{{% endfor %}}",
    "a question first": "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ raise_exception('No user query') }}{% endif %}" + f"{{% for m in messages %}}{TURN}{{% endfor %}}{PROMPT}",
    "a question last": "{% if messages[-1].role != 'user' %}{{ raise_exception('ask') }}{% endif %}"
    + f"{{% for m in messages %}}{TURN}{{% endfor %}}{PROMPT}",
    "an answer last": "{% if messages[-1].role != 'assistant' %}{{ raise_exception('answer') }}{% endif %}"
    + f"{{% for m in messages %}}{TURN}{{% endfor %}}{PROMPT}",
}  # fmt: skip


@pytest.mark.parametrize("kind", TEMPLATES)
def test_every_answer_is_learned_once_after_its_questions_with_any_chat_template(tmp_path, kind):
    tokenizer = load_tokenizer(DEMO)
    tokenizer.chat_template = TEMPLATES[kind]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in CHAT]}))
    examples = chat_examples(file, tokenizer)
    learned = [text for example in examples for text, counts in example.turns if counts]
    assert len(learned) == 2 and "First." in learned[0] and "Second." in learned[1]
    for example in examples:
        assert example.text.count("One?") == 1 and example.text.count("First.") == 1
        asked = "".join(text for text, counts in example.turns if not counts)
        assert "One?" in asked and all(word not in "".join(learned) for word in ("One?", "Two?", "Be brief"))
        if "Second." in example.text:
            before = example.text.split("Second.")[0]
            positions = [before.index(text) for _, text in CHAT[:-1]]
            assert positions == sorted(positions)


def test_a_chat_template_that_refuses_every_answer_is_named(tmp_path):
    tokenizer = load_tokenizer(DEMO)
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in CHAT]}))
    with pytest.raises(UsageError, match=r"chat\.jsonl: the chat template refuses it \(never\): change --task"):
        chat_examples(file, tokenizer)


def test_conversations_as_strings_and_calls_of_tools_are_a_task(tmp_path):
    tokenizer = load_tokenizer(DEMO)
    chat = [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "tool_calls": [{"id": 1}]},
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "say"},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "", "messages": chat}))
    with (tmp_path / "b.csv").open("w", newline="") as out:
        csv.writer(out).writerows([["id", "messages"], [1, json.dumps(chat)]])
    (tmp_path / "c.jl").write_text(json.dumps({"messages": str(chat)}))  # as pandas writes a list into a cell
    found = [chat_examples(tmp_path / name, tokenizer) for name in ("a.jsonl", "b.csv", "c.jl")]
    assert found[0] == found[1] == found[2] and found[0][0].turns[-1] == ("### assistant\nsay\n", True)
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": [*chat[:-1], {"role": "assistant", "content": "a\0b"}]}))
    with pytest.raises(UsageError, match=r"d\.jsonl holds bytes of value 0"):
        chat_examples(tmp_path / "d.jsonl", tokenizer)
