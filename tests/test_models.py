"""Families, loading, and the locked checkpoint as an ordinary Hugging Face folder."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import QUICK
from tiny import VOCAB, save_tiny, tiny_config

from lockkit.errors import UnsupportedModelError, UsageError
from lockkit.files import LOCK_RECORD
from lockkit.lock.config import LockConfig
from lockkit.lock.plan import plan_model
from lockkit.lock.run import lock_model
from lockkit.models.activation_cache import ActivationCache
from lockkit.models.capture import LayerwiseCapture
from lockkit.models.families import FAMILIES, decoder_layers, family_of, mlp_weights, require_unlocked
from lockkit.models.layered import StreamedModel
from lockkit.models.load import DEMO, load_config, load_model, load_tokenizer, resolve_model
from lockkit.models.locked import base_config
from lockkit.workers import Workers

EVERY_FAMILY = pytest.mark.parametrize("model_type", FAMILIES)


def remote_model(folder, **options):
    """Load with transformers alone, using the code in the folder."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.mark.parametrize("kept_in", ["memory", "files"])
@EVERY_FAMILY
def test_one_layer_at_a_time_gives_the_mlp_inputs_and_logits_of_the_whole_model(
    model_type, kept_in, originals, tmp_path, monkeypatch
):
    model, family = load_model(originals(model_type), torch.float32)
    rows = torch.randint(0, VOCAB, (7, 24), generator=torch.Generator().manual_seed(1))
    expected = [[] for _ in decoder_layers(model)]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _m, args, into=into: into.append(args[0]))
        for layer, into in zip(decoder_layers(model), expected, strict=True)
    ]
    with torch.no_grad():
        logits = model(rows).logits
    for hook in hooks:
        hook.remove()
    stream = StreamedModel(originals(model_type), load_config(originals(model_type)), family, "cpu")
    monkeypatch.setattr("lockkit.models.capture.TOKENS_IN_A_BATCH", 96)  # batches of 4 and 3 rows
    budget = {"memory": 10**9, "files": 0}[kept_in]
    capture = LayerwiseCapture(stream, rows, ActivationCache(tmp_path, budget), "train", Workers())
    for index, [inputs] in enumerate(expected):
        found = torch.empty(inputs.shape)
        with stream.layer(index) as layer:
            capture.advance(index, layer, found)
        torch.testing.assert_close(found, inputs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stream.head(capture.hidden), logits, rtol=1e-4, atol=1e-4)
    assert all(parameter.is_meta for parameter in stream.layers.parameters())


@EVERY_FAMILY
def test_a_locked_folder_loads_without_lockkits_classes_and_gives_the_same_logits(model_type, locks):
    ours, _ = load_model(locks(model_type))
    theirs = remote_model(locks(model_type))
    assert "lockkit" not in type(theirs).__module__.split(".")[0]
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits)


@EVERY_FAMILY
def test_a_locked_model_has_the_originals_parameter_count_and_none_of_its_mlp_rows(model_type, locks, originals):
    original, family = load_model(originals(model_type))
    locked, _ = load_model(locks(model_type))
    assert sum(p.numel() for p in locked.parameters()) == sum(p.numel() for p in original.parameters())
    for before, after in zip(decoder_layers(original), decoder_layers(locked), strict=True):
        weights = mlp_weights(before.mlp, family)
        teacher_rows = {
            row.numpy().tobytes() for m in (weights.up, weights.gate) if m is not None for row in m.detach()
        }
        teacher_rows |= {column.contiguous().numpy().tobytes() for column in weights.down.detach().T}
        for block in after.mlp.blocks:
            rows = [*block.up_proj.weight, *block.down_proj.weight.T, *(block.gate_proj.weight if family.gated else [])]
            assert not teacher_rows & {row.detach().contiguous().numpy().tobytes() for row in rows}


@EVERY_FAMILY
def test_all_weights_except_the_mlps_are_the_originals(model_type, locks, originals):
    original = load_model(originals(model_type))[0].state_dict()
    locked = load_model(locks(model_type))[0].state_dict()
    kept = [name for name in original if ".mlp." not in name]
    assert kept and all(torch.equal(original[name], locked[name]) for name in kept)
    assert {n for n in locked if ".mlp." not in n} == set(kept)


@EVERY_FAMILY
def test_a_locked_model_generates_the_same_with_and_without_cache(model_type, locks):
    model = remote_model(locks(model_type))
    prompt = torch.randint(1, VOCAB, (1, 20), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    with_cache = model.generate(prompt, use_cache=True, **options)
    without = model.generate(prompt, use_cache=False, **options)
    assert with_cache.shape[1] > prompt.shape[1]
    assert torch.equal(with_cache, without)


@EVERY_FAMILY
def test_the_originals_config_is_recovered(model_type, locks):
    locked = load_config(locks(model_type))
    recovered = base_config(locked, family_of(locked)).to_dict()
    original = tiny_config(model_type).to_dict()
    ignored = {"architectures", "transformers_version", "dtype", "_name_or_path"}
    assert {k: v for k, v in recovered.items() if k not in ignored} == {
        k: v for k, v in original.items() if k not in ignored
    }


ROPE_VARIANTS = {
    "default": {"rope_theta": 500.0},
    "llama3": {
        "rope_theta": 500.0,
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_theta": 500.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("rope", ROPE_VARIANTS)
def test_rope_settings_are_kept_and_written_under_the_names_of_older_versions(rope, tmp_path):
    save_tiny("llama", tmp_path / "original", rope_parameters=ROPE_VARIANTS[rope])
    lock_model(str(tmp_path / "original"), tmp_path / "locked", LockConfig(**QUICK))
    original = load_config(tmp_path / "original").rope_parameters
    locked = load_config(tmp_path / "locked").rope_parameters
    assert {key: locked[key] for key in original} == original
    raw = json.loads((tmp_path / "locked" / "config.json").read_text())
    assert raw["rope_theta"] == 500.0 and raw.get("rope_scaling", {"type": "default"})["type"] == rope


def test_transformers_alone_saves_and_loads_a_locked_model(locks, tmp_path):
    model = remote_model(locks("qwen3"))
    model.save_pretrained(tmp_path / "again")
    again = remote_model(tmp_path / "again")
    ids = torch.arange(1, 20).unsqueeze(0)
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_a_locked_model_can_be_converted_to_another_dtype(locks):
    half = remote_model(locks("llama"), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(torch.arange(1, 9).unsqueeze(0)).logits.dtype == torch.bfloat16
    assert {p.dtype for p in half.to(torch.float64).parameters()} == {torch.float64}


@pytest.mark.gpu
def test_a_locked_model_gives_the_same_logits_on_a_gpu(locks):
    model = remote_model(locks("llama"), dtype=torch.float32)
    ids = torch.arange(1, 9).unsqueeze(0)
    here = model(ids).logits
    torch.testing.assert_close(model.cuda()(ids.cuda()).logits.cpu(), here, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", ["qwen3", "phi"])
def test_adapters_train_on_a_locked_model(model_type, locks):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(remote_model(locks(model_type)), peft.LoraConfig(r=2, target_modules="all-linear"))
    adapted = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any(".mlp.blocks." in name for name in adapted)
    ids = torch.arange(1, 30).unsqueeze(0)
    before = model(ids, labels=ids).loss
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert model(ids, labels=ids).loss < before


def test_a_locked_folder_works_in_a_process_without_lockkit(locks):
    code = (
        "import sys; sys.modules['lockkit'] = None\n"
        "from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer\n"
        "folder = sys.argv[1]\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)('def f(', return_tensors='pt')\n"
        "print(model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] - ids.input_ids.shape[1])\n"
        "headless, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)\n"
        "print(type(headless).__name__, sorted(info['missing_keys']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, locks("qwen3")],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["3", "DLRLockModel []"]  # and no question about code


@EVERY_FAMILY
def test_the_model_without_its_head_gives_the_hidden_states_of_the_whole_one(model_type, locks):
    whole = remote_model(locks(model_type))
    headless = transformers.AutoModel.from_pretrained(locks(model_type), trust_remote_code=True).eval()
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = whole(ids, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(headless(ids).last_hidden_state, expected)


@pytest.mark.parametrize(("model_type", "named"), [("phi3", "GemmaTokenizer"), ("qwen2", None)])
def test_the_tokenizer_has_the_originals_class_without_code(model_type, named, originals, tmp_path):
    folder = shutil.copytree(originals(model_type), tmp_path / "original")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": named}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    quick = QUICK | {"tokens": 512, "end_to_end_tokens": 0, "validation_tokens": 64}
    lock_model(str(folder), tmp_path / "locked", LockConfig(**quick))
    original = transformers.AutoTokenizer.from_pretrained(folder)
    locked = transformers.AutoTokenizer.from_pretrained(tmp_path / "locked", trust_remote_code=False)
    assert type(locked) is type(original)
    text = "def  f(x):\n\treturn é"
    assert locked(text).input_ids == original(text).input_ids


def test_the_record_has_recipe_data_and_layers_but_no_path(locks, originals):
    text = (locks("llama") / LOCK_RECORD).read_text()
    record = json.loads(text)
    assert record["schema"] == "lockkit-lock/2"
    assert record["recipe"]["depth"] == 5 and record["recipe"]["seed"] == 0
    assert len(record["layers"]) == 2 and all(layer["nmse"] >= 0 for layer in record["layers"])
    assert len(record["data"]["train_sha256"]) == 64
    assert {"lockkit", "torch", "transformers"} <= set(record["versions"])
    assert str(originals("llama").parent) not in text


def test_the_tokenizer_is_copied_byte_for_byte(locks):
    assert (locks("qwen3") / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()


# --- models that cannot be locked or loaded


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.MixtralConfig(), "mixture of experts"),
        (transformers.Qwen3MoeConfig(), "mixture of experts"),
        (transformers.BertConfig(architectures=["BertModel"]), "an encoder"),
        (transformers.T5Config(), "encoder-decoder"),
        (transformers.GPT2Config(architectures=["GPT2LMHeadModel"]), "not supported yet"),
        (tiny_config("llama", quantization_config={"quant_method": "gptq", "bits": 4}), "quantised"),
    ],
)
def test_an_unsupported_model_is_refused_with_its_kind(config, message):
    with pytest.raises(UnsupportedModelError, match=message):
        family_of(config)


def test_a_locked_model_is_not_locked_again(locks):
    with pytest.raises(UnsupportedModelError, match="my-lock is locked already: give MODEL"):
        require_unlocked(load_config(locks("llama")), "my-lock")


@pytest.fixture
def broken(originals, tmp_path):
    """A copy of a tiny original, for tests that damage it."""
    return shutil.copytree(originals("llama"), tmp_path / "broken")


def test_truncated_weights_are_refused(broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UsageError, match="not a complete safetensors file"):
        load_model(broken)


def test_missing_weights_are_refused(broken):
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UsageError, match="pickled weights are never loaded"):
        load_model(broken)


def test_incomplete_weights_are_refused(broken):
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lack 1 tensor \(model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(broken)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model_type": "llama", "hidden_size": "many"}'])
def test_broken_config_is_refused(broken, text):
    (broken / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json (is not|cannot be used)"):
        load_config(broken)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "Git LFS pointer, .* `git lfs pull`"),
        ("\ufeff\n<!DOCTYPE html><html>Sign in</html>", "web page, .* download it again"),
        ("<html lang='en'>", "web page"),
    ],
)
def test_what_a_download_left_in_place_of_a_file_is_named(broken, name, content, words):
    (broken / name).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=f"{name} is a {words}.*, or change MODEL"):
        load_model(broken)
        load_tokenizer(broken)


def test_missing_and_broken_tokenizers_are_refused(broken):
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_tokenizer(broken)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="has no tokenizer"):
        load_tokenizer(broken)


def test_a_sentencepiece_tokenizer_is_read_or_the_missing_package_named(broken, monkeypatch):
    import sentencepiece

    trained = io.BytesIO()
    sentences = (f"sentence number {number} of a text" for number in range(500))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=trained,
        vocab_size=300,
        minloglevel=2,
        model_type="bpe",
        byte_fallback=True,
    )
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer.model").write_bytes(trained.getvalue())
    (broken / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = load_tokenizer(broken)
    assert tokenizer.decode(tokenizer("number 7 ü")["input_ids"], skip_special_tokens=True) == "number 7 ü"
    (broken / "tokenizer.model").write_bytes(b"{}")
    with pytest.raises(UsageError, match=r"tokenizer\.model is not a SentencePiece model: add tokenizer\.json"):
        load_tokenizer(broken)
    monkeypatch.setattr("transformers.utils.is_sentencepiece_available", lambda: False)
    with pytest.raises(UsageError, match=r"pip install 'lockkit\[sentencepiece\]', add tokenizer\.json, or change"):
        load_tokenizer(broken)


@pytest.mark.parametrize("model", ["./nowhere", "/no/where", "no-such-model", "some one/with spaces"])
def test_a_missing_model_is_refused_in_one_line(model):
    with pytest.raises(UsageError, match="there is no folder") as error:
        resolve_model(model)
    assert "\n" not in str(error.value) and "change MODEL" in str(error.value)


def test_code_of_a_folder_never_runs(broken, tmp_path):
    marker = tmp_path / "it-ran"
    config = json.loads((broken / "config.json").read_text())
    config["model_type"] = "unheard_of"
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()")
    for use in (lambda: load_config(broken), lambda: load_model(broken), lambda: plan_model(str(broken))):
        with pytest.raises(UsageError, match="does not run a model's own code: change MODEL") as error:
            use()
        assert "\n" not in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("dlr", [None, [1], {"depth": 4}, {"depth": 5, "gains": [0.1], "activation": "silu"}])
def test_a_damaged_description_of_the_chains_is_refused_in_one_line(dlr, locks, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(locks("qwen3"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({key: v for key, v in config.items() if key != "dlr"} | {"dlr": dlr})
    )
    with pytest.raises(UsageError, match="dlr ") as refused:
        load_model(folder)
    assert len(str(refused.value).splitlines()) == 1
