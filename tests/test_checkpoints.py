"""Which weights are read from a folder: exactly those that transformers reads, or the folder is refused."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from lockkit.errors import UsageError
from lockkit.lock.plan import plan_model
from lockkit.models.checkpoint import stored_dtype
from lockkit.models.families import family_of
from lockkit.models.identity import weight_hashes, weights_sha256
from lockkit.models.layered import StreamedModel
from lockkit.models.load import load_config, load_model, resolve_model

INDEX = "model.safetensors.index.json"
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
SMALL = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32, "num_attention_heads": 2}


@functools.cache
def small_weights(model_type: str, seed: int) -> dict[str, torch.Tensor]:
    """The weights of a small model with a head of its own."""
    model = tiny_model(model_type, seed, **SMALL, tie_word_embeddings=False)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# --- a folder layout, and what transformers reads from it ------------------------------------------


@dataclass(frozen=True)
class Layout:
    """A model folder. See `LAYOUTS` for the values.

    Attributes:
        single, shards: the seed of the weights in `model.safetensors` and in the shards; None for no such files.
        index: what is special about the index of the shards; None for no index.
        lacks: whether `model.safetensors` lacks a tensor.
        extra_file: a file that no rule names, with other weights.
        extra_tensor: a tensor that the model does not have.
        head: the head in the files.
        tied, dtype: of config.json.
        stored: dtype of the tensors; "mixed" has embeddings of another one.
        prefix: whether the names of tensors begin with `model.`.
        links: the files are links to files in another folder.
    """

    model_type: str = "llama"
    single: int | None = 0
    shards: int | None = None
    index: str | None = None
    lacks: bool = False
    extra_file: str | None = None
    extra_tensor: str | None = None
    head: str = "own"
    tied: bool = False
    dtype: str | None = "float32"
    stored: str = "float32"
    prefix: bool = True
    links: bool = False

    @property
    def ambiguous(self) -> bool:
        """Whether transformers may load it although a tensor is there twice, or whole layers are dropped."""
        shards_are_read = self.single is None and self.shards is not None and self.index
        return (
            self.extra_tensor in AMBIGUOUS_TENSORS
            or (shards_are_read and self.index == "a tensor in both")
        )  # fmt: skip

    def weights(self, seed: int) -> dict[str, torch.Tensor]:
        """The tensors of one of the two models, by their names in the files."""
        found = dict(small_weights(self.model_type, seed))
        if self.head == "absent":
            del found[HEAD]
        elif self.head == "equal":
            found[HEAD] = found[EMBEDDINGS].clone()
        elif self.head == "alone":
            del found[EMBEDDINGS]
        dtype = torch.bfloat16 if self.stored == "bfloat16" else torch.float32
        found = {name: value.to(dtype) for name, value in found.items()}
        if self.stored == "mixed" and EMBEDDINGS in found:
            found[EMBEDDINGS] = found[EMBEDDINGS].to(torch.float16)
        found |= {self.extra_tensor: torch.ones(3)} if self.extra_tensor else {}
        return found if self.prefix else {name.removeprefix("model."): value for name, value in found.items()}

    def two_shards(self) -> list[dict[str, torch.Tensor]]:
        """The tensors of both shards."""
        weights = self.weights(self.shards or 0)
        names = list(weights)
        first, second = ({name: weights[name] for name in names[part::2]} for part in (0, 1))
        if self.index == "a tensor in both":
            second[names[0]] = weights[names[0]] + 1
        if self.index == "a tensor in neither":
            del second[names[3]]
        return [first, second]

    def write(self, folder: Path) -> Path:
        """Write the folder."""
        config = tiny_model(self.model_type, **SMALL, tie_word_embeddings=self.tied).config.to_dict()
        config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
        (folder / "config.json").write_text(json.dumps(config | ({"dtype": self.dtype} if self.dtype else {})))
        below = "parts/" if self.index == "shards in a folder" else ""
        shards = dict(
            zip([f"{below}model-0000{n}-of-00002.safetensors" for n in (1, 2)], self.two_shards(), strict=True)
        )
        files = {} if self.shards is None else dict(shards)
        if self.single is not None:
            files["model.safetensors"] = self.weights(self.single)
            if self.lacks:
                del files["model.safetensors"]["norm.weight" if not self.prefix else "model.norm.weight"]
        if self.extra_file:
            files[self.extra_file] = self.weights(1)
        for name, tensors in files.items():
            target = folder / ("blobs" if self.links else ".") / name
            for path in (target, folder / name):
                path.parent.mkdir(exist_ok=True, parents=True)
            save_file({key: value.contiguous() for key, value in tensors.items()}, target, {"format": "pt"})
            if self.links:
                (folder / name).symlink_to(target)
        if self.index:
            names = {tensor: name for name, tensors in shards.items() for tensor in tensors}
            if self.index == "names a tensor in the other file":
                names[next(iter(names))] = list(shards)[1]
            metadata = {} if self.index == "no metadata" else {"metadata": {"total_size": 1}}
            (folder / INDEX).write_text(json.dumps({"weight_map": names} | metadata))
        return folder


INDEXES = ["shards in a folder", "names a tensor in the other file", "a tensor in both", "a tensor in neither"]
EXTRA_FILES = ["old-model.safetensors", "model.fp16.safetensors", "z.safetensors", "Model.safetensors"]
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
IGNORED_TENSORS = [INV_FREQ, "score.weight", "model.layers.0.mlp.up_proj.lora_A.weight"]
AMBIGUOUS_TENSORS = ["embed_tokens.weight", "model.layers.7.extra"]
LAYOUTS = st.builds(
    Layout,
    model_type=st.sampled_from(["llama", "gemma3_text"]),
    single=st.sampled_from([None, 0]),
    shards=st.sampled_from([None, 0, 2, 2]),
    index=st.sampled_from([None, *["plain"] * 6, *INDEXES, "no metadata"]),
    lacks=st.sampled_from([*[False] * 9, True]),
    extra_file=st.sampled_from([None, None, *EXTRA_FILES]),
    extra_tensor=st.sampled_from([*[None] * 6, *IGNORED_TENSORS * 2, *AMBIGUOUS_TENSORS]),
    head=st.sampled_from(["own", "own", "own", "equal", "equal", "absent", "alone"]),
    tied=st.booleans(),
    dtype=st.sampled_from([None, None, "float32", "bfloat16", "float16"]),
    stored=st.sampled_from(["float32", "bfloat16", "mixed"]),
    prefix=st.booleans(),
    links=st.booleans(),
)


def read_by_transformers(folder: Path, dtype: torch.dtype | str) -> dict[str, torch.Tensor] | None:
    """The tensors that transformers alone loads; None if it does not load all of them."""
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception:
        return None
    return None if info["missing_keys"] else model.state_dict()


def read_in_layers(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors that `StreamedModel` reads."""
    config = load_config(folder)
    stream = StreamedModel(folder, config, family_of(config), "cpu", dtype)
    for index in range(len(stream)):
        stream.read_layer(index)
    return stream.model.state_dict()


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layout=LAYOUTS)
@example(Layout(extra_file="old-model.safetensors"))
@example(Layout(shards=2, index="plain"))
@example(Layout(index="plain"))
@example(Layout(single=None, shards=0, index="plain", extra_file="consolidated.safetensors"))
@example(Layout(tied=True, head="own"))
@example(Layout(tied=True, head="equal"))
@example(Layout(tied=True, head="alone"))
@example(Layout(dtype=None, stored="bfloat16"))
def test_whole_and_layered_loading_read_what_transformers_reads_or_refuse(layout):
    with tempfile.TemporaryDirectory() as made:
        folder = layout.write(Path(made))
        expected = read_by_transformers(folder, "auto")
        if expected is None or layout.ambiguous:
            for use in (
                lambda: load_model(folder),
                lambda: read_in_layers(folder, torch.float32),
            ):
                with pytest.raises(UsageError) as refused:
                    use()
                assert len(str(refused.value).splitlines()) == 1 and "change MODEL" in str(refused.value)
            return
        model, _ = load_model(folder)
        require_equal(model.state_dict(), expected)
        dtype = stored_dtype(folder, load_config(folder))
        require_equal(read_in_layers(folder, dtype), expected)
        same = torch.equal(expected[HEAD], expected[EMBEDDINGS])
        assert model.config.tie_word_embeddings is (layout.tied and same)
        assert weight_hashes(folder).keys() == (
            {"model.safetensors"} if layout.single is not None else set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        )  # fmt: skip


# --- folders that are refused, in one line that names the cause ------------------------------------


@pytest.fixture
def plain(tmp_path) -> Path:
    """A small complete model, for tests that damage it."""
    folder = tmp_path / "model"
    folder.mkdir()
    return Layout().write(folder)


def change_config(folder: Path, **changes) -> None:
    """Change entries of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder: Path, changes: dict[str, torch.Tensor]) -> None:
    """Change or add tensors of `model.safetensors`."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | changes, file, {"format": "pt"})


def index_of(*names: object) -> str:
    """An index that names these files."""
    return json.dumps({"metadata": {}, "weight_map": {f"tensor {n}": name for n, name in enumerate(names)}})


def without_single_file(folder: Path, index: str) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / INDEX).write_text(index)


def renamed(folder: Path, prefix: str) -> None:
    """Put a prefix before the names of all tensors."""
    file = folder / "model.safetensors"
    save_file({prefix + name: value for name, value in load_file(file).items()}, file, {"format": "pt"})


def without_tensors(folder: Path, *names: str) -> None:
    """Remove tensors of `model.safetensors`."""
    file = folder / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name not in names}, file, {"format": "pt"})


def split(folder: Path, index: bool) -> None:
    """Move the second layer into another file, which nothing lists."""
    weights = load_file(folder / "model.safetensors")
    second = {name: value for name, value in weights.items() if ".layers.1." in name}
    first = {name: value for name, value in weights.items() if name not in second}
    name = "part-1.safetensors" if index else "model.safetensors"
    (folder / "model.safetensors").unlink()
    save_file(first, folder / name, {"format": "pt"})
    save_file(second, folder / "part-2.safetensors", {"format": "pt"})
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(first, name)}))


UP = "model.layers.1.mlp.up_proj.weight"
REFUSED = {
    "a Git LFS pointer": lambda f: (f / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    ),
    "a web page": lambda f: (f / "model.safetensors").write_text("\n<!DOCTYPE html><html><body>Sign in</body></html>"),
    "a pickle": lambda f: torch.save({}, f / "model.safetensors"),
    "a GGUF file": lambda f: (f / "model.safetensors").write_bytes(b"GGUF\3\0\0\0" + bytes(64)),
    "not a complete safetensors file": lambda f: (f / "model.safetensors").write_bytes(b""),
    "a link to a file that does not exist": lambda f: (
        (f / "model.safetensors").unlink(),
        (f / "model.safetensors").symlink_to(f / "gone"),
    ),
    "model.ckpt.safetensors is not read under that name": lambda f: (f / "model.safetensors").rename(
        f / "model.ckpt.safetensors"
    ),
    "only safetensors are loaded": lambda f: without_single_file(f, index_of("pytorch_model.bin")),
    "which is not a file in its folder": lambda f: without_single_file(f, index_of("../model/part.safetensors")),
    "names '/": lambda f: without_single_file(f, index_of(str(f / "part.safetensors"))),
    "which does not exist": lambda f: without_single_file(f, index_of("part.safetensors", "other.safetensors")),
    "names '7'": lambda f: without_single_file(f, index_of(7)),
    "must have weight_map and metadata": lambda f: without_single_file(f, '{"metadata": {}, "weight_map": {}}'),
    "is not valid JSON": lambda f: without_single_file(f, "{"),
    "has an adapter": lambda f: (f / "adapter_config.json").write_text("{}"),
    "has a distributed checkpoint": lambda f: shutil.copy(
        f / "model.safetensors", f / "shard-00001-model-00001-of-00001.safetensors"
    ),
    "names its own weight file": lambda f: change_config(f, transformers_weights="part.safetensors"),
    "dtype I8, so the model is quantised": lambda f: change_weights(f, {UP: torch.ones(24, 16, dtype=torch.int8)}),
    "dtype F8_E4M3, so the model": lambda f: change_weights(f, {UP: torch.ones(24, 16).to(torch.float8_e4m3fn)}),
    "dtype U8, so the model": lambda f: change_weights(f, {UP: torch.ones(192, 1, dtype=torch.uint8)}),
    "vocab_size is 40 in config.json, but .* has 32 rows": lambda f: change_config(f, vocab_size=40),
    r"sizes of model.layers.1.mlp.up_proj.weight in .* are \[0, 16\]": lambda f: change_weights(
        f, {UP: torch.ones(0, 16)}
    ),
    "num_hidden_layers is 1 .* weights have 2": lambda f: change_config(f, num_hidden_layers=1),
    "num_hidden_layers is 3 .* weights have 2": lambda f: change_config(f, num_hidden_layers=3),
    r"lack 1 tensor \(model.norm.weight\)": lambda f: without_tensors(f, "model.norm.weight"),
    r"lack 4 tensors \(.*input_layernorm.* and 1 more\)": lambda f: without_tensors(
        f, UP, "model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
    ),
    "lack lm_head.weight: set tie_word_embeddings to true": lambda f: without_tensors(f, "lm_head.weight"),
    "weights have 1 decoder layer: correct": lambda f: without_tensors(
        f, *(name for name in small_weights("llama", 0) if ".layers.1." in name)
    ),
    "part-2.safetensors has 9 tensors .* because .*index.json does not list it: correct": lambda f: split(f, True),
    "part-2.safetensors has 9 tensors .* because .*model.safetensors is there: correct": lambda f: split(f, False),
    "begin with module.: save the model itself": lambda f: renamed(f, "module."),
    "begin with _orig_mod.: save the model before torch.compile": lambda f: renamed(f, "_orig_mod."),
    "begin with base_model.model.: save the merged model": lambda f: renamed(f, "base_model.model."),
}


@pytest.mark.parametrize("message", REFUSED)
def test_weights_that_are_not_the_models_are_refused_by_every_reader(message, plain):
    REFUSED[message](plain)
    for use in (
        lambda: load_model(plain),
        lambda: read_in_layers(plain, torch.float32),
        lambda: plan_model(str(plain), [4]),
    ):
        with pytest.raises(UsageError, match=message) as refused:
            use()
        assert len(str(refused.value).splitlines()) == 1


def test_an_adapter_alone_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="is an adapter, not a model: merge it"):
        resolve_model(str(tmp_path))


def test_what_is_ignored_is_said_once(tmp_path, caplog):
    folder = Layout(shards=2, index="plain", extra_tensor="score.weight").write(tmp_path)
    for _ in range(2):
        load_model(folder)
        read_in_layers(folder, torch.float32)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("lockkit")]
    assert len(lines) == 2
    assert "read from model.safetensors; ignored" in lines[0] and "model-00001-of-00002.safetensors" in lines[0]
    assert INDEX in lines[0] and "score.weight" in lines[1]


def test_files_that_are_not_read_do_not_change_the_hash(plain):
    before = weights_sha256(plain)
    shutil.copy(plain / "model.safetensors", plain / "old-model.safetensors")
    assert weights_sha256(plain) == before
