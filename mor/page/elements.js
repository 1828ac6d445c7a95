// Short words for elements and numbers.
"use strict";
const byId = (id) => document.getElementById(id);
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
// What is invisible is named: spaces at the ends and line ends, as in ␣the↵.
const visible = (text) =>
  text
    .replace(/^ +| +$/g, (s) => "␣".repeat(s.length))
    .replace(/\n/g, "↵")
    .replace(/\t/g, "⇥");
