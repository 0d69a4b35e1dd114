"use strict";
// Sends what is held, and shows each group of frames at the chosen speed. The next group is asked for when one begins to be
// shown, so that it is there when this one ends, and a key takes effect in the group after that at the latest.
const $ = (id) => document.getElementById(id);
const state = { hello: null, held: [], queue: [], frame: 0, shownAt: [], values: [], recording: false, link: null, epoch: 0, frames: 0 };
window.stdit = state; // for tests

const ARROWS = { ArrowUp: ["up", "forward", "north"], ArrowDown: ["down", "backward", "south"], ArrowLeft: ["left", "west"], ArrowRight: ["right", "east"] };
const SYMBOLS = { ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→", " ": "space" };
const LETTERS = "1234567890asdfghjklqwe".split("");

function keyOf(name, index, taken) {
  const words = String(name).toLowerCase().split(/[^a-z]+/);
  for (const [key, meanings] of Object.entries(ARROWS)) if (!taken.has(key) && meanings.some((m) => words.includes(m)) && words.filter((w) => w !== "move" && w !== "turn").length === 1) return key;
  if (!taken.has(" ") && ["toggle", "attack", "fire", "shoot"].includes(words.join(""))) return " ";
  return LETTERS.find((letter) => !taken.has(letter));
}

function send(message) { if (state.socket.readyState === 1) state.socket.send(JSON.stringify(message)); }

function sendAction() {
  const { hello } = state;
  if (!hello) return;
  if (hello.width) return send({ type: "act", action: state.values });
  const held = state.held[state.held.length - 1];
  send({ type: "act", action: held !== undefined ? held : null });
}

function press(action) {
  if (!state.held.includes(action)) state.held.push(action);
  mark(); sendAction();
}
function release(action) {
  state.held = state.held.filter((held) => held !== action);
  mark();
  if (!state.hello.turn_based) sendAction();
}
function mark() { document.querySelectorAll(".key").forEach((key) => key.classList.toggle("pressed", state.held.includes(Number(key.dataset.action)))); }

function buildKeys(hello) {
  const place = $("keys");
  place.replaceChildren();
  state.byKey = {};
  if (hello.width) return buildSliders(hello, place);
  const taken = new Set();
  for (let action = 0; action < hello.count; action++) {
    const name = hello.names[action] ?? String(action);
    const key = keyOf(name, action, taken);
    const button = document.createElement("button");
    button.className = "key"; button.dataset.action = action; button.type = "button"; button.tabIndex = -1;
    if (key !== undefined) { taken.add(key); state.byKey[key] = action; const cap = document.createElement("kbd"); cap.textContent = SYMBOLS[key] ?? key; button.append(cap); }
    button.append(name);
    button.addEventListener("pointerdown", () => press(action));
    for (const end of ["pointerup", "pointerleave", "pointercancel"]) button.addEventListener(end, () => release(action));
    place.append(button);
  }
}

function buildSliders(hello, place) {
  state.values = [];
  for (let i = 0; i < hello.width; i++) {
    const low = hello.low[i] ?? -1, high = hello.high[i] ?? 1;
    const label = document.createElement("label"), slider = document.createElement("input");
    slider.type = "range"; slider.min = low; slider.max = high; slider.step = (high - low) / 100; slider.value = Math.min(Math.max(0, low), high);
    state.values.push(Number(slider.value));
    slider.addEventListener("input", () => { state.values[i] = Number(slider.value); sendAction(); });
    label.append(hello.names[i] ?? `number ${i + 1}`, " ", slider);
    place.append(label);
  }
  sendAction();
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !state.hello) return;
  const action = state.byKey?.[event.key] ?? state.byKey?.[event.key.toLowerCase()];
  if (action !== undefined) { event.preventDefault(); if (!event.repeat || state.hello.turn_based) press(action); }
  else if (event.key.toLowerCase() === "r") restart();
  else if (event.key === "Backspace") { event.preventDefault(); rewind(); }
});
addEventListener("keyup", (event) => {
  const action = state.byKey?.[event.key] ?? state.byKey?.[event.key.toLowerCase()];
  if (action !== undefined) release(action);
});
addEventListener("blur", () => { state.held = []; mark(); if (!state.hello?.turn_based) sendAction(); });

function restart() { send({ type: "restart", seed: Math.floor(Math.random() * 2 ** 31) }); }
function rewind() { send({ type: "rewind", groups: Math.max(1, Math.round(state.hello.fps / 4)) }); }
$("restart").addEventListener("click", (event) => { restart(); event.target.blur(); });
$("rewind").addEventListener("click", (event) => { rewind(); event.target.blur(); });
$("record").addEventListener("click", (event) => { send({ type: "record", on: !state.recording }); event.target.blur(); });
$("speed").addEventListener("input", () => { $("speed-value").textContent = `${$("speed").value} frames a second at most`; });

async function decode(buffer) {
  const view = new DataView(buffer), first = view.getUint32(0, true), count = view.getUint16(4, true), both = view.getUint16(6, true);
  const pictures = [];
  for (let at = 8; at < buffer.byteLength;) {
    const length = view.getUint32(at, true);
    pictures.push(createImageBitmap(new Blob([buffer.slice(at + 4, at + 4 + length)], { type: "image/png" })));
    at += 4 + length;
  }
  const all = await Promise.all(pictures);
  return all.slice(0, count).map((dream, i) => ({ dream, truth: both ? all[count + i] : null, number: first + i, begins: i === 0 }));
}

function draw(canvas, picture) {
  if (canvas.width !== picture.width || canvas.height !== picture.height) { canvas.width = picture.width; canvas.height = picture.height; }
  canvas.getContext("2d").drawImage(picture, 0, 0);
}

let due = 0;
function show(now) {
  requestAnimationFrame(show);
  if (now < due || !state.queue.length) return;
  const { dream, truth, number, begins } = state.queue.shift();
  if (begins) send({ type: "shown", epoch: state.epoch });
  draw($("dream"), dream);
  if (truth) draw($("truth"), truth);
  state.frame = number; state.frames++;
  state.shownAt = [...state.shownAt.filter((time) => time > now - 2000), now];
  const first = state.shownAt[0];
  state.fps = state.shownAt.length > 1 ? (1000 * (state.shownAt.length - 1)) / (now - first) : 0;
  $("fps").textContent = state.fps.toFixed(1);
  $("frame").textContent = number;
  due = Math.max(due + 1000 / Number($("speed").value), now - 1000 / Number($("speed").value));
}
requestAnimationFrame(show);

// The link to the last recording stays beside what is said.
function note(text) { $("note").replaceChildren(...[text, text && state.link ? " " : "", state.link ?? ""].filter((part) => part !== "")); }

const handlers = {
  hello(message) {
    state.hello = message;
    $("title").textContent = message.title; $("evaluations").textContent = message.evaluations;
    $("speed").value = Math.max(16, Math.round(message.fps)); $("speed").dispatchEvent(new Event("input"));
    $("status").textContent = message.turn_based ? `each key is ${message.steps === 1 ? "one step" : `${message.steps} steps`}` : "hold a key";
    buildKeys(message);
  },
  reset(message) { state.queue = []; state.epoch = message.epoch; $("truth-figure").hidden = !message.truth; note(""); if (!state.hello.turn_based) sendAction(); },
  rewound(message) { state.queue = []; state.epoch = message.epoch; $("status").textContent = `back at frame ${message.frames}`; },
  alone(message) { $("truth-figure").hidden = true; note(message.message); },
  recording() { state.recording = true; state.link = null; note(""); $("record").textContent = "stop recording"; $("record").className = "recording"; },
  recorded(message) {
    state.recording = false; $("record").textContent = "record"; $("record").className = "";
    if (!message.url) return note("");
    const link = document.createElement("a"); link.href = message.url; link.textContent = "the recording (mp4)"; link.download = "";
    state.link = link; note("");
  },
  error(message) { note(message.message); },
  full(message) { $("status").textContent = message.message; },
};

// Groups are decoded one after another, so that they are queued in their order.
let decoding = Promise.resolve();
function connect() {
  state.socket = new WebSocket(`ws://${location.host}/play`);
  state.socket.binaryType = "arraybuffer";
  state.socket.addEventListener("message", ({ data }) => {
    decoding = decoding.then(async () => {
      if (typeof data === "string") { const message = JSON.parse(data); handlers[message.type]?.(message); }
      else state.queue.push(...(await decode(data)));
    });
  });
  state.socket.addEventListener("close", () => { if (!$("status").textContent.includes("worlds are open")) $("status").textContent = "the server has stopped"; });
}
connect();
