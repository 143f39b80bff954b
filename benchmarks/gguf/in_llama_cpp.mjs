// Perplexity of token sequences and the tokens of a text, in llama.cpp: node in_llama_cpp.mjs MODEL.gguf SEQUENCES.json TEXT
// Run in a folder where `npm install node-llama-cpp` was run; prints one JSON object.
import fs from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const require = createRequire(process.cwd() + "/");
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);
const [file, sequencesFile, text] = process.argv.slice(2);
const sequences = JSON.parse(fs.readFileSync(sequencesFile, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: sequences[0].length + 8, batchSize: sequences[0].length + 8});
const sequence = context.getSequence();

let sum = 0, count = 0;
for (const sequence of sequences) {
    await sequence.clearHistory();
    const asked = window.map((token) => [token, {generateNext: {probabilities: true}}]);
    const answers = await sequence.controlledEvaluate(asked);
    for (let i = 0; i + 1 < window.length; i++, count++)
        sum -= Math.log(answers[i].next.probabilities.get(window[i + 1]));
}
process.stdout.write(JSON.stringify({perplexity: Math.exp(sum / count), tokens: model.tokenize(text, false)}) + "\n");
process.exit(0);
