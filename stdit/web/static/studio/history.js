// The versions that were made: shown, taken as input, and their settings taken up again.
import { $, ago, h, path, plural } from "./dom.js";
import { arrange, changed, frameOf, known, loadParts, place, plan, state, viewOf } from "./state.js";
import { useModel } from "./models.js";
import { play, player, retry, showMask } from "./stage.js";

let built = "";
const visible = new Set();
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const name = entry.target.dataset.name;
    if (entry.isIntersecting) { visible.add(name); viewOf(name, null).then(changed, () => {}); } else visible.delete(name);
  }
});

export function show(name) {
  const version = state.versions.find((one) => one.name === name);
  if (!version) return;
  const open = state.parts.some((part) => part.slot);
  player.frame = 0;
  if (open) { place(name, { label: version.request.label, caption: version.request.caption }); return; }
  state.shown = name;
  retry(name);
  play(version.frames > 1);
}

addEventListener("show-version", (event) => show(event.detail));

// Everything as it was when a version was made.
export async function restore(version) {
  const { request } = version;
  if (request.model !== state.model && !(await useModel(request.model))) return;
  arrange("generate", []);
  for (const name of ["task", "label", "caption", "steps", "guidance", "seed", "count", "factor", "strength", "height", "width"]) state[name] = request[name];
  state.parts = request.parts.map(({ media, frames }) => ({ media, frames }));
  state.shelf = state.parts.filter((part) => part.media);
  state.pinned = true;
  state.form++;
  state.shown = null;
  state.selected = null;
  state.filled = version.name;
  state.compare = false;
  loadParts().then(() => (request.mask ? showMask(request.mask, state.shelf[0]?.media) : plan()));
  changed();
}

export function drawHistory() {
  const shape = JSON.stringify([state.versions.map((one) => one.name), state.shown ?? state.filled]);
  if (shape !== built) { built = shape; build(); }
  for (const canvas of document.querySelectorAll("#versions canvas")) {
    const name = canvas.closest(".version").dataset.name;
    if (!visible.has(name)) continue;
    const view = known(name, null), hovered = canvas.closest(".version").matches(":hover, :focus-within");
    const frame = hovered ? player.clock % (view?.frames ?? 1) : Math.floor((view?.frames ?? 1) / 2);
    const key = `${view?.ready} ${frame}`;
    const place = view && frameOf(view, frame);
    if (!place || canvas.dataset.key === key) continue;
    canvas.dataset.key = key;
    canvas.width = Math.min(320, view.width * 2); canvas.height = Math.round((canvas.width * view.height) / view.width);
    canvas.getContext("2d").drawImage(...place, 0, 0, canvas.width, canvas.height);
  }
}
player.clock = 0;
setInterval(() => { player.clock++; if (document.querySelector(".version:hover, .version:focus-within")) changed(); }, 125);

function build() {
  const box = $("versions"), current = state.shown ?? state.filled;
  if (!state.versions.length) { box.replaceChildren(h("p", { class: "dim none" }, "What you generate is kept here, with its settings.")); return; }
  const old = new Map([...box.querySelectorAll(".version")].map((node) => [node.dataset.name, node]));
  const numbers = new Map(state.versions.map((one) => [one.name, one.number]));
  const cards = state.versions.map((version) => {
    const node = old.get(version.name) ?? card(version, numbers);
    node.classList.toggle("current", version.name === current);
    return node;
  });
  box.replaceChildren(...cards);
}

function card(version, numbers) {
  const { request } = version, what = request.label ?? request.caption ?? "";
  const from = request.parts.filter((part) => part.media).map((part) => (numbers.has(part.media) ? `v${numbers.get(part.media)}` : part.media.split("/").pop())).join(" + ");
  const node = h("article", { class: "version", data: { name: version.name }, draggable: true },
    h("button", { type: "button", class: "face", title: "show", onclick: () => show(version.name) }, h("canvas", { width: 64, height: 64 })),
    h("div", { class: "about" },
      h("b", {}, `v${version.number} `, h("span", {}, request.task)),
      h("span", { class: "line" }, what || "—"),
      h("span", { class: "line dim made" }, h("span", { class: "from", title: from }, from), h("span", {}, `${from ? "→ " : ""}${plural(version.frames, "frame")} · ${ago(version.time)}`)),
      h("span", { class: "tools" },
        h("button", { type: "button", class: "ghost use", title: "lay it on the timeline", onclick: () => place(version.name, { label: request.label, caption: request.caption }) }, "use"),
        h("button", { type: "button", class: "ghost restore", title: "timeline and settings as they were", onclick: () => restore(version) }, "settings"),
        h("a", { class: "ghost", href: `/download/${version.name.endsWith(".png") ? "png" : "mp4"}/${path(version.name)}`, download: "", title: "save" }, "↓"))));
  if (version.warnings?.length) node.querySelector(".about").append(h("span", { class: "line warn", title: version.warnings.join("\n") }, `⚠ ${version.warnings[0]}`));
  node.addEventListener("dragstart", (event) => event.dataTransfer.setData("text/version", version.name));
  seen.observe(node);
  return node;
}
