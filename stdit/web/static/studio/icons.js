// A small diagram of every task: what is known is filled, what is new is coloured.
const NS = "http://www.w3.org/2000/svg";
const k = (x, y, w, hh) => ["known", x, y, w, hh];
const n = (x, y, w, hh) => ["new", x, y, w, hh];
const DIAGRAMS = {
  generate: [n(1, 3, 8, 12), n(10, 3, 8, 12), n(19, 3, 8, 12)],
  animate: [k(1, 3, 5, 12), n(7.5, 3, 9, 12), n(18, 3, 9, 12)],
  extend: [n(1, 3, 6, 12), k(8.5, 3, 11, 12), n(21, 3, 6, 12)],
  connect: [k(1, 3, 7, 12), n(9.5, 3, 9, 12), k(20, 3, 7, 12)],
  loop: [k(1, 3, 14, 12), n(16.5, 3, 10.5, 12)],
  interpolate: [k(1, 3, 4, 12), n(6, 3, 4, 12), k(11, 3, 4, 12), n(16, 3, 4, 12), k(21, 3, 4, 12)],
  inpaint: [k(3, 1.5, 22, 15), n(11, 5, 8, 8)],
  outpaint: [n(1, 1.5, 26, 15), k(8.5, 4.5, 11, 9)],
  edit: [k(3, 1.5, 11, 15), n(14, 1.5, 11, 15)],
};
export const TASKS = {
  generate: "from nothing but a label or text",
  animate: "a picture begins to move",
  extend: "what came before, and what comes after",
  connect: "from one clip or picture to another",
  loop: "the end leads back to the beginning",
  interpolate: "more frames in between",
  inpaint: "what you paint over is made anew",
  outpaint: "what lies around the picture",
  edit: "the same motion, something else",
};

export function icon(task) {
  const svg = document.createElementNS(NS, "svg");
  svg.setAttribute("viewBox", "0 0 28 18");
  svg.setAttribute("aria-hidden", "true");
  for (const [kind, x, y, width, height] of DIAGRAMS[task]) {
    const rect = document.createElementNS(NS, "rect");
    for (const [name, value] of Object.entries({ x, y, width, height, rx: 1.5, class: kind })) rect.setAttribute(name, value);
    svg.append(rect);
  }
  if (task === "loop") {
    const back = document.createElementNS(NS, "path");
    back.setAttribute("d", "M25 1.2 H4 l2.4 -1.7 M4 1.2 l2.4 1.7");
    svg.setAttribute("viewBox", "0 -1.5 28 19.5");
    svg.append(back);
  }
  return svg;
}
