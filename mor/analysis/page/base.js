// The data, and short words for elements and numbers.
"use strict";
const models = JSON.parse(document.getElementById("data").textContent).models;
const state = { at: models.map(() => -1), held: false, mode: "depth" };
const SVG = "http://www.w3.org/2000/svg";

// Elements: el("p", {class: "x"}, "text", child, ...); svg(...) the same for drawings.
function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {}))
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  node.append(
    ...children
      .flat(Infinity)
      .filter((c) => c !== null && c !== undefined)
      .map((c) => (c instanceof Node ? c : String(c))),
  );
  return node;
}
const el = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

const minus = (text) => text.replace(/^-(?=0*\.?0*$)/, "").replace("-", "−"); // no −0.00
const num = (x, digits = 2) => (x === null || x === undefined ? "–" : minus(x.toFixed(digits)));
const signed = (x, digits = 2) => (x > 0 && Number(x.toFixed(digits)) ? "+" : "") + num(x, digits);
const count = (n) => n.toLocaleString("en");
const hundredths = (p) => String(Math.round(p * 100));
const routed = (m) => m.model.family === "mor";
const answers = (m) => m.asked === "answer"; // of a task, in place of next tokens
const looped = (m) => m.model.num_recursions > 1;
// What is invisible is named: spaces at the ends and line ends, as in ␣the↵.
const visible = (text) =>
  text
    .replace(/^ +| +$/g, (s) => "␣".repeat(s.length))
    .replace(/\n/g, "↵")
    .replace(/\t/g, "⇥");
const label = (t) => (t.piece === "" ? t.token : visible(t.piece));

function part(name, draw) {
  const place = document.querySelector(`[data-part="${name}"]`);
  models.forEach((m, k) => {
    const box = el("div", { class: "part", "data-model": k });
    if (models.length > 1) box.append(el("p", { class: "name" }, m.name));
    box.append(...[draw(m, k)].flat());
    place.append(box);
  });
}
