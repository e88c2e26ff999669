"""Generate with optimum: EXPORT PROMPT NEW_TOKENS; prints JSON. A test runs this in another environment."""

import importlib.util
import json
import sys

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

folder, prompt, new_tokens = sys.argv[1:]
model = ORTModelForCausalLM.from_pretrained(folder, use_cache=True)
inputs = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=int(new_tokens), do_sample=False)
scoring = ORTModelForCausalLM.from_pretrained(folder, file_name="model_all_logits.onnx", use_cache=True)
print(
    json.dumps(
        {
            "lockkit": importlib.util.find_spec("lockkit") is not None,
            "tokens": out[0, inputs["input_ids"].shape[1] :].tolist(),
            "logits": model(**inputs).logits[0, -1].tolist(),
            "all_logits": scoring(**inputs).logits[0].tolist(),
        }
    )
)
