// Litegraph hides a widget that is advanced, but ComfyUI marks only its options, which the Vue renderer reads, and a
// hidden one keeps its row.

import { app } from "../../../scripts/app.js";

function mark(node) {
  for (const widget of node.widgets ?? []) if (widget.options?.advanced) widget.advanced = true;
}

app.registerExtension({
  name: "LightForcing.AdvancedWidgets",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("LightForcing")) return;
    mark(node);
    const laidOut = node.getLayoutWidgets;
    node.getLayoutWidgets = function () {
      return laidOut.call(this).filter((widget) => this.isWidgetVisible(widget));
    };
    node.setSize(node.computeSize());
    for (const hook of ["onConfigure", "onWidgetChanged"]) {
      const before = node[hook];
      node[hook] = function (...args) {
        const result = before?.apply(this, args);
        mark(this); // a preset brings widgets of its own
        return result;
      };
    }
  },
});
