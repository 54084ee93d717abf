// The strip on a prompt timeline node: the prompts up to this node in the order of time, and how each takes over.

import { app } from "../../../scripts/app.js";
import { addElement } from "./element.js";
import { originOf, valueOf } from "./graph.js";

const NODE = "LightForcingPromptTimeline";
const WIDGET = "light_forcing_timeline_strip";
const EVERY_MS = 250;
const HEIGHT = 50;
const FPS = 16;
const CHUNK_SECONDS = 0.75; // of three latent frames; only a run knows the real chunks
const COLOURS = ["#3b7dd8", "#2f8f6b", "#8a63d2", "#b9792a", "#b8506f", "#3d8fa3"];

/** The prompt of a conditioning input, as far as its node shows it. */
function textOf(node, input) {
  const encoder = originOf(node, input)?.node;
  const texts = ["text", "caption", "name"].map((name) => encoder && valueOf(encoder, name));
  return texts.find((text) => typeof text === "string") ?? "";
}

/** The sampler that a node's timeline reaches, through other timeline nodes. */
function samplerOf(node) {
  for (let at = node, hops = 0; at && hops < 50; hops += 1) {
    const readers = at.graph.nodes.filter((one) => originOf(one, "timeline")?.node === at);
    const sampler = readers.find((one) => one.type !== NODE);
    if (sampler) return sampler;
    [at] = readers;
  }
  return null;
}

function timelineOf(node) {
  const changes = [];
  for (let at = node; at?.type === NODE && changes.length < 50; at = originOf(at, "timeline")?.node) {
    const [start, how, blend] = ["start", "switch", "blend_chunks"].map((name) => valueOf(at, name));
    changes.push({ start: start ?? 0, how, blend: how === "blend" ? blend * CHUNK_SECONDS : 0, text: textOf(at, "positive") });
  }
  changes.sort((one, other) => one.start - other.start);
  const sampler = samplerOf(node);
  const latent = sampler && originOf(sampler, "latent")?.node;
  const frames = latent && valueOf(latent, "length");
  const last = changes.at(-1).start;
  const end = frames > FPS * last ? frames / FPS : 1.5 * last || 1;
  return { end, prompts: [{ start: 0, how: "", blend: 0, text: sampler ? textOf(sampler, "positive") : "" }, ...changes] };
}

function draw(element, { end, prompts }) {
  const percent = (seconds) => `${(100 * seconds) / end}%`;
  const parts = prompts.flatMap(({ start, how, blend, text }, index) => {
    const [bar, label] = [document.createElement("div"), document.createElement("div")];
    const [colour, before] = [COLOURS[index % COLOURS.length], COLOURS[(index + COLOURS.length - 1) % COLOURS.length]];
    const until = prompts[index + 1]?.start ?? end;
    const shared = { position: "absolute", left: percent(start), overflow: "hidden", whiteSpace: "nowrap" };
    Object.assign(bar.style, shared, {
      width: percent(until - start),
      top: 0,
      height: "24px",
      padding: "4px 6px",
      boxSizing: "border-box",
      color: "#ffffff",
      textOverflow: "ellipsis",
      background: blend ? `linear-gradient(90deg, ${before}, ${colour} ${(100 * blend) / (until - start)}%)` : colour,
    });
    Object.assign(label.style, shared, { top: "28px" });
    bar.textContent = bar.title = text;
    label.textContent = how ? `${start} s ${how}` : "0 s";
    return [bar, label];
  });
  element.replaceChildren(...parts);
}

app.registerExtension({
  name: "LightForcing.TimelineStrip",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const element = document.createElement("div");
    element.className = "light-forcing-timeline";
    Object.assign(element.style, { position: "relative", minHeight: `${HEIGHT}px`, font: "11px Inter, sans-serif" });
    element.style.color = "var(--descrip-text, #999999)";
    addElement(node, WIDGET, element, () => HEIGHT);
    let drawn = "";
    const timer = setInterval(() => {
      if (!node.graph || document.hidden) return;
      const timeline = timelineOf(node);
      if (drawn !== (drawn = JSON.stringify(timeline))) draw(element, timeline);
    }, EVERY_MS);
    const removed = node.onRemoved;
    node.onRemoved = function (...args) {
      clearInterval(timer);
      return removed?.apply(this, args);
    };
  },
});
