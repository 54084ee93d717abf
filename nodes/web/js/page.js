// Registers the page with the server: it draws schedules, and may play the live view.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const SETTING = "LightForcing.LiveView";

async function tell() {
  if (!api.clientId) return;
  const plays = app.extensionManager?.setting?.get(SETTING) !== false;
  const message = JSON.stringify({ client_id: api.clientId, plays });
  const headers = { "Content-Type": "application/json" };
  try {
    await api.fetchApi("/light_forcing/page", { method: "POST", headers, body: message });
  } catch {
    // The server is gone; `reconnected` follows when it is back.
  }
}

app.registerExtension({
  name: "LightForcing.Page",
  settings: [
    {
      id: SETTING,
      category: ["Light Forcing", "Canvas", "Live view"],
      name: "Play the video on the sampler while it is made",
      tooltip: "Off: a sheet of still pictures, through ComfyUI's own preview.",
      type: "boolean",
      defaultValue: true,
      onChange: tell,
    },
  ],
  setup() {
    // The first status message brings the client's id, which a restarted server has forgotten.
    api.addEventListener("status", once);
    api.addEventListener("reconnected", tell);
    tell();
  },
});

function once() {
  if (!api.clientId) return;
  api.removeEventListener("status", once);
  tell();
}
