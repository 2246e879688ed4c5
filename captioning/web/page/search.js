// Beam search for one photo: what captioning/search/beam_search.py computes.
//
// At every step the most probable continuations of all live hypotheses are kept. Those that end are finished and leave
// the beam. Sums are rounded to float32, as in torch, so that equal captions win here and there.

/**
 * The best captions of a photo, as {words, attention, logProbability, finished}: finished ones first, best first.
 *
 * model.step(parents, words) appends words[i] to hypothesis parents[i] of the step before, at first to the empty one,
 * number 0. It returns a promise of {logProbabilities: Float32Array (rows * vocabulary), of the next words; attention:
 * Float32Array (rows * cells), or null}.
 * options, named as in description.json: beam_size, num_captions, max_length (words), length_penalty, never and end
 * (word ids).
 */
export async function beamSearch(model, options) {
  const { beam_size: beamSize, num_captions: wanted, max_length: maxLength, end } = options;
  let live = [{ parent: null, row: 0, word: options.start, logProbability: 0, length: 0 }]; // the empty hypothesis
  let finished = [];
  let unfinished = live; // a fallback if too few finish
  for (let number = 0; number <= maxLength; number++) {
    const parents = live.map((hypothesis) => hypothesis.row);
    const words = live.map((hypothesis) => hypothesis.word);
    const best = continuations(live, await model.step(parents, words), beamSize, options.never);
    const ended = best.filter((hypothesis) => hypothesis.word === end);
    for (const hypothesis of ended) {
      hypothesis.score = Math.fround(hypothesis.logProbability / hypothesis.length ** options.length_penalty);
    }
    finished = [...finished, ...ended].sort((one, other) => other.score - one.score).slice(0, wanted);
    if (number === maxLength) break; // what has not ended by now is too long
    live = best.filter((hypothesis) => hypothesis.word !== end);
    if (live.length === 0) break;
    unfinished = live.slice(0, wanted);
    // log p never increases, so this is an upper bound of what a live hypothesis can reach
    const bound = live[0].logProbability / (maxLength + 1) ** options.length_penalty;
    if (finished.length === wanted && bound <= finished[wanted - 1].score) break;
  }
  return distinct([...finished, ...unfinished].slice(0, wanted).map((hypothesis) => trace(hypothesis, end)));
}

/** The `count` most probable continuations of the live hypotheses, best first. */
function continuations(live, { logProbabilities, attention }, count, never) {
  const vocabulary = logProbabilities.length / live.length;
  const cells = attention ? attention.length / live.length : 0;
  const banned = new Set(never);
  const best = []; // sorted, best first
  live.forEach((parent, row) => {
    for (let word = 0; word < vocabulary; word++) {
      const logProbability = Math.fround(parent.logProbability + logProbabilities[row * vocabulary + word]);
      const least = best.length === count ? best[count - 1].logProbability : -Infinity;
      if (!(logProbability > least) || banned.has(word)) continue;
      if (best.length === count) best.pop();
      let place = best.length;
      while (place > 0 && best[place - 1].logProbability < logProbability) place--;
      best.splice(place, 0, { parent, row, word, logProbability });
    }
  });
  for (const hypothesis of best) {
    const { row, parent } = hypothesis;
    hypothesis.length = parent.length + 1;
    hypothesis.attention = attention && attention.slice(row * cells, (row + 1) * cells);
  }
  return best;
}

/** A hypothesis as a caption: its words from the first to the last, without <start> and <end>. */
function trace(hypothesis, end) {
  const words = [];
  const attention = [];
  for (let node = hypothesis; node.parent; node = node.parent) {
    if (node.word === end) continue;
    words.unshift(node.word);
    attention.unshift(node.attention);
  }
  const { logProbability, word } = hypothesis;
  return { words, attention: attention.every(Boolean) ? attention : null, logProbability, finished: word === end };
}

/** The first of captions with the same words: an unfinished one may have the words of a finished one. */
function distinct(captions) {
  const unique = new Map();
  for (const caption of captions) {
    const key = caption.words.join();
    if (!unique.has(key)) unique.set(key, caption);
  }
  return [...unique.values()];
}
