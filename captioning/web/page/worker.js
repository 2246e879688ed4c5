// Loads the model and captions photos, beside the page, which stays responsive.
//
// Receives {id, file}, and {device} first. Sends {progress: {loaded, total}} in bytes, {ready: {device, threads, problem}}
// or {failed: message}; then for each photo {id, captions, seconds} or {id, error}.

import { readPhoto } from "./image.js";
import { OnnxModel } from "./model.js";
import { beamSearch } from "./search.js";
import { Trust } from "./trust.js";

const MOST_THREADS = 8; // more gain nothing at these sizes
const address = (path) => new URL(path, import.meta.url).href;
let loading; // the promise of {model, trust}: an OnnxModel, and a Trust if the run is calibrated
let queue = Promise.resolve(); // photos are captioned one after another

self.onmessage = ({ data }) => {
  if ("device" in data) {
    loading = load(data.device);
    loading.catch((error) => self.postMessage({ failed: error.message }));
  } else {
    queue = queue.then(() => captionPhoto(data));
  }
};

/** Captions a photo, and sends the result. */
async function captionPhoto({ id, file }) {
  try {
    const { model, trust } = await loading;
    const { description } = model;
    const started = performance.now();
    const photo = await model.read(await readPhoto(file, description));
    const found = await beamSearch(photo, description);
    const judged = trust ? await trust.judge(photo, found, description) : found;
    const captions = judged.map((caption) => ({ ...caption, words: caption.words.map((word) => description.words[word]) }));
    self.postMessage({ id, captions, seconds: (performance.now() - started) / 1000 });
  } catch (error) {
    self.postMessage({ id, error: error.message });
  }
}

/** Loads the model. device: "gpu" or "cpu", or null for a GPU where there is one that works. */
async function load(device) {
  if (device) return loadOn(device);
  if (!(await hasGpu())) return loadOn("cpu");
  try {
    return await loadOn("gpu");
  } catch (error) {
    return loadOn("cpu", error.message);
  }
}

/** Loads the runtime and the models. problem: why the GPU is not used, if there is one. */
async function loadOn(device, problem) {
  const description = await (await fetchOrThrow("model/description.json")).json();
  const files = description.runtime[device];
  const paths = { binary: files.binary, ...mapParts(description, (part) => part.file) };
  if (description.trust) paths.trust = description.trust.file;
  const content = await download(paths, description.bytes);
  const runtime = await import(address(files.script));
  runtime.env.wasm.wasmPaths = { mjs: address(files.module) };
  runtime.env.wasm.wasmBinary = content.binary;
  runtime.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MOST_THREADS) : 1;
  const sessions = {};
  for (const name of Object.keys(description.parts)) {
    // steps are small: sending them to a GPU would take longer than computing them here
    const executionProviders = device === "gpu" && name === "encoder" ? ["webgpu"] : ["wasm"];
    sessions[name] = await runtime.InferenceSession.create(content[name], { executionProviders });
  }
  const model = new OnnxModel(runtime, sessions, description);
  const begin = (cells, shape) => model.begin(cells, shape);
  const trust = description.trust ? await Trust.load(description.trust, content.trust, begin) : null;
  self.postMessage({ ready: { device, threads: runtime.env.wasm.numThreads, problem } });
  return { model, trust };
}

const mapParts = (description, value) =>
  Object.fromEntries(Object.entries(description.parts).map(([name, part]) => [name, value(part)]));

async function hasGpu() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter) && !adapter.info?.isFallbackAdapter; // a fallback adapter is a slow imitation of a GPU
}

/** Downloads files and reports the progress. paths: by name; sizes: of each path, in bytes. */
async function download(paths, sizes) {
  const total = Object.values(paths).reduce((sum, path) => sum + sizes[path], 0);
  let loaded = 0;
  const downloads = Object.entries(paths).map(async ([name, path]) => {
    const content = new Uint8Array(sizes[path]);
    const reader = (await fetchOrThrow(path)).body.getReader();
    let position = 0;
    for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
      if (position + chunk.value.length > content.length) throw new Error(`${path}: longer than expected`);
      content.set(chunk.value, position);
      position += chunk.value.length;
      loaded += chunk.value.length;
      self.postMessage({ progress: { loaded, total } });
    }
    if (position < content.length) throw new Error(`${path}: incomplete`);
    return [name, content];
  });
  return Object.fromEntries(await Promise.all(downloads));
}

async function fetchOrThrow(path) {
  const response = await fetch(address(path));
  if (!response.ok) throw new Error(`${path}: ${response.status} ${response.statusText}`);
  return response;
}
