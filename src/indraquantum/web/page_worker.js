// Runs the model of an exported page in a worker, so that the page answers while the model writes. It gets {kind:
// "write", ...} and {kind: "stop"}, and sends {kind: "progress" | "ready" | "token" | "done" | "failed", ...}.
import * as ort from "./runtime/ort.js";
import { Tokenizer } from "./runtime/tokenizers.js";

const GREEDY_BELOW = 1e-6; // at lower temperatures the likeliest token is certain
// Otherwise the library drops spaces before punctuation when it decodes.
const AS_IN_PYTHON = { clean_up_tokenization_spaces: false };
const UNFINISHED = "\ufffd"; // what a decoder shows for the bytes of an incomplete character
const ALTERNATIVES = 8;
let model, session, tokenizer, stopped;

async function load() {
  model = await (await fetch("model.json")).json();
  tokenizer = new Tokenizer(await (await fetch("tokenizer.json")).json(), AS_IN_PYTHON);
  const bytes = await download("model.onnx", model.bytes);
  ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send
  ort.env.wasm.wasmPaths = { wasm: new URL("runtime/ort.wasm", self.location.href).href };
  session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"], graphOptimizationLevel: "all" });
  postMessage({ kind: "ready", model });
}

async function download(name, size) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name}: the server answered ${answer.status}`);
  const bytes = new Uint8Array(size), reader = answer.body.getReader();
  let at = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (at + part.value.length > size) throw new Error(`${name} is longer than model.json says`);
    bytes.set(part.value, at);
    at += part.value.length;
    postMessage({ kind: "progress", part: at / size });
  }
  if (at !== size) throw new Error(`${name} ends after ${at} of ${size} bytes`);
  return bytes;
}

// Decoders drop a leading space, and a character may take several tokens. So a token's text is what the text up to it
// is longer than the text before.
const decode = (ids) => {
  const kept = ids.filter((id) => !model.control.includes(id));
  return kept.length ? tokenizer.decode(kept, { skip_special_tokens: false }) : ""; // the library refuses an empty list
};
const encode = (text) => (text === "" ? [] : tokenizer.encode(text, { add_special_tokens: false }).ids);
const promptIds = (text) => [...(model.bos === null ? [] : [model.bos]), ...encode(text)];

const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

async function read(ids, first, past) {
  const feeds = {
    input_ids: int64(ids),
    attention_mask: int64(Array(first + ids.length).fill(1)),
    position_ids: int64(ids.map((_, at) => first + at)),
  };
  for (let layer = 0; layer < model.layers; layer += 1)
    for (const part of ["key", "value"])
      feeds[`past_key_values.${layer}.${part}`] = past ? past[`present.${layer}.${part}`]
        : new ort.Tensor("float32", new Float32Array(0), [1, model.heads, 0, model.head_dim]);
  return session.run(feeds);
}

// The probabilities of the last position, at temperature 1.
function distribution(logits) {
  const size = logits.dims[2], last = logits.data.subarray(logits.data.length - size);
  let largest = -Infinity, sum = 0;
  for (const value of last) if (value > largest) largest = value;
  const probabilities = new Float64Array(size);
  for (let id = 0; id < size; id += 1) sum += probabilities[id] = Math.exp(last[id] - largest);
  for (let id = 0; id < size; id += 1) probabilities[id] /= sum;
  return probabilities;
}

// The ids of the `count` largest, the largest first; of equal ones the lower id.
function likeliest(probabilities, count) {
  const found = [];
  for (let id = 0; id < probabilities.length; id += 1) {
    if (found.length === count && probabilities[id] <= probabilities[found[count - 1]]) continue;
    let at = found.length;
    while (at > 0 && probabilities[found[at - 1]] < probabilities[id]) at -= 1;
    found.splice(at, 0, id);
    if (found.length > count) found.pop();
  }
  return found;
}

// The next token: drawn from what temperature, top-k and top-p leave, in this order, or the likeliest.
function choose(probabilities, order, { temperature, topK, topP }) {
  if (temperature < GREEDY_BELOW) return order[0];
  const ids = topK ? likeliest(probabilities, topK) : [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
  const weights = ids.map((id) => (probabilities[id] / probabilities[ids[0]]) ** (1 / temperature));
  const sum = weights.reduce((total, weight) => total + weight, 0);
  let kept = 0, mass = 0;
  while (kept < ids.length && (kept === 0 || mass < topP * sum)) mass += weights[kept++];
  let left = Math.random() * mass;
  for (let at = 0; at < kept; at += 1) if ((left -= weights[at]) < 0) return ids[at];
  return ids[kept - 1];
}

// A pause in which a message to stop can arrive.
const pause = () => new Promise((resume) => {
  const channel = new MessageChannel();
  channel.port1.onmessage = () => resume(channel.port1.close());
  channel.port2.postMessage(null);
});

async function write({ run, prompt, count, ...sampling }) {
  stopped = false;
  const start = promptIds(prompt), room = model.context - start.length;
  if (!start.length) throw new Error("The text must not be empty, because this model's documents begin without a BOS token.");
  if (room < 1) throw new Error(`The text has ${start.length} tokens. This model takes at most ${model.context - 1}.`);
  const ids = [...start], began = performance.now();
  let shown = decode(ids), reading = start, past = null, written = 0;
  const most = Math.min(count, room);
  while (written < most && !stopped) {
    past = await read(reading, ids.length - reading.length, past);
    const probabilities = distribution(past.logits), order = likeliest(probabilities, ALTERNATIVES);
    const id = choose(probabilities, order, sampling), before = ids.slice(-1);
    ids.push(id);
    reading = [id];
    written += 1;
    const ends = id === model.eos, whole = decode(ids);
    const held = whole.endsWith(UNFINISHED) && !ends && written < most;
    const context = decode(before), named = (other) => model.control.includes(other) ? model.names[other] : decode([...before, other]).slice(context.length);
    postMessage({ kind: "token", run, id, text: held ? "" : whole.slice(shown.length), isEnd: ends,
      probability: probabilities[id], confidence: past.magnitude.data.at(-1), phase: past.phase.data.at(-1),
      alternatives: order.map((other) => ({ id: other, text: named(other), probability: probabilities[other] })) });
    if (!held) shown = whole;
    if (ends) break;
    await pause();
  }
  const reason = stopped ? "stopped" : ids.at(-1) === model.eos ? "end" : written < count ? "full" : "count";
  postMessage({ kind: "done", run, written, reason, seconds: (performance.now() - began) / 1000, ids: ids.slice(start.length) });
}

onmessage = ({ data }) => {
  if (data.kind === "stop") stopped = true;
  else if (data.kind === "encode") postMessage({ kind: "encoded", ids: data.texts.map(promptIds) });
  else write(data).catch((error) => postMessage({ kind: "failed", run: data.run, message: error.message }));
};
load().catch((error) => postMessage({ kind: "failed", loading: true, message: error.message }));
