// The live view: plays the video so far on the sampling node while the rest is being made.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { nodeOfExecution } from "./graph.js";

const WIDGET = "light_forcing_live_view";
const MIN_HEIGHT = 200;
const MESSAGE = "light_forcing.preview";
const views = new Map(); // execution id → LiveView; outlives the node object when tabs are switched

/** Pictures of one run, each with the video frame it begins at, and the canvas that plays them. */
class LiveView {
  constructor() {
    this.element = document.createElement("div");
    Object.assign(this.element.style, { position: "relative", minHeight: `${MIN_HEIGHT}px` });
    this.canvas = document.createElement("canvas");
    this.canvas.className = "light-forcing-live-view";
    this.canvas.title = "The video so far. Click to pause.";
    const all = { position: "absolute", inset: 0, width: "100%", height: "100%" };
    Object.assign(this.canvas.style, { ...all, objectFit: "contain", cursor: "pointer" });
    this.element.append(this.canvas);
    this.canvas.addEventListener("click", () => (this.paused = !this.paused));
    this.paused = false;
    this.begin(null);
  }

  begin(promptId) {
    this.promptId = promptId;
    this.cells = []; // {at, picture, x, y, width, height}, in order
    this.until = 0; // video frames that are there
    this.frames = 0;
    this.clock = 0; // position in video frames
    this.drawn = null;
    this.live = true;
  }

  async take(message) {
    if (message.prompt_id !== this.promptId) this.begin(message.prompt_id);
    this.frames = message.frames;
    this.fps = message.fps;
    for (const strip of message.strips) {
      const picture = new Image();
      picture.src = strip.image;
      await picture.decode();
      if (message.prompt_id !== this.promptId) return;
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
    this.start();
  }

  start() {
    if (this.ticking) return;
    this.ticking = true;
    let before = performance.now();
    const tick = (now) => {
      if (!this.canvas.isConnected && !this.live) {
        this.ticking = false;
        return;
      }
      if (!this.paused && this.until) this.clock = (this.clock + ((now - before) / 1000) * this.fps) % this.until;
      before = now;
      if (this.canvas.isConnected) this.draw();
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  draw() {
    const cell = this.cells.findLast((one) => one.at <= this.clock) ?? this.cells[0];
    if (!cell) return;
    const { canvas } = this;
    const largest = this.cells[0];
    const width = Math.max(largest.width, 256);
    const height = Math.round((width * largest.height) / largest.width);
    const bar = 6;
    const state = `${cell.at}/${this.until}/${this.cells.length}/${Math.round(this.clock)}/${this.live}`;
    if (state === this.drawn && canvas.width === width) return;
    this.drawn = state;
    if (canvas.width !== width || canvas.height !== height + bar) {
      canvas.width = width;
      canvas.height = height + bar;
    }
    const ctx = canvas.getContext("2d");
    ctx.drawImage(cell.picture, cell.x, cell.y, cell.width, cell.height, 0, 0, width, height);
    const scale = width / Math.max(this.frames, 1);
    ctx.fillStyle = "#20242a";
    ctx.fillRect(0, height, width, bar);
    ctx.fillStyle = this.live ? "#3b7dd8" : "#5b6672";
    ctx.fillRect(0, height + 1, this.until * scale, bar - 2);
    ctx.fillStyle = "#ffffff";
    ctx.fillRect(Math.min(this.clock * scale, width - 2), height, 2, bar);
  }
}

function attach(node, view) {
  if (node.widgets?.some((widget) => widget.name === WIDGET)) return;
  const widget = node.addDOMWidget(WIDGET, "LIGHT_FORCING_LIVE_VIEW", view.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => MIN_HEIGHT + 20,
    getValue: () => "",
  });
  widget.serialize = false;
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  node.setDirtyCanvas(true, true);
}

function detach(node) {
  const place = node?.widgets?.findIndex((widget) => widget.name === WIDGET) ?? -1;
  if (place < 0) return;
  node.widgets[place].onRemove?.();
  node.widgets.splice(place, 1);
  node.setDirtyCanvas(true, true);
}

function endOfRun(promptId) {
  for (const view of views.values()) if (view.promptId === promptId) view.live = false;
}

app.registerExtension({
  name: "LightForcing.LiveView",
  setup() {
    api.addEventListener(MESSAGE, ({ detail }) => {
      const node = nodeOfExecution(detail.node);
      if (!node) return;
      if (!views.has(detail.node)) views.set(detail.node, new LiveView());
      const view = views.get(detail.node);
      attach(node, view);
      node.lightForcingView = view;
      view.take(detail);
    });
    api.addEventListener("executed", ({ detail }) => {
      // A node that shows its own video file needs no pictures beside it.
      if (detail.output?.images && views.has(detail.node)) detach(nodeOfExecution(detail.node));
    });
    for (const name of ["execution_success", "execution_error", "execution_interrupted"])
      api.addEventListener(name, ({ detail }) => endOfRun(detail.prompt_id));
  },
});
