// The few words of the pack's JavaScript, in the language of the page, from locales/*/main.json.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

let languages = {};

export async function loadTexts() {
  languages = await (await api.fetchApi("/i18n")).json();
}

export function textOf(name) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale");
  return (languages[language] ?? languages.en)?.lightForcing?.[name] ?? name;
}
