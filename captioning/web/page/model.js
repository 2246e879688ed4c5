// The exported models, encoder, begin and step, in onnxruntime-web: description.json has their inputs and outputs.

/** Reads photos. */
export class OnnxModel {
  constructor(runtime, sessions, description) {
    this.runtime = runtime;
    this.sessions = sessions; // of encoder, begin and step
    this.description = description;
  }

  /** A photo, (3, S, S) bytes -> the decoder before it. */
  async read(pixels) {
    const size = this.description.image_size;
    const photos = new this.runtime.Tensor("uint8", pixels, [1, 3, size, size]);
    const { cells } = await this.sessions.encoder.run({ photos });
    return this.decodingOf(cells);
  }

  /** The features of a photo, a Float32Array of this shape (1, N, C) -> the decoder before it. */
  async begin(features, shape) {
    return this.decodingOf(new this.runtime.Tensor("float32", features, shape));
  }

  async decodingOf(cells) {
    return new Decoding(this.runtime, this.sessions.step, await this.sessions.begin.run({ cells }));
  }
}

/** The decoder before a photo. */
class Decoding {
  constructor(runtime, session, state) {
    this.runtime = runtime;
    this.session = session;
    this.photo = entries(state, "photo_");
    this.first = entries(state, "row_");
    this.repeated = new Map(); // number of captions -> the state of the photo, once for each
    this.restart();
  }

  /** The next step starts from the empty caption again. */
  restart() {
    this.rows = this.first;
  }

  /** See beamSearch. */
  async step(parents, words) {
    const { Tensor } = this.runtime;
    const rows = mapValues(this.rows, (tensor) => select(Tensor, tensor, parents));
    const inputs = { words: new Tensor("int64", BigInt64Array.from(words, BigInt), [words.length]) };
    const outputs = await this.session.run({ ...inputs, ...this.photoOf(words.length), ...rows });
    this.rows = mapValues(this.rows, (_, name) => outputs[`next_${name}`]);
    return { logProbabilities: outputs.log_probabilities.data, attention: outputs.attention?.data ?? null };
  }

  /** The state of the photo, once for each of `count` captions. */
  photoOf(count) {
    if (!this.repeated.has(count)) {
      const rows = new Array(count).fill(0);
      this.repeated.set(count, mapValues(this.photo, (tensor) => select(this.runtime.Tensor, tensor, rows)));
    }
    return this.repeated.get(count);
  }
}

/** Rows of a tensor (R, ...), in this order. */
function select(Tensor, tensor, rows) {
  const [, ...shape] = tensor.dims;
  const size = shape.reduce((product, length) => product * length, 1);
  const data = new Float32Array(rows.length * size);
  rows.forEach((row, i) => data.set(tensor.data.subarray(row * size, (row + 1) * size), i * size));
  return new Tensor("float32", data, [rows.length, ...shape]);
}

const entries = (tensors, prefix) =>
  Object.fromEntries(Object.entries(tensors).filter(([name]) => name.startsWith(prefix)));

const mapValues = (object, change) =>
  Object.fromEntries(Object.entries(object).map(([name, value]) => [name, change(value, name)]));
