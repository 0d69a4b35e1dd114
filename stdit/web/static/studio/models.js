// The model that is used, and the page as it was before it was loaded again.
import { call, path } from "./dom.js";
import { arrange, changed, edited, state } from "./state.js";
import { showMask } from "./stage.js";

// Loads what the page must know of a model; the timeline stays, and is looked at as that model gets it. Whether it is the one
// that is used now.
export async function useModel(name) {
  if (!name) return false;
  const first = state.facts === null && !state.parts.length, before = state.usual;
  if (name !== state.model) state.steps = state.guidance = state.height = state.width = null;
  state.model = name; state.facts = null; state.plan = null; state.refused = null;
  changed();
  try {
    const facts = await call("GET", `/api/model/${path(name)}`);
    if (state.model !== name) return false;
    state.facts = facts;
    sessionStorage.setItem("model", name);
    if (state.label && !facts.classes.includes(state.label)) state.label = null;
    if (!state.label && facts.classes.length && state.task === "generate") state.label = facts.classes[0];
    if (first) { arrange("generate"); takeUp(); }
    else if (state.task === "generate" && state.parts.length === 1 && state.parts[0].frames === before) arrange("generate");
    state.usual = facts.num_frames;
    edited();
    return true;
  } catch (error) {
    state.refused = error.problem ?? { message: String(error), fixes: [], stops: true };
    changed();
    return false;
  }
}

// What was on the page before it was loaded again.
const KEPT = ["model", "task", "label", "caption", "steps", "guidance", "seed", "pinned", "count", "factor", "strength", "height", "width", "parts", "mask", "masked"];
function takeUp() {
  try {
    const { mask, masked, ...kept } = JSON.parse(sessionStorage.getItem("request")) ?? {};
    if (kept.model !== state.model) return;
    for (const name of KEPT) if (kept[name] !== undefined) state[name] = kept[name];
    if (mask) showMask(mask, masked).catch(() => {}); // the file may be gone, and is painted again then
  } catch { /* nothing is kept */ }
}
addEventListener("pagehide", () => {
  if (state.facts) sessionStorage.setItem("request", JSON.stringify(Object.fromEntries(KEPT.map((name) => [name, state[name]]))));
});
