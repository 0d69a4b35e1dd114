// The timeline: clips, pictures and gaps side by side; gaps grow by whole groups, parts are moved, cut and taken off.
import { $, call, h, plural, query } from "./dom.js";
import { arrange, changed, edited, frameOf, gap, isGap, known, lookOf, media, place, plan, remove, remember, state, viewOf } from "./state.js";
import { hatch, player, seek, version } from "./stage.js";

const track = $("track");
let drawn = "";

export function drawTimeline() {
  const shape = JSON.stringify([state.parts, state.selected, state.task, state.uploading, Boolean(state.facts)]);
  if (shape !== drawn) { drawn = shape; build(); }
  thumbnails();
  playhead();
}

function build() {
  const focus = document.activeElement?.closest?.(".part")?.dataset.at;
  const parts = state.parts.map((part, at) => {
    const selected = state.selected === at;
    if (part.slot) return slotOf(at);
    const kind = isGap(part) ? "gap" : "clip";
    if (kind === "gap" && !part.frames) return h("button", { type: "button", class: "insert", data: { at }, title: "add new frames here", onclick: () => resize(at, step(at)) }, "+");
    const node = h("button", { type: "button", class: `part ${kind}`, data: { at }, draggable: kind === "clip", "aria-pressed": String(selected), style: { flexGrow: String(Math.max(part.frames, 3)) }, onclick: () => select(at), onkeydown: (event) => keys(event, at) },
      h("canvas", {}), h("span", { class: "count" }, kind === "gap" ? `${part.frames} new` : plural(part.frames, "frame")));
    node.setAttribute("aria-label", kind === "gap" ? plural(part.frames, "new frame") : `clip of ${plural(part.frames, "frame")}`);
    if (kind === "gap") node.append(h("i", { class: "handle", title: "drag: more or fewer new frames", onpointerdown: (event) => drag(event, at) }));
    node.addEventListener("dragstart", (event) => event.dataTransfer.setData("text/part", String(at)));
    return node;
  });
  const more = state.facts ? [h("div", { class: "add" },
    h("button", { type: "button", class: "ghost", id: "add-clip", title: "a clip or picture from this machine", onclick: () => $("file").click() }, state.uploading ? "reading …" : "+ file"),
    h("button", { type: "button", class: "ghost", id: "add-gap", title: "new frames at the end", onclick: () => append(2 * state.facts.group) }, "+ new"))] : [];
  track.replaceChildren(...parts, ...more);
  if (focus !== undefined) track.querySelector(`.part[data-at="${focus}"]`)?.focus();
  inspector();
}

function slotOf(at) {
  const what = state.task === "animate" ? "a picture" : state.task === "connect" ? "a clip or picture" : "a clip";
  const latest = state.versions[0];
  return h("div", { class: "slot", data: { at } },
    h("button", { type: "button", class: "ghost choose", onclick: () => $("file").click() }, state.uploading ? "reading …" : `drop or choose ${what}`),
    latest ? h("button", { type: "button", class: "ghost latest", onclick: () => place(latest.name, { label: latest.request.label, caption: latest.request.caption }) }, `use v${latest.number}`) : null);
}

const groups = () => state.facts?.step ?? 4;
// In front of a clip the first frame is a group alone.
function step(at) {
  const before = at === 0 && state.parts.some((part) => part.media);
  const total = media().reduce((sum, part) => sum + part.frames, 0);
  return before && total % groups() !== 1 % groups() ? groups() + 1 : groups();
}

export function select(at) { state.selected = state.selected === at ? null : at; changed(); }
export function resize(at, frames) {
  const least = state.task === "generate" ? 1 : 0;
  state.parts[at] = gap(Math.max(least, Math.min(frames, 1024)));
  edited();
}
export function append(frames) {
  const last = state.parts.at(-1);
  if (last && isGap(last)) state.parts[state.parts.length - 1] = gap(last.frames + frames);
  else state.parts.push(gap(frames));
  if (media().length && ["connect", "generate", "edit", "interpolate", "inpaint", "outpaint"].includes(state.task)) {
    if (state.task !== "connect") arrange("extend");
  }
  edited();
}

function drag(event, at) {
  event.preventDefault(); event.stopPropagation();
  const from = event.clientX, frames = state.parts[at].frames;
  const total = state.parts.reduce((sum, part) => sum + (part.frames || 0), 0);
  const scale = total / track.clientWidth;
  const move = (moved) => resize(at, frames + Math.round(((moved.clientX - from) * scale) / groups()) * groups());
  const end = () => { removeEventListener("pointermove", move); removeEventListener("pointerup", end); };
  addEventListener("pointermove", move); addEventListener("pointerup", end);
}

function keys(event, at) {
  const part = state.parts[at], change = { "+": groups(), "=": groups(), ArrowUp: groups(), "-": -groups(), ArrowDown: -groups() }[event.key];
  if (isGap(part) && change) { event.preventDefault(); event.stopPropagation(); resize(at, part.frames + change); }
  else if (event.key === "Delete" || event.key === "Backspace") { event.preventDefault(); remove([at]); }
  else if (part.media && event.altKey && (event.key === "ArrowLeft" || event.key === "ArrowRight")) { event.preventDefault(); event.stopPropagation(); move(at, event.key === "ArrowLeft" ? -1 : 1); }
}

// Moves a clip past its neighbours.
export function move(at, by, to = null) {
  const clips = media(), from = clips.indexOf(state.parts[at]), into = to ?? from + by;
  if (into < 0 || into >= clips.length || from < 0) return;
  const kept = clips.splice(from, 1);
  clips.splice(into, 0, ...kept);
  let next = 0;
  state.parts = state.parts.map((part) => (part.media ? clips[next++] : part));
  state.selected = null;
  edited();
}

function inspector() {
  const box = $("inspector"), at = state.selected, part = at === null ? null : state.parts[at];
  box.replaceChildren();
  if (!part || part.slot) return;
  const button = (text, act, title) => h("button", { type: "button", class: "ghost", title, onclick: act }, text);
  if (isGap(part)) {
    const field = h("input", { type: "number", min: 0, max: 1024, step: 1, value: String(part.frames), "aria-label": "new frames", onchange: (event) => resize(at, Number(event.target.value)) });
    box.append(button("−", () => resize(at, part.frames - groups())), field, h("span", {}, "new frames"), button("+", () => resize(at, part.frames + groups())), button("take off", () => remove([at])));
    return;
  }
  const view = known(part.media, lookOf());
  const from = h("input", { type: "number", min: 1, max: part.frames, value: "1", "aria-label": "from frame" });
  const to = h("input", { type: "number", min: 1, max: part.frames, value: String(part.frames), "aria-label": "to frame" });
  box.append(h("span", { class: "name" }, part.media.split("/").pop()), view?.note ? h("span", { class: "dim" }, view.note) : "",
    ...(part.frames > 1 ? [h("span", {}, "frames"), from, "–", to, button("cut", () => cut(at, Number(from.value) - 1, Number(to.value)))] : []),
    ...(media().length > 1 ? [button("◂", () => move(at, -1), "to the left (alt ←)"), button("▸", () => move(at, 1), "to the right (alt →)")] : []),
    button("take off", () => remove([at])));
}

export async function cut(at, begin, end) {
  const part = state.parts[at], look = lookOf();
  try {
    const found = await call("POST", `/api/cut${query(look)}`, { name: part.media, begin, end });
    remember(found.name, look, found);
    state.parts[at] = { media: found.name, frames: found.frames };
    state.shelf = media();
    edited();
  } catch (error) { state.refused = error.problem ?? null; changed(); }
}

// Files of this machine, one after another. first: seconds that are kept of a clip that is too long.
export async function upload(files, { first = null, at = null } = {}) {
  const look = lookOf();
  if (!look || !files.length) return;
  for (const file of files) {
    state.uploading++; state.refused = null; changed();
    try {
      if (state.limits.upload && file.size > state.limits.upload) throw Object.assign(new Error(), { problem: { message: `${file.name} has ${Math.round(file.size / 2 ** 20)} MB, and ${state.limits.upload >> 20} are the most; compress or cut it.`, fixes: [], stops: true } });
      const found = await call("POST", `/api/media${query(look)}&name=${encodeURIComponent(file.name)}${first ? `&first=${first}` : ""}`, file);
      remember(found.name, look, found);
      place(found.name, { at, facts: found });
      await viewOf(found.name, look);
    } catch (error) {
      await plan();
      state.refused = { ...(error.problem ?? { message: String(error), fixes: [], stops: true }), file };
    } finally { state.uploading--; changed(); }
  }
}

function thumbnails() {
  const made = state.shown ? null : version(), look = lookOf();
  const result = made ? known(made.name, null) : null;
  let begin = 0;
  const ratio = window.devicePixelRatio || 1;
  for (const node of track.children) {
    const part = state.parts[Number(node.dataset.at)];
    if (!node.classList.contains("part") || !part) continue;
    const canvas = node.firstChild, box = node.getBoundingClientRect(), own = part.media ? known(part.media, look) : null;
    const width = Math.round(box.width * ratio), height = Math.round(box.height * ratio);
    const view = result?.ready ? result : own, whole = view === result && state.parts.filter((one) => one.frames).length === 1;
    const frames = whole && view ? view.frames : part.frames, offset = view === result && !whole ? begin : 0;
    begin += part.frames;
    const key = `${width} ${height} ${view?.name} ${view?.ready} ${offset} ${frames} ${getComputedStyle(document.documentElement).colorScheme}`;
    if (canvas.dataset.key === key) continue;
    canvas.dataset.key = key;
    canvas.width = width; canvas.height = height;
    node.classList.toggle("filled", view === result && Boolean(result?.ready));
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = true;
    if (!view?.ready) { if (isGap(part)) hatch(context, 0, 0, width, height, ratio); continue; }
    const wide = height * (view.width / view.height), count = Math.max(1, Math.ceil(width / wide));
    for (let i = 0; i < count; i++) {
      const frame = frameOf(view, Math.min(view.frames - 1, offset + Math.floor((i * frames) / count)));
      if (frame) context.drawImage(...frame, Math.round(i * wide), 0, Math.ceil(wide), height);
    }
  }
}

function playhead() {
  const line = $("playhead"), made = version();
  const whole = state.parts.filter((part) => part.frames).length === 1;
  let left = player.frame, found = null;
  for (const node of track.children) {
    const part = state.parts[Number(node.dataset.at)];
    if (!node.classList.contains("part") || !part) continue;
    const frames = whole && made && !state.shown ? made.frames : part.frames;
    if (left < frames) { found = node.offsetLeft + (node.offsetWidth * (left + 0.5)) / frames; break; }
    left -= frames;
  }
  line.hidden = found === null || Boolean(state.shown) || !player.count;
  if (found !== null) line.style.transform = `translateX(${found}px)`;
}

// A click on the strip also seeks.
track.addEventListener("click", (event) => {
  const node = event.target.closest(".part");
  if (!node || state.shown || event.detail === 0) return;
  const at = Number(node.dataset.at), box = node.getBoundingClientRect();
  const before = state.parts.slice(0, at).reduce((sum, part) => sum + part.frames, 0);
  seek(Math.min(player.count - 1, before + Math.floor(((event.clientX - box.left) / box.width) * state.parts[at].frames)));
});

$("file").addEventListener("change", async () => { const files = [...$("file").files]; $("file").value = ""; await upload(files); });
for (const type of ["dragover", "drop"]) addEventListener(type, (event) => event.preventDefault());
addEventListener("drop", (event) => {
  const node = event.target.closest?.(".part, .insert, .slot");
  const at = node ? Number(node.dataset.at) : null, files = [...event.dataTransfer.files];
  const name = event.dataTransfer.getData("text/version"), from = event.dataTransfer.getData("text/part");
  const open = node && state.parts[at]?.slot ? null : at;
  if (files.length) upload(files, { at: open });
  else if (name) { const one = state.versions.find((version) => version.name === name); place(name, { at: open, label: one?.request.label, caption: one?.request.caption }); }
  else if (from !== "" && at !== null) move(Number(from), 0, state.parts.slice(0, at + (at > Number(from) ? 1 : 0)).filter((part) => part.media).length - (at > Number(from) ? 1 : 0));
});
