"""The model card of a locked checkpoint: what it is, how to run it, and what was measured."""

from __future__ import annotations

from typing import Any

from lockkit.measure.records import MeasuredText
from lockkit.models.card import NOT_AUDITED, card_text, copied_metadata, results_part
from lockkit.models.locked import MODELING_FILE
from lockkit.models.origin import Origin

TAGS = ("lockkit", "dlr-lock")


def locked_model_card(record: dict[str, Any], origin: Origin) -> str:
    """The text of README.md for a locked checkpoint, in Markdown.

    Args:
        record: the content of its `lockkit.json` (lockkit/lock/record.py).
        origin: the original.
    """
    source = record["data"]["source"]
    datasets = [source.partition(":")[0]] if "/" in source else []  # a Hub dataset; files have plain names here
    # The Hub has no word for a lock. A fine-tune also keeps the architecture's purpose and changes the weights.
    metadata = copied_metadata(origin, library="transformers", relation="finetune", tags=TAGS, datasets=datasets)
    return card_text(metadata, _body(record, origin))


def _body(record: dict[str, Any], origin: Origin) -> str:
    return f"""# {record["model"]}, locked

{_description(record)}
## How to run it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
# Runs modeling_dlr_lock.py from this folder. AutoModel loads the model without its head.
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # needs no code; False avoids a question
```

## How close it is to the original

{_fidelity(record)}
## How well each layer was distilled

{_layers(record)}
`lockkit.json` has the recipe, the seed, the versions of the software, and the hashes of the data.

{results_part("attack", NOT_AUDITED)}
## What this lock does not protect against

The command that made this checkpoint did not run any attack on it. These weaknesses of such locks are known:

- An attacker can rewrite every chain as an ordinary MLP by placing the weights of its blocks side by side. This needs
  no data.
- The attacker can then correct these MLPs in closed form, with a few hundred tokens of unlabelled text. The weaker the
  coupling between the blocks, the smaller the remaining error.

The rewritten model can be fine-tuned like any other. So do not rely on this lock as the only protection. If the original
weights are public, it protects nothing.

{origin.paragraph(_changes(record))}"""


def _changes(record: dict[str, Any]) -> str:
    """What differs from the original, as licences ask."""
    return f"""Every MLP was replaced by a chain of {record["dlr"]["depth"]} blocks, distilled from it by lockkit
{record["versions"]["lockkit"]}. All other weights are the original's, stored in {record["dtype"]}. `config.json`
describes the chains. `{MODELING_FILE}`, which is part of lockkit (Apache-2.0), `lockkit.json` and this card were
added."""


def _description(record: dict[str, Any]) -> str:
    dlr = record["dlr"]
    rank = str(dlr["rank"]) if dlr["rank"] == dlr["smallest_rank"] else f"{dlr['smallest_rank']} or {dlr['rank']}"
    return f"""This is a locked version of `{record["model"]}` (model type `{record["model_type"]}`). Each MLP of the original is
replaced by a chain of {dlr["depth"]} blocks of rank {rank}: a deep low-rank residual network with the same number of
parameters (DLR-Lock, arXiv 2605.10777).

The locked model is used for inference like the original. Fine-tuning it is meant to be expensive: back-propagation has to
store activations for every block, so its memory grows with the depth of the chains.
"""


def _fidelity(record: dict[str, Any]) -> str:
    fidelity = record["fidelity"]
    text = MeasuredText(**fidelity["text"])
    return f"""| | original | locked | ratio |
|---|---|---|---|
| perplexity | {fidelity["original_perplexity"]:.3f} | {fidelity["perplexity"]:.3f} | **{fidelity["perplexity_ratio"]:.4f}** |

- KL divergence from the original's predictions to the locked model's: {fidelity["kl_divergence"]:.5f} nats per token.
- Both predict the same most likely token at {fidelity["top1_agreement"]:.2%} of the positions.
- Measured on {text}, in rows of {text.block_tokens} tokens. This text was not used to train the lock or
  to choose its final state.
{_other_texts(record["other_texts"])}"""


def _other_texts(figures: list[dict[str, Any]]) -> str:
    """The figures on text of other kinds, as a table; empty without any."""
    if not figures:
        return ""
    rows = "\n".join(
        f"| {fidelity['text']['source']} | {fidelity['perplexity_ratio']:.4f} | {fidelity['kl_divergence']:.5f} "
        f"| {fidelity['top1_agreement']:.2%} |"
        for fidelity in figures
    )
    return f"""
On held-out text of other kinds than the lock was distilled on:

| text | perplexity, locked over original | KL divergence | same most likely token |
|---|---|---|---|
{rows}
"""


def _layers(record: dict[str, Any]) -> str:
    nmse = [layer["nmse"] for layer in record["layers"]]
    rows = "\n".join(f"| {layer['layer']} | {layer['nmse']:.5f} |" for layer in record["layers"])
    return f"""The normalised mean squared error (NMSE) compares the outputs of a chain with those of the MLP that it replaces: 0 is
exact, and 1 is the error of a constant output. It was measured after phase 1 of distillation, which trains each layer by
itself.

| layer | NMSE after phase 1 |
|---|---|
{rows}

Mean NMSE: {sum(nmse) / len(nmse):.5f}.
"""
