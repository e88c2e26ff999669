"""The model card of an export: what it is, how to run it, its figures, and its licence."""

from __future__ import annotations

from lockkit.export.manifest import ALL_LOGITS_FILE, MODEL_FILE, Manifest
from lockkit.models.card import NOT_AUDITED, card_text, copied_metadata, results_part
from lockkit.models.origin import Origin

TAGS = ("lockkit", "onnx", "onnxruntime", "onnxruntime-genai")
NOT_VERIFIED = """## Verification

Not measured: `lockkit verify` compares an export with the PyTorch model, and `lockkit card` writes its figures here."""


def export_card(manifest: Manifest, origin: Origin) -> str:
    """The text of README.md for an export, in Markdown.

    Args:
        manifest: of the export.
        origin: the model that was exported.
    """
    tags = [*TAGS, *(["dlr-lock"] if manifest.locked else [])]
    metadata = copied_metadata(origin, library="onnx", relation="quantized", tags=list(dict.fromkeys(tags)))
    return card_text(metadata, _body(manifest, origin))


def _body(manifest: Manifest, origin: Origin) -> str:
    return f"""# {origin.name}, in ONNX

{_description(manifest, origin)}
## How to run it

With onnxruntime-genai:

```python
import onnxruntime_genai as genai

folder = "path/to/this/folder"
model = genai.Model(folder)
tokenizer = genai.Tokenizer(model)
settings = genai.GeneratorParams(model)
settings.set_search_options(max_length=64, do_sample=False)
generator = genai.Generator(model, settings)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```

With onnxruntime alone, the logits after a text (`present.*` are the cache, which the next call reads as
`past_key_values.*`):

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = "path/to/this/folder"
session = onnxruntime.InferenceSession(f"{{folder}}/{MODEL_FILE}")
ids = np.array([Tokenizer.from_file(f"{{folder}}/tokenizer.json").encode("Once upon a time").ids], np.int64)
feeds = {{"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}}
for node in session.get_inputs():
    if node.name.startswith("past_key_values."):
        kind = np.float16 if node.type == "tensor(float16)" else np.float32
        feeds[node.name] = np.zeros((1, node.shape[1], 0, node.shape[3]), kind)
names = {{node.name for node in session.get_inputs()}}
logits = session.run(["logits"], {{name: value for name, value in feeds.items() if name in names}})[0]  # [1, 1, vocab]
```

With optimum (`pip install optimum-onnx onnxruntime`):

```python
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = ORTModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

In a batch of unequal lengths, the graph needs padding on the right. onnxruntime-genai pads so; `generate` of optimum
does not.

`{MODEL_FILE}` has the logits of the last token of each row, as text generation needs. To score text, load
`{ALL_LOGITS_FILE}` in its place (in optimum, `file_name="{ALL_LOGITS_FILE}"`): it has those of all positions and reads the
same weights.

{results_part("verify", NOT_VERIFIED)}
{results_part("attack", NOT_AUDITED) if manifest.locked else ""}
`lockkit_manifest.json` has the SHA-256 of every file except this card, and the versions of the software.

{origin.paragraph(_changes(manifest))}"""


def _description(manifest: Manifest, origin: Origin) -> str:
    kind = f" Its MLPs are chains of {manifest.depth} blocks (DLR-Lock, arXiv 2605.10777)." if manifest.locked else ""
    blocks = f", {manifest.block_size} weights per scale" if manifest.block_size else ""
    return f"""This is `{origin.name}` (model type `{manifest.model_type}`) as an ONNX graph with its weights, made by lockkit
{manifest.versions["lockkit"]}.{kind}

| | |
|---|---|
| precision of the weights | {manifest.precision}{blocks} |
| made for | {manifest.provider.upper()} |
| files | `{MODEL_FILE}`, `{ALL_LOGITS_FILE}`, `{MODEL_FILE}_data`, `config.json`, `genai_config.json`, the tokenizer |
"""


def _changes(manifest: Manifest) -> str:
    """What differs from the exported model, as licences ask."""
    locked = (
        "Every MLP of the original was replaced by a chain of low-rank blocks, distilled from it. "
        if manifest.locked
        else ""
    )
    quantised = f"The weights were rounded to {manifest.precision}. " if manifest.precision != "fp32" else ""
    return (
        f"{locked}The model was converted to an ONNX graph by lockkit. {quantised}Files for PyTorch were\nleft out, and "
        "those for ONNX runtimes and this card were added."
    )
