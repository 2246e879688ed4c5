// The page's side of worker.js: a promise for every photo.

/** Captions photos in a worker. Calls back with {progress}, {ready} or {failed}: see worker.js. */
export class Captioner {
  constructor(device, report) {
    this.pending = new Map(); // id of a photo -> the functions of its promise
    this.count = 0; // of the photos so far: the next one's id
    this.worker = startWorker("worker.js");
    this.worker.onmessage = ({ data }) => ("id" in data ? this.settle(data) : report(data));
    this.worker.onerror = (event) => report({ failed: event.message || "worker.js" });
    this.worker.postMessage({ device });
  }

  /** A photo file -> {captions, seconds}. Rejects with an Error whose message is a key of text.js, or any other. */
  caption(file) {
    const id = this.count++;
    return new Promise((resolve, reject) => {
      this.pending.set(id, { resolve, reject });
      this.worker.postMessage({ id, file });
    });
  }

  settle({ id, error, ...result }) {
    const { resolve, reject } = this.pending.get(id);
    this.pending.delete(id);
    if (error === undefined) resolve(result);
    else reject(new Error(error));
  }
}

/** A worker from a blob inherits the page's Content-Security-Policy; one from an address would have none. */
function startWorker(path) {
  const code = `import ${JSON.stringify(new URL(path, import.meta.url).href)};`;
  const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  return new Worker(url, { type: "module" });
}
