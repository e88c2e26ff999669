"""Load a locked folder, generate, save and reload it: FOLDER PROMPT NEW_TOKENS SAVE_TO; prints JSON.

A test runs this in another environment.
"""

import importlib.util
import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt, new_tokens, save_to = sys.argv[1:]


def continuation(model, ids):
    """Greedy tokens after `ids`, `[1, seq]`."""
    ones = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=ones, max_new_tokens=int(new_tokens), do_sample=False)
    return out[0, ids.shape[1] :].tolist()


# Eager attention: in some versions the others leave out the soft caps of Gemma 2.
options = {"trust_remote_code": True, "torch_dtype": torch.float32, "attn_implementation": "eager"}
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
ids = tokenizer(prompt, return_tensors="pt").input_ids
with torch.no_grad():
    logits = model(ids).logits[0, -1].tolist()
tokens = continuation(model, ids)
model.save_pretrained(save_to)
again = AutoModelForCausalLM.from_pretrained(save_to, **options).eval()
print(
    json.dumps(
        {
            "transformers": transformers.__version__,
            "lockkit": importlib.util.find_spec("lockkit") is not None,
            "logits": logits,
            "tokens": tokens,
            "tokens_after_reload": continuation(again, ids),
        }
    )
)
