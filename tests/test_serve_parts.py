"""The parts of the server: text, rows, the engine, and the check of the export."""

from __future__ import annotations

import asyncio
import json
import random
import shutil

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import save_tiny
from tokenizers import Tokenizer

from lockkit.errors import UsageError
from lockkit.export.manifest import read_manifest, write_manifest
from lockkit.export.run import export_model
from lockkit.export.session import ExportSession
from lockkit.files import EXPORT_MANIFEST
from lockkit.generate import next_token
from lockkit.models.load import DEMO
from lockkit.serve.batch import SeparateRows, SharedRows, open_rows
from lockkit.serve.engine import Engine, Job, QueueFullError
from lockkit.serve.model import open_served_model
from lockkit.serve.prometheus import Metrics
from lockkit.text_stream import TextStream

TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def exports(originals, tmp_path_factory):
    """A function from a model type to the folder of a tiny export."""
    made = {}

    def export(model_type):
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp("export") / model_type
            export_model(str(originals(model_type)), made[model_type])
        return made[model_type]

    return export


@pytest.fixture
def copied(exports, tmp_path):
    """A copy of an export, for one test to change."""
    return shutil.copytree(exports("qwen3"), tmp_path / "export")


# Text


def streamed(ids: list[int], stops: list[str]) -> tuple[str, bool]:
    stream, text = TextStream(TOKENIZER.decode, [5, 6], stops), ""
    for token in ids:
        text += stream.push(token)
        if stream.stopped:
            return text, True
    return text + stream.flush(), False


def test_pieces_are_whole_characters():
    stream = TextStream(TOKENIZER.decode, TOKENIZER.encode("x").ids)
    pieces = [stream.push(token) for token in TOKENIZER.encode("aß☃b").ids]
    assert "".join(pieces) == "aß☃b" and pieces.count("") >= 3
    half = TextStream(TOKENIZER.decode, [5])
    assert half.push(TOKENIZER.encode("☃").ids[0]) + half.flush() == ""


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab☃ \n", max_size=30), stops=st.lists(st.text("ab☃ ", min_size=1, max_size=4), max_size=4))
def test_text_ends_before_the_first_stop_string(text, stops):
    found, stopped = streamed(TOKENIZER.encode(text).ids, stops)
    assert text.startswith(found) and not any(stop in found for stop in stops)
    assert stopped == any(stop in text for stop in stops)
    if stopped:
        assert any(text[len(found) :].startswith(stop) for stop in stops)
    else:
        assert found == text


def test_top_p_draws_from_the_nucleus_only():
    logits = torch.tensor([0.1, 0.5, 0.05, 0.35]).log()
    drawn = [next_token(logits, 1.0, torch.Generator().manual_seed(seed), 0.6) for seed in range(2000)]
    shares = np.bincount(drawn, minlength=4) / 2000
    np.testing.assert_allclose(shares, [0, 0.5 / 0.85, 0, 0.35 / 0.85], atol=0.04)


# Rows


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "llama"])
def test_rows_get_the_logits_that_each_text_gets_alone(exports, model_type):
    """Prompts in parts, decoding steps and rows that end, in random order, compared with one text at a time."""
    alone, chance = ExportSession(exports(model_type)), random.Random(3)
    rows = open_rows(open_served_model(exports(model_type)), 4, 64, "cpu", 1)
    assert type(rows) is (
        SeparateRows if model_type == "llama" else SharedRows
    )  # the heads of this one are too small for GroupQueryAttention
    texts: list[list[int]] = []
    for _ in range(60):
        if len(texts) < 4 and chance.random() < 0.4:
            text = chance.choices(range(1, 4096), k=chance.randint(1, 40))
            cut = chance.randint(0, len(text) - 1)
            if cut:
                rows.prefill(text[:cut], 0)
            logits = rows.prefill(text[cut:], cut)
            assert_close(logits, alone, text)
            rows.admit(len(texts), len(text))
            texts.append(text)
        if texts and (chance.random() < 0.2 or max(map(len, texts)) == 64):
            row = max(range(len(texts)), key=lambda row: len(texts[row]))
            rows.move(len(texts) - 1, row, len(texts[-1]))
            texts[row] = texts[-1]
            texts.pop()
        if texts:
            for text in texts:
                text.append(chance.randint(1, 4095))
            found = rows.decode([text[-1] for text in texts], [len(text) for text in texts])
            for row, text in enumerate(texts):
                assert_close(found[row], alone, text)


def assert_close(logits: torch.Tensor, alone: ExportSession, text: list[int]) -> None:
    expected = alone.forward(np.array([text]))[0][0, -1]
    np.testing.assert_allclose(logits.numpy(), expected, atol=2e-4, rtol=1e-4)


# The engine


class CountingRows:
    """Rows whose next token is the row's length. A prompt that starts with 9 fails; one with 8 fails the next step."""

    fused = False

    def __init__(self):
        self.fail_next_step = False

    def prefill(self, tokens, past):
        if tokens[0] == 9:
            raise RuntimeError("the prompt fails")
        self.fail_next_step |= tokens[0] == 8
        return torch.nn.functional.one_hot(torch.tensor(past + len(tokens)), 4096)

    def admit(self, row, length): ...

    def move(self, source, target, length): ...

    def decode(self, tokens, lengths):
        if self.fail_next_step:
            self.fail_next_step = False
            raise RuntimeError("the step fails")
        return torch.nn.functional.one_hot(torch.tensor(lengths), 4096)


def run_engine(body, max_batch=2, max_queue=4):
    async def main():
        engine = Engine(CountingRows(), TOKENIZER, frozenset({300}), max_batch, max_queue, Metrics())
        engine.start()
        try:
            return await asyncio.wait_for(body(engine), 20)
        finally:
            engine.stop()

    return asyncio.run(main())


async def ending(job: Job):
    while (piece := await job.pieces.get()).reason is None:
        pass
    return piece.reason


def test_a_failure_ends_only_the_jobs_that_it_affects():
    async def body(engine):
        jobs = [Job([first, 1], max_tokens=5) for first in (1, 9, 2)]
        for job in jobs:
            engine.submit(job)
        assert [await ending(job) for job in jobs] == ["length", "error", "length"]
        failing = Job([8, 1], max_tokens=5)
        engine.submit(failing)
        assert await ending(failing) == "error"
        after = Job([1], max_tokens=5)
        engine.submit(after)
        return await ending(after), engine.alive

    assert run_engine(body) == ("length", True)


def test_the_engine_stops_at_end_of_text_limits_its_queue_and_cancels():
    async def body(engine):
        end = Job([1] * 290, max_tokens=1000)  # token 300 is the end of text
        engine.submit(end)
        assert await ending(end) == "stop" and end.generated == 11
        with pytest.raises(QueueFullError):
            for _ in range(100):
                engine.submit(Job([400], max_tokens=10**9))
        waiting = next(iter(engine._waiting))
        engine.cancel(waiting, "timeout")
        return await ending(waiting)

    assert run_engine(body) == "timeout"


# The export


def refusal(folder) -> str:
    with pytest.raises(UsageError) as caught:
        open_served_model(folder)
    return str(caught.value)


def test_every_file_must_match_the_manifest(copied, exports):
    for name in read_manifest(copied).files:
        path, content = copied / name, (copied / name).read_bytes()
        path.write_bytes(content[:-1])
        assert name in refusal(copied) and "bytes" in refusal(copied)
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        assert name in refusal(copied) and "SHA-256" in refusal(copied)
        path.unlink()
        assert f"{name} is missing" in refusal(copied)
        path.symlink_to(exports("qwen3") / name)
        assert "link out of the folder" in refusal(copied)
        path.unlink()
        path.write_bytes(content)
    assert open_served_model(copied).context == 256


def test_a_file_that_is_read_must_be_in_the_manifest(copied):
    (copied / "README.md").write_text("not read by the server")
    open_served_model(copied)
    for name in ("chat_template.jinja", "added_tokens.json", "generation_config.json"):
        if not (copied / name).exists():
            (copied / name).write_text("{}")
            assert f"{name} is not in the manifest" in refusal(copied)
            (copied / name).unlink()
    manifest = json.loads((copied / EXPORT_MANIFEST).read_text())
    for name in ("model.onnx", "config.json"):
        files = {key: value for key, value in manifest["files"].items() if key != name}
        (copied / EXPORT_MANIFEST).write_text(json.dumps(manifest | {"files": files}))
        assert f"does not list {name}" in refusal(copied)


def test_weights_that_are_not_listed_are_not_read(copied):
    """The manifest matches, but does not list the file with the graph's weights."""
    manifest = read_manifest(copied)
    del manifest.files["model.onnx_data"]
    (copied / EXPORT_MANIFEST).write_text(manifest.model_dump_json(by_alias=True))
    assert "model.onnx reads weights from 'model.onnx_data', which is not in the manifest" in refusal(copied)
    with pytest.raises(UsageError, match=r"model\.onnx_data"):
        ExportSession(copied)


def test_weights_outside_the_folder_are_not_read(copied, tmp_path):
    """The manifest matches, and the graph reads weights from outside the folder."""
    (copied / "model.onnx_data").rename(tmp_path / "elsewhere")
    graph = onnx.load(copied / "model.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere"
    onnx.save(graph, copied / "model.onnx")
    write_manifest(copied, read_manifest(copied))
    assert "reads weights from '../elsewhere', which is not in the manifest" in refusal(copied)


def nested(tensor: onnx.TensorProto) -> onnx.GraphProto:
    """A graph with this tensor as its initialiser."""
    return onnx.helper.make_graph([], "inner", [], [], [tensor])


@pytest.mark.parametrize("place", ["initializer", "attribute", "subgraph", "function", "subgraph of a function"])
def test_external_weights_are_found_anywhere_in_a_graph(copied, place):
    tensor = onnx.TensorProto(name="hidden", data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="evil.bin")
    node = onnx.helper.make_node("If", ["condition"], [], then_branch=nested(tensor))
    constant = onnx.helper.make_node("Constant", [], ["hidden"], value=tensor)
    graph = onnx.load(copied / "model.onnx", load_external_data=False)
    if place == "initializer":
        graph.graph.initializer.append(tensor)
    elif "function" in place:
        body = [node if "subgraph" in place else constant]
        graph.functions.append(onnx.helper.make_function("evil", "Evil", [], [], body, []))
    else:
        graph.graph.node.append(node if place == "subgraph" else constant)
    onnx.save(graph, copied / "model.onnx")
    write_manifest(copied, read_manifest(copied))
    (copied / "evil.bin").write_bytes(b"0" * 64)
    assert "reads weights from 'evil.bin', which is not in the manifest" in refusal(copied)


def test_code_in_an_export_never_runs(originals, tmp_path):
    """A tokenizer that names code in the folder: the code does not run, even if the manifest matches."""
    export_model(str(originals("qwen3")), tmp_path / "export")
    (tmp_path / "export" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: ...\n")
    for name in ("tokenizer_config.json", "config.json"):
        path = tmp_path / "export" / name
        asks = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"], "AutoConfig": "evil.Config"}}
        asks |= {"tokenizer_class": "EvilTokenizer"} if name == "tokenizer_config.json" else {"model_type": "evil"}
        path.write_text(json.dumps(json.loads(path.read_text()) | asks))
    write_manifest(tmp_path / "export", read_manifest(tmp_path / "export"))
    try:
        open_served_model(tmp_path / "export")
    except UsageError as error:
        assert "tokenizer" in str(error)
    assert not (tmp_path / "ran").exists()


def test_a_model_without_a_tokenizer_file_is_refused(tmp_path):
    folder = save_tiny("qwen3", tmp_path / "model")
    export_model(str(folder), tmp_path / "export")
    (tmp_path / "export" / "tokenizer.json").unlink()
    write_manifest(tmp_path / "export", read_manifest(tmp_path / "export"))
    assert "has no tokenizer" in refusal(tmp_path / "export")
