"""Each attack's effect on a model, against references: exact cases, PyTorch's own loops, autograd."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from test_attack import ONE_RATE
from torch import nn

from lockkit.attack.attacks.gradient.adapters import QLora, quantise
from lockkit.attack.attacks.gradient.full_ft import FullFinetune
from lockkit.attack.attacks.gradient.reparametrise import Reparametrise, balance
from lockkit.attack.attacks.gradient.small_state import Lomo
from lockkit.attack.attacks.gradient.surrogate import SurrogateBackward
from lockkit.attack.attacks.unlocks.closed_form import RandomFeatures
from lockkit.attack.attacks.unlocks.redistill import MAX_PASSES, Redistill, RedistillConfig, measured_after
from lockkit.attack.attacks.unlocks.shorten import MergeBlocks, MergeConfig, PruneConfig, PruneSVD, merge, padded, prune
from lockkit.attack.base import GradientAttack
from lockkit.attack.config import audit_config
from lockkit.attack.cost import Cost, StepCost
from lockkit.attack.finetune import Charges, FinetuneConfig, Training, batches, finetune
from lockkit.attack.losses import logits_of, task_loss
from lockkit.attack.registry import registry
from lockkit.attack.run import run_audit
from lockkit.attack.subjects import Subjects
from lockkit.attack.tasks import load_task
from lockkit.attack.unlocking import original_as_chain
from lockkit.dlr.mlp import MLPWeights
from lockkit.dlr.net import DLRNet, block_ranks
from lockkit.dlr.view import load_side_by_side
from lockkit.errors import UsageError
from lockkit.models.families import decoder_layers
from lockkit.models.load import DEMO, load_tokenizer

GRADIENT = {name: attack for name, attack in registry().items() if issubclass(attack, GradientAttack)}
SLOW_START = ("mezo",)  # eight zeroth-order steps do not lower the loss reliably


def bench_of(model_type: str, originals, locks) -> Subjects:
    return Subjects(str(locks(model_type)), str(originals(model_type)), audit_config("quick", **ONE_RATE))


@pytest.fixture(scope="module")
def bench(originals, locks):
    return bench_of("qwen3", originals, locks)


@pytest.fixture(scope="module")
def two_layer_bench(originals, locks):
    return bench_of("phi", originals, locks)


def random_chain(gated: bool, activation=nn.functional.silu, bias: bool = False, gain: float = 0.7) -> DLRNet:
    torch.manual_seed(0)
    chain = DLRNet(8, block_ranks(15, 4), activation, gated, bias, output_bias=bias, gain=gain)
    for parameter in chain.parameters():
        nn.init.normal_(parameter, std=0.5)
    return chain.requires_grad_(False)


def chain_of(blocks: list[MLPWeights], like: DLRNet) -> DLRNet:
    ranks = [len(block.up) for block in blocks]
    gated, bias = like.blocks[0].gate_proj is not None, like.output_bias is not None
    chain = DLRNet(8, ranks, like.activation, gated, bias, bias, like.gain).requires_grad_(False)
    load_side_by_side(chain, MLPWeights.side_by_side(blocks))
    return chain


@pytest.mark.parametrize("name", [name for name, attack in GRADIENT.items() if name not in SLOW_START])
def test_every_variant_trains_the_lock(name, bench):
    variants = GRADIENT[name].variants()
    for variant in (
        variants[1:] if GRADIENT[name].in_quick else variants
    ):  # the test of the quick suite runs the first variant
        attack = GRADIENT[name](GRADIENT[name].configured(bench.config, variant, 1e-3))
        if attack.config.saver == "offload":
            continue  # refused if the training runs on the CPU
        result = attack.run(bench.load("locked"), bench, bench.tasks["signatures"])
        assert not result.diverged
        assert result.cost.steps >= 8
        assert result.cost.flops > 0
        assert result.cost.peak_tensor_bytes > 0
        assert result.best < result.start, variant


def test_lockkits_loop_and_the_trainers_agree(bench):
    config = FinetuneConfig(steps=12, batch_rows=2, warm_up=3, evaluations=3)
    models, results = [bench.load("locked"), bench.load("locked")], []
    for name, model in zip(("full-ft", "trainer"), models, strict=True):
        results.append(GRADIENT[name](config).run(model, bench, bench.tasks["signatures"]))
    ours, theirs = results
    assert [point.step for point in ours.curve] == [point.step for point in theirs.curve] == [0, 4, 8, 12]
    assert [point.loss for point in theirs.curve] == pytest.approx([point.loss for point in ours.curve], abs=1e-4)
    assert theirs.cost.flops == ours.cost.flops
    assert theirs.cost.tokens == ours.cost.tokens
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_lomo_takes_the_steps_of_gradient_descent(bench):
    task, rows = bench.tasks["signatures"], 2
    config = Lomo.Config(form="lomo", steps=8, batch_rows=rows, learning_rate=0.05, schedule="constant", evaluations=1)
    model = bench.load("locked")
    finetune(Lomo(config).prepare(model, bench), task, config)
    other = bench.load("locked")
    optimiser = torch.optim.SGD(other.parameters(), lr=0.05)
    for ids, labels in batches(task.train, rows, 8, seed=0):
        task_loss(logits_of(other, ids), labels).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_badam_trains_one_block_at_a_time(bench):
    config = GRADIENT["badam"].Config(steps=8, batch_rows=2, switch_every=2)
    model = bench.load("locked")
    training = GRADIENT["badam"](config).prepare(model, bench)
    layers = [set(layer.parameters()) for layer in decoder_layers(model)]
    ids = bench.evaluation[:1, :32]
    moved = []
    for _ in range(6):
        before = {p: p.detach().clone() for p in model.parameters()}
        task_loss(logits_of(model, ids), ids).backward()
        training.optimiser.step()
        changed = {p for p, old in before.items() if not torch.equal(p, old)}
        moved.append([index for index, layer in enumerate(layers) if layer & changed])
        assert all(p.grad is None for p in model.parameters())
    assert moved == [[], [], [0], [0], [1], [1]]


def test_each_kind_of_step_has_its_own_cost():
    training = Training(nn.Linear(1, 1), [], None, kind=lambda step: step // 4, before=Cost(tokens=7, flops=5.0))
    charges = Charges(training, {0: StepCost(10.0, 3, 2), 1: StepCost(20.0, 4, 1)}, 100, 0.5)
    assert charges.point(6, 1.0).flops == 5 + 4 * 10 + 2 * 20
    assert charges.point(6, 1.0).tokens == 7 + 600
    assert (
        charges.point(12, 1.0).flops == 5 + 4 * 10 + 8 * 20
    )  # the third kind was not counted: the highest of the others


def test_the_side_network_does_not_change_the_model(bench):
    model = bench.load("locked")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = GRADIENT["side-network"].Config(steps=8, batch_rows=2, learning_rate=1e-2)
    ids = bench.evaluation[:1, :32]
    training = GRADIENT["side-network"](config).prepare(model, bench)
    torch.testing.assert_close(logits_of(model, ids), logits_of(bench.frozen("locked"), ids))
    result = finetune(training, bench.tasks["signatures"], config)
    assert result.best < result.start
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_qlora_has_four_bits_per_weight(bench):
    model = bench.load("locked")
    linears = [m.weight.numel() for layer in decoder_layers(model) for m in layer.modules() if type(m) is nn.Linear]
    quantise(model)
    held = [p for p in decoder_layers(model).parameters() if p.dtype == torch.uint8]
    assert sum(p.nbytes for p in held) == sum(linears) / 2
    training = QLora(QLora.Config(steps=8)).prepare(bench.load("locked"), bench)
    assert {p.dtype for p in training.parameters} == {torch.float32}
    assert not any("lora" not in n for n, p in training.model.named_parameters() if p.requires_grad)
    assert len(list(training.state())) > 0


@pytest.mark.parametrize("subject", ["original", "locked"])
@pytest.mark.parametrize("form", ["balanced", "orthogonal"])
@pytest.mark.parametrize("which", ["bench", "two_layer_bench"])
def test_reparametrised_models_compute_the_same(which, form, subject, request):
    bench = request.getfixturevalue(which)
    model, ids = bench.load(subject), bench.evaluation[:1, :32]
    before = logits_of(model, ids).detach()
    Reparametrise(Reparametrise.Config(form=form)).prepare(model, bench)
    torch.testing.assert_close(logits_of(model, ids), before, atol=1e-4, rtol=1e-4)
    for name, module in decoder_layers(model).named_modules():
        if form == "orthogonal" and type(module).__name__ == "ParametrizedLinear":
            q = module.parametrizations.weight.original1
            gram = q @ q.T if q.shape[0] <= q.shape[1] else q.T @ q
            torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-4, rtol=0, msg=name)


def test_balanced_units_have_rows_and_columns_of_the_same_norm(bench):
    chain = decoder_layers(bench.load("locked"))[0].mlp
    balance(chain, bench.family)
    for block in chain.blocks:
        torch.testing.assert_close(block.up_proj.weight.norm(dim=1), block.down_proj.weight.norm(dim=0))


@pytest.mark.parametrize("surrogate", ["stack-solve", "redistill"])
def test_a_surrogate_of_uncoupled_blocks_is_exact(bench, surrogate):
    config = SurrogateBackward.Config(surrogate=surrogate)
    training = SurrogateBackward(config).prepare(original_as_chain(bench).requires_grad_(True), bench)
    assert training.notes["jacobian_nmse"] < 1e-4
    assert training.notes["gradient_cosine"] > 0.9999


def test_a_surrogate_changes_only_the_backward_pass(bench):
    model, plain = bench.load("locked"), bench.load("locked")
    training = SurrogateBackward(SurrogateBackward.Config()).prepare(model, bench)
    assert 1e-4 < training.notes["jacobian_nmse"] < 1  # the blocks are coupled
    assert training.before.flops > 0
    ids = bench.evaluation[:1, :32]
    for each in (model, plain):
        task_loss(logits_of(each, ids), ids).backward()
    torch.testing.assert_close(logits_of(model, ids), logits_of(plain, ids))
    pairs = [(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True)]
    assert all((a is None) == (b is None) for a, b in pairs)
    a, b = (torch.cat([pair[i].flatten() for pair in pairs if pair[i] is not None]) for i in range(2))
    assert not torch.allclose(a, b, rtol=1e-3)
    assert torch.cosine_similarity(a, b, dim=0) == pytest.approx(training.notes["gradient_cosine"], abs=0.1)


def test_merging_is_exact_where_blocks_are_linear():
    chain = random_chain(gated=False, activation=lambda t: t * 1.0, bias=True)
    x = torch.randn(50, 8)
    for bounds in ([(0, 4)], [(0, 2), (2, 4)], [(0, 3), (3, 4)]):
        blocks = merge(chain, x, bounds)
        torch.testing.assert_close(chain_of(blocks, chain)(x), chain(x), atol=1e-4, rtol=1e-4)


def test_merged_rows_see_the_mean_jacobian_of_the_blocks_before():
    chain = random_chain(gated=True)
    x = torch.randn(40, 8)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda t: chain.blocks[0](t, chain.activation)))(x).mean(0)
    seen = torch.eye(8) + chain.gain * jacobian
    (merged, _) = merge(chain, x, [(0, 2), (2, 4)])
    rank = len(chain.blocks[0].up_proj.weight)
    torch.testing.assert_close(merged.up[:rank], chain.blocks[0].up_proj.weight)
    torch.testing.assert_close(merged.up[rank:], chain.blocks[1].up_proj.weight @ seen, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(merged.gate[rank:], chain.blocks[1].gate_proj.weight @ seen, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gated", [True, False])
def test_pruning_drops_blocks_without_effect_and_keeps_the_function(gated):
    chain = random_chain(gated, nn.functional.gelu, bias=not gated)
    for index in (1, 2):
        chain.blocks[index].down_proj.weight.zero_()
    x = torch.randn(50, 8)
    blocks, notes = prune(chain, x, energy=1 - 1e-9)
    assert notes["blocks"] == 2
    torch.testing.assert_close(chain_of(padded(blocks, 3, 6), chain)(x), chain(x), atol=1e-4, rtol=1e-4)
    _, fewer = prune(chain, x, energy=0.8)
    assert fewer["share_of_rank"] < 1


@pytest.mark.parametrize("attack", [MergeBlocks(MergeConfig(neighbours=k)) for k in (2, 4, None)])
@pytest.mark.parametrize("which", ["bench", "two_layer_bench"])
def test_merged_models_are_saved_and_loaded(which, attack, request, tmp_path):
    bench = request.getfixturevalue(which)
    unlocked = attack.unlock(bench.frozen("locked"), bench)
    assert unlocked.blocks == {2: 3, 4: 2, None: 1}[attack.config.neighbours]
    assert bench.quality(attack.unlock(original_as_chain(bench), bench).model).kl_to_original < 1e-5
    unlocked.model.save_pretrained(tmp_path)
    again = type(unlocked.model).from_pretrained(tmp_path)
    ids = bench.evaluation[:1, :32]
    torch.testing.assert_close(logits_of(again, ids), logits_of(unlocked.model, ids))
    if unlocked.blocks == 1:
        assert not any(isinstance(module, DLRNet) for module in again.modules())


def test_pruning_is_closer_to_the_lock_the_more_energy_is_kept(bench):
    kl = [bench.quality(PruneSVD(PruneConfig(energy=e)).unlock(bench.frozen("locked"), bench).model).kl_to_lock
          for e in (0.9, 0.999999)]  # fmt: skip
    assert kl[1] < 1e-4 < kl[0]


def test_points_of_a_redistillation_are_evenly_spaced_in_the_logarithm():
    assert measured_after(640, 7) == [10, 20, 40, 80, 160, 320, 640]
    assert measured_after(3, 7) == [1, 2, 3]
    assert measured_after(5, 1) == [5]


def test_a_budget_is_in_multiples_of_the_locks_tokens_and_passes_are_bounded(bench):
    recipe = bench.record["recipe"]
    spent = recipe["tokens"] + recipe["end_to_end_tokens"]
    quarter = Redistill(RedistillConfig(budget=0.25, points=2, seed=1)).unlock(bench.frozen("locked"), bench)
    assert quarter.cost.tokens == spent // 4
    assert quarter.notes["passes"] == quarter.cost.tokens / quarter.notes["text_tokens"]
    assert not quarter.notes["cut_short"]
    assert [point["tokens"] for point in quarter.notes["curve"]] == [1024, 2048]
    much = Redistill(RedistillConfig(budget=100, points=1, seed=1)).unlock(bench.frozen("locked"), bench)
    assert much.notes["cut_short"]
    assert much.notes["passes"] == MAX_PASSES
    assert much.notes["curve"][-1]["kl_to_lock"] < quarter.notes["curve"][0]["kl_to_lock"]


class Greedy(FullFinetune):
    name = "greedy"

    def prepare(self, model, bench):
        torch.empty(2**45)
        return super().prepare(model, bench)


def test_a_failed_attack_does_not_stop_the_others(originals, locks, tmp_path, monkeypatch):
    monkeypatch.setitem(registry(), "greedy", Greedy)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = audit_config("quick", **ONE_RATE)
    names = ["greedy", "qlora", "last-layers"]
    run_audit(str(locks("qwen3")), str(originals("qwen3")), tmp_path / "audit", config, names)
    rows = [json.loads(line) for line in (tmp_path / "audit" / "rows.jsonl").read_text().splitlines()]
    found = {(row["attack"], row["model"]): row for row in rows}
    assert found["greedy", "locked"]["status"] == "out-of-memory"
    assert found["qlora", "locked"]["status"] == "unavailable"
    assert "bitsandbytes is not installed: pip install" in found["qlora", "locked"]["note"]
    assert found["last-layers", "locked"]["status"] == "finished"
    assert all(math.isfinite(row["best_loss"]) for row in rows if row["status"] == "finished")


def test_a_broken_task_is_refused_before_anything_is_run(cli, originals, locks, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"mess\n')
    out = tmp_path / "audit"
    outcome = cli("attack", locks("qwen3"), "--original", originals("qwen3"), "--task", file, "--out", out)
    assert outcome.code == 2
    assert "line 2" in outcome.err
    assert not out.exists()


def test_a_text_that_cannot_be_a_task_is_refused_by_its_option(tmp_path):
    file = tmp_path / "notes.txt"
    for text, says in (
        ("", "holds no text"),
        ("one passage", "train has 0 tokens and needs 32"),
        ("\xff", "not UTF-8"),
    ):
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(UsageError, match=says) as refused:
            load_task(
                str(file), load_tokenizer(DEMO), block_tokens=32, train_tokens=64, held_out_tokens=64, distilled_on=None
            )
        assert str(file) in str(refused.value)
        assert "--task" in str(refused.value)
        assert "--data" not in str(refused.value)


def test_a_folder_that_cannot_be_made_is_refused(cli, originals, locks, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = cli("attack", locks("qwen3"), "--original", originals("qwen3"), "--out", tmp_path / "file" / "audit")
    assert outcome.code == 2
    assert "file is a file" in outcome.err
    assert "change --out" in outcome.err


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("learning_rates", "--learning-rate", math.nan),
        ("learning_rates", "--learning-rate", 0),
        ("redistill_budgets", "--redistill-budget", -1),
    ],
)
def test_a_wrong_value_in_a_list_is_refused_by_its_option(name, option, value):
    with pytest.raises(UsageError, match=f"^{option}: "):
        audit_config("quick", **{name: [1e-3, value]})


def test_a_redistillation_from_random_features_starts_from_their_model(bench):
    solved = RandomFeatures(RandomFeatures.trials(bench.config)[0]).unlock(bench.frozen("locked"), bench)
    config = RedistillConfig(start="features", learning_rate=1e-9, tokens=1024, points=1)
    again = Redistill(config).unlock(bench.frozen("locked"), bench)
    ids = bench.evaluation[:2]
    torch.testing.assert_close(again.model(ids).logits, solved.model(ids).logits, atol=1e-4, rtol=1e-4)
    assert again.cost.tokens > solved.cost.tokens
