// Captions by the server that this page comes from: python -m captioning.serve checkpoints/RUN.

/** As Captioner of captioner.js. name: what the server computes on. */
export class Service {
  constructor(name, report) {
    report({ ready: { device: "server", name } });
  }

  /** A photo file -> {captions, seconds}. Rejects with the server's reason. */
  async caption(file) {
    const started = performance.now();
    const response = await this.send(file);
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    const captions = [answer, ...answer.alternatives].map(captionOf);
    return { captions, seconds: (performance.now() - started) / 1000 };
  }

  /** Sends a photo, again and again while the server is busy. */
  async send(file) {
    for (;;) {
      const response = await fetch("caption?attention=1", { method: "POST", body: file });
      const seconds = Number(response.headers.get("Retry-After"));
      if (response.status !== 503 || !seconds) return response;
      await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
    }
  }
}

const captionOf = ({ log_probability: logProbability, ...caption }) => ({ ...caption, logProbability });
