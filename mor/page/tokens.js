// Tokens coloured by depth, and the way through them by keys.
"use strict";

const shade = (x, most) => (x === null ? null : Math.min(1, Math.max(0, x / most)));
const depthLevel = (depth, deepest) => (deepest < 2 ? 0 : Math.max(0, depth - 1) / (deepest - 1));
// level: from pale (0) to dark (1), null without colour; bars: lines below, so that colour is never alone
function tint(node, level, bars = 0) {
  node.style.setProperty("--level", level === null ? 0 : level);
  node.style.setProperty("--bars", bars);
  node.classList.toggle("none", level === null);
  return node;
}
const swatch = (text, level, bars) => tint(el("span", { class: "tok" }, text), level, bars);
// least: the depth that the shallowest token takes
const depthLegend = (deepest, least) => [
  ...Array.from({ length: deepest + 1 - least }, (_, i) => i + least).map((d) =>
    swatch(`depth ${d}`, depthLevel(d, deepest), d),
  ),
  "as many lines below as recursions",
];

// Scrolls the panel, not the page.
function reveal(box, node) {
  const a = box.getBoundingClientRect(),
    b = node.getBoundingClientRect();
  if (b.top < a.top + 4) box.scrollTop -= a.top + 4 - b.top;
  if (b.bottom > a.bottom - 4) box.scrollTop += b.bottom - a.bottom + 4;
}
function lineStep(box, i, down) {
  const nodes = [...box.querySelectorAll("[data-i]")],
    here = nodes[i].getClientRects()[0],
    centre = (here.left + here.right) / 2;
  let best = i,
    nearest = Infinity,
    line = null;
  for (let j = i + (down ? 1 : -1); j >= 0 && j < nodes.length; j += down ? 1 : -1) {
    const r = nodes[j].getClientRects()[0];
    if (!r || (down ? r.top < here.bottom - 1 : r.bottom > here.top + 1)) continue;
    if (line === null) line = r.top;
    if (Math.abs(r.top - line) > here.height / 2) break;
    const away = Math.abs((r.left + r.right) / 2 - centre);
    if (away < nearest) [nearest, best] = [away, j];
  }
  return best;
}
// The token that a key leads to from token i; undefined for keys that do not move.
function moved(key, box, i) {
  const to = {
    ArrowRight: () => i + 1,
    ArrowLeft: () => i - 1,
    ArrowDown: () => lineStep(box, i, true),
    ArrowUp: () => lineStep(box, i, false),
    Home: () => 0,
    End: () => Infinity,
  };
  return to[key]?.();
}
