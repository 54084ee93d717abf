// Widgets that hold an HTML element of the pack, on nodes drawn by either renderer; they are never saved.

/** Adds a widget with `element`; once for each node and name. */
export function addElement(node, name, element, minHeight) {
  const widget = node.addDOMWidget(name, name.toUpperCase(), element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => minHeight,
    getValue: () => "",
  });
  widget.serialize = false;
  keep(node, widget);
}

/** Makes a node that is on the canvas as high as its widgets need. */
export function fit(node) {
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  node.setDirtyCanvas(true, true);
}

export function removeElement(node, name) {
  const place = node?.widgets?.findIndex((widget) => widget.name === name) ?? -1;
  if (place < 0) return;
  node.widgets[place].onRemove?.();
  node.widgets.splice(place, 1);
  node.setDirtyCanvas(true, true);
}

/** A subgraph node drawn by Vue rebuilds its list of widgets from its inputs, so ours is added to each new list. */
function keep(node, widget) {
  const made = Object.getOwnPropertyDescriptor(node, "widgets");
  if (node.widgets.includes(widget) || !made?.get || !made.configurable) return;
  Object.defineProperty(node, "widgets", { ...made, get: () => [...made.get.call(node), widget] });
  made.get.call(node).push(widget); // a change that Vue notices; the next reading takes it out again
}
