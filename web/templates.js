// This pack's templates: listed in an order for reading, and with notes, groups and titles in the front end's language.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

// The host lists files as its disk does.
const ORDER = [
  "miniature",
  "text-to-image",
  "thinking-text-to-image",
  "edit",
  "edit-two-references",
  "edit-a-part",
  "outpaint",
  "four-variations",
  "image-qa",
  "story",
  "sprint-side-by-side",
  "turbo-and-normal",
  "decoder-with-ksampler",
  "edit-keeps-the-photo",
  "edit-in-a-mask",
  "larger",
  "with-lora",
];
const PARAGRAPH = "\n\n";
const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));

const listed = api.getWorkflowTemplates;
api.getWorkflowTemplates = async function (...given) {
  const templates = await listed.apply(this, given);
  templates[PACK]?.sort((a, b) => ORDER.indexOf(a) - ORDER.indexOf(b));
  return templates;
};

// English -> Chinese. It is fetched once, when it is first needed.
let fetched;
async function chinese() {
  fetched ??= fetch(new URL("templates.zh.json", import.meta.url)).then((answer) => answer.json());
  return Object.entries(await fetched);
}

// A graph is one of ours where a note still has a paragraph of ours; what its user has written stays.
async function translate(graph) {
  const notes = (graph.nodes ?? []).filter((node) => node.type === "MarkdownNote" && node.widgets_values?.[0]);
  if (!notes.length) return;
  const intoChinese = app.extensionManager?.setting?.get("Comfy.Locale") === "zh";
  const texts = new Map((await chinese()).map(([en, zh]) => (intoChinese ? [en, zh] : [zh, en])));
  let ours = false;
  for (const note of notes) {
    const paragraphs = note.widgets_values[0].split(PARAGRAPH);
    if (!paragraphs.some((text) => texts.has(text))) continue;
    note.widgets_values[0] = paragraphs.map((text) => texts.get(text) ?? text).join(PARAGRAPH);
    ours = true;
  }
  if (!ours) return;
  for (const named of [...graph.nodes, ...(graph.groups ?? [])])
    if (texts.has(named.title)) named.title = texts.get(named.title);
}

app.registerExtension({ name: "LLaDAUni.Templates", beforeConfigureGraph: translate });
