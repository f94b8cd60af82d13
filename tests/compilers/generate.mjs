// node generate.mjs JOB.json: greedy tokens of Transformers.js for every folder, as JSON {folder: [ids, prompt included]}
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const { modules, folders, prompt, tokens } = JSON.parse(readFileSync(process.argv[2], "utf8"));
const entry = createRequire(`${modules}/package.json`).resolve("@huggingface/transformers");
const { AutoModelForCausalLM, AutoTokenizer, env } = await import(pathToFileURL(entry));
env.allowRemoteModels = false;
env.localModelPath = "/";

const found = {};
for (const folder of folders) {
  const tokenizer = await AutoTokenizer.from_pretrained(folder);
  const model = await AutoModelForCausalLM.from_pretrained(folder);
  const output = await model.generate({ ...tokenizer(prompt), max_new_tokens: tokens, do_sample: false });
  found[folder] = Array.from(output.data, Number);
  await model.dispose();
}
console.log(JSON.stringify(found));
