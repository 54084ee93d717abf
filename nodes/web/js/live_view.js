// The live view: the video so far of one run, as it plays in the panels that show it.

/** Pictures of one run, each with the video frame at which it begins, and the screens that play them. */
export class LiveView {
  constructor() {
    this.screens = new Set(); // each with a `canvas` and `draw`
    this.paused = false;
    this.begin(null);
  }

  begin(promptId) {
    this.promptId = promptId;
    this.cells = []; // {at, picture, x, y, width, height}, in order
    this.until = 0; // number of video frames so far
    this.frames = 0;
    this.clock = 0; // position in video frames
    this.live = true;
  }

  /** Reads messages in order: a draft that takes longer to decode must not replace later frames. */
  take(message) {
    if (message.prompt_id !== this.promptId) this.begin(message.prompt_id);
    this.turn = Promise.allSettled([this.turn]).then(() => this.read(message));
    return this.turn;
  }

  async read(message) {
    if (message.prompt_id !== this.promptId) return;
    const pictures = await Promise.all(message.strips.map(pictureOf));
    if (message.prompt_id !== this.promptId) return;
    this.frames = message.frames;
    this.fps = message.fps;
    message.strips.forEach((strip, index) => this.put(strip, pictures[index]));
    if (message.end !== null) {
      this.cells = this.cells.filter((cell) => cell.at < message.end);
      this.until = message.end;
    }
    this.start();
  }

  put(strip, picture) {
    const { width, height, columns } = strip;
    this.cells = this.cells.filter((cell) => cell.at < strip.start || cell.at >= strip.stop);
    strip.at.forEach((at, index) => {
      const x = (index % columns) * width;
      const y = Math.floor(index / columns) * height;
      this.cells.push({ at, picture, x, y, width, height });
    });
    this.cells.sort((a, b) => a.at - b.at);
    this.until = Math.max(this.until, strip.stop);
  }

  start() {
    if (this.ticking) return;
    this.ticking = true;
    let before = performance.now();
    const tick = (now) => {
      const shown = [...this.screens].filter((screen) => screen.canvas.isConnected);
      if (!shown.length && !this.live) {
        this.ticking = false;
        return;
      }
      if (!this.paused && this.until) this.clock = (this.clock + ((now - before) / 1000) * this.fps) % this.until;
      before = now;
      for (const screen of shown) screen.draw();
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }
}

async function pictureOf(strip) {
  const picture = new Image();
  picture.src = strip.image;
  await picture.decode();
  return picture;
}
