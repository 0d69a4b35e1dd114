// Training runs: curves that grow as the run writes, and its previews.
import { $, ago, call, h } from "./dom.js";

const runs = { listing: [], chosen: null, data: null, preview: null, hover: null, key: "loss" };
const CHARTS = [["loss", "loss"], ["held_out_loss", "held-out loss"], ["clips_per_second", "clips per second"], ["grad_norm", "gradient norm"], ["lr", "learning rate"]];
let open = false, timer = 0;

export function openRuns(on) {
  open = on;
  clearTimeout(timer);
  if (on) poll();
}

async function poll() {
  clearTimeout(timer);
  if (!open) return;
  if (!document.hidden) {
    try {
      const found = await call("GET", "/api/runs");
      runs.listing = found.runs;
      dispatchEvent(new CustomEvent("models", { detail: found.models }));
      runs.chosen ??= runs.listing[0]?.name ?? null;
      if (runs.chosen) {
        const last = runs.data?.previews.length, data = await call("GET", `/api/runs/${encodeURIComponent(runs.chosen)}`);
        if (runs.data?.name !== data.name || last !== data.previews.length) runs.preview = null; // the newest
        runs.data = data;
      }
      draw();
    } catch (error) { if (error.problem && runs.chosen) { runs.chosen = null; runs.data = null; draw(error.problem.message); } }
  }
  timer = setTimeout(poll, 3000);
}
addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });

function draw(message = "") {
  const box = $("runs"), { data } = runs;
  if (!runs.listing.length) return box.replaceChildren(h("p", { class: "dim none" }, "Runs of ", h("code", {}, "stdit train"), " are shown here while they train."));
  const chooser = h("select", { "aria-label": "run", onchange: (event) => { runs.chosen = event.target.value; runs.data = null; poll(); } }, ...runs.listing.map((run) => h("option", { value: run.name, selected: run.name === runs.chosen }, run.name)));
  const listed = runs.listing.find((run) => run.name === runs.chosen);
  const parts = [h("div", { class: "run" }, chooser, listed?.live ? h("span", { class: "live" }, "training") : h("span", { class: "dim" }, listed ? ago(listed.changed) : ""))];
  if (message) parts.push(h("p", { class: "notice" }, message));
  if (data) {
    const share = data.steps ? Math.min(1, data.step / data.steps) : 0;
    parts.push(h("div", { class: "steps numbers" }, h("span", {}, `step ${data.step.toLocaleString("en")}${data.steps ? ` of ${data.steps.toLocaleString("en")}` : ""}`), data.steps ? h("div", { class: "bar" }, h("i", { style: { width: `${100 * share}%` } })) : null));
    const have = CHARTS.filter(([key]) => data.curves[key]);
    parts.push(...have.filter(([key]) => key.includes("loss")).map(([key, title]) => chart(key, title)), h("div", { class: "small" }, ...have.filter(([key]) => !key.includes("loss")).map(([key, title]) => chart(key, title, 56))));
    if (data.previews.length) parts.push(previews(data));
  }
  // Charts are drawn when their size is known; a slider that is held stays.
  if (box.contains(document.activeElement) && document.activeElement.type === "range") return;
  box.replaceChildren(...parts);
  for (const canvas of box.querySelectorAll("canvas[data-key]")) plot(canvas);
}

function chart(key, title, height = 120) {
  const canvas = h("canvas", { data: { key }, style: { height: `${height}px` }, onpointermove: (event) => { const box = canvas.getBoundingClientRect(); plot(canvas, (event.clientX - box.left) / box.width); }, onpointerleave: () => plot(canvas) });
  return h("figure", {}, h("figcaption", {}, h("span", {}, title), h("span", { class: "value numbers" })), canvas);
}

function plot(canvas, hover = null) {
  const { key } = canvas.dataset, { curves } = runs.data, steps = curves.step, style = getComputedStyle(document.documentElement);
  const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * ratio; canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const levels = key === "loss" ? Object.keys(curves).filter((name) => name.startsWith("loss_level_")) : [];
  const shown = [...levels, key].map((name) => smooth(curves[name]));
  const finite = curves[key].filter((value) => value !== null).sort((a, b) => a - b);
  if (!finite.length) return;
  const log = key === "grad_norm", scale = (value) => (log ? Math.log10(Math.max(value, 1e-9)) : value);
  // A few spikes must not flatten the rest.
  const all = shown.flat().filter((value) => value !== null).sort((a, b) => a - b);
  const high = scale(all[Math.floor(0.985 * (all.length - 1))]), low = key === "lr" || key === "clips_per_second" ? 0 : scale(all[0]);
  const x = (i) => 2 + ((width - 4) * (steps[i] - steps[0])) / Math.max(1, steps.at(-1) - steps[0]);
  const y = (value) => height - 4 - ((height - 12) * (scale(value) - low)) / Math.max(1e-12, (high - low) * 1.05);
  context.strokeStyle = style.getPropertyValue("--line");
  for (const part of [0.25, 0.5, 0.75, 1]) { context.beginPath(); context.moveTo(0, part * height - 0.5); context.lineTo(width, part * height - 0.5); context.stroke(); }
  shown.forEach((values, n) => {
    context.beginPath();
    context.strokeStyle = style.getPropertyValue(n === shown.length - 1 ? "--accent" : "--faint");
    context.lineWidth = n === shown.length - 1 ? 1.75 : 1;
    let begun = false;
    values.forEach((value, i) => { if (value === null) return; begun ? context.lineTo(x(i), y(value)) : context.moveTo(x(i), y(value)); begun = true; });
    context.stroke();
  });
  const at = hover === null ? null : steps.reduce((best, _, i) => (Math.abs(x(i) - hover * width) < Math.abs(x(best) - hover * width) ? i : best), 0);
  const last = curves[key].findLastIndex((value) => value !== null), point = at ?? last;
  if (at !== null) { context.strokeStyle = style.getPropertyValue("--dim"); context.lineWidth = 1; context.beginPath(); context.moveTo(x(at), 0); context.lineTo(x(at), height); context.stroke(); }
  const value = curves[key][point];
  canvas.parentNode.querySelector(".value").textContent = value === null ? "" : `${at === null ? "" : `step ${steps[at]}: `}${value && Math.abs(value) < 1e-3 ? value.toExponential(2) : Number(value.toPrecision(4))}`;
}

function smooth(values) {
  const reach = Math.floor(values.length / 120);
  if (!reach) return values;
  return values.map((value, i) => {
    const near = values.slice(Math.max(0, i - reach), i + reach + 1).filter((one) => one !== null);
    return value === null || !near.length ? null : near.reduce((sum, one) => sum + one, 0) / near.length;
  });
}

function previews(data) {
  const chosen = runs.preview ?? data.previews.filter((name) => name.startsWith("step-")).length - 1;
  const at = Math.max(0, Math.min(chosen < 0 ? data.previews.length - 1 : chosen, data.previews.length - 1));
  const source = (i) => `/preview/${encodeURIComponent(data.name)}/${encodeURIComponent(data.previews[i])}`;
  const title = (i) => (data.previews[i].startsWith("step-") ? `preview at step ${Number(data.previews[i].slice(5, -4)).toLocaleString("en")}` : "final samples");
  const caption = h("figcaption", {}, title(at)), image = h("img", { src: source(at), alt: title(at), loading: "lazy" });
  const slider = h("input", { type: "range", min: 0, max: data.previews.length - 1, value: String(at), "aria-label": "preview", oninput: (event) => { runs.preview = Number(event.target.value); image.src = source(runs.preview); caption.textContent = image.alt = title(runs.preview); } });
  return h("figure", { class: "previews" }, caption, h("a", { href: source(at), target: "_blank" }, image), data.previews.length > 1 ? slider : null);
}
