// Small helpers of the page: elements, numbers, and calls of the server.
export const $ = (id) => document.getElementById(id);

export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name === "style") Object.assign(node.style, value);
    else if (name in node && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// What the server refuses is an Error with `problem`: one line, and buttons.
export class Refused extends Error {
  constructor(problem) { super(problem.message); this.problem = problem; }
}

export async function call(method, url, body) {
  let answer;
  try {
    answer = await fetch(url, { method, body: body instanceof Blob || body === undefined ? body : JSON.stringify(body) });
  } catch {
    throw new Refused({ message: "The server does not answer.", fixes: [], stops: true });
  }
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(found.problem ?? { message: `The server answers ${answer.status}.`, fixes: [], stops: true });
  return found;
}

export const path = (name) => name.split("/").map(encodeURIComponent).join("/");
export const query = (look) => (look ? `?height=${look.height}&width=${look.width}&fps=${look.fps}` : "");
export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

export function duration(seconds) {
  if (seconds < 1) return "less than a second";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

export function ago(time) {
  const seconds = Date.now() / 1000 - time;
  if (seconds < 45) return "just now";
  if (seconds < 5400) return `${Math.max(1, Math.round(seconds / 60))} min ago`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h ago`;
  return new Date(time * 1000).toLocaleDateString();
}
