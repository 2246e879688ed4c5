// How far to trust a caption: what captioning/evaluation computes in candidates.py, consensus.py and calibration.py.
// captioning/web/trust.py writes the numbers.

const SIGMA = 6; // of CIDEr-D's length penalty, in words

/** The evidence of the words of captions, and the probability that the best one is good. */
export class Trust {
  /**
   * description: that of description.json; content: the bytes of its file. beginWith: a function from cells
   * (Float32Array) and their shape to the promise of the decoder before them, which `judge` reads like a photo.
   */
  static async load({ mean_photo: shape, probability }, content, beginWith) {
    const numbers = new Numbers(content.buffer);
    const meanPhoto = await beginWith(numbers.read(Float32Array, shape[0] * shape[1]), [1, ...shape]);
    return new Trust(meanPhoto, probability?.model, probability && new NGrams(probability.ngrams, numbers));
  }

  constructor(meanPhoto, model, ngrams) {
    Object.assign(this, { meanPhoto, model, ngrams });
  }

  /** The captions of a photo, best first, with the evidence of each word; the first with its probability, if known. */
  async judge(photo, captions, options) {
    const words = captions.map((caption) => caption.words);
    const withPhoto = await forcedLogProbabilities(photo, words, options);
    const fromHabit = await forcedLogProbabilities(this.meanPhoto, words, options);
    const evidence = withPhoto.map((row, i) => row.map((value, j) => value - fromHabit[i][j])); // of <end> too
    const judged = captions.map((caption, i) => ({ ...caption, evidence: evidence[i].slice(0, -1) }));
    if (this.model) judged[0].probability = predict(this.model, featuresOf(words, withPhoto, evidence[0], this.ngrams));
    return judged;
  }
}

/** Arrays of a file, one after another. */
class Numbers {
  constructor(buffer) {
    Object.assign(this, { buffer, position: 0 });
  }

  read(Type, length) {
    const array = new Type(this.buffer, this.position, length);
    this.position += array.byteLength;
    return array;
  }
}

/** log p of every word of captions of a photo, given those before it, and of the <end> after them. */
async function forcedLogProbabilities(photo, captions, { start, end }) {
  photo.restart();
  const found = captions.map(() => []);
  const longest = Math.max(...captions.map((words) => words.length));
  let parents = captions.map(() => 0);
  let words = captions.map(() => start);
  for (let position = 0; position <= longest; position++) {
    const { logProbabilities } = await photo.step(parents, words);
    const vocabulary = logProbabilities.length / captions.length;
    words = captions.map((caption) => caption[position] ?? end);
    for (const [row, caption] of captions.entries()) {
      if (position <= caption.length) found[row].push(logProbabilities[row * vocabulary + words[row]]);
    }
    parents = captions.map((_, row) => row);
  }
  return found;
}

/** The features of the first caption, as Candidates.features of candidates.py. evidence: of its words and <end>. */
function featuresOf(captions, logProbabilities, evidence, ngrams) {
  const [words, ...others] = captions;
  const [total, ...totals] = logProbabilities.map(sum);
  return [
    mean(logProbabilities[0]),
    Math.min(...logProbabilities[0]),
    mean(evidence),
    others.length ? total - Math.max(...totals) : 0,
    mean(others.map((other) => ngrams.agreement(words, other))),
    words.length,
    mean(words.map((word) => ngrams.weight([word]))),
  ];
}

/** Logistic regression: see captioning/evaluation/logistic.py. */
function predict({ mean: means, scale, weights, bias }, features) {
  const terms = features.map((value, i) => (weights[i] * (value - means[i])) / scale[i]);
  return 1 / (1 + Math.exp(-bias - sum(terms)));
}

const sum = (values) => values.reduce((total, value) => total + value, 0);
const mean = (values) => (values.length ? sum(values) / values.length : 0);

/** The n-grams of CIDEr-D (Vedantam et al. 2015), with their tf-idf weights. */
export class NGrams {
  /** counts: how many n-grams there are of each order, 1 to 4; numbers: reads them. */
  constructor(counts, numbers) {
    this.orders = counts.map((count) => ({
      beginnings: numbers.read(Uint32Array, count),
      lastWords: numbers.read(Uint32Array, count),
      weights: numbers.read(Float32Array, count + 1),
    }));
  }

  /** log(photos / photos whose captions have this n-gram). */
  weight(ngram) {
    let number = 0;
    for (const [i, word] of ngram.entries()) number = find(this.orders[i], number, word);
    return this.orders[ngram.length - 1].weights[number];
  }

  /** The CIDEr-D, 0 to 10, of a caption with another one as its only reference. */
  agreement(caption, reference) {
    const cosines = this.orders.map((_, i) => cosine(this.vector(caption, i + 1), this.vector(reference, i + 1)));
    return 10 * mean(cosines) * Math.exp(-((caption.length - reference.length) ** 2) / (2 * SIGMA ** 2));
  }

  /** The weight of each n-gram of this many words in a caption, times how often it occurs. */
  vector(words, order) {
    const vector = new Map();
    for (let i = 0; i + order <= words.length; i++) {
      const ngram = words.slice(i, i + order);
      const key = ngram.join();
      vector.set(key, (vector.get(key) ?? 0) + this.weight(ngram));
    }
    return vector;
  }
}

/** The number of an n-gram, given that of the n-gram without its last word; the number after the last if unknown. */
function find({ beginnings, lastWords }, beginning, word) {
  let low = 0;
  let high = beginnings.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    const isBefore = (beginnings[middle] - beginning || lastWords[middle] - word) < 0;
    if (isBefore) low = middle + 1;
    else high = middle;
  }
  return beginnings[low] === beginning && lastWords[low] === word ? low : beginnings.length;
}

/** The cosine of the angle between two vectors, where the first one is clipped to the second one. */
function cosine(vector, reference) {
  let product = 0;
  for (const [ngram, weight] of vector) {
    const other = reference.get(ngram) ?? 0;
    product += Math.min(weight, other) * other;
  }
  const norm = Math.sqrt(squares(vector) * squares(reference));
  return norm > 0 ? product / norm : 0;
}

const squares = (vector) => sum([...vector.values()].map((weight) => weight ** 2));
