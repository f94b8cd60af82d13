// One artifact under Transformers.js: `node runtime_client.mjs MODULES FOLDER JOB.json`, started by runtimes.py. MODULES has
// node_modules with @huggingface/transformers; the folder is an export with `layout: transformers.js`. Prints as JSON the
// versions, the tokens generated greedily, and the logits of `text` at once.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [modules, folder, jobFile] = process.argv.slice(2);
const { prompt, text, tokens } = JSON.parse(readFileSync(jobFile, "utf8"));
const require = createRequire(`${modules}/package.json`);
const { AutoModelForCausalLM, Tensor, env } = await import(pathToFileURL(require.resolve("@huggingface/transformers")));
env.allowRemoteModels = false;
env.localModelPath = "/";

const feed = (ids) => ({
  input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
  attention_mask: new Tensor("int64", new BigInt64Array(ids.length).fill(1n), [1, ids.length]),
});
const model = await AutoModelForCausalLM.from_pretrained(folder);
const output = await model.generate({ ...feed(prompt), max_new_tokens: tokens, min_new_tokens: tokens, do_sample: false });
const { logits } = await model(feed(text));
console.log(JSON.stringify({
  version: `${env.version} on onnxruntime-node ${JSON.parse(readFileSync(`${modules}/node_modules/onnxruntime-node/package.json`)).version}`,
  tokens: Array.from(output.data, Number).slice(prompt.length),
  logits: Array.from(logits.data),
}));
