// Litegraph hides a widget that is advanced, but ComfyUI's nodes mark only its options, which the Vue renderer reads.

import { app } from "../../../scripts/app.js";

function mark(node) {
  for (const widget of node.widgets ?? []) if (widget.options?.advanced) widget.advanced = true;
}

app.registerExtension({
  name: "LightForcing.AdvancedWidgets",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("LightForcing")) return;
    mark(node);
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
