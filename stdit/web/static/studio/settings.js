// What is to be seen, how it is sampled, what stands in the way, and the requests that are on their way.
import { $, call, duration, h } from "./dom.js";
import { changed, choose, draw, edited, gap, plan, remove, request, state, viewOf } from "./state.js";
import { useModel } from "./models.js";
import { play, player } from "./stage.js";
import { append, cut, resize, upload } from "./timeline.js";

const form = $("settings");
let built = "";

export function drawSettings() {
  const { facts, task } = state;
  // Not for what is being typed, which would be lost.
  const shape = JSON.stringify([facts, task, state.label, state.pinned, state.form]);
  if (shape !== built) { built = shape; build(); }
  for (const [i, name] of ["height", "width"].entries()) form.querySelector(`#${name}`)?.setAttribute("placeholder", state.plan?.size[i] ?? "");
  const seed = form.querySelector("#seed");
  if (seed && document.activeElement !== seed) seed.value = state.seed ?? "";
  const stopped = !facts || !state.connected || !state.plan || state.plan.problems.some((problem) => problem.stops);
  const fill = form.querySelector("#fill");
  if (fill) fill.disabled = stopped;
  drawNotices(); drawJobs(); drawCommand();
}

function field(label, node, hint = "") { return h("label", { class: "field", title: hint }, h("span", {}, label), node); }
function number(id, value, options, set) {
  return h("input", { id, type: "number", value: value === null ? "" : String(value), ...options, oninput: (event) => { set(event.target.value === "" ? null : Number(event.target.value)); later(); } });
}
// A model that has learnt guidance takes the scales that it has learnt.
function bounds(scales) { const most = Object.values(scales); return most.length ? { min: 1, max: Math.max(...most) } : { min: 0 }; }
function settled() { changed(); plan(); }

function build() {
  const { facts, task } = state;
  if (!facts) return form.replaceChildren();
  const own = {
    interpolate: () => [field("times as many frames", h("select", { id: "factor", onchange: (event) => { state.factor = Number(event.target.value); edited(); } }, ...[2, 3, 4, 8].map((one) => h("option", { value: String(one), selected: one === state.factor }, String(one)))))],
    edit: () => {
      const output = h("output", {}, String(state.strength));
      return [field("change", h("span", { class: "slider" }, h("input", { id: "strength", type: "range", min: 0, max: 1, step: 0.05, value: String(state.strength), oninput: (event) => { state.strength = Number(event.target.value); output.textContent = event.target.value; }, onchange: settled }), output), "0 changes nothing, 1 everything")];
    },
    outpaint: () => [field("height", number("height", state.height, { min: facts.grid[0], step: facts.grid[0] }, (value) => { state.height = value; state.filled = null; })), field("width", number("width", state.width, { min: facts.grid[1], step: facts.grid[1] }, (value) => { state.width = value; state.filled = null; }))],
  }[task]?.() ?? [];
  const rest = [
    field("steps", number("steps", state.steps, { min: 1, max: 1000, placeholder: String(facts.steps) }, (value) => (state.steps = value)), "solver steps: more are slower and better"),
    facts.guided ? field("guidance", number("guidance", state.guidance, { ...bounds(facts.scales), step: "any", placeholder: String(facts.guidance) }, (value) => (state.guidance = value)), "how strongly the label or text is followed; 1: not at all") : null,
    field("variations", number("count", state.count, { min: 1, max: 8 }, (value) => (state.count = value ?? 1))),
    field("seed", h("span", { class: "seed" },
      number("seed", state.seed, { min: 0, max: Number.MAX_SAFE_INTEGER }, (value) => { state.seed = value ?? draw(); state.pinned = value !== null; }),
      h("button", { type: "button", id: "pin", class: "ghost", "aria-pressed": String(state.pinned), title: state.pinned ? "this seed is used again; press for a new one each time" : "a new seed is drawn each time; press to keep this one", onclick: () => { state.pinned = !state.pinned; if (!state.pinned) draw(); settled(); } }, state.pinned ? "kept" : "drawn"))),
    state.height && task !== "outpaint" ? field("size", h("button", { type: "button", class: "ghost", title: "back to the size of training", onclick: () => { state.height = state.width = null; state.form++; edited(); } }, `${state.height} × ${state.width} ✕`)) : null,
  ];
  const fill = h("button", { id: "fill", type: "submit", class: "primary" }, h("span", {}, task === "generate" ? "Generate" : task === "edit" ? "Edit" : "Fill"), h("kbd", {}, "⌃↵"));
  form.replaceChildren(what(facts), h("div", { class: "row" }, ...own, ...rest.filter(Boolean), h("span", { class: "grow" }), fill));
}

function what(facts) {
  const rows = [];
  if (facts.classes.length && facts.classes.length <= 24) {
    const chip = (name, text = name) => h("button", { type: "button", class: "chip", "aria-pressed": String(state.label === name), onclick: () => { state.label = state.label === name ? null : name; settled(); } }, text);
    rows.push(h("div", { class: "chips", role: "group", "aria-label": "label" }, ...facts.classes.map((name) => chip(name))));
  } else if (facts.classes.length) {
    rows.push(field("label", h("input", { id: "label", list: "labels", value: state.label ?? "", placeholder: `one of ${facts.classes.length}`, onchange: (event) => { state.label = event.target.value || null; settled(); } })),
      h("datalist", { id: "labels" }, ...facts.classes.map((name) => h("option", { value: name }))));
  }
  if (facts.captions) {
    const most = state.limits.text, full = h("small", { class: "dim", id: "full", hidden: (state.caption ?? "").length < most }, `a text has at most ${most} characters`);
    rows.push(h("textarea", { id: "caption", rows: 2, maxLength: most, placeholder: "what is to be seen", "aria-label": "caption", oninput: (event) => { state.caption = event.target.value || null; full.hidden = event.target.value.length < most; later(); } }, state.caption ?? ""), full);
  }
  return h("div", { class: "what" }, ...rows);
}
let timer = 0;
function later() { clearTimeout(timer); timer = setTimeout(settled, 200); }

// Changes that a button of a problem makes.
const CHANGES = {
  task: (task) => choose(task),
  gap: ([at, frames]) => resize(at, frames),
  before: () => { if (state.parts[0]?.media === null) state.parts[0] = gap(0); edited(); },
  append: (frames) => append(frames),
  insert: ([at, frames]) => { state.parts.splice(at, 0, gap(frames)); edited(); },
  remove: (indices) => remove(indices),
  cut: ([at, begin, end]) => cut(at, begin, end),
  label: (label) => { state.label = label; settled(); },
  caption: (caption) => { state.caption = caption; settled(); },
  count: (count) => { state.count = count; settled(); },
  guidance: (scale) => { state.guidance = scale; settled(); },
  size: ([height, width]) => { state.height = height; state.width = width; edited(); },
  seed: () => { draw(); state.pinned = false; settled(); },
  show: (name) => dispatchEvent(new CustomEvent("show-version", { detail: name })),
  model: (name) => useModel(name),
  upload: ({ first }, file) => { if (file) upload([file], { first }); },
  again: (body) => submit(body),
};

function fixed(fix) {
  const file = state.refused?.file;
  state.refused = null;
  state.form++;
  for (const [name, value] of Object.entries(fix.change)) CHANGES[name]?.(value, file);
  changed();
}

function drawNotices() {
  const found = state.refused ? [state.refused] : state.plan?.problems ?? [];
  const key = JSON.stringify(found);
  const box = $("notices");
  if (box.dataset.key === key) return;
  box.dataset.key = key;
  box.replaceChildren(...found.map((problem) => h("div", { class: `notice${problem.stops ? " stops" : ""}` }, h("span", {}, problem.message),
    ...problem.fixes.map((fix) => h("button", { type: "button", class: "fix", onclick: () => fixed(fix) }, fix.label)),
    state.refused ? h("button", { type: "button", class: "fix quiet", "aria-label": "dismiss", onclick: () => { state.refused = null; changed(); plan(); } }, "✕") : null)));
}

function drawJobs() {
  const box = $("jobs");
  const here = [...state.jobs.values()].filter((job) => ["waiting", "running"].includes(job.state) || (state.mine.has(job.id) && job.state === "failed"));
  const have = new Map([...box.children].map((node) => [node.dataset.id, node]));
  for (const [id, node] of have) if (!here.some((job) => job.id === id)) node.remove();
  for (const job of here) {
    let node = have.get(job.id);
    if (!node) {
      node = h("div", { class: "job", data: { id: job.id } }, h("div", { class: "bar" }, h("i", {})), h("span", { class: "says numbers" }), h("button", { type: "button", class: "ghost cancel" }, "cancel"));
      node.querySelector(".cancel").addEventListener("click", () => { const now = state.jobs.get(job.id); if (now?.state === "failed") { own(job.id); changed(); } else cancel(job.id); });
      box.append(node);
    }
    node.classList.toggle("failed", job.state === "failed");
    node.querySelector("i").style.width = `${100 * job.share}%`;
    const whose = state.mine.has(job.id) ? "" : " (another tab)";
    const what = `${job.request.task}${job.request.label ? `, ${job.request.label}` : ""}${whose}`;
    const left = job.left === null || !job.share ? "beginning" : `${duration(job.left)} left`;
    const step = job.step[1] ? ` · step ${job.step[0]} of ${job.step[1]}` : "";
    node.querySelector(".says").textContent = job.state === "failed" ? job.problem.message : job.state === "waiting" ? `${what} · waits` : job.cancelling ? `${what} · stopping` : `${what}${step} · ${left}`;
    node.querySelector(".cancel").textContent = job.state === "failed" ? "✕" : "cancel";
  }
}

export async function cancel(id) {
  const job = state.jobs.get(id);
  if (job) job.cancelling = true;
  changed();
  try { await call("DELETE", `/api/jobs/${id}`); } catch (error) { state.refused = error.problem; changed(); }
}
// The last request of this tab that is not cancelled yet, also one that the server has not answered.
export function cancelLast() {
  const waits = asking.findLast((one) => !one.cancelled);
  if (waits) { waits.cancelled = true; return; }
  const mine = [...state.jobs.values()].filter((job) => state.mine.has(job.id) && ["waiting", "running"].includes(job.state) && !job.cancelling);
  if (mine.length) cancel(mine.at(-1).id);
}

function drawCommand() {
  const lines = state.plan?.commands ?? [];
  $("command").hidden = !lines.length;
  $("command").firstChild.textContent = lines.join("\n");
}
$("copy").addEventListener("click", async () => {
  const text = $("command").firstChild.textContent;
  try { await navigator.clipboard.writeText(text); } catch { getSelection().selectAllChildren($("command").firstChild); document.execCommand("copy"); }
  $("copy").textContent = "copied";
  setTimeout(() => ($("copy").textContent = "copy"), 1200);
});

let asking = []; // requests that are not answered yet
export async function submit(body = request()) {
  const arrangement = JSON.stringify(state.parts) + state.task, one = { cancelled: false };
  if (!state.pinned) draw(); // at once, so that two clicks are two clips
  asking.push(one);
  try {
    const job = await call("POST", "/api/jobs", body);
    own(job.id, arrangement);
    state.jobs.set(job.id, { ...job, ...state.jobs.get(job.id) }); // it may have been told of already, and even be done
    if (one.cancelled) cancel(job.id);
    state.refused = null;
    changed(); plan();
  } catch (error) { state.refused = error.problem ?? null; changed(); }
  asking = asking.filter((other) => other !== one);
}

// Notes a request as one of this tab, also after the page is loaded again; without an arrangement as one of none.
function own(id, arrangement) {
  if (arrangement === undefined) state.mine.delete(id); else state.mine.set(id, arrangement);
  sessionStorage.setItem("mine", JSON.stringify([...state.mine].slice(-64)));
}

// Shows what was made, once: in the gaps of the timeline if that is still as it was when it was asked for.
export function showFinished() {
  if (!state.facts) return; // the timeline is not laid yet
  for (const job of state.jobs.values()) {
    const arrangement = state.mine.get(job.id), name = job.versions[0];
    if (job.state !== "done" || !arrangement) continue;
    own(job.id, null);
    viewOf(name, null).catch(() => {});
    if (arrangement === JSON.stringify(state.parts) + state.task) Object.assign(state, { filled: name, shown: null, compare: false }); else state.shown = name;
    player.frame = 0;
    play(true);
  }
}
form.addEventListener("submit", (event) => { event.preventDefault(); if (!form.querySelector("#fill").disabled) submit(); });
