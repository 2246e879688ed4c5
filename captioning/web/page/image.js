// A photo as the encoder sees it: upright RGB, resized to a square. The resize equals torch's and Pillow's, bit for bit,
// except that new versions of Pillow begin with the columns where a photo is tall, which moves pixels by a grey level.
//
// Both resize in two passes, first along the rows, then along the columns, and round each pass to bytes. An output pixel
// is a sum of input pixels with integer weights, which are real weights times 2^bits. Pillow has 22 bits, torch as many
// as let the largest weight fit into 16.

import { isTruncated } from "./truncation.js";

const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, weight: cubic },
};
const PILLOW_BITS = 22;
const MOST_PIXELS = 89_478_485; // as Pillow: more are taken for an attack
const STRIP_PIXELS = 1 << 22; // pixels read from a canvas at once

/** Keys's cubic filter with a = -1/2. */
function cubic(x) {
  const distance = Math.abs(x);
  if (distance < 1) return (1.5 * distance - 2.5) * distance * distance + 1;
  if (distance < 2) return ((-0.5 * distance + 2.5) * distance - 4) * distance + 2;
  return 0;
}

/**
 * Weights of an antialiased resize of `inputSize` to `outputSize` pixels: of output pixel i, `count` integers for the
 * input pixels from `first` on, to be divided by 2^bits.
 */
function resizeWeights(inputSize, outputSize, interpolation, decoding) {
  const filter = FILTERS[interpolation];
  const scale = inputSize / outputSize;
  const stretch = Math.max(scale, 1); // antialiased: a filter covers at least what an output pixel covers
  const support = filter.support * stretch;
  const rows = [];
  for (let i = 0; i < outputSize; i++) {
    const center = scale * (i + 0.5);
    const first = Math.max(Math.trunc(center - support + 0.5), 0);
    const last = Math.min(Math.trunc(center + support + 0.5), inputSize);
    const weights = Array.from({ length: last - first }, (_, j) => filter.weight((first + j - center + 0.5) / stretch));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    rows.push({ first, weights: weights.map((weight) => weight / total) });
  }
  const bits = decoding === "pillow" ? PILLOW_BITS : torchBits(rows);
  return {
    bits,
    rows: rows.map(({ first, weights }) => ({ first, weights: Int32Array.from(weights, (w) => roundAway(w * 2 ** bits)) })),
  };
}

/** The bits of torch's weights: as many as let the largest weight stay below 2^15. */
function torchBits(rows) {
  const largest = Math.max(...rows.map(({ weights }) => Math.max(...weights)));
  let bits = 0;
  while (bits < PILLOW_BITS && Math.trunc(0.5 + largest * 2 ** (bits + 1)) < 2 ** 15) bits++;
  return bits;
}

/** The nearest integer; halves are rounded away from zero. */
const roundAway = (x) => Math.trunc(x + Math.sign(x) / 2);

/** Resizes a photo that arrives in strips of whole rows, so that a large photo need not be in memory at once. */
export class Resizer {
  constructor(width, height, { image_size: size, interpolation, decoding }) {
    this.width = width;
    this.height = height;
    this.size = size;
    this.horizontal = resizeWeights(width, size, interpolation, decoding);
    this.vertical = resizeWeights(height, size, interpolation, decoding);
    this.narrow = new Uint8ClampedArray(3 * height * size); // (3, height, size), after the first pass
  }

  /** Adds rows from number `top` on; rgba: their bytes, four a pixel, of which the fourth is ignored. */
  addRows(rgba, top) {
    const { width, height, size, narrow } = this;
    const { bits, rows } = this.horizontal;
    const count = rgba.length / (4 * width);
    const half = 1 << (bits - 1);
    for (let y = 0; y < count; y++) {
      for (let x = 0; x < size; x++) {
        const { first, weights } = rows[x];
        let red = half, green = half, blue = half;
        for (let j = 0, i = 4 * (y * width + first); j < weights.length; j++, i += 4) {
          red += weights[j] * rgba[i];
          green += weights[j] * rgba[i + 1];
          blue += weights[j] * rgba[i + 2];
        }
        const target = (top + y) * size + x;
        narrow[target] = red >> bits; // a clamped array cuts off what is below 0 and above 255
        narrow[target + height * size] = green >> bits;
        narrow[target + 2 * height * size] = blue >> bits;
      }
    }
  }

  /** The resized photo: (3, size, size) bytes. */
  finish() {
    const { height, size, narrow } = this;
    const { bits, rows } = this.vertical;
    const result = new Uint8ClampedArray(3 * size * size);
    for (let channel = 0; channel < 3; channel++) {
      for (let y = 0; y < size; y++) {
        const { first, weights } = rows[y];
        for (let x = 0; x < size; x++) {
          let sum = 1 << (bits - 1);
          for (let j = 0; j < weights.length; j++) {
            sum += weights[j] * narrow[(channel * height + first + j) * size + x];
          }
          result[(channel * size + y) * size + x] = sum >> bits;
        }
      }
    }
    return new Uint8Array(result.buffer);
  }
}

/**
 * Decodes a photo file and resizes it -> (3, size, size) bytes. The browser decodes: upright, without its colour
 * profile, transparent pixels on white, as in training.
 *
 * Throws an Error whose message is a key of text.js: "unreadable" or "tooLarge".
 */
export async function readPhoto(file, description) {
  if (isTruncated(new Uint8Array(await file.arrayBuffer()))) throw new Error("unreadable");
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, {
      imageOrientation: "from-image",
      premultiplyAlpha: "none",
      colorSpaceConversion: "none",
    });
  } catch {
    throw new Error("unreadable");
  }
  try {
    if (bitmap.width * bitmap.height > MOST_PIXELS) throw new Error("tooLarge");
    return resizeBitmap(bitmap, description);
  } finally {
    bitmap.close();
  }
}

function resizeBitmap(bitmap, description) {
  const { width, height } = bitmap;
  const resizer = new Resizer(width, height, description);
  const strip = Math.min(height, Math.max(1, Math.floor(STRIP_PIXELS / width)));
  const context = new OffscreenCanvas(width, strip).getContext("2d", { willReadFrequently: true });
  for (let top = 0; top < height; top += strip) {
    const rows = Math.min(strip, height - top);
    context.fillStyle = "white";
    context.fillRect(0, 0, width, strip);
    context.drawImage(bitmap, 0, -top);
    resizer.addRows(context.getImageData(0, 0, width, rows).data, top);
  }
  return resizer.finish();
}
