// Widgets that hold an HTML element of the pack, on nodes drawn by either renderer; they are never saved.

const ours = new WeakSet(); // all such widgets, those that are gone too
const lists = new WeakMap(); // subgraph node → {widgets: those that it shows, made: its own list}

/** Adds a widget with `element`, which needs the height that `minHeight` returns. */
export function addElement(node, name, element, minHeight) {
  const widget = node.addDOMWidget(name, name.toUpperCase(), element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: minHeight,
    getValue: () => "",
  });
  widget.serialize = false;
  ours.add(widget);
  if (node.subgraph) keep(node, widget, true);
  return widget;
}

export function removeElement(node, widget) {
  widget.onRemove?.();
  if (node.subgraph) keep(node, widget, false);
  else node.widgets.splice(node.widgets.indexOf(widget), 1);
}

/** A subgraph node builds its list of widgets anew, from its inputs: those of ours that it shows follow behind. */
function keep(node, widget, isShown) {
  if (!lists.has(node)) {
    const widgets = new Set();
    const made = Object.getOwnPropertyDescriptor(node, "widgets");
    const get = () => [...made.get.call(node).filter((one) => !ours.has(one)), ...widgets];
    Object.defineProperty(node, "widgets", { ...made, get });
    lists.set(node, { widgets, made });
  }
  const { widgets, made } = lists.get(node);
  widgets[isShown ? "add" : "delete"](widget);
  made.get.call(node).push(widget); // a change that Vue notices; the next reading takes it out again
  void node.widgets; // which also updates a list of Vue's around ours
}
