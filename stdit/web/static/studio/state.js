// The state of this tab, and what changes it. Modules listen, and draw what they show of it.
import { call, path, query, Refused } from "./dom.js";

// The requests of this tab, and how the timeline was when they were made; null for those whose result was shown.
function kept() {
  try { return new Map(JSON.parse(sessionStorage.getItem("mine"))); } catch { return new Map(); }
}

export const state = {
  connected: false, boot: null, models: [], model: null, facts: null, versions: [], jobs: new Map(), limits: {},
  task: "generate", parts: [], selected: null, label: null, caption: null, steps: null, guidance: null, seed: null, pinned: false,
  count: 1, factor: 2, strength: 0.6, mask: null, height: null, width: null,
  plan: null, refused: null, shown: null, filled: null, compare: false, masked: null, form: 0, mine: kept(), uploading: 0,
};
window.studio = state; // for tests

export const atWork = () => [...state.jobs.values()].filter((job) => ["waiting", "running"].includes(job.state));
// What a model that is not loaded yet waits for.
export const loading = () => (atWork().length ? "the model is loaded when what is at work is over, or cancelled" : "loading the model");

const listeners = [];
export const listen = (listener) => listeners.push(listener);
let due = false;
export function changed() {
  if (due) return;
  due = true;
  queueMicrotask(() => { due = false; for (const listener of listeners) listener(state); });
}

// Frames of files, by name and look; those that were not looked at for longest go first.
const views = new Map();
const MOST_PIXELS = 2 ** 26;
function makeRoom() {
  let pixels = 0;
  for (const [key, view] of [...views].reverse()) {
    pixels += view.frames * view.height * view.width;
    if (pixels < MOST_PIXELS || key === [...views.keys()].at(-1)) continue;
    views.delete(key);
    for (const picture of view.pictures) picture?.close();
  }
}
export const lookOf = () => {
  const { facts } = state;
  if (!facts) return null;
  const inner = state.task === "outpaint" ? state.plan?.inner : null;
  const size = inner ? { height: inner[0], width: inner[1] } : state.task === "outpaint" ? facts : { height: state.height ?? facts.height, width: state.width ?? facts.width };
  return { height: size.height, width: size.width, fps: facts.fps };
};

export function remember(name, look, facts) {
  const key = name + query(look);
  if (!views.has(key)) views.set(key, { ...facts, name, look, pictures: [], ready: false });
  const view = views.get(key);
  if (!view.loading) {
    view.loading = Promise.all(Array.from({ length: view.sheets }, async (_, i) => {
      const answer = await fetch(`/sheet/${i}/${path(name)}${query(look)}`);
      if (!answer.ok) throw new Refused((await answer.json()).problem);
      view.pictures[i] = await createImageBitmap(await answer.blob());
    })).then(() => { view.ready = true; changed(); }, () => { views.delete(key); });
    makeRoom();
  }
  return view;
}

export async function viewOf(name, look) {
  const key = name + query(look);
  if (views.has(key)) return views.get(key);
  return remember(name, look, await call("GET", `/api/view/${path(name)}${query(look)}`));
}

export function known(name, look) {
  const key = name + query(look), view = views.get(key);
  if (view) { views.delete(key); views.set(key, view); }
  return view;
}

// Where frame i of a view is: a picture, and a rectangle of it.
export function frameOf(view, i) {
  if (!view?.ready) return null;
  const sheet = Math.floor(i / (view.rows * view.columns)), at = i % (view.rows * view.columns);
  const x = (at % view.columns) * view.width, y = Math.floor(at / view.columns) * view.height;
  return view.pictures[sheet] ? [view.pictures[sheet], x, y, view.width, view.height] : null;
}

// The timeline: {media, frames} or {media: null, frames} or {slot: true}. What changes it forgets what it was filled with.
// masked: the clip over which the mask was painted.
export const isGap = (part) => !part.slot && part.media === null;
export const media = () => state.parts.filter((part) => part.media);
export const gap = (frames) => ({ media: null, frames });
const slot = () => ({ slot: true, media: null, frames: 0 });
export const draw = () => (state.seed = Math.floor(Math.random() * 2 ** 31));

export function edited() {
  state.filled = null;
  state.compare = false;
  state.refused = null;
  changed();
  plan();
  loadParts();
}

// Lays out the clips that are there as a task needs them.
export function arrange(task, clips = null) {
  const { facts } = state;
  const here = clips ?? (media().length ? media() : state.shelf ?? []);
  const group = facts?.group ?? 4, all = facts?.num_frames ?? 17;
  if (here.length) state.shelf = here;
  const first = here[0] ?? slot();
  const same = task === state.task, at = state.parts.findIndex((part) => part.media), end = state.parts.findLastIndex((part) => part.media);
  // The gaps before, between and after the clips stay as they are while the task does.
  const was = (index, other) => (same && at >= 0 && state.parts[index] && isGap(state.parts[index]) ? state.parts[index].frames : other);
  const gaps = same && at >= 0 ? state.parts.slice(at, end).filter(isGap).map((part) => part.frames) : [];
  const between = (clips) => clips.flatMap((part, i) => (i ? [gap(gaps[i - 1] || 3 * group), part] : [part]));
  const layouts = {
    generate: () => [gap(all)],
    animate: () => [first, gap(was(end + 1, all - 1))],
    extend: () => [gap(was(at - 1, 0)), ...between(here.length ? here : [first]), gap(was(end + 1, 2 * group))],
    loop: () => [first, gap(was(end + 1, 3 * group))],
    connect: () => between(here.length > 1 ? here : [first, slot()]),
  };
  state.parts = (layouts[task] ?? (() => [first]))();
  if (task !== state.task) { state.height = state.width = null; state.selected = null; }
  state.task = task;
}

// A task begins with what is on the stage.
export function choose(task) {
  const version = state.versions.find((one) => one.name === (state.shown ?? state.filled));
  const acts = version && task !== "generate" && (state.shown || task !== state.task);
  if (acts && version.request.label && state.facts?.classes.includes(version.request.label)) state.label = version.request.label;
  if (acts && version.request.caption && state.facts?.captions) state.caption = version.request.caption;
  arrange(task, acts ? [{ media: version.name, frames: version.frames }] : null);
  state.shown = null;
  edited();
}

// Puts a file on the timeline: into a slot, or at a place, or at the end with new frames between.
export function place(name, { at = null, label = null, caption = null, facts = null } = {}) {
  const part = { media: name, frames: facts?.frames ?? 0 };
  const open = state.parts.findIndex((one) => one.slot);
  if (label && state.facts?.classes.includes(label)) state.label = label;
  if (caption && state.facts?.captions) state.caption = caption;
  if (at === null && open >= 0) state.parts[open] = part;
  else if (!media().length) arrange(state.task === "generate" ? (facts?.picture ? "animate" : "extend") : state.task, [part]);
  else {
    const clips = media(), before = at === null ? clips.length : state.parts.slice(0, at).filter((one) => one.media).length;
    clips.splice(before, 0, part);
    const task = state.task === "extend" || state.task === "loop" ? state.task : "connect";
    const fit = clips.length > 1 && task === "extend" && !state.parts.some((one) => isGap(one) && one.frames) ? "connect" : task;
    arrange(fit, clips);
  }
  state.shelf = media();
  state.shown = null;
  edited();
}

export function remove(indices) {
  const left = state.parts.map((part, i) => (indices.includes(i) ? (part.media ? slot() : null) : part)).filter(Boolean);
  state.parts = left;
  const clips = media();
  state.shelf = clips;
  const spare = left.filter((part) => part.slot).length > 0 && clips.length > 0 && !["connect"].includes(state.task);
  if (spare || (state.task === "connect" && left.filter((one) => one.slot).length && clips.length > 1)) arrange(state.task, clips);
  state.selected = null;
  edited();
}

export function request() {
  const { model, task, label, caption, steps, guidance, seed, count, factor, strength, mask, height, width } = state;
  const parts = state.parts.map(({ media: name, frames }) => ({ media: name, frames: name ? 0 : frames }));
  return { model, task, parts, label, caption, steps, guidance, seed, count, factor, strength, mask: task === "inpaint" && state.masked === media()[0]?.media ? mask : null, height, width };
}

// Asks what the settings come to; of several answers on their way only the last one counts.
let asked = 0;
export async function plan() {
  if (!state.facts || !state.connected) return;
  const mine = ++asked;
  if (state.seed === null) draw();
  try {
    const inner = String(state.plan?.inner);
    const found = await call("POST", "/api/plan", request());
    if (mine !== asked) return;
    state.plan = found;
    state.refused = null;
    if (String(found.inner) !== inner) loadParts();
  } catch (error) {
    if (mine !== asked || !error.problem) return;
    state.plan = null;
    state.refused = error.problem;
  }
  changed();
}

// Frames of every clip on the timeline, as the model gets them.
export async function loadParts() {
  const look = lookOf();
  await Promise.all(media().map(async (part) => {
    try {
      const view = await viewOf(part.media, look);
      part.frames = view.frames;
    } catch (error) { state.refused ??= error.problem ?? null; } // that of the plan has buttons
  }));
  changed();
}
