// The stage: shows a version, or the timeline before it is filled, frame by frame; and the brush over it.
import { $, h, path } from "./dom.js";
import { changed, frameOf, known, loading, lookOf, media, plan, state, viewOf } from "./state.js";

export const player = { frame: 0, playing: false, count: 0, fps: 8, next: 0 };
window.player = player; // for tests
const picture = $("picture"), paint = $("paint"), pen = paint.getContext("2d", { willReadFrequently: true });
let erasing = false;

// Versions whose frames were asked for: null while they are on their way, then the problem for which there are none.
const asked = new Map();
function ask(name) {
  asked.set(name, null);
  viewOf(name, null).then(() => asked.delete(name), (error) => asked.set(name, (state.refused = error.problem ?? { message: String(error), fixes: [], stops: true }))).then(changed);
}
// Asks anew for the frames of a version, or of all of them.
export function retry(name) { if (name === undefined) asked.clear(); else if (asked.get(name)) asked.delete(name); }

export const version = () => state.versions.find((one) => one.name === (state.shown ?? (state.compare ? null : state.filled))) ?? null;

// What is shown: frames, and for each a rectangle of a picture, or what stands in for one that is not made yet.
export function program() {
  const made = version();
  if (made) {
    const view = known(made.name, null);
    if (!view && !asked.has(made.name)) ask(made.name);
    return { count: made.frames, fps: made.fps, width: made.width, height: made.height, at: (i) => ({ frame: frameOf(view, i) }), made };
  }
  const look = lookOf();
  if (!look) return null;
  const frames = [];
  const clips = state.parts.map((part) => (part.media ? known(part.media, look) : null));
  state.parts.forEach((part, p) => {
    if (part.slot) return;
    const near = clips.slice(0, p).filter(Boolean).at(-1), later = clips.slice(p + 1).find(Boolean);
    for (let i = 0; i < part.frames; i++)
      frames.push(clips[p] ? { view: clips[p], i } : { gap: true, view: near ?? later, i: near ? near.frames - 1 : 0 });
  });
  const size = state.plan?.size ?? [look.height, look.width];
  const outer = state.task === "outpaint" ? size : [look.height, look.width];
  return {
    count: frames.length, fps: look.fps, height: outer[0], width: outer[1], inner: look,
    at: (i) => (frames[i] ? { ...frames[i], frame: frames[i].view ? frameOf(frames[i].view, frames[i].i) : null } : null),
  };
}

export function hatch(context, x, y, width, height, scale = 1) {
  const style = getComputedStyle(document.documentElement);
  context.save();
  context.beginPath(); context.rect(x, y, width, height); context.clip();
  context.strokeStyle = style.getPropertyValue("--hatch"); context.lineWidth = 1.5 * scale;
  for (let at = x - height; at < x + width; at += 9 * scale) { context.beginPath(); context.moveTo(at, y + height); context.lineTo(at + height, y); context.stroke(); }
  context.restore();
}

export function drawStage() {
  const shown = program();
  const has = Boolean(shown?.count) && (state.task === "generate" || media().length > 0 || Boolean(shown.made));
  $("player").classList.toggle("off", !has);
  $("empty").hidden = has && (Boolean(shown.made) || state.task !== "generate");
  picture.hidden = !has;
  if (!has) { paint.hidden = true; $("brush").hidden = true; player.count = 0; return emptyText(); }
  player.count = shown.count; player.fps = shown.fps;
  player.frame = Math.min(player.frame, shown.count - 1);
  // Small clips are drawn larger, with their pixels, so that what lies over them is sharp.
  const scale = Math.max(1, Math.round(512 / shown.width));
  const width = shown.width * scale, height = shown.height * scale;
  if (picture.width !== width || picture.height !== height) { picture.width = width; picture.height = height; }
  picture.style.aspectRatio = paint.style.aspectRatio = `${shown.width} / ${shown.height}`;
  $("screen").style.setProperty("--ratio", shown.width / shown.height);
  const context = picture.getContext("2d");
  context.imageSmoothingEnabled = shown.width > 256;
  context.clearRect(0, 0, width, height);
  const at = shown.at(player.frame), inner = shown.inner ?? shown;
  const box = [((shown.width - inner.width) / 2 | 0) * scale, ((shown.height - inner.height) / 2 | 0) * scale, inner.width * scale, inner.height * scale];
  if (!shown.made && state.task === "outpaint") hatch(context, 0, 0, width, height, 2);
  if (at?.frame) {
    context.globalAlpha = at.gap ? 0.25 : 1;
    context.drawImage(...at.frame, ...box);
    context.globalAlpha = 1;
  }
  if (at?.gap) hatch(context, 0, 0, width, height, 2);
  const painting = state.task === "inpaint" && !shown.made && media().length === 1 && Boolean(at?.frame);
  paint.hidden = $("brush").hidden = !painting;
  if (painting && (paint.width !== shown.width || paint.height !== shown.height)) { paint.width = shown.width; paint.height = shown.height; state.mask = null; }
  if (painting && state.masked !== media()[0].media) { pen.clearRect(0, 0, paint.width, paint.height); state.masked = media()[0].media; state.mask = null; }
  $("scrub").max = Math.max(0, shown.count - 1);
  $("scrub").value = player.frame;
  $("scrub").style.setProperty("--at", `${shown.count > 1 ? (100 * player.frame) / (shown.count - 1) : 0}%`);
  $("play").textContent = player.playing ? "❚❚" : "▶";
  $("time").textContent = `${player.frame + 1} / ${shown.count} · ${+shown.fps.toFixed(2)} fps`;
  caption(shown);
  emptyText();
}

function caption(shown) {
  const { made } = shown, line = $("caption-line"), can = Boolean(state.filled) && !state.shown && media().length > 0;
  $("compare").hidden = !can;
  $("compare").textContent = state.compare ? "after" : "before";
  line.replaceChildren();
  $("saves").replaceChildren();
  if (!made) return;
  const what = made.request.label ?? made.request.caption ?? "";
  const name = `v${made.number} · ${made.request.task}${what ? ` · ${what}` : ""} · ${made.height} × ${made.width} · seed ${made.request.seed}`;
  line.append(name);
  const link = (format) => h("a", { href: `/download/${format}/${path(made.name)}`, download: "", class: "save", title: `save as ${format}` }, `↓ ${format}`);
  $("saves").append(...(made.name.endsWith(".png") ? [link("png")] : [link("mp4"), link("gif")]));
}

function emptyText() {
  const box = $("empty"), shown = version();
  const text = shown ? asked.get(shown.name)?.message ?? "" : !state.facts
    ? (state.refused ? "" : `${loading()} …`)
    : state.task === "generate" ? "choose a label or write what is to be seen, and generate"
    : media().length ? "" : "drop a clip or picture here";
  box.textContent = text;
  box.hidden = !text;
}

export function seek(frame) {
  if (!player.count) return;
  player.frame = (Math.round(frame) + player.count) % player.count;
  changed();
}
export function play(on = !player.playing) { player.playing = on && player.count > 1; player.next = 0; changed(); }

function tick(now) {
  requestAnimationFrame(tick);
  if (!player.playing || player.count < 2 || document.hidden) return;
  if (!player.next) player.next = now + 1000 / player.fps;
  if (now < player.next) return;
  player.next = Math.max(player.next + 1000 / player.fps, now);
  player.frame = (player.frame + 1) % player.count;
  changed();
}
requestAnimationFrame(tick);

// The brush: what is painted becomes white on a picture of the clip's size, which is sent as the mask.
let stroke = null, sending = null;
const colour = () => getComputedStyle(document.documentElement).getPropertyValue("--accent");
const place = (event) => { const box = paint.getBoundingClientRect(); return [((event.clientX - box.left) / box.width) * paint.width, ((event.clientY - box.top) / box.height) * paint.height]; };
function dab([x, y]) {
  pen.globalCompositeOperation = erasing ? "destination-out" : "source-over";
  pen.strokeStyle = pen.fillStyle = colour();
  pen.lineCap = pen.lineJoin = "round";
  pen.lineWidth = (Number($("brush-size").value) / 100) * paint.width;
  pen.beginPath(); pen.moveTo(...(stroke ?? [x, y])); pen.lineTo(x + 0.01, y); pen.stroke();
  stroke = [x, y];
}
paint.addEventListener("pointerdown", (event) => { paint.setPointerCapture(event.pointerId); play(false); stroke = null; dab(place(event)); });
paint.addEventListener("pointermove", (event) => { if (stroke) for (const one of event.getCoalescedEvents?.() ?? [event]) dab(place(one)); });
for (const end of ["pointerup", "pointercancel"]) paint.addEventListener(end, () => { if (stroke) { stroke = null; sendMask(); } });
$("erase").addEventListener("click", () => { erasing = !erasing; $("erase").setAttribute("aria-pressed", erasing); });
$("clear").addEventListener("click", () => { pen.clearRect(0, 0, paint.width, paint.height); sendMask(); });
$("invert").addEventListener("click", () => {
  pen.globalCompositeOperation = "xor"; pen.fillStyle = colour(); pen.fillRect(0, 0, paint.width, paint.height);
  sendMask();
});

// Paints what a mask of before has in white.
export async function showMask(name, clip) {
  const look = lookOf(), view = await viewOf(name, look);
  await view.loading;
  paint.width = look.width; paint.height = look.height;
  pen.globalCompositeOperation = "source-over";
  pen.drawImage(...frameOf(view, 0), 0, 0, paint.width, paint.height);
  const pixels = pen.getImageData(0, 0, paint.width, paint.height);
  for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i] > 127 ? 255 : 0;
  pen.putImageData(pixels, 0, 0);
  pen.globalCompositeOperation = "source-in"; pen.fillStyle = colour(); pen.fillRect(0, 0, paint.width, paint.height);
  Object.assign(state, { mask: name, masked: clip });
  changed(); plan();
}

async function sendMask() {
  // White on black, without half-tones: what is half painted is made anew.
  const pixels = pen.getImageData(0, 0, paint.width, paint.height);
  let some = false;
  for (let i = 0; i < pixels.data.length; i += 4) {
    const on = pixels.data[i + 3] > 60 ? 255 : 0;
    some ||= on > 0;
    pixels.data[i] = pixels.data[i + 1] = pixels.data[i + 2] = on; pixels.data[i + 3] = 255;
  }
  if (!some) { state.mask = null; changed(); return plan(); }
  const canvas = new OffscreenCanvas(paint.width, paint.height);
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  const blob = await canvas.convertToBlob({ type: "image/png" });
  const mine = (sending = blob);
  const answer = await fetch(`/api/media?name=mask.png`, { method: "POST", body: blob });
  const found = await answer.json();
  if (mine !== sending) return;
  if (answer.ok) state.mask = found.name; else state.refused = found.problem;
  changed(); plan();
}

export function compare() { if (!$("compare").hidden) { state.compare = !state.compare; changed(); } }
$("compare").addEventListener("click", compare);
$("back").addEventListener("click", () => { play(false); seek(player.frame - 1); });
$("forward").addEventListener("click", () => { play(false); seek(player.frame + 1); });
$("play").addEventListener("click", () => play());
$("scrub").addEventListener("input", () => { play(false); seek(Number($("scrub").value)); });
