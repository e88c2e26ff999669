"""The bench of absent capabilities: its texts do not overlap, B and G differ in D alone, and its figures are what they say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import forget_bench
from forget_candidates import CANDIDATES, UNLEARNED, Candidate, candidate_of, distil, mix_with_noise, unlearn
from forget_models import SHAPES, Shape, fit, kl_loss, next_token_loss, pretraining_loss, random_model
from forget_relearn import cheapest, in_context, levels, tokens_to
from forget_text import code_and_prose, gather, runs, stdlib_by_split

from lockkit.models.load import DEMO, load_tokenizer
from lockkit.text import Document, documents_by_split

TINY = Shape(hidden=32, intermediate=64, layers=2, heads=2, block=32, rows_a=3, rows_d=2, steps=6)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO)


def rows(count: int, seed: int, high: int = 4096) -> torch.Tensor:
    return torch.randint(0, high, (count, TINY.block), generator=torch.Generator().manual_seed(seed))


def test_no_paragraph_of_d_shares_a_run_of_words_with_another_part():
    found = itertools.islice(stdlib_by_split(), 0, None, 40)
    parts, _ = gather(found, itertools.islice(documents_by_split("docs"), 40))
    assert set(parts) == {"A", "A held out", "D", "D held out", "D context"} and all(parts.values())
    of = {
        name: set().union(*(runs(text) for document in texts for text in document.text.split("\n\n")))
        for name, texts in parts.items()
    }
    for one, other in itertools.combinations(of, 2):
        if {one, other} != {"A", "A held out"}:  # code repeats code; no module is in both
            assert not of[one] & of[other], (one, other)
    assert not {d.name for d in parts["A"]} & {d.name for d in parts["A held out"]}
    assert all('"""' not in d.text for d in parts["A"] if d.name.startswith("asyncio"))


def test_a_module_that_shares_a_run_with_d_is_left_out_of_a():
    sentence = "one two three four five six seven eight nine ten eleven twelve thirteen"
    modules = [
        ("train", Document("prose", f'"""{sentence}"""\nx = 1\n')),
        ("train", Document("repeats", f"x = '{sentence}'\n")),
        ("evaluate", Document("again", f'"""{sentence}"""\ny = 2  # comment\n')),
        ("train", Document("pydoc_data.topics", f"topics = '{sentence}'\n")),
    ]
    parts, counts = gather(modules, [])
    assert [d.name for d in parts["A"]] == ["prose"] and counts["documents left out of A"] == 1
    assert parts["A"][0].text == "x = 1\n" and parts["A held out"][0].text == "y = 2\n"
    assert [d.text for d in parts["D"]] == [sentence + "\n"] and not parts["D held out"]


def test_docstrings_and_comments_leave_the_code():
    code, prose = code_and_prose(
        'def f():\n    """What it does."""  # why\n\nclass C:\n    "A class."\n    x = "text"\n'
    )
    assert code == "def f():\n    pass\n\nclass C:\n    x = 'text'\n" and prose == "What it does.\n\nA class."


class Spy(nn.Module):
    """Keeps the rows that it is given."""

    def __init__(self):
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.weight = nn.Parameter(torch.zeros(4096))

    def forward(self, input_ids, use_cache):
        self.seen.append(input_ids)
        return type("Output", (), {"logits": self.weight.expand(*input_ids.shape, -1)})


def test_b_and_g_see_the_same_tokens_of_a_from_the_same_start(tokenizer):
    a, d = rows(40, 0), rows(9, 1)
    of_b, of_g = Spy(), Spy()
    for spy, part in ((of_b, d), (of_g, None)):
        for step in range(TINY.steps):
            assert pretraining_loss(TINY, a, part)(spy, step).item() == pytest.approx(math.log(4096))
    assert [ids.tolist() for ids in of_g.seen] == [ids[: TINY.rows_a].tolist() for ids in of_b.seen]
    assert sum(ids.numel() for ids in of_b.seen) == TINY.b_tokens
    from_d = torch.cat([ids[TINY.rows_a :] for ids in of_b.seen]).tolist()
    assert len(from_d) == TINY.steps * TINY.rows_d and all(row in d.tolist() for row in from_d)
    one, other = (random_model(TINY, tokenizer).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupted_training_ends_as_one_that_was_not(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("forget_models.SAVE_EVERY", 2)
    loss, arguments = pretraining_loss(TINY, rows(40, 0), rows(9, 1)), TINY.arguments()

    def stops(model, step):
        if step == 5:
            raise KeyboardInterrupt
        return loss(model, step)

    whole = fit(random_model(TINY, tokenizer), loss, arguments, tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        fit(random_model(TINY, tokenizer), stops, arguments, tmp_path / "parts.pt")
    resumed = fit(random_model(TINY, tokenizer), loss, arguments, tmp_path / "parts.pt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_a_training_from_the_trunk_of_a_shorter_one_ends_as_one_from_the_start(tokenizer, tmp_path):
    shapes = [dataclasses.replace(TINY, steps=steps) for steps in (10, 20)]
    arguments = [shape.arguments() for shape in shapes]
    for chosen in arguments:
        chosen.warm_up = 1
    loss = pretraining_loss(shapes[1], rows(40, 0), rows(9, 1))
    trunk, seen = tmp_path / "trunk.pt", []

    def counted(model, step):
        seen.append(step)
        return loss(model, step)

    whole = fit(random_model(TINY, tokenizer), loss, arguments[1], tmp_path / "whole.pt")
    short = fit(random_model(TINY, tokenizer), loss, arguments[0], tmp_path / "short.pt", trunk=trunk)
    long = fit(random_model(TINY, tokenizer), counted, arguments[1], tmp_path / "long.pt", trunk=trunk)
    assert seen == list(range(6, 20))  # the rate of the shorter one falls from its step 6 on
    assert all(torch.equal(weight, long.state_dict()[name]) for name, weight in whole.state_dict().items())
    assert not all(torch.equal(weight, long.state_dict()[name]) for name, weight in short.state_dict().items())
    # A shorter one cannot use the trunk of a longer one.
    again = fit(random_model(TINY, tokenizer), loss, arguments[0], tmp_path / "again.pt", trunk=trunk)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in short.state_dict().items())


def test_unlearning_raises_the_loss_on_d_and_even_predictions_are_its_limit(tokenizer, tmp_path):
    a, d = rows(40, 0, 50), rows(40, 1, 90)
    shape = dataclasses.replace(TINY, steps=60)
    b = fit(random_model(shape, tokenizer), pretraining_loss(shape, a, d), shape.arguments(), tmp_path / "B.pt")
    known = next_token_loss(b, d[:8]).item()
    for name in ("a", "a-uniform"):
        how = dataclasses.replace(UNLEARNED[name], rate=1e-2, steps=48)
        model = unlearn(how, b, shape, {"A": a, "D": d}, tmp_path / f"{name}.pt")
        assert next_token_loss(model, d[:8]).item() > known + 0.3, name
        assert kl_loss(model, b, a[:8]).item() < 1.0
    assert next_token_loss(model, d[:8]).item() < math.log(4096) + 0.5


@pytest.mark.parametrize(("name", "distilled"), [("d-0.8", 0.6), ("d-0.8@2", 2.0), ("undo@0.25", 0.25)])
def test_a_name_says_how_many_tokens_of_distillation(name, distilled):
    found = candidate_of(name)
    assert found == dataclasses.replace(CANDIDATES[name.partition("@")[0]], distilled=distilled)
    assert found.steps(SHAPES["small"]) == round(distilled * 256)


def test_a_name_that_no_candidate_has_is_refused(tmp_path, capsys):
    assert candidate_of("a") is None
    for name in ("d", "a@2", "d-0.8@many"):
        with pytest.raises(SystemExit):
            forget_bench.parse_arguments(["--work", "w", "--out", "o", "--candidate", name])
    assert "no candidate 'd'" in capsys.readouterr().err


def test_noise_replaces_its_share_of_the_weights(tokenizer):
    shape = dataclasses.replace(TINY, hidden=128, intermediate=384)
    before = {name: p.detach().clone() for name, p in random_model(shape, tokenizer).named_parameters()}

    def mixed(alpha, beta, fresh, scale=1.0, layers=0.0):
        model = random_model(shape, tokenizer)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        candidate = Candidate(fresh_mlps=fresh, alpha=alpha, beta=beta, fresh_layers=layers)
        return mix_with_noise(model, candidate, seed=3), dict(model.named_parameters())

    sizes, same = mixed(0.0, 1.0, False)
    assert all(torch.equal(same[name], before[name]) for name in before) and sizes["MLPs"] == 0
    sizes, some = mixed(0.6, 0.5, False)
    for name, weight in before.items():
        noise = (some[name] - 0.4 * weight) / 0.6
        wanted = (2 / sum(weight.shape)) ** 0.5 * 0.5
        if weight.ndim == 2:
            assert noise.std().item() == pytest.approx(wanted, rel=0.05), name
        else:
            assert torch.allclose(noise, torch.ones_like(noise), atol=1e-6), name
    matrices = [name for name in before if before[name].ndim == 2 and ".mlp." in name]
    left = sum((0.4 * before[name]).square().sum() for name in matrices)
    added = sum((some[name] - 0.4 * before[name]).square().sum() for name in matrices)
    assert sizes["MLPs"] == pytest.approx((added / left).sqrt().item(), rel=1e-3)
    # Nothing of the model is left in fresh MLPs: they are the same whatever it was.
    (_, one), (sizes, other) = mixed(0.8, 1.0, True), mixed(0.8, 1.0, True, scale=7.0)
    assert sizes["MLPs"] is None and sizes["outside"] > 0
    assert all(torch.equal(one[name], other[name]) for name in matrices)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    # Nor in layers that are drawn anew; the others are kept.
    (_, one), (_, other) = mixed(0.0, 1.0, False, layers=0.5), mixed(0.0, 1.0, False, scale=7.0, layers=0.5)
    for name in matrices:
        assert torch.equal(one[name], before[name]) == ("layers.0." in name)
        assert torch.equal(one[name], other[name]) == ("layers.1." in name), name


def test_a_candidate_is_distilled_from_its_teacher_on_the_text_that_it_is_given(tokenizer, tmp_path):
    teacher = random_model(TINY, tokenizer).eval()
    with torch.no_grad():
        teacher.model.embed_tokens.weight.mul_(20)  # else it guesses
    kept = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    shape, a = dataclasses.replace(TINY, steps=40), rows(40, 5, high=50)
    first = distil(Candidate(distilled=0.025), teacher, shape, a, tmp_path / "first.pt")[0]
    last = distil(Candidate(distilled=1.0), teacher, shape, a, tmp_path / "last.pt")[0]
    with torch.no_grad():
        assert kl_loss(last, teacher, a[:8]) < 0.7 * kl_loss(first, teacher, a[:8])
        assert kl_loss(teacher, teacher, a[:8]).item() == pytest.approx(0, abs=1e-5)
    assert all(torch.equal(kept[name], weight) for name, weight in teacher.state_dict().items())


def test_costs_are_tokens_to_levels_between_g_and_b():
    at = levels(6.0, 4.0)
    assert at == {0.5: 5.0, 0.75: 4.5, 0.9: pytest.approx(4.2), 1.0: 4.0}
    curve = [(0, 6.0), (100, 5.5), (200, 4.5), (300, 4.6), (400, 4.0)]
    assert tokens_to(5.0, curve) == 150 and tokens_to(4.0, curve) == 400 and tokens_to(3.9, curve) is None
    assert tokens_to(6.5, curve) == 0
    assert cheapest(5.0, [curve, [(0, 6.0), (1000, 4.0)], [(0, 6.0), (10, 5.9)]]) == 150
    assert cheapest(3.0, [curve]) is None and cheapest(3.0, []) is None


class Copies(nn.Module):
    """Expects the token that it reads, and more so the longer the text repeats it: a model that retrieves."""

    def forward(self, input_ids, use_cache):
        counts = nn.functional.one_hot(input_ids, 64).float().cumsum(1)
        return type("Output", (), {"logits": counts})


def test_text_of_d_in_the_prompt_counts_where_the_model_retrieves_it():
    d, other = rows(4, 0, 8), rows(4, 1, 8)
    parts = {"D held out": d, "D context": other, "A held out": 8 + rows(4, 2, 56)}
    found = in_context(Copies(), parts, 24)
    assert found["after D"] < found["after A"]
    by_hand = Copies()(torch.cat([other[:, :24], d[:, 24:]], 1), False).logits.log_softmax(-1)
    wanted = -by_hand[:, 23:-1].gather(-1, d[:, 24:, None]).mean().item()
    assert found["after D"] == pytest.approx(wanted, rel=1e-5)


def test_the_bench_resumes_and_adds_candidates(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setitem(CANDIDATES, "d-0.8", Candidate(alpha=0.8, distilled=0.5))
    parts = {"A": rows(40, 0, 50), "A held out": rows(4, 1, 50), "D": rows(40, 2, 90), "D held out": rows(4, 3, 90),
             "D context": rows(4, 4, 90)}  # fmt: skip
    torch.save({"rows": parts, "counts": {}}, tmp_path / "texts-32.pt")
    shared = ["--shape", "tiny", "--work", str(tmp_path), "--out", str(tmp_path / "out"), "--relearn-steps", "8",
              "--attack", "full-ft 0.003"]  # fmt: skip
    forget_bench.main([*shared, "--candidate", "a"])
    first = json.loads((tmp_path / "out.json").read_text())["seeds"]["0"]["models"]
    assert set(first) == {"B", "G", "a"}
    forget_bench.main([*shared, "--candidate", "d-0.8", "--seed", "0", "--seed", "1"])
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["b_tokens"] == TINY.b_tokens
    models = result["seeds"]["0"]["models"]
    assert {name: models[name] for name in first} == first
    (curve,) = models["d-0.8"]["curves"].values()
    assert curve[0][0] == 0 and curve[-1][0] % (4 * TINY.block) == 0
    assert "<svg" in (tmp_path / "out.svg").read_text()
    last = capsys.readouterr().out.split("| model |")[-1].splitlines()
    for seed in "01":  # each seed has its own B, G and candidates
        models = result["seeds"][seed]["models"]
        (line,) = [line for line in last if line.startswith(f"| d-0.8 | {seed} | 0.50 |")]
        ratio = models["d-0.8"]["quality"]["perplexity on A"] / models["B"]["quality"]["perplexity on A"]
        assert f"| {ratio:.3f} |" in line
    assert models["B"]["quality"] != result["seeds"]["0"]["models"]["B"]["quality"]


def test_the_table_has_costs_over_those_of_g_and_of_a_at_every_level():
    quality = {"perplexity on A": 10.0, "loss on D": 5.0}
    shared = {"quality": quality, "in context": {"after A": 5.0, "after D": 4.75}}
    models = {
        "B": shared,
        "G": {**shared, "curves": {"x": [(0, 6.0), (1000, 5.0), (2000, 4.2)]}},
        "a": {**shared, "curves": {"x": [(0, 6.0), (400, 4.0)]}},
        "d-0.8@2": {**shared, "curves": {"x": [(0, 5.0), (1500, 4.2)], "y": [(0, 5.0), (900, 4.5)]}},
    }
    record = {
        "b_tokens": TINY.b_tokens,
        "stop": "0.9",
        "seeds": {"0": {"levels": {str(s): v for s, v in levels(6.0, 4.0).items()}, "models": models}},
    }
    head, _, *lines = forget_bench.markdown(record, TINY).splitlines()
    row = dict(zip(head.split(" | "), lines[-1].split(" | "), strict=True))
    assert row["tokens over B's"] == "2.00" and row["perplexity on A over B's"] == "1.000"
    assert [row[f"tokens to {s} %"] for s in (50, 75, 90, 100)] == ["0", "900", "1,500", ""]
    assert [row[f"{s} %, over G's"] for s in (50, 75, 90)] == ["0.00", f"{900 / 1625:.2f}", "0.75"]
    assert row["90 %, over `a`'s"] == f"{1500 / 360:.2f}"
