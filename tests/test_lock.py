"""Distillation: its quality, its guarantees, and its errors."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import QUICK, command_line
from safetensors.torch import load_file, save_file
from tiny import VOCAB, add_token, empty_chain, save_tiny
from tokenizers import processors
from torch import nn

from lockkit.dlr import DLRNet
from lockkit.errors import DistillationError, UsageError
from lockkit.files import LOCK_RECORD
from lockkit.lock.config import LockConfig, make_config
from lockkit.lock.data import sampled_data
from lockkit.lock.initialise import scrub_teacher_rows, start_from_teacher
from lockkit.lock.meter import FidelityMeter
from lockkit.lock.modulewise import LayerTask, chain_nmse, distil_layers
from lockkit.lock.run import lock_model
from lockkit.lock.sampling import draw
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
) -> LayerTask:
    """The distillation of one MLP into a chain."""
    weights = mlp_weights(mlp, family)

    def empty(gain: float) -> DLRNet:
        return empty_chain(weights.shape, depth, gain, mlp.act_fn)

    return LayerTask(layer, mlp, weights, empty, train, validation)


@EVERY_FAMILY
def test_continuation_starts_as_the_teacher(model_type, originals):
    model, family = load_model(originals(model_type), torch.float32)
    mlp = decoder_layers(model)[1].mlp
    weights = mlp_weights(mlp, family)
    chain = empty_chain(weights.shape, 7, 1.0, getattr(mlp, "act_fn", None) or mlp.activation_fn)
    start_from_teacher(chain, weights, seed=3)
    x = torch.randn(50, weights.shape.hidden_size)
    with torch.no_grad():
        torch.testing.assert_close(chain(x, gain=0.0), mlp(x), rtol=1e-4, atol=1e-4)


def test_nmse_is_one_for_the_mean_and_zero_for_the_teacher():
    teacher = torch.randn(100, 8) * 3 + 5
    assert nmse(teacher, teacher) == 0
    assert nmse(teacher.mean(0).expand_as(teacher), teacher) == pytest.approx(1, rel=1e-5)


@pytest.fixture(scope="module")
def demo_lock(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "locked"
    config = LockConfig(depth=16, tokens=40_000, end_to_end_tokens=4_096, device="cpu")
    return lock_model("demo", out, config).record


def test_the_bundled_model_keeps_its_perplexity(demo_lock):
    """The project's goal at depth 16, with a fifth of the default tokens."""
    assert demo_lock["fidelity"]["perplexity_ratio"] <= 1.02
    assert all(layer["nmse"] < 0.05 for layer in demo_lock["layers"])


def test_the_bundled_model_predicts_text(demo_lock):
    # The unigram-plus-bigram baseline of its card has a perplexity of about 120.
    assert demo_lock["fidelity"]["original_perplexity"] < 40


def test_continuation_beats_noise_at_equal_tokens(tmp_path):
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
    reached = {}
    for init in ("continuation", "random"):
        config = LockConfig(depth=16, init=init, tokens=16_384)
        task = layer_task(1, mlp, family, *inputs[:2], depth=16)
        [(chain, result)] = distil_layers([task], config, NoProgress())
        reached[init] = result.nmse
        assert result.nmse == pytest.approx(chain_nmse(chain, mlp, inputs[1]))
    assert reached["continuation"] < reached["random"] / 5
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
        distil_layers([task], quick(coupling=1, learning_rate=rate), NoProgress()) for rate in (2.0, 0.25)
    )
    assert result.learning_rate < 2
    if result.learning_rate == careful.learning_rate:
        assert all(map(torch.equal, chain.parameters(), expected.parameters()))
    assert careful.record()["learning_rate"] == 0.25 and result.nmse < 10


def test_phase_2_improves_on_phase_1(originals, tmp_path):
    """With the learning rate that it finds."""
    config = quick(coupling=1, end_to_end_tokens=16_384)
    record = lock_model(str(originals("llama")), tmp_path / "out", config).record
    assert record["end_to_end"]["best_step"] > 0
    assert record["end_to_end"]["kl_divergence_after"] < 0.95 * record["end_to_end"]["kl_divergence_before"]


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_phase_2_never_ends_worse_than_phase_1(originals, tmp_path, offload):
    # A learning rate that is too high for any model.
    config = quick(end_to_end_learning_rate=0.5, offload=offload)
    record = lock_model(str(originals("llama")), tmp_path / "out", config).record
    assert record["end_to_end"]["best_step"] == 0
    assert record["fidelity"]["kl_divergence"] == pytest.approx(record["after_phase_1"]["kl_divergence"], rel=1e-4)


def test_phase_2_ends_after_its_trials_if_none_is_better(originals, tmp_path, monkeypatch):
    monkeypatch.setattr("lockkit.lock.end_to_end.TRIAL_RATES", (0.5, 1.0))  # too high for any model
    record = lock_model(str(originals("llama")), tmp_path / "out", quick()).record
    phase_2 = record["end_to_end"]
    assert (phase_2["steps"], phase_2["tokens"], phase_2["learning_rate"], phase_2["best_step"]) == (0, 0, 0, 0)
    assert phase_2["kl_divergence_after"] == phase_2["kl_divergence_before"]
    assert record["fidelity"]["kl_divergence"] == pytest.approx(record["after_phase_1"]["kl_divergence"], rel=1e-4)


def test_phase_2_has_the_gradients_of_plain_autograd(originals, tmp_path):
    """Backward passes layer by layer give the same gradients as one through the whole model."""
    from lockkit.lock.end_to_end import EndToEnd
    from lockkit.lock.stack import ChainStack
    from lockkit.models.layered import StreamedModel
    from lockkit.models.load import load_config
    from lockkit.workers import Workers

    folder = originals("gemma2")
    model, family = load_model(folder, torch.float32)
    config = quick()

    def start(index):
        mlp = decoder_layers(teacher)[index].mlp
        chain = empty_chain(mlp_weights(mlp, family).shape, 5, 0.3, mlp.act_fn).requires_grad_(False)
        start_from_teacher(chain, mlp_weights(mlp, family), index)
        return chain

    teacher, _ = load_model(folder, torch.float32)
    rows = torch.randint(1, 4096, (3, 40), generator=torch.Generator().manual_seed(0))
    stream = StreamedModel(folder, load_config(folder), family, "cpu")
    stack = ChainStack(stream, start, config)
    gradients = []
    for index in range(len(stream)):
        _, optimiser = stack._take(index)
        optimiser.optimiser.register_step_pre_hook(
            lambda optimiser, *_: gradients.append([p.grad.clone() for p in optimiser.param_groups[0]["params"]])
        )
    expected = ChainStack(stream, start, config)
    with torch.no_grad():
        target = model(rows).logits
    for index, layer in enumerate(decoder_layers(model)):
        layer.requires_grad_(False).mlp = expected.chain(index)
    log_student, log_teacher = (logits.flatten(0, 1).log_softmax(-1) for logits in (model(rows).logits, target))
    torch.nn.functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True).backward()
    EndToEnd(stream, stack, rows, None, config, None, Workers(), NoProgress())._step(torch.arange(3), 0)
    for index, found in enumerate(reversed(gradients)):
        for one, other in zip(expected.chain(index).parameters(), found, strict=True):
            torch.testing.assert_close(other, one.grad, rtol=1e-3, atol=1e-4 * one.grad.abs().max().item())


@pytest.mark.parametrize(("model_type", "warned"), [("qwen3", True), ("demo", False)])
def test_text_that_the_model_cannot_read_is_warned_of(originals, tmp_path, model_type, warned):
    class Lines(NoProgress):
        def say(self, line: str) -> None:
            said.append(line)

    said: list[str] = []
    model = "demo" if model_type == "demo" else str(originals(model_type))
    config = quick(data="stdlib", tokens=256, end_to_end_tokens=0, validation_tokens=64)
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
    start_from_teacher(chain, weights, 0)
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


def change_weights(folder: Path, **changes: float) -> None:
    """Multiply tensors of a saved model, given by parts of their names."""
    weights = load_file(folder / "model.safetensors")
    for part, factor in changes.items():
        for name in weights:
            if part in name.replace(".", "_"):
                weights[name] = weights[name] * factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "settings",
    [
        {"end_to_end_tokens": 0},
        {"gain": 0.5, "layers_together": 2},
        {"init": "random", "coupling": 0.5, "offload": "disk"},
        {"compute_dtype": "bfloat16", "dtype": "float16"},
    ],
)
def test_the_chain_of_a_layer_of_zeros_is_zero(tmp_path, settings):
    original = save_tiny("llama", tmp_path / "original")
    change_weights(original, layers_1_mlp_down=0)
    record = lock_model(str(original), tmp_path / "out", quick(**settings)).record
    assert record["layers"][1]["nmse"] == 0 < record["layers"][0]["nmse"]
    locked, _ = load_model(tmp_path / "out")
    assert not any(block.down_proj.weight.any() for block in locked.model.layers[1].mlp.blocks)
    assert all(block.down_proj.weight.any() for block in locked.model.layers[0].mlp.blocks)
    assert all(weight.isfinite().all() for weight in locked.parameters())


def test_the_chain_of_a_layer_with_constant_output_is_constant(tmp_path):
    original = save_tiny("phi", tmp_path / "original")
    change_weights(original, layers_1_mlp_fc2_weight=0)
    record = lock_model(str(original), tmp_path / "out", quick(end_to_end_tokens=0)).record
    assert record["layers"][1]["nmse"] < 1e-3


@pytest.mark.parametrize(
    ("name", "factor", "dtype", "says"),
    [
        ("layers_1_self_attn_q_proj", math.nan, "auto", r"model\.layers\.1\.self_attn\.q_proj\.weight .*not finite"),
        ("layers_0_mlp_up_proj", math.inf, "auto", r"model\.layers\.0\.mlp\.up_proj\.weight .*not finite"),
        ("embed_tokens", math.nan, "auto", r"model\.embed_tokens\.weight .*not finite"),
        ("lm_head", 1e6, "float16", r"lm_head\.weight .*too large for float16: change --dtype"),
        ("layers_0_mlp_up", 1e12, "auto", r"layers\.0\.mlp\.up_proj\.weight .* up to .*e\+1.*too large to distil"),
    ],
)
def test_a_weight_that_is_not_finite_or_too_large_is_refused_before_any_work(tmp_path, name, factor, dtype, says):
    original = save_tiny("llama", tmp_path / "original")
    change_weights(original, **{name: factor})
    with pytest.raises(UsageError, match=says):
        lock_model(str(original), tmp_path / "out", quick(data=str(tmp_path / "no text yet"), dtype=dtype))


def test_a_text_of_no_finite_perplexity_is_refused(tmp_path):
    original = save_tiny("llama", tmp_path / "original")
    change_weights(original, model_norm=1e4, lm_head=1e4)
    with pytest.raises(UsageError, match=r"not finite on .* tokens of stdlib.*: change MODEL or --data"):
        lock_model(str(original), tmp_path / "out", quick())


def test_logits_that_are_not_finite_are_not_sampled_from():
    for value in (math.nan, math.inf):
        with pytest.raises(UsageError, match="logits that are not finite"):
            draw(torch.full((2, 600), value), [3], torch.Generator())


def test_chains_of_no_finite_perplexity_end_the_lock_in_one_line(tmp_path):
    original = save_tiny("llama", tmp_path / "original")
    change_weights(original, model_norm=1e2, lm_head=1e4)
    with pytest.raises(DistillationError, match="perplexity after phase 1 is inf: raise --tokens"):
        lock_model(str(original), tmp_path / "out", quick(data="self", tokens=512))


def test_mlp_outputs_whose_squares_overflow_are_refused_before_distillation(tmp_path):
    original = save_tiny("llama", tmp_path / "original")
    change_weights(original, layers_0_post_attention_layernorm=1e4, layers_0_mlp=1e4)
    with pytest.raises(UsageError, match=r"MLP of layer 0 .* computes values up to .*squares are too large"):
        lock_model(str(original), tmp_path / "out", quick())


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


# --- the command


def lock_arguments(original, out):
    options = command_line(QUICK)
    return ["lock", original, out, *options]


def test_the_command_writes_the_folder(cli, originals, tmp_path):
    done = cli(*lock_arguments(originals("qwen3"), tmp_path / "out"))
    assert done.code == 0, done.err
    assert "over original" in done.out and "layer 1" in done.err
    record = json.loads((tmp_path / "out" / LOCK_RECORD).read_text())
    assert record["recipe"]["depth"] == QUICK["depth"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{record['fidelity']['perplexity_ratio']:.4f}" in card
    again = cli(*lock_arguments(originals("qwen3"), tmp_path / "out"))
    assert again.code == 2 and "--overwrite" in again.err
    assert cli(*lock_arguments(originals("qwen3"), tmp_path / "out"), "--overwrite").code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_removes_what_lockkit_did_not_write(cli, originals, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    done = cli(*lock_arguments(originals("qwen3"), tmp_path), "--overwrite")
    assert done.code == 2 and "not written by lockkit" in done.err
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--depth", "49"], "--depth 49 is larger than the MLP's width 48"),
        (["--depth", "1"], "--depth"),
        (["--init", "magic"], "--init"),
        (["--data", "/no/such/file.txt"], "there is no file or folder /no/such/file.txt: change --data"),
        (["--data", "no-such-dataset"], "--data no-such-dataset is no local file or folder"),
        (["--device", "meta"], "--device meta is not available"),
        (["--learning-rate", "inf"], "--learning-rate"),
        (["--device", "cuda:99"], "--device cuda:99 is not available"),
        (["--config", "./no-such-recipe.yaml"], "--config"),
        (["--tokens", "100000000"], "lower --tokens"),
        (["--data", ""], "there is no file or folder : change --data"),
        (["--seed", "99999999999999999999"], "--seed"),
    ],
)
def test_bad_options_end_with_one_line_and_code_2(cli, originals, tmp_path, options, message):
    done = cli(*lock_arguments(originals("qwen3"), tmp_path / "out"), *options)
    assert done.code == 2
    assert message in done.err and len(done.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_output_is_refused_before_any_work(cli, originals, tmp_path):
    (tmp_path / "file").write_text("")
    done = cli(*lock_arguments(originals("qwen3"), tmp_path / "file" / "out"))
    assert done.code == 2 and "change OUT" in done.err and "layer" not in done.err


@pytest.mark.parametrize(
    ("content", "message"), [("", "holds no text"), ("a few words", "too short: distill has 6 tokens")]
)
def test_empty_and_tiny_text_is_refused(cli, originals, tmp_path, content, message):
    (tmp_path / "a.txt").write_text(content)
    done = cli(*lock_arguments(originals("qwen3"), tmp_path / "out"), "--data", tmp_path / "a.txt")
    assert done.code == 2 and message in done.err and "--data" in done.err
    assert not (tmp_path / "out").exists()


PROGRAM = "import resource, signal, sys\n{setup}\nfrom lockkit.cli.app import main\nsys.argv[0] = 'lockkit'\nmain()"


def test_a_full_disk_keeps_finished_layers_only(originals, tmp_path):
    # A limit on file size fails a write just as a full disk does.
    setup = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (300_000,) * 2)"
    arguments = [str(a) for a in lock_arguments(originals("qwen3"), tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(setup=setup), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "disk is full" in done.stderr and "Traceback" not in done.stderr
    assert "finished layers are kept in" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.lockkit-work"]
    again = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(setup=""), *arguments], capture_output=True, text=True, check=False
    )
    assert again.returncode == 0 and "layer 0" not in again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_leaves_no_files(originals, tmp_path):
    arguments = [str(a) for a in lock_arguments(originals("qwen3"), tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", PROGRAM.format(setup=""), *arguments, "--tokens", "90000"],
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = ""
    while "layer 0" not in seen and process.poll() is None:
        seen += process.stderr.read(1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert rest.endswith("interrupted: nothing half-written is left\n") and "Traceback" not in rest  # nothing to resume
    assert list(tmp_path.iterdir()) == []


def test_the_original_is_hashed_once(originals, tmp_path):
    """Hashing opens the file in Python, loading does not."""
    weights = str(originals("qwen3") / "model.safetensors")
    opened = []

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]) == weights:
            opened.append(arguments)

    sys.addaudithook(watch)  # it stays, and notes opens of this one file
    lock_model(str(originals("qwen3")), tmp_path / "locked", quick(depth=4, tokens=1_024, end_to_end_tokens=0))
    assert len(opened) == 1
