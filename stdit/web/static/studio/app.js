// The page: connects to the server and stays connected, and hears keys.
import { $, h } from "./dom.js";
import { atWork, changed, choose, draw, listen, loading, plan, state } from "./state.js";
import { compare, drawStage, play, player, retry, seek } from "./stage.js";
import { drawTimeline } from "./timeline.js";
import { cancelLast, drawSettings, showFinished, submit } from "./settings.js";
import { drawHistory } from "./history.js";
import { useModel } from "./models.js";
import { openRuns } from "./runs.js";
import { icon, TASKS } from "./icons.js";

const names = Object.keys(TASKS);
$("tasks").append(...names.map((name, i) => h("button", { type: "button", class: "task", id: `task-${name}`, title: `${TASKS[name]} (${i + 1})`, onclick: () => choose(name) }, icon(name), h("span", {}, name))));

function drawFrame() {
  for (const name of names) { $(`task-${name}`).setAttribute("aria-pressed", String(state.task === name)); $(`task-${name}`).disabled = !state.facts; }
  const status = $("status");
  status.className = state.connected ? (state.facts ? "on" : "wait") : "off";
  const busy = atWork().length;
  status.lastChild.textContent = state.full ?? (!state.connected ? "the server has stopped" : !state.facts ? loading() : busy ? `${busy} at work` : "ready");
  const select = $("model"), list = JSON.stringify([state.models.map((model) => model.name), state.model]);
  if (select.dataset.key !== list) {
    select.dataset.key = list;
    select.replaceChildren(...state.models.map((model) => h("option", { value: model.name, selected: model.name === state.model, disabled: Boolean(model.error), title: model.error ?? "" }, model.name)));
  }
  $("model-text").textContent = state.models.find((model) => model.name === state.model)?.text ?? "";
}
for (const drawn of [drawFrame, drawStage, drawTimeline, drawSettings, drawHistory, showFinished]) listen(drawn);

$("model").addEventListener("change", () => useModel($("model").value));
addEventListener("models", (event) => { state.models = event.detail; changed(); });

const handlers = {
  hello(message) {
    const again = state.boot !== null && state.boot !== message.boot;
    Object.assign(state, { connected: true, full: null, boot: message.boot, models: message.models, versions: message.versions, limits: { upload: message.upload, seconds: message.seconds, text: message.text } });
    const lost = [...state.jobs.values()].filter((job) => state.mine.has(job.id) && ["waiting", "running"].includes(job.state) && !message.jobs.some((one) => one.id === job.id));
    state.jobs = new Map(message.jobs.map((job) => [job.id, { ...state.jobs.get(job.id), ...job }]));
    tellLost(lost);
    retry();
    const kept = sessionStorage.getItem("model");
    const usable = (name) => state.models.some((model) => model.name === name && !model.error);
    if (!state.facts || again) useModel(usable(state.model) ? state.model : usable(kept) ? kept : state.models.find((model) => !model.error)?.name);
    changed();
  },
  job({ job }) {
    state.jobs.set(job.id, { ...state.jobs.get(job.id), ...job });
    changed();
  },
  versions({ versions }) { state.versions = versions; changed(); },
  full({ message }) { state.full = message; changed(); },
};

function tellLost(jobs) {
  const box = $("banner");
  box.hidden = !jobs.length;
  if (!jobs.length) return;
  box.replaceChildren(h("span", {}, `The server was started again; ${jobs.length === 1 ? "what it was sampling is" : `${jobs.length} requests are`} lost.`),
    h("button", { type: "button", class: "fix", id: "again", onclick: () => { box.hidden = true; for (const job of jobs) submit(job.request); } }, "Do it again"),
    h("button", { type: "button", class: "fix quiet", "aria-label": "dismiss", onclick: () => { box.hidden = true; } }, "✕"));
}

let wait = 300;
function connect() {
  const socket = new WebSocket(`ws://${location.host}/events`);
  socket.addEventListener("message", ({ data }) => { const message = JSON.parse(data); wait = 300; handlers[message.type]?.(message); });
  socket.addEventListener("close", () => {
    if (state.full) return setTimeout(connect, 3000);
    const was = state.connected;
    state.connected = false;
    if (was || state.boot === null) {
      const lost = [...state.jobs.values()].some((job) => state.mine.has(job.id) && ["waiting", "running"].includes(job.state));
      $("banner").replaceChildren(h("span", {}, `The server has stopped${lost ? " while it was sampling" : ""}. Start it again with `, h("code", {}, "stdit studio"), "; this page waits for it, and keeps what is on it."));
      $("banner").hidden = false;
    }
    changed();
    setTimeout(connect, wait);
    wait = Math.min(2000, wait * 1.5);
  });
}
connect();

// Tabs of the side, theme and keys.
function side(runs) {
  $("runs").hidden = !runs; $("versions").hidden = runs;
  $("tab-runs").setAttribute("aria-selected", String(runs)); $("tab-versions").setAttribute("aria-selected", String(!runs));
  openRuns(runs);
}
$("tab-versions").addEventListener("click", () => side(false));
$("tab-runs").addEventListener("click", () => side(true));

const dark = () => getComputedStyle(document.documentElement).colorScheme === "dark" || (getComputedStyle(document.documentElement).colorScheme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
function theme(name) { document.documentElement.style.colorScheme = name; for (const canvas of document.querySelectorAll("canvas")) delete canvas.dataset.key; changed(); }
if (localStorage.getItem("theme")) theme(localStorage.getItem("theme"));
$("theme").addEventListener("click", () => { const name = dark() ? "light" : "dark"; localStorage.setItem("theme", name); theme(name); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(localStorage.getItem("theme") ?? "light dark"));

const KEYS = [["1 … 9", "the tasks"], ["space", "play or stop"], ["← →", "one frame back or forward"], ["home end", "first or last frame"], ["ctrl enter", "generate or fill"], ["esc", "cancel, within one step"], ["o", "open a file"], ["+ −", "more or fewer new frames, on a gap"], ["alt ← →", "move a clip, on a clip"], ["delete", "take a part off"], ["c", "before and after"], ["s", "draw another seed"], ["?", "these keys"]];
$("keys").querySelector("table").append(...KEYS.map(([key, what]) => h("tr", {}, h("td", {}, h("kbd", {}, key)), h("td", {}, what))));
$("help").addEventListener("click", () => $("keys").showModal());
addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") { event.preventDefault(); const fill = $("fill"); if (fill && !fill.disabled) { document.activeElement?.blur?.(); submit(); } return; }
  const typing = event.target.matches?.("input:not([type=range]), textarea, select") || $("keys").open;
  if (event.key === "Escape" && !$("keys").open) return cancelLast();
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = {
    " ": () => play(), ArrowLeft: () => { play(false); seek(player.frame - 1); }, ArrowRight: () => { play(false); seek(player.frame + 1); },
    Home: () => seek(0), End: () => seek(player.count - 1), "?": () => $("keys").showModal(), c: compare, o: () => $("file").click(), s: () => { draw(); changed(); plan(); },
  }[event.key] ?? (/^[1-9]$/.test(event.key) && state.facts ? () => choose(names[event.key - 1]) : null);
  if (act && !(event.key === " " && event.target.matches?.("button")) && !(event.target.matches?.("input[type=range]") && event.key.startsWith("Arrow"))) { event.preventDefault(); act(); }
});
// A button that was clicked does not keep the keys.
addEventListener("click", (event) => { if (event.detail) event.target.closest?.("button:not(.part)")?.blur(); });
new ResizeObserver(() => changed()).observe($("work"));
