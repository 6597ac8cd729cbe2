// A colour for each of this pack's link types, as in its thumbnails. Without it the front end draws them all alike.
import { app } from "../../scripts/app.js";

const COLOURS = {
  LLADA_UNI: "#5b6fc9",
  LLADA_TOKENS: "#e39b3b",
  LLADA_SAMPLING: "#4fa3a5",
  LLADA_SPRINT: "#c46fa8",
};

// Front ends keep these tables in different places; one that is not there is left alone.
function paint() {
  const canvas = app.canvas;
  const tables = [canvas?.default_connection_color_byType, canvas?.constructor?.link_type_colors];
  for (const table of tables) if (table) Object.assign(table, COLOURS);
  for (const [type, colour] of Object.entries(COLOURS))
    document.documentElement.style.setProperty(`--color-datatype-${type}`, colour);
  canvas?.setDirty?.(true, true);
}

function setup() {
  paint();
  // Another palette fills the tables anew, a moment after it was chosen.
  app.ui?.settings?.addEventListener?.("Comfy.ColorPalette.change", () => setTimeout(paint, 500));
}

app.registerExtension({ name: "LLaDAUni.LinkColours", setup, afterConfigureGraph: paint });
