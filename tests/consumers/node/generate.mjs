// Generate with transformers.js under Node: FOLDER PROMPT NEW_TOKENS [DTYPE]; prints JSON. Run by a test.
// With DTYPE, FOLDER is one that `lockkit web` wrote; without, an export.
import path from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";

const [folder, prompt, newTokens, dtype] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const name = path.basename(folder);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const asExported = {
  subfolder: "", // the graph is beside config.json
  use_external_data_format: true, // model.onnx_data
  dtype: "fp32",
};
const model = await AutoModelForCausalLM.from_pretrained(name, { ...(dtype ? { dtype } : asExported), device: "cpu" });
const inputs = tokenizer(prompt);
const out = await model.generate({ ...inputs, max_new_tokens: Number(newTokens), do_sample: false });
const tokens = Array.from(out.data, Number).slice(inputs.input_ids.dims[1]);
console.log(JSON.stringify({ tokens }));
