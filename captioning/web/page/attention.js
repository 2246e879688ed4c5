// Where a word looked: a veil over the photo, clear where attention was.

const DARKEST = 0.75; // fraction of the light that a cell without attention loses

/** Draws the attention of a word on a canvas, one pixel a cell, which style.css stretches over the photo. */
export function drawVeil(canvas, attention, [rows, columns]) {
  canvas.width = columns;
  canvas.height = rows;
  const image = new ImageData(columns, rows);
  const most = Math.max(...attention, 1e-9);
  attention.forEach((weight, cell) => {
    image.data[4 * cell + 3] = Math.round(255 * DARKEST * (1 - weight / most));
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** The fraction of a word that came from the photo; the rest is that of the sentinel (Lu et al. 2017). */
export const photoShare = (attention) => Math.min(1, attention.reduce((sum, weight) => sum + weight, 0));
