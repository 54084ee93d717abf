// Reading the graph: nodes by execution id, and what a widget or an input holds, wherever the value comes from.

import { app } from "../../../scripts/app.js";

/** The node that runs under an execution id such as "8", behind the subgraph nodes around it ("12:8"); [] for none. */
export function pathOfExecution(id) {
  let graph = app.rootGraph ?? app.graph;
  const path = [];
  for (const part of String(id).split(":")) {
    const node = graph?.getNodeById(Number(part));
    if (!node) return [];
    path.push(node);
    graph = node.subgraph;
  }
  return path;
}

/** The node and slot that feed an input, with subgraph borders crossed; null for an open one. */
export function originOf(node, inputName) {
  const input = node.inputs?.find((one) => one.name === inputName);
  const link = input?.link == null ? null : linkOf(node.graph, input.link);
  if (!link) return null;
  const origin = node.graph.getNodeById(link.origin_id);
  if (origin) return { node: origin, slot: link.origin_slot };
  const inner = node.graph.inputs?.[link.origin_slot];
  const outer = inner && outerNodeOf(node.graph);
  return outer ? (originOf(outer, inner.name) ?? { node: outer, widget: inner.name }) : null;
}

/** The value of an input: its widget's, or that of the primitive that feeds it; undefined if a run has to tell. */
export function valueOf(node, name) {
  const origin = originOf(node, name);
  if (!origin) return node.widgets?.find((widget) => widget.name === name)?.value;
  if (origin.widget) return origin.node.widgets?.find((widget) => widget.name === origin.widget)?.value;
  return origin.node.type?.startsWith("Primitive") ? origin.node.widgets?.[0]?.value : undefined;
}

function linkOf(graph, id) {
  return graph.getLink?.(id) ?? graph.links?.[id];
}

function outerNodeOf(subgraph) {
  const root = app.rootGraph ?? app.graph;
  const graphs = [root, ...(root.subgraphs?.values() ?? [])];
  for (const graph of graphs) {
    const found = graph.nodes.find((node) => node.subgraph === subgraph);
    if (found) return found;
  }
  return null;
}
