// Reads the graph: nodes by execution id, and the value of a widget or an input, through links.

import { app } from "../../../scripts/app.js";

/** The node with an execution id such as "8", after the subgraph nodes around it ("12:8"); [] if there is none. */
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

/** The node and slot that feed an input, across subgraph borders; null if it is not connected. */
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

/** The value of an input: its widget's, or that of the primitive that feeds it; undefined if only a run knows it. */
export function valueOf(node, name) {
  const origin = originOf(node, name);
  if (!origin) return node.widgets?.find((widget) => widget.name === name)?.value;
  if (origin.widget) return origin.node.widgets?.find((widget) => widget.name === origin.widget)?.value;
  return origin.node.type?.startsWith("Primitive") ? origin.node.widgets?.[0]?.value : undefined;
}

export function linkOf(graph, id) {
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
