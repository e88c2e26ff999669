"""Distillation: its quality, its guarantees, and its errors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import QUICK
from tiny import VOCAB, add_token, empty_chain, save_tiny
from tokenizers import processors
from torch import nn

from lockkit.dlr import DLRNet
from lockkit.errors import DistillationError, UsageError
from lockkit.lock.config import LockConfig, make_config
from lockkit.lock.data import sampled_data
from lockkit.lock.initialise import scrub_teacher_rows, start_from_teacher
from lockkit.lock.meter import FidelityMeter
from lockkit.lock.modulewise import LayerTask, chain_nmse, distil_layers
from lockkit.lock.run import lock_model
from lockkit.measure.metrics import nmse
from lockkit.measure.records import MeasuredText
from lockkit.models.families import FAMILIES, Family, decoder_layers, mlp_weights
from lockkit.models.load import DEMO, load_config, load_model, load_tokenizer
from lockkit.progress import NoProgress
from lockkit.text import require_embedded

EVERY_FAMILY = pytest.mark.parametrize("model_type", FAMILIES)


def quick(**changes) -> LockConfig:
    return LockConfig(**(QUICK | changes))


def layer_task(
    layer: int,
    mlp: nn.Module,
    family: Family,
    train: torch.Tensor,
    validation: torch.Tensor,
    depth: int = QUICK["depth"],
    coupling: float = 0.25,
) -> LayerTask:
    """The distillation of one MLP into a chain."""
    weights = mlp_weights(mlp, family)

    def empty(gain: float) -> DLRNet:
        return empty_chain(weights.shape, depth, gain, mlp.act_fn)

    return LayerTask(layer, mlp, weights, empty, train, validation, coupling)


@EVERY_FAMILY
def test_a_chain_starts_as_the_teacher_whose_units_it_has(model_type, originals):
    model, family = load_model(originals(model_type), torch.float32)
    mlp = decoder_layers(model)[1].mlp
    weights = mlp_weights(mlp, family)
    chain = empty_chain(weights.shape, 7, 0.0, getattr(mlp, "act_fn", None) or mlp.activation_fn)
    x = torch.randn(50, weights.shape.hidden_size)
    start_from_teacher(chain, weights, x)
    with torch.no_grad():
        torch.testing.assert_close(chain(x), mlp(x), rtol=1e-4, atol=1e-4)


def test_nmse_is_one_for_the_mean_and_zero_for_the_teacher():
    teacher = torch.randn(100, 8) * 3 + 5
    assert nmse(teacher, teacher) == 0
    assert nmse(teacher.mean(0).expand_as(teacher), teacher) == pytest.approx(1, rel=1e-5)


@pytest.fixture(scope="module")
def demo_lock(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "locked"
    config = LockConfig(depth=16, tokens=32_768, device="cpu")
    return lock_model("demo", out, config).record


def test_the_bundled_model_keeps_its_perplexity(demo_lock):
    """The project's goal at depth 16."""
    assert demo_lock["fidelity"]["perplexity_ratio"] <= 1.02
    assert all(layer["nmse"] < 0.05 for layer in demo_lock["layers"])


def test_the_budget_of_kl_is_kept_and_used(demo_lock):
    """Training lowers the KL for which the couplings were chosen, so the lock spends less than the budget."""
    budget = demo_lock["recipe"]["max_kl"]
    assert budget / 5 < demo_lock["fidelity"]["kl_divergence"] <= budget
    couplings = [layer["coupling"] for layer in demo_lock["layers"]]
    assert len(set(couplings)) == len(couplings)
    assert all(layer["nmse"] <= layer["start_nmse"] for layer in demo_lock["layers"])


def test_the_bundled_model_predicts_text(demo_lock):
    # The unigram-plus-bigram baseline of its card has a perplexity of about 120.
    assert demo_lock["fidelity"]["original_perplexity"] < 40


def test_the_teachers_units_beat_noise_at_equal_tokens(tmp_path):
    """On the bundled model's second layer; a tiny random model has no structure to keep."""
    from lockkit.text import documents, token_blocks

    model, family = load_model(DEMO, torch.float32)
    model.requires_grad_(False)
    tokenizer = load_tokenizer(DEMO)
    mlp = decoder_layers(model)[1].mlp
    inputs = []
    mlp.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for split, tokens in (("distill", 16_384), ("validate", 2_048)):
            model(token_blocks(tokenizer, documents("stdlib", split), 128, tokens))
    unfitted = empty_chain(mlp_weights(mlp, family).shape, 16, 0.0, mlp.act_fn).requires_grad_(False)
    start_from_teacher(unfitted, mlp_weights(mlp, family), inputs[0])
    reached = {}
    for init in ("teacher", "random"):
        config = LockConfig(depth=16, init=init, tokens=16_384)
        task = layer_task(1, mlp, family, *inputs[:2], depth=16)
        [(chain, result)] = distil_layers([task], config, NoProgress())
        reached[init] = result.nmse
        assert result.nmse == pytest.approx(chain_nmse(chain, mlp, inputs[1]))
        if init == "teacher":
            unfitted.gain = result.gain
            assert result.nmse <= result.start_nmse < chain_nmse(unfitted, mlp, inputs[1]) / 3
    assert reached["teacher"] < reached["random"] / 5
    assert reached["random"] < 1


def test_layers_trained_together_are_the_layers_trained_alone(originals):
    """The weights are equal within rounding, because batching changes the speed only."""
    model, family = load_model(originals("qwen3"), torch.float32)
    model.requires_grad_(False)
    config = quick(depth=5, tokens=4_096)
    generator = torch.Generator().manual_seed(0)
    tasks = [
        layer_task(i, layer.mlp, family, *torch.randn(2, 1024, 32, generator=generator))
        for i, layer in enumerate(decoder_layers(model))
    ]
    together = distil_layers(tasks, config, NoProgress())
    for task, (chain, result) in zip(tasks, together, strict=True):
        [(alone, alone_result)] = distil_layers([task], config, NoProgress())
        assert result.nmse == pytest.approx(alone_result.nmse, rel=1e-3)
        for one, other in zip(chain.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


def test_chains_computed_in_bfloat16_are_nearly_as_good(originals):
    model, family = load_model(originals("llama"), torch.float32)
    mlp = decoder_layers(model)[0].requires_grad_(False).mlp
    task = layer_task(0, mlp, family, *torch.randn(2, 2048, 32))
    reached = [
        distil_layers([task], quick(tokens=16_384, compute_dtype=dtype), NoProgress())[0][1].nmse
        for dtype in ("float32", "bfloat16")
    ]
    assert reached[1] == pytest.approx(reached[0], rel=0.3)


def test_a_layer_that_diverges_is_tried_again_at_half_the_rate(originals):
    model, family = load_model(originals("llama"), torch.float32)
    mlp = decoder_layers(model)[0].requires_grad_(False).mlp
    task = layer_task(0, mlp, family, *torch.randn(2, 2048, 32))
    [(chain, result)], [(expected, careful)] = (
        distil_layers([task], quick(learning_rate=rate), NoProgress()) for rate in (2.0, 0.25)
    )
    assert result.learning_rate < 2
    if result.learning_rate == careful.learning_rate:
        assert all(map(torch.equal, chain.parameters(), expected.parameters()))
    assert careful.record()["learning_rate"] == 0.25 and result.nmse < 10


@pytest.mark.parametrize(("model_type", "warned"), [("qwen3", True), ("demo", False)])
def test_text_that_the_model_cannot_read_is_warned_of(originals, tmp_path, model_type, warned):
    class Lines(NoProgress):
        def say(self, line: str) -> None:
            said.append(line)

    said: list[str] = []
    model = "demo" if model_type == "demo" else str(originals(model_type))
    config = quick(data="stdlib", tokens=512, end_to_end_tokens=0, validation_tokens=64)
    lock_model(model, tmp_path / "out", config, progress=Lines())
    warnings = [line for line in said if line.startswith("warning:")]
    assert bool(warnings) == warned
    if warned:  # the weights are random, so its guesses are, too
        assert "stdlib, split 'evaluate' is " in warnings[0] and warnings[0].endswith("change --data")


def test_a_lock_is_measured_on_text_of_other_kinds(originals, tmp_path):
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"paragraph {i} " * 60 for i in range(200)))
    others = ["stdlib", "docs", "licences", str(tmp_path / "corpus.txt")]
    result = lock_model(str(originals("qwen3")), tmp_path / "out", quick(other_texts=others, end_to_end_tokens=0))
    measured = result.record["other_texts"]
    # not the text that the lock was distilled on
    assert [each["text"]["source"] for each in measured] == ["docs", "licences", "corpus.txt"]
    assert len({each["text"]["token_sha256"] for each in [*measured, result.record["fidelity"]]}) == 4
    assert all(0 < each["kl_divergence"] < 1 and each["text"]["split"] == "evaluate" for each in measured)
    assert "| licences |" in (tmp_path / "out" / "README.md").read_text()


def test_another_text_that_is_too_short_is_refused_before_the_work(originals, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(UsageError, match=r"short.txt is too short: .*give more text with --other-text"):
        lock_model(str(originals("qwen3")), tmp_path / "out", quick(other_texts=[str(tmp_path / "short.txt")]))


def test_fidelity_of_a_perfect_copy(originals):
    from lockkit.models.layered import StreamedModel
    from lockkit.models.load import load_config

    model, family = load_model(originals("llama"), torch.float32)
    stream = StreamedModel(originals("llama"), load_config(originals("llama")), family, "cpu")
    rows = torch.randint(1, 4096, (5, 64), generator=torch.Generator().manual_seed(0))
    text = MeasuredText.of(rows, "random", "evaluate")
    fidelity = FidelityMeter(stream, rows, text).measure(lambda index: decoder_layers(model)[index].mlp)
    with torch.no_grad():
        loss = model(rows, labels=rows).loss  # transformers' own, over the same next tokens
    assert fidelity.kl_divergence == pytest.approx(0, abs=1e-9)
    assert fidelity.tokens == 5 * 63 and fidelity.text == text
    assert fidelity.top1_agreement == 1
    assert fidelity.perplexity == pytest.approx(loss.exp().item(), rel=1e-4) == fidelity.original_perplexity


def test_rows_that_equal_the_teachers_are_perturbed(originals):
    model, family = load_model(originals("phi"), torch.float32)
    mlp = decoder_layers(model)[0].mlp
    weights = mlp_weights(mlp, family)
    chain = empty_chain(weights.shape, 4, 1.0, mlp.activation_fn).to(torch.bfloat16)
    start_from_teacher(chain, weights, torch.randn(50, weights.shape.hidden_size))
    before = chain(torch.ones(3, 32, dtype=torch.bfloat16))
    assert scrub_teacher_rows(chain, weights, 0) == 2 * 48
    assert scrub_teacher_rows(chain, weights, 0) == 0
    after = chain(torch.ones(3, 32, dtype=torch.bfloat16))
    assert (after - before).float().norm() < 0.1 * before.float().norm()


def test_a_seed_fixes_every_weight(originals, tmp_path):
    def locked(name, seed):
        lock_model(str(originals("qwen2")), tmp_path / name, quick(seed=seed))
        return (tmp_path / name / "model.safetensors").read_bytes()

    first = locked("a", 0)
    assert locked("b", 0) == first
    assert locked("c", 1) != first


GENERATION_SETTINGS = [
    {"num_beams": 4, "num_return_sequences": 2},
    {"forced_eos_token_id": 0, "forced_bos_token_id": 5, "min_length": 7, "max_length": 9},
    {"return_dict_in_generate": True, "output_scores": True, "stop_strings": ["a"]},
    {"suppress_tokens": [5, 6], "begin_suppress_tokens": [7], "bad_words_ids": [[8]], "no_repeat_ngram_size": 1},
    {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.1, "repetition_penalty": 9.0, "use_cache": False},
    {"cache_implementation": "static", "eos_token_id": [3, 4], "bos_token_id": 9, "guidance_scale": 3.0},
]


@pytest.mark.parametrize("settings", GENERATION_SETTINGS, ids=lambda settings: next(iter(settings)))
def test_sampled_text_does_not_depend_on_the_generation_settings(originals, tmp_path, settings):
    folder, config = tmp_path / "model", quick(tokens=512, block_tokens=16, validation_tokens=64)
    shutil.copytree(originals("qwen3"), folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    expected, found = (
        sampled_data(each, config, load_config(each), load_tokenizer(each), "cpu", NoProgress())
        for each in (originals("qwen3"), folder)
    )
    assert found["train"].shape == (128, 16)
    assert all(torch.equal(found[part], expected[part]) for part in expected)


def test_self_sampled_text(originals, tmp_path):
    record = lock_model(str(originals("qwen3")), tmp_path / "out", quick(data="auto", tokens=2_048)).record
    assert record["data"]["source"] == "self"
    assert len({record["data"][f"{part}_sha256"] for part in ("train", "validation", "evaluation")}) == 3


def test_the_dtype_is_that_of_the_original_by_default(tmp_path):
    from safetensors import safe_open

    original = tmp_path / "original"
    save_tiny("llama", original)
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(original).to(torch.bfloat16).save_pretrained(original)
    for asked, stored in (("auto", "BF16"), ("float32", "F32")):
        lock_model(str(original), tmp_path / asked, quick(dtype=asked))
        with safe_open(tmp_path / asked / "model.safetensors", "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {stored}  # noqa: SIM118


def test_recipe_file_and_options_make_one_config(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("depth: 8\nend-to-end-tokens: 0\nseed: 5\n")
    config = make_config(recipe, depth=12, seed=None)
    assert (config.depth, config.end_to_end_tokens, config.seed) == (12, 0, 5)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_recipe_may_have_a_byte_order_mark_and_the_home_folder(tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: ~/corpus.txt\nwork: ~/work\n", encoding=encoding)
    config = make_config(recipe)
    assert (config.data, config.work) == ("/home/someone/corpus.txt", "/home/someone/work")
    assert make_config(data="~no-such-user/a").data == "~no-such-user/a"


def test_a_token_beyond_the_embeddings_is_named(tmp_path, originals):
    folder, text = tmp_path / "model", tmp_path / "corpus.txt"
    shutil.copytree(originals("qwen3"), folder)
    add_token(folder, "<extra>")
    text.write_text("\n\n".join(f"word{i} " * 1000 for i in range(60)))
    config = quick(data=str(text), end_to_end_tokens=0)
    lock_model(str(folder), tmp_path / "out", config)  # a tokenizer may have such a token
    text.write_text(text.read_text().replace("\n\n", "<extra>\n\n"))
    with pytest.raises(UsageError, match=rf"token '<extra>' has the id {VOCAB}, and the model has only {VOCAB} embed"):
        lock_model(str(folder), tmp_path / "other", config)


@pytest.mark.parametrize("which", ["eos_token", "bos_token"])
def test_a_token_beyond_the_embeddings_that_the_tokenizer_adds_is_named(which):
    tokenizer = load_tokenizer(DEMO)
    tokenizer.add_special_tokens({which: "<extra>"})
    extra = tokenizer.convert_tokens_to_ids("<extra>")
    if which == "bos_token":
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<extra> $A", special_tokens=[("<extra>", extra)]
        )
    with pytest.raises(
        UsageError, match=rf"adds its {which} to every text.*'<extra>' has the id {extra}.*change MODEL"
    ):
        require_embedded(tokenizer, [1, extra], VOCAB, "corpus.txt", "--data")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("depht: 8", r"unknown setting 'depht' in .*recipe.yaml: did you mean depth\?"),
        ("depth: many", r"--depth: must be a whole number, not 'many' in .*recipe.yaml"),
        ("depth: yes", "--depth: must be a whole number, not True"),
        ("gain: on", "--gain: must be a number, not True"),
        ("data: 5", "--data: must be text, not 5"),
        ("block-tokens: 64\nblock_tokens: 32", "twice"),
        ("depth: 8\nseed: 1\ndepth: 4", "recipe.yaml has the setting 'depth' twice: change --config"),
        ("depth: [", "not valid YAML"),
        ("- depth", "must have lines of the form `setting: value`"),
        ("tokens: -1", "--tokens"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, recipe, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    with pytest.raises(UsageError, match=message) as error:
        make_config(file)
    assert "\n" not in str(error.value)


def test_divergence_is_reported_and_nothing_written(originals, tmp_path):
    with pytest.raises(DistillationError, match=r"diverged.*--learning-rate"):
        lock_model(str(originals("llama")), tmp_path / "out", quick(learning_rate=1e9))
    assert list(tmp_path.iterdir()) == []
