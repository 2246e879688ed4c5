// Firefox decodes photo files that end too early, with the missing part black or grey; training and Chromium refuse them.

const SIGNATURES = { png: [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a], jpeg: [0xff, 0xd8] };
const PNG_CHUNK_FRAME = 12; // bytes of a chunk beside its data: length, type and checksum
const START_OF_SCAN = 0xda;
const END_OF_IMAGE = 0xd9;

/** Whether the bytes of a PNG or JPEG file end before the photo does. Other formats are left to the browser. */
export function isTruncated(bytes) {
  if (startsWith(bytes, SIGNATURES.png)) return !pngEnds(bytes);
  if (startsWith(bytes, SIGNATURES.jpeg)) return !jpegEnds(bytes);
  return false;
}

const startsWith = (bytes, signature) => signature.every((value, i) => bytes[i] === value);

/** Whether all chunks are there, up to IEND. */
function pngEnds(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  let position = SIGNATURES.png.length;
  while (position + PNG_CHUNK_FRAME <= bytes.length) {
    const type = String.fromCharCode(...bytes.subarray(position + 4, position + 8));
    position += PNG_CHUNK_FRAME + view.getUint32(position);
    if (type === "IEND") return position <= bytes.length;
  }
  return false;
}

/** Whether the end marker follows the first scan: a thumbnail among the segments before has one of its own. */
function jpegEnds(bytes) {
  let position = SIGNATURES.jpeg.length;
  while (bytes[position] === 0xff && bytes[position + 1] !== START_OF_SCAN) {
    const isFill = bytes[position + 1] === 0xff;
    position += isFill ? 1 : 2 + 256 * bytes[position + 2] + bytes[position + 3];
  }
  while (position + 1 < bytes.length) {
    position = bytes.indexOf(0xff, position);
    if (position < 0) return false;
    if (bytes[position + 1] === END_OF_IMAGE) return true; // in pixels, 0xff is followed by 0
    position++;
  }
  return false;
}
