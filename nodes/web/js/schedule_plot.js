// The schedule node's plot: the attention that each chunk computes, its mean, and FLOPs relative to dense. It follows
// the widgets; the server computes the numbers, as it does for the run.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { addElement } from "./element.js";
import { linkOf, originOf, valueOf } from "./graph.js";

const NODE = "LightForcingSchedule";
const WIDGET = "light_forcing_schedule_plot";
const EVERY_MS = 250;
const MIN_HEIGHT = 170;
const SHARPNESS = 2; // canvas pixels per unit of the graph
const MARGIN = { left: 44, right: 8, top: 48, bottom: 34 };
const FILE_WIDGETS = ["model_name", "unet_name", "ckpt_name", "gguf_name"];

/** The inputs that decide the schedule, in the form of POST /light_forcing/schedule. */
function inputsOf(node) {
  const preset = { preset: valueOf(node, "preset") };
  for (const widget of node.widgets) {
    const [group, name] = widget.name.split(".");
    if (group === "preset" && name) preset[name] = valueOf(node, widget.name);
  }
  return { length: lengthOf(node), preset, ...modelOf(node) };
}

/** The video's length: that of the sampler's latent, which the run takes, or the node's own. */
function lengthOf(node) {
  for (const id of node.outputs?.[0]?.links ?? []) {
    const sampler = node.graph.getNodeById(linkOf(node.graph, id)?.target_id);
    const latent = sampler && originOf(sampler, "latent");
    const length = latent && valueOf(latent.node, "length");
    if (Number.isInteger(length)) return length;
  }
  return valueOf(node, "length");
}

/** Family, file and attention widgets of the connected model, as far as the loaders on the way to it know. */
function modelOf(node) {
  let [family, widgets] = [null, null];
  for (let at = originOf(node, "model"), hops = 0; at && hops < 50; hops += 1) {
    const loader = at.node;
    const file = FILE_WIDGETS.map((name) => valueOf(loader, name)).find((value) => typeof value === "string");
    if (/^LightForcing(ModelLoader|Apply)$/.test(loader.type)) {
      const chosen = valueOf(loader, "family");
      if (chosen && chosen !== "auto") family ??= chosen;
      const names = loader.widgets.map((widget) => widget.name).filter((name) => name !== "family");
      widgets ??= Object.fromEntries(names.map((name) => [name, valueOf(loader, name)]));
    }
    if (file !== undefined) return { family, file, widgets };
    const input = loader.inputs?.find((one) => one.type === "MODEL");
    at = input ? originOf(loader, input.name) : null;
  }
  return { family, file: null, widgets };
}

class SchedulePlot {
  constructor(node) {
    this.node = node;
    this.element = document.createElement("div");
    Object.assign(this.element.style, { position: "relative", minHeight: `${MIN_HEIGHT}px` });
    this.canvas = document.createElement("canvas");
    this.canvas.className = "light-forcing-schedule";
    Object.assign(this.canvas.style, { position: "absolute", inset: 0, width: "100%", height: "100%" });
    this.element.append(this.canvas);
    this.asked = null;
    this.numbers = null;
    this.busy = false;
    this.again = () => (this.asked = null); // ask again what the server did not answer
    api.addEventListener("reconnected", this.again);
    this.timer = setInterval(() => this.follow(), EVERY_MS);
    this.sizes = new ResizeObserver(() => this.draw());
    this.sizes.observe(this.element);
  }

  stop() {
    clearInterval(this.timer);
    api.removeEventListener("reconnected", this.again);
    this.sizes.disconnect();
  }

  async follow() {
    if (this.busy || !this.node.graph || document.hidden) return;
    const inputs = inputsOf(this.node);
    const asked = JSON.stringify(inputs);
    if (asked === this.asked) return;
    this.asked = asked;
    this.busy = true;
    try {
      this.numbers = await numbersOf(inputs);
    } catch {
      this.numbers = { error: "The server does not answer." };
    }
    this.busy = false;
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.element;
    if (!this.numbers || !width || !height) return;
    this.canvas.width = width * SHARPNESS;
    this.canvas.height = height * SHARPNESS;
    const ctx = this.canvas.getContext("2d");
    ctx.scale(SHARPNESS, SHARPNESS);
    draw(ctx, width, height, this.numbers);
  }
}

async function numbersOf(inputs) {
  if (!Number.isInteger(inputs.length)) return { follows: "the length arrives when the graph runs" };
  if (Object.values(inputs.preset).includes(undefined)) return { follows: "a setting arrives when the graph runs" };
  const answer = await api.fetchApi("/light_forcing/schedule", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(inputs),
  });
  return answer.json();
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name, otherwise) => style.getPropertyValue(name).trim() || otherwise;
  return {
    text: of("--input-text", "#dddddd"),
    faint: of("--descrip-text", "#999999"),
    grid: of("--border-color", "#4e4e4e"),
    fill: "#3b7dd8",
    mean: "#e2707f",
    error: of("--error-text", "#ff6666"),
  };
}

function draw(ctx, width, height, numbers) {
  const ink = colours();
  if (numbers.error || numbers.follows) {
    paragraph(ctx, width, numbers.error ?? `The plot follows: ${numbers.follows}.`, numbers.error ? ink.error : ink.faint);
    return;
  }
  const { lengths, sparsities, policy } = numbers;
  const total = lengths.reduce((sum, one) => sum + one, 0);
  const x = (frame) => MARGIN.left + (frame / total) * (width - MARGIN.left - MARGIN.right);
  const top = MARGIN.top + (policy ? 16 : 0);
  const y = (share) => height - MARGIN.bottom - share * (height - top - MARGIN.bottom);

  ctx.font = "600 12px Inter, sans-serif";
  ctx.fillStyle = ink.text;
  ctx.textBaseline = "middle";
  ctx.fillText(headline(numbers), 6, 12);
  ctx.font = "11px Inter, sans-serif";
  ctx.fillStyle = ink.faint;
  ctx.fillText(details(numbers), 6, 28);
  if (policy) ctx.fillText(policy, 6, 44);

  for (const share of [0, 0.5, 1]) {
    ctx.strokeStyle = ink.grid;
    ctx.lineWidth = 1;
    line(ctx, MARGIN.left, y(share), width - MARGIN.right, y(share));
    ctx.fillStyle = ink.faint;
    ctx.textAlign = "right";
    ctx.fillText(`${100 * share} %`, MARGIN.left - 4, y(share));
  }
  ctx.textAlign = "center";
  for (const frame of ticks(total)) ctx.fillText(String(frame), x(frame), height - MARGIN.bottom + 10);
  ctx.fillText("attention computed, of dense · by latent frame", x(total / 2), height - 8);

  let frame = 0;
  lengths.forEach((length, index) => {
    const [left, right] = [x(frame), x(frame + length)];
    frame += length;
    if (sparsities[index] === null) return; // only a run knows it
    const computed = y(1 - sparsities[index]);
    const gap = Math.min(1, (right - left) / 6);
    ctx.fillStyle = `${ink.fill}66`;
    ctx.fillRect(left + gap / 2, computed, right - left - gap, y(0) - computed);
    ctx.fillStyle = ink.fill;
    ctx.fillRect(left + gap / 2, computed - 1, right - left - gap, 2);
  });
  if (numbers.mean !== null) {
    ctx.strokeStyle = ink.mean;
    ctx.setLineDash([5, 4]);
    line(ctx, x(0), y(1 - numbers.mean), x(total), y(1 - numbers.mean));
    ctx.setLineDash([]);
    ctx.fillStyle = ink.mean;
    ctx.textAlign = "right";
    ctx.fillText(`mean of sparse chunks ${percent(1 - numbers.mean)}`, x(total) - 3, y(1 - numbers.mean) - 18);
  }
  ctx.textAlign = "left";
}

function headline({ attention_ratio: attention, model_ratio: model }) {
  if (attention === null) return "The keys decide how much is skipped";
  if (attention === 1) return "Dense: nothing is skipped";
  return `Attention ${percent(attention)} of dense · whole model ${percent(model)} (FLOPs)`;
}

function details({ title, lengths, window, sink_frames: sinks }) {
  const seen = window === null ? "sees everything" : `window ${window}${sinks ? `, ${sinks} sink` : ""}`;
  return `${title} · ${lengths.length} chunks · ${seen}`;
}

function percent(share) {
  return `${Math.round(100 * share)} %`;
}

function ticks(total) {
  const step = [1, 3, 6, 12, 30, 60, 120, 300, 600, 1200].find((one) => total / one <= 8) ?? 2400;
  return Array.from({ length: Math.floor(total / step) + 1 }, (_, index) => index * step);
}

function line(ctx, fromX, fromY, toX, toY) {
  ctx.beginPath();
  ctx.moveTo(fromX, fromY);
  ctx.lineTo(toX, toY);
  ctx.stroke();
}

function paragraph(ctx, width, text, colour) {
  ctx.font = "13px Inter, sans-serif";
  ctx.fillStyle = colour;
  ctx.textBaseline = "top";
  ctx.textAlign = "left";
  let [row, top] = ["", 14];
  for (const word of text.split(" ")) {
    if (ctx.measureText(`${row} ${word}`).width > width - 24) {
      ctx.fillText(row, 12, top);
      [row, top] = [word, top + 18];
    } else row = row ? `${row} ${word}` : word;
  }
  ctx.fillText(row, 12, top);
}

app.registerExtension({
  name: "LightForcing.SchedulePlot",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const plot = new SchedulePlot(node);
    addElement(node, WIDGET, plot.element, () => MIN_HEIGHT + 20);
    node.lightForcingPlot = plot;
    const removed = node.onRemoved;
    node.onRemoved = function (...args) {
      plot.stop();
      return removed?.apply(this, args);
    };
  },
});
