"""The model card of a locked checkpoint: what it is, how to run it, what was measured."""

from __future__ import annotations

from lockkit.measure.records import MeasuredText


def locked_model_card(record: dict) -> str:
    """Return the text of README.md for a locked checkpoint, from its `lockkit.json`."""
    dlr, fidelity = record["dlr"], record["fidelity"]
    text = MeasuredText(**fidelity["text"])
    nmse = [layer["nmse"] for layer in record["layers"]]
    rank = str(dlr["rank"]) if dlr["rank"] == dlr["smallest_rank"] else f"{dlr['smallest_rank']}-{dlr['rank']}"
    rows = "\n".join(f"| {layer['layer']} | {layer['nmse']:.5f} |" for layer in record["layers"])
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [lockkit, dlr-lock]
{"base_model: " + record["model"] + chr(10) if "/" in record["model"] else ""}---
# {record["model"]}, locked

This is `{record["model"]}` ({record["model_type"]}) with every MLP replaced by a deep low-rank residual network
of the same parameter count (DLR-Lock, arXiv 2605.10777): {dlr["depth"]} blocks of rank {rank}. It runs like the original;
back-propagation through it needs activation memory that grows with depth.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
# The code that runs is modeling_dlr_lock.py in this folder.
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
```

## Measured on held-out text

| | original | locked | ratio |
|---|---|---|---|
| perplexity | {fidelity["original_perplexity"]:.3f} | {fidelity["perplexity"]:.3f} | **{fidelity["perplexity_ratio"]:.4f}** |

KL divergence to the original {fidelity["kl_divergence"]:.5f} nats per token, same most likely token
{fidelity["top1_agreement"]:.2%} of the time. Text: {text}, in rows of {text.block_tokens}; it
neither trained the lock nor chose its state.

| layer | NMSE after phase 1 |
|---|---|
{rows}

Mean NMSE {sum(nmse) / len(nmse):.5f}. `lockkit.json` has the recipe, versions, seed and hashes of the data.

## What this lock is worth

No attack has been run on this checkpoint by the command that made it. Known of a plain lock of this kind: whoever
wants to fine-tune it can put its weights side by side as ordinary MLPs, without any data, and correct these in closed
form from a few hundred tokens of unlabelled text: the weaker the coupling, the nearer that comes. Do not rely on it alone, and not at all where the original weights are public.
"""
