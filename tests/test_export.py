"""Exports compared with PyTorch: every family, locked and original, prefill and token by token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny import VOCAB, save_tiny, tiny_model

from lockkit.dlr.mlp import chains_for
from lockkit.errors import UsageError
from lockkit.export import ExportConfig, ExportSession, export_model
from lockkit.export.chains import expand_chains
from lockkit.export.manifest import ALL_LOGITS_FILE, read_manifest, write_manifest
from lockkit.export.run import check_graph
from lockkit.models.families import FAMILIES, activation_name, mlp_weights
from lockkit.models.load import DEMO, load_model
from lockkit.models.locked import locked_classes, locked_config
from lockkit.models.save import copy_tokenizer

TOLERANCE = 1e-4  # of the largest logit
# Heads of size 16 with RoPE on all 16 values, because GroupQueryAttention requires them.
SIZES = {
    "mistral": {"hidden_size": 64, "head_dim": 16},
    "nemotron": {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.1},
    "phi": {"hidden_size": 128},
}
GAINS = [2.5, 1.0]


def sizes(model_type: str) -> dict:
    return SIZES.get(model_type, {"hidden_size": 64})


def save_random_lock(model_type: str, folder: Path, gains: list[float] = GAINS, **overrides) -> Path:
    """Save a locked model with random chains. Their weights are so large that an error in one block is visible."""
    family, original = FAMILIES[model_type], tiny_model(model_type, **overrides)
    shape = mlp_weights(original.model.layers[0].mlp, family).shape
    chains = chains_for(shape, 5, activation_name(original.config), gains)  # ranks of 10 and 9
    locked = locked_classes(family)[1](locked_config(original.config, family, chains)).eval()
    locked.load_state_dict(original.state_dict(), strict=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in locked.named_parameters():
            if ".mlp." in name:
                parameter.normal_(std=0.05 if model_type == "nemotron" else 0.12)
    locked.save_pretrained(folder)
    copy_tokenizer(DEMO, folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A function from (model type, locked) to a model folder."""
    made: dict[tuple[str, bool], Path] = {}

    def model(model_type: str, locked: bool) -> Path:
        if (model_type, locked) not in made:
            save = save_random_lock if locked else save_tiny
            folder = tmp_path_factory.mktemp("model") / model_type
            made[model_type, locked] = save(model_type, folder, **sizes(model_type))
        return made[model_type, locked]

    return model


@pytest.fixture(scope="session")
def exports(models, tmp_path_factory):
    """A function from (model type, locked) to the folder of its fp32 export."""
    made: dict[tuple[str, bool], Path] = {}

    def export(model_type: str, locked: bool) -> Path:
        if (model_type, locked) not in made:
            out = tmp_path_factory.mktemp("export") / model_type
            export_model(str(models(model_type, locked)), out)
            made[model_type, locked] = out
        return made[model_type, locked]

    return export


def token_ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCAB, (rows, length))


@torch.no_grad()
def pytorch_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    model, _ = load_model(folder, dtype=torch.float32)
    return model(torch.tensor(ids)).logits.numpy()


def token_by_token(session: ExportSession, ids: np.ndarray, prefill: int) -> np.ndarray:
    logits, cache = session.forward(ids[:, :prefill])
    parts = [logits]
    for column in range(prefill, ids.shape[1]):
        logits, cache = session.forward(ids[:, column : column + 1], cache=cache)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


def assert_same(got: np.ndarray, want: np.ndarray, what: str) -> None:
    difference, scale = np.abs(got - want).max(), np.abs(want).max()
    print(f"{what}: largest difference {difference:.1e}, largest logit {scale:.1f}")
    assert difference <= TOLERANCE * scale
    assert (got.argmax(-1) == want.argmax(-1)).all()


def assert_export_equals_model(model: Path, export: Path, length: int = 40) -> None:
    ids, session = token_ids(2, length), ExportSession(export)
    want = pytorch_logits(model, ids)
    assert_same(session.forward(ids)[0], want, f"{model.name}, prefill")
    assert_same(token_by_token(session, ids, length // 3), want, f"{model.name}, token by token")
    generating = ExportSession(export, last_only=True)
    assert_same(generating.forward(ids)[0], want[:, -1:], f"{model.name}, last position")
    last = token_by_token(generating, ids, length // 3)
    assert_same(last, want[:, length // 3 - 1 :], f"{model.name}, last positions")


@pytest.mark.parametrize("locked", [True, False], ids=["locked", "original"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_equal_those_of_pytorch(model_type, locked, models, exports):
    assert_export_equals_model(models(model_type, locked), exports(model_type, locked))


ROPE = {"rope_theta": 10000.0}
FACTORS = {"short_factor": [1 + i / 10 for i in range(8)], "long_factor": [2 + i / 3 for i in range(8)]}
VARIANTS = {
    "mistral-window": ("mistral", {"sliding_window": 16}),
    "phi3-window": ("phi3", {"sliding_window": 16}),
    "qwen2-window": ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "nemotron-biases": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0}}),
    "olmo2-linear": ("olmo2", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "gemma3-linear": (
        "gemma3_text",
        {
            "rope_parameters": {
                "sliding_attention": ROPE | {"rope_type": "default"},
                "full_attention": ROPE | {"rope_type": "linear", "factor": 8.0},
            }
        },
    ),
    "phi3-longrope-short": (
        "phi3",
        {"rope_parameters": ROPE | FACTORS | {"rope_type": "longrope"}, "original_max_position_embeddings": 64},
    ),
    "phi3-longrope-long": (
        "phi3",
        {"rope_parameters": ROPE | FACTORS | {"rope_type": "longrope"}, "original_max_position_embeddings": 8},
    ),
    "llama-heads-of-8": ("llama", {"hidden_size": 32}),  # too small for GroupQueryAttention: MultiHeadAttention
    "smollm3-heads-of-8": ("smollm3", {"hidden_size": 32}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_families(variant, tmp_path):
    model_type, overrides = VARIANTS[variant]
    save_tiny(model_type, tmp_path / variant, **(sizes(model_type) | overrides))
    export_model(str(tmp_path / variant), tmp_path / "out")
    assert_export_equals_model(tmp_path / variant, tmp_path / "out")


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(model_type, side, models, exports):
    session, lengths, longest = ExportSession(exports(model_type, True)), [20, 7, 13], 20
    ids, mask, texts = np.zeros((3, longest), np.int64), np.zeros((3, longest), np.int64), token_ids(3, longest + 4)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[row, place], mask[row, place] = texts[row, :length], 1
    prompt_logits, cache = session.forward(ids, mask)
    mask = np.concatenate([mask, np.ones((3, 4), np.int64)], axis=1)
    following = np.stack([texts[row, length : length + 4] for row, length in enumerate(lengths)])
    new_logits, _ = session.forward(following, mask, cache)
    for row, length in enumerate(lengths):
        want = pytorch_logits(models(model_type, True), texts[row : row + 1, : length + 4])[0]
        assert_same(prompt_logits[row][mask[row, :longest] == 1], want[:length], f"row of {length}, prompt")
        assert_same(new_logits[row], want[length:], f"row of {length}, new tokens")
        assert not prompt_logits[row][mask[row, :longest] == 0].any()


@pytest.fixture(scope="session")
def older(exports, tmp_path_factory):
    """An export as earlier versions wrote it: one graph, with the logits of all positions."""
    folder = tmp_path_factory.mktemp("older") / "onnx"
    shutil.copytree(exports("qwen3", True), folder)
    (folder / ALL_LOGITS_FILE).rename(folder / "model.onnx")
    write_manifest(folder, read_manifest(folder))
    return folder


@pytest.fixture(scope="session")
def small_heads(tmp_path_factory):
    """A model whose heads are too small for GroupQueryAttention, and its export with MultiHeadAttention."""
    folder = tmp_path_factory.mktemp("small")
    save_tiny("llama", folder / "llama", hidden_size=32)
    export_model(str(folder / "llama"), folder / "onnx")
    return folder / "llama", folder / "onnx"


@pytest.mark.parametrize("graph", ["GroupQueryAttention", "MultiHeadAttention", "older"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_position_of_each_row(graph, side, models, exports, older, small_heads):
    model, folder = models("qwen3", True), older if graph == "older" else exports("qwen3", True)
    if graph == "MultiHeadAttention":
        model, folder = small_heads
    session, lengths, longest = ExportSession(folder, last_only=True), [20, 1, 13], 20
    texts = token_ids(3, longest + 1)
    ids, mask = np.full((3, longest), 7), np.zeros((3, longest), np.int64)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[row, place], mask[row, place] = texts[row, :length], 1
    found, cache = session.forward(ids, mask)
    following = np.stack([texts[row, length : length + 1] for row, length in enumerate(lengths)])
    then, _ = session.forward(following, np.concatenate([mask, np.ones((3, 1), np.int64)], axis=1), cache)
    assert found.shape == then.shape == (3, 1, VOCAB)
    for row, length in enumerate(lengths):
        want = pytorch_logits(model, texts[row : row + 1, : length + 1])[0]
        assert_same(found[row], want[length - 1 : length], f"row of {length}")
        assert_same(then[row], want[length:], f"row of {length}, next token")


def test_an_export_of_an_earlier_version_still_runs(older, models):
    assert_export_equals_model(models("qwen3", True), older)


def test_a_graph_of_last_positions_is_not_taken_for_one_of_all(exports, tmp_path):
    shutil.copytree(exports("qwen3", True), tmp_path / "out")
    (tmp_path / "out" / ALL_LOGITS_FILE).unlink()
    with pytest.raises(UsageError, match="last position only"):
        ExportSession(tmp_path / "out", check=False)
    with pytest.raises(UsageError, match="is missing"):
        ExportSession(tmp_path / "out")


def test_genai_generates_the_same_tokens_for_rows_of_unequal_lengths(models, exports):
    genai = pytest.importorskip("onnxruntime_genai")
    lengths, new_tokens = [24, 9, 1], 8
    texts = token_ids(3, max(lengths), seed=4)
    loaded = genai.Model(str(exports("qwen3", True)))
    pad = json.loads((exports("qwen3", True) / "genai_config.json").read_text())["model"]["pad_token_id"]
    prompts = np.full((3, max(lengths)), pad, np.int32)  # padded on the right, as Tokenizer.encode_batch does
    for row, length in enumerate(lengths):
        prompts[row, :length] = texts[row, :length]
    parameters = genai.GeneratorParams(loaded)
    total = max(lengths) + new_tokens
    parameters.set_search_options(batch_size=3, max_length=total, min_length=total, do_sample=False)
    generator = genai.Generator(loaded, parameters)
    generator.append_tokens(prompts)
    while not generator.is_done():
        generator.generate_next_token()
    model, _ = load_model(models("qwen3", True), dtype=torch.float32)
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    for row, length in enumerate(lengths):
        prompt = torch.tensor(texts[row : row + 1, :length])
        want = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0, length:]
        assert list(generator.get_sequence(row))[max(lengths) :] == want.tolist()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_genai_generates_the_same_tokens(model_type, models, exports):
    genai = pytest.importorskip("onnxruntime_genai")
    prompt, new_tokens = token_ids(1, 24, seed=3), 16
    model, _ = load_model(models(model_type, True), dtype=torch.float32)
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    want = model.generate(torch.tensor(prompt), attention_mask=torch.ones(1, 24, dtype=torch.long), **settings)
    loaded = genai.Model(str(exports(model_type, True)))
    parameters = genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=24 + new_tokens, min_length=24 + new_tokens, do_sample=False)
    generator = genai.Generator(loaded, parameters)
    generator.append_tokens(prompt.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0)) == want[0].tolist()


def test_genai_reads_the_tokenizer(exports):
    genai = pytest.importorskip("onnxruntime_genai")
    from lockkit.models.load import load_tokenizer

    folder = exports("llama", True)
    tokenizer, ours = genai.Tokenizer(genai.Model(str(folder))), load_tokenizer(folder)
    for text in ["Once upon a time, there was", "  spaces\n\nund Ünïcödé 漢字 😀 123"]:
        ids = tokenizer.encode(text)
        assert list(ids) == ours(text)["input_ids"]
        assert tokenizer.decode(ids) == text


def kl_divergence(want: np.ndarray, got: np.ndarray) -> float:
    want, got = torch.tensor(want).log_softmax(-1), torch.tensor(got).log_softmax(-1)
    return torch.nn.functional.kl_div(got, want, log_target=True, reduction="none").sum(-1).mean().item()


@pytest.mark.parametrize(
    ("precision", "block_size", "limit"),
    [("int8", 32, 1e-3), ("int8", 16, 1e-3), ("int4", 32, 0.1), ("fp16", None, 1e-5)],
)
def test_precisions_on_the_demo(precision, block_size, limit, tmp_path):
    blocks = {"block_size": block_size} if block_size else {}
    export_model("demo", tmp_path / "out", ExportConfig(precision=precision, **blocks))
    ids, session = token_ids(2, 40), ExportSession(tmp_path / "out")
    want = pytorch_logits(DEMO, ids)
    for got in (session.forward(ids)[0], token_by_token(session, ids, 20)):
        divergence = kl_divergence(want, got)
        print(f"{precision}, blocks of {block_size}: KL {divergence:.1e}")
        assert divergence < limit


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_chains_are_quantised(precision, bits, provider, models, tmp_path):
    config = ExportConfig(precision=precision, provider=provider)
    result = export_model(str(models("qwen3", True)), tmp_path / "out", config)
    nodes = expand_chains(check_graph(result.folder / "model.onnx"))
    found = {
        node.name: {entry.name: entry.i for entry in node.attribute}["bits"]
        for node in nodes
        if node.op_type == "MatMulNBits"
    }
    assert sum("/mlp/blocks." in name for name in found) == 2 * 5 * 3  # layers * blocks * matrices
    assert set(found.values()) == {bits}
    assert not [node for node in nodes if node.op_type == "MatMul"]
    assert result.manifest.block_size == 32
    # The graph for cuda runs on the CPU as well.
    assert np.isfinite(ExportSession(result.folder).forward(token_ids(1, 8))[0]).all()


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
def test_a_quantised_table_that_is_also_the_head_is_stored_once(precision, bits, tmp_path):
    save_tiny("gemma3_text", tmp_path / "model", hidden_size=64)
    result = export_model(str(tmp_path / "model"), tmp_path / "out", ExportConfig(precision=precision))
    graph = check_graph(result.folder / "model.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    lookup = next(node for node in graph.node if node.op_type == "GatherBlockQuantized")
    head = next(node for node in graph.node if node.op_type == "MatMulNBits" and "lm_head" in node.name)
    places = [
        {entry.key: entry.value for entry in tensors[name].external_data} for name in (lookup.input[0], head.input[1])
    ]
    assert places[0] == places[1] and int(places[0]["length"]) == VOCAB * 64 * bits // 8
    assert lookup.input[2] == head.input[2]  # the scales
    others = tensors.keys() - {lookup.input[0], head.input[1]}
    assert all(np.prod(tensors[name].dims) < VOCAB * 64 for name in others)
    ids = token_ids(2, 20)
    got, want = ExportSession(result.folder).forward(ids)[0], pytorch_logits(tmp_path / "model", ids)
    assert kl_divergence(want, got) < (1e-3 if bits == 8 else 0.1)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_the_graph_is_valid_with_its_functions(precision, models, tmp_path):
    export_model(str(models("qwen3", True)), tmp_path / "out", ExportConfig(precision=precision))
    model = check_graph(tmp_path / "out" / "model.onnx")
    (function,) = model.functions
    calls = [node for node in model.graph.node if node.domain == "lockkit"]
    assert [node.op_type for node in calls] == [function.name] * 2  # one for each layer
    assert not [node for node in model.graph.node if "/mlp/blocks" in node.name]
    # Every value has a type: the builder writes those of onnxruntime's own operators, ONNX infers the others.
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True).graph
    typed = {value.name for value in [*inferred.value_info, *inferred.input, *inferred.output, *inferred.initializer]}
    assert not [name for node in inferred.node for name in node.output if name and name not in typed]
