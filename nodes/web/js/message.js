// The end of a run in words, on the node that it concerns and on the subgraph nodes around it: an error, a refusal, or
// why it stopped early. It stays until the next run, also after undo and a change of the tab.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { addElement, fit, removeElement } from "./element.js";
import { pathOfExecution } from "./graph.js";

const WIDGET = "light_forcing_message";
const MIN_HEIGHT = 64;
const messages = new Map(); // execution id → { text, isError, workflow }

const workflow = () => app.extensionManager?.workflow?.activeWorkflow?.key;

function say(id, text, isError) {
  if (!text) return;
  messages.set(String(id), { text, isError, workflow: workflow() });
  show(String(id));
}

function show(id) {
  const { text, isError, workflow: of } = messages.get(id);
  const path = of === workflow() ? pathOfExecution(id) : [];
  if (!path.at(-1)?.comfyClass?.startsWith("LightForcing")) return;
  for (const node of path) {
    // Vue does not notice that a widget is replaced by one of the same name.
    const shown = node.widgets?.find((widget) => widget.name === WIDGET);
    const element = shown?.element ?? document.createElement("div");
    element.className = "light-forcing-message";
    element.textContent = text;
    const colour = isError ? "var(--error-text, #ff6666)" : "var(--input-text, #dddddd)";
    const font = { font: "12px Inter, sans-serif", whiteSpace: "pre-wrap", overflowWrap: "anywhere" };
    Object.assign(element.style, { ...font, color: colour, overflow: "auto", userSelect: "text", padding: "4px 8px" });
    if (shown) continue;
    addElement(node, WIDGET, element, MIN_HEIGHT);
    fit(node);
  }
}

function forget() {
  for (const id of messages.keys()) for (const node of pathOfExecution(id)) removeElement(node, WIDGET);
  messages.clear();
}

function sayRefusals() {
  for (const [id, { errors }] of Object.entries(app.lastNodeErrors ?? {}))
    say(id, errors.map(({ message, details }) => [message, details].filter(Boolean).join(": ")).join("\n"), true);
}

app.registerExtension({
  name: "LightForcing.Message",
  setup() {
    const queue = app.queuePrompt;
    app.queuePrompt = async function (...args) {
      forget();
      try {
        return await queue.apply(this, args);
      } finally {
        sayRefusals();
      }
    };
    api.addEventListener("execution_error", ({ detail }) => say(detail.node_id, detail.exception_message?.trim(), true));
    api.addEventListener("execution_interrupted", ({ detail }) => say(detail.node_id, "cancelled", false));
    api.addEventListener("executed", ({ detail }) => say(detail.node, detail.output?.text?.join("\n"), false));
  },
  afterConfigureGraph() {
    for (const id of messages.keys()) show(id);
  },
});
