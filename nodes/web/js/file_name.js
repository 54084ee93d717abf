// Fields such as %date:yyyy-MM-dd% and %Node.widget% in a video's file name, as ComfyUI fills them in for Save Video.

import { app } from "../../../scripts/app.js";

const NODE = "LightForcingVideoOutput";

app.registerExtension({
  name: "LightForcing.FileName",
  nodeCreated(node) {
    const fillIn = window.comfyAPI?.utils?.applyTextReplacements; // a frontend without it leaves them to the server
    if (node.comfyClass !== NODE || !fillIn) return;
    const widget = node.widgets.find((one) => one.name === "filename_prefix");
    widget.serializeValue = () => fillIn(app, widget.value);
  },
});
