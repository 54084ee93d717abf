// The panel on a node of the pack, and on the subgraph nodes around it: the video so far, one line about the run, notes
// that must be seen (an error, a refusal, why the run ended early), and details behind the line. It belongs to the
// workflow that was queued, and stays until its next run, also after undo and a change of the tab.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { addElement, removeElement } from "./element.js";
import { pathOfExecution } from "./graph.js";
import { LiveView } from "./live_view.js";
import { loadTexts, textOf } from "./text.js";

const WIDGET = "light_forcing_panel";
const PICTURE_HEIGHT = 200;
const BAR = 6; // height of the bar under the picture
const SYNC_MS = 250;
const KINDS = /^(LightForcing|SamplerCustom)/; // nodes that a panel can be on
const queued = new Map(); // prompt id → workflow
const states = new WeakMap(); // workflow → Map(execution id → State), the last changed one at the end
const strays = new Map(); // the same by prompt id, of runs that this page did not queue or does not know yet
const panels = new Map(); // node → Panel
const loaded = new WeakMap(); // node → its saved height, which Vue replaces by that of the node before an undo

/** What is known of one node's last run. */
class State {
  view = null;
  line = "";
  notes = "";
  details = "";
  end = null; // "error" or "cancelled", if the run did not end well
  hasVideo = false; // the node itself shows a video file
}

const openWorkflow = () => app.extensionManager?.workflow?.activeWorkflow;

function statesOf(map, key) {
  if (!map.has(key)) map.set(key, new Map());
  return map.get(key);
}

/** The state of a node in a run, which is about to change. */
function stateOf(promptId, id) {
  const workflow = queued.get(promptId);
  const all = workflow ? statesOf(states, workflow) : statesOf(strays, promptId);
  return touched(all, String(id));
}

function touched(all, id) {
  const state = all.get(id) ?? new State();
  all.delete(id);
  all.set(id, state);
  return state;
}

function say(state, notes, end) {
  Object.assign(state, { notes, end });
  sync();
}

function sayRefusals(workflow, errors) {
  for (const [id, refused] of Object.entries(errors ?? {})) {
    const lines = refused.errors.map(({ message, details }) => [message, details].filter(Boolean).join(": "));
    say(touched(statesOf(states, workflow), id), lines.join("\n"), "error");
  }
}

/** Before a run: forget how the last one failed. */
function forgetEnds(workflow) {
  for (const state of states.get(workflow)?.values() ?? [])
    if (state.end) Object.assign(state, { line: "", notes: "", details: "", end: null });
}

/** A run that the page did not queue belongs to the first open workflow that has its node. */
function adoptStrays(workflow) {
  for (const [promptId, all] of strays) {
    if (![...all.keys()].some((id) => KINDS.test(pathOfExecution(id).at(-1)?.comfyClass))) continue;
    strays.delete(promptId);
    if (!queued.has(promptId)) queued.set(promptId, workflow);
    for (const [id, state] of all) statesOf(states, queued.get(promptId)).set(id, state);
  }
}

/** Gives each node of the open graph the panel that it should have: after events, undo, and a change of the tab. */
function sync() {
  const workflow = openWorkflow();
  if (!workflow) return;
  adoptStrays(workflow);
  const wanted = new Map();
  for (const [id, state] of states.get(workflow) ?? []) {
    const path = pathOfExecution(id);
    const kind = path.at(-1)?.comfyClass ?? "";
    // Of other packs' nodes only those that run our sampler, which gives them a line.
    if (!KINDS.test(kind) || !(state.line || (kind.startsWith("LightForcing") && (state.notes || state.view)))) continue;
    for (const node of path) wanted.set(node, { state, view: state.hasVideo && node === path.at(-1) ? null : state.view });
  }
  for (const [node, panel] of panels) {
    if (wanted.has(node)) continue;
    panels.delete(node);
    panel.close();
  }
  for (const [node, { state, view }] of wanted) {
    if (!panels.has(node)) panels.set(node, new Panel(node));
    panels.get(node).show(state, view);
  }
}

class Panel {
  constructor(node) {
    this.node = node;
    this.height = node.size[1];
    this.own = Math.min(loaded.get(node) ?? Infinity, this.height); // the height without the panel
    loaded.delete(node);
    node.lightForcingPanel = this;
    this.element = part("div", "panel", { display: "flex", flexDirection: "column", gap: "4px", padding: "0 4px" });
    this.frame = part("div", "frame", { position: "relative", flex: "1 1 auto", minHeight: `${PICTURE_HEIGHT}px` });
    const all = { position: "absolute", inset: 0, width: "100%", height: "100%" };
    this.canvas = part("canvas", "live-view", { ...all, objectFit: "contain", cursor: "pointer" });
    this.canvas.title = textOf("pictureTip");
    this.canvas.addEventListener("click", () => (this.view.paused = !this.view.paused));
    this.frame.append(this.canvas);
    const font = { font: "12px Inter, sans-serif", whiteSpace: "pre-wrap", overflowWrap: "anywhere", userSelect: "text" };
    this.text = part("div", "text", { ...font, flex: "none", color: "var(--input-text, #dddddd)" });
    this.status = part("details", "status", {});
    this.line = part("summary", "line", { cursor: "pointer" });
    this.details = part("div", "details", { opacity: 0.7 });
    this.status.append(this.line, this.details);
    this.notes = part("div", "notes", {});
    this.text.append(this.status, this.notes);
    this.element.append(this.frame, this.text);
    this.widget = addElement(node, WIDGET, this.element, () => this.minHeight());
    this.sizes = new ResizeObserver(() => this.fit());
    this.sizes.observe(this.text);
    // The node is saved as high as it is without the panel, which is not saved.
    const { onSerialize } = node;
    this.restore = () => (node.onSerialize = onSerialize);
    node.onSerialize = (saved) => {
      onSerialize?.call(node, saved);
      this.settle();
      saved.size = [saved.size[0], this.own];
    };
  }

  show(state, view) {
    if (this.view !== view) {
      this.view?.screens.delete(this);
      this.view = view;
      view?.screens.add(this);
      view?.start();
      this.frame.style.display = view ? "" : "none";
      this.drawn = null;
      this.fit();
    }
    const { line, details, notes } = state;
    const said = JSON.stringify([line, details, notes, state.end]);
    if (said === this.said) return;
    this.said = said;
    this.line.textContent = line;
    this.line.style.listStyle = details ? "" : "none";
    this.details.textContent = details;
    this.status.style.display = line ? "" : "none";
    this.notes.textContent = notes;
    this.notes.style.display = notes ? "" : "none";
    this.notes.style.color = state.end === "error" ? "var(--error-text, #ff6666)" : "";
  }

  close() {
    this.settle();
    this.view?.screens.delete(this);
    this.sizes.disconnect();
    this.restore();
    removeElement(this.node, this.widget);
    delete this.node.lightForcingPanel;
    this.resize(this.own);
  }

  minHeight() {
    return (this.view ? PICTURE_HEIGHT + 4 : 0) + this.text.offsetHeight;
  }

  /** Makes the node as high as its widgets need, or as high as it is without the panel. */
  fit() {
    this.settle();
    const height = Math.max(this.own, this.node.computeSize()[1]);
    this.resize(LiteGraph.vueNodesMode ? Math.max(height, this.height) : height);
  }

  /**
   * Finds out how the user has changed the height. ComfyUI's own changes make it no higher than the widgets need; Vue's
   * may, so with it a node that grows while it has a panel counts as grown for the panel.
   */
  settle() {
    const height = this.node.size[1];
    if (height < this.height) this.own = Math.min(this.own, height);
    else if (!LiteGraph.vueNodesMode && height > this.node.computeSize()[1]) this.own += height - this.height;
    this.height = height;
  }

  resize(height) {
    this.height = height;
    if (height !== this.node.size[1]) this.node.setSize([this.node.size[0], height]);
    this.node.setDirtyCanvas(true, true);
  }

  draw() {
    const { canvas, view } = this;
    const cell = view.cells.findLast((one) => one.at <= view.clock) ?? view.cells[0];
    if (!cell) return;
    const largest = view.cells[0];
    const width = Math.max(largest.width, 256);
    const height = Math.round((width * largest.height) / largest.width);
    const { promptId, until, cells, clock, live } = view;
    const state = `${promptId}/${cell.at}/${until}/${cells.length}/${Math.round(clock)}/${live}`;
    if (state === this.drawn && canvas.width === width) return;
    this.drawn = state;
    if (canvas.width !== width || canvas.height !== height + BAR) {
      canvas.width = width;
      canvas.height = height + BAR;
    }
    const ctx = canvas.getContext("2d");
    ctx.drawImage(cell.picture, cell.x, cell.y, cell.width, cell.height, 0, 0, width, height);
    const scale = width / Math.max(view.frames, 1);
    ctx.fillStyle = "#20242a";
    ctx.fillRect(0, height, width, BAR);
    ctx.fillStyle = live ? "#3b7dd8" : "#5b6672";
    ctx.fillRect(0, height + 1, until * scale, BAR - 2);
    ctx.fillStyle = "#ffffff";
    ctx.fillRect(Math.min(clock * scale, width - 2), height, 2, BAR);
  }
}

function part(tag, name, style) {
  const element = document.createElement(tag);
  element.className = `light-forcing-${name}`;
  Object.assign(element.style, style);
  return element;
}

function endOfRun(promptId) {
  const all = states.get(queued.get(promptId)) ?? strays.get(promptId);
  for (const { view } of all?.values() ?? []) if (view?.promptId === promptId) view.live = false;
}

app.registerExtension({
  name: "LightForcing.Panel",
  async setup() {
    const queue = api.queuePrompt;
    api.queuePrompt = async function (...args) {
      const workflow = openWorkflow();
      forgetEnds(workflow);
      try {
        const answer = await queue.apply(this, args);
        queued.set(answer.prompt_id, workflow);
        sayRefusals(workflow, answer.node_errors);
        return answer;
      } catch (error) {
        sayRefusals(workflow, error.response?.node_errors);
        throw error;
      }
    };
    api.addEventListener("light_forcing.status", ({ detail }) => {
      const { prompt_id: promptId, node, line, notes, details } = detail;
      Object.assign(stateOf(promptId, node), { line, notes, details, end: null, hasVideo: false });
      sync();
    });
    api.addEventListener("light_forcing.preview", ({ detail }) => {
      const state = stateOf(detail.prompt_id, detail.node);
      state.view ??= new LiveView();
      state.view.take(detail);
      sync();
    });
    api.addEventListener("executed", ({ detail }) => {
      const { text, images } = detail.output ?? {};
      if (!text && !images?.length) return;
      const state = stateOf(detail.prompt_id, detail.node);
      state.hasVideo = Boolean(images?.length); // and needs no pictures of ours
      if (text) state.notes = text.filter((one) => one !== state.line).join("\n");
      sync();
    });
    api.addEventListener("execution_error", ({ detail }) =>
      say(stateOf(detail.prompt_id, detail.node_id), detail.exception_message?.trim() ?? "", "error"),
    );
    api.addEventListener("execution_interrupted", ({ detail }) =>
      say(stateOf(detail.prompt_id, detail.node_id), textOf("cancelled"), "cancelled"),
    );
    for (const name of ["execution_success", "execution_error", "execution_interrupted"])
      api.addEventListener(name, ({ detail }) => endOfRun(detail.prompt_id));
    setInterval(sync, SYNC_MS);
    await loadTexts();
  },
  loadedGraphNode(node) {
    loaded.set(node, node.size[1]);
    setTimeout(() => loaded.delete(node), 3 * SYNC_MS); // from then on the height is the user's
  },
});
