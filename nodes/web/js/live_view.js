// The live view: plays the video so far on the sampling node, and on the subgraph nodes around it, as ComfyUI does with
// its own previews.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { addElement, fit, removeElement } from "./element.js";
import { pathOfExecution } from "./graph.js";

const NODE = "LightForcingSampler";
const WIDGET = "light_forcing_live_view";
const MIN_HEIGHT = 200;
const MESSAGE = "light_forcing.preview";
const views = new Map(); // execution id → LiveView; outlives the node object when tabs are switched

/** Pictures of one run, each with the video frame at which it begins, and the screens that play them. */
class LiveView {
  constructor() {
    this.screens = new Set();
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

/** The part of a view on one node: a canvas, and on a subgraph node the line that ComfyUI shows on the inner one. */
class Screen {
  constructor() {
    this.element = document.createElement("div");
    Object.assign(this.element.style, { display: "flex", flexDirection: "column", minHeight: `${MIN_HEIGHT}px` });
    const frame = document.createElement("div");
    Object.assign(frame.style, { position: "relative", flex: "1 1 auto", minHeight: "0" });
    this.canvas = document.createElement("canvas");
    this.canvas.className = "light-forcing-live-view";
    this.canvas.title = "The video so far. Click to pause.";
    const all = { position: "absolute", inset: 0, width: "100%", height: "100%" };
    Object.assign(this.canvas.style, { ...all, objectFit: "contain", cursor: "pointer" });
    this.canvas.addEventListener("click", () => (this.view.paused = !this.view.paused));
    frame.append(this.canvas);
    this.line = document.createElement("div");
    Object.assign(this.line.style, { flex: "none", font: "12px Inter, sans-serif", whiteSpace: "pre-line" });
    this.element.append(frame, this.line);
  }

  show(view) {
    this.view?.screens.delete(this);
    this.view = view;
    view.screens.add(this);
    view.start();
  }

  draw() {
    const { canvas, view } = this;
    const cell = view.cells.findLast((one) => one.at <= view.clock) ?? view.cells[0];
    if (!cell) return;
    const largest = view.cells[0];
    const width = Math.max(largest.width, 256);
    const height = Math.round((width * largest.height) / largest.width);
    const bar = 6;
    const { promptId, until, cells, clock, live } = view;
    const state = `${promptId}/${cell.at}/${until}/${cells.length}/${Math.round(clock)}/${live}`;
    if (state === this.drawn && canvas.width === width) return;
    this.drawn = state;
    if (canvas.width !== width || canvas.height !== height + bar) {
      canvas.width = width;
      canvas.height = height + bar;
    }
    const ctx = canvas.getContext("2d");
    ctx.drawImage(cell.picture, cell.x, cell.y, cell.width, cell.height, 0, 0, width, height);
    const scale = width / Math.max(view.frames, 1);
    ctx.fillStyle = "#20242a";
    ctx.fillRect(0, height, width, bar);
    ctx.fillStyle = live ? "#3b7dd8" : "#5b6672";
    ctx.fillRect(0, height + 1, until * scale, bar - 2);
    ctx.fillStyle = "#ffffff";
    ctx.fillRect(Math.min(clock * scale, width - 2), height, 2, bar);
  }
}

function attach(node, view) {
  node.lightForcingView = view;
  if (!node.widgets?.some((widget) => widget.name === WIDGET)) {
    node.lightForcingScreen = new Screen();
    addElement(node, WIDGET, node.lightForcingScreen.element, MIN_HEIGHT + 20);
    fit(node);
  }
  if (node.lightForcingScreen.view !== view) node.lightForcingScreen.show(view);
}

function endOfRun(promptId) {
  for (const view of views.values()) if (view.promptId === promptId) view.live = false;
}

app.registerExtension({
  name: "LightForcing.LiveView",
  setup() {
    api.addEventListener(MESSAGE, ({ detail }) => {
      if (!views.has(detail.node)) views.set(detail.node, new LiveView());
      const view = views.get(detail.node);
      const path = pathOfExecution(detail.node);
      // Else the graph is still being loaded, or another workflow is open.
      if (path.at(-1)?.comfyClass === NODE) for (const node of path) attach(node, view);
      view.take(detail);
    });
    api.addEventListener("progress_text", ({ detail }) => {
      const view = views.get(detail.nodeId);
      for (const node of view ? pathOfExecution(detail.nodeId).slice(0, -1) : [])
        if (node.lightForcingScreen?.view === view) node.lightForcingScreen.line.textContent = detail.text;
    });
    api.addEventListener("executed", ({ detail }) => {
      // A node that shows its own video file needs no pictures as well.
      if (detail.output?.images && views.has(detail.node)) removeElement(pathOfExecution(detail.node).at(-1), WIDGET);
    });
    for (const name of ["execution_success", "execution_error", "execution_interrupted"])
      api.addEventListener(name, ({ detail }) => endOfRun(detail.prompt_id));
  },
});
