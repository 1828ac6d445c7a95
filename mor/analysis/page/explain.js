"use strict";
const models = JSON.parse(document.getElementById("data").textContent).models;
const state = { at: models.map(() => -1), held: false, mode: "depth" };
const SVG = "http://www.w3.org/2000/svg";

// Elements: el("p", {class: "x"}, "text", child, ...); svg(...) the same for drawings.
function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {}))
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  node.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined).map((c) => (c instanceof Node ? c : String(c))));
  return node;
}
const el = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

const minus = (text) => text.replace("-", "−");
const num = (x, digits = 2) => (x === null || x === undefined ? "–" : minus(x.toFixed(digits)));
const signed = (x, digits = 2) => (x === null || x === undefined ? "–" : (x >= 0 ? "+" : "") + num(x, digits));
const count = (n) => n.toLocaleString("en");
const hundredths = (p) => (p >= 0.995 ? "1" : p < 0.005 ? "0" : String(Math.round(p * 100)));
const routed = (m) => m.model.family === "mor";
const looped = (m) => m.model.num_recursions > 1;
// What is invisible is named: spaces at the ends and line ends, as in ␣the↵.
const visible = (text) => text.replace(/^ +| +$/g, (s) => "␣".repeat(s.length)).replace(/\n/g, "↵").replace(/\t/g, "⇥");
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

// ---- heading
function summary(m) {
  const s = m.summary;
  const what = { vanilla: "Vanilla Transformer", recursive: "Recursive Transformer", mor: "Mixture of Recursions" }[m.model.family];
  const about = [`layers ${m.model.layers}`, `width ${m.model.dim}`, `vocabulary ${count(m.model.vocab_size)}`];
  if (routed(m)) about.unshift(`${m.model.router.replace("_", "-")} router`, `${m.model.kv_strategy.replace("_", "-")} keys and values`);
  const tiles = [["tokens", count(s.tokens)], ["mean depth", `${num(s.mean_depth)} of ${m.model.num_recursions}`],
    ["nats per token", num(s.nll, 3)], ["bits per byte", num(s.bits_per_byte, 3)]];
  return [
    models.length === 1 ? el("p", { class: "kind" }, el("b", {}, m.name), ` · ${what} · ${about.join(" · ")}`)
      : el("p", { class: "kind" }, `${what} · ${about.join(" · ")}`),
    el("dl", { class: "tiles" }, tiles.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
  ];
}

// ---- text
const surprise = (m, i) => (i > 0 && m.tokens[i - 1].logprob !== null ? -m.tokens[i - 1].logprob : null);
const MODES = {
  depth: { name: "depth", needs: () => models.some(looped), level: (m, t) => depthLevel(m, t.depth), bars: (t) => t.depth },
  surprise: { name: "surprise", needs: () => true, level: (m, t) => shade(surprise(m, t.index), 10), unit: "nats it cost to predict this token; 10 and more is darkest" },
  entropy: { name: "doubt", needs: () => true, level: (m, t) => shade(t.entropy, Math.log(m.model.vocab_size)), unit: "entropy of the next token, nats; a uniform guess is darkest" },
  fewer: { name: "one recursion fewer", needs: () => models.some(looped), level: (m, t) => t.fewer, diverging: 2, unit: "change of the next token's log-probability, nats; ±2 and more is darkest" },
  more: { name: "one recursion more", needs: () => models.some(looped), level: (m, t) => t.more, diverging: 2, unit: "change of the next token's log-probability, nats; ±2 and more is darkest" },
  against: { name: "against the other model", needs: () => models.length > 1, level: (m, t) => m.against[t.index], diverging: 4, unit: "nats by which this model predicts this stretch better (blue) or worse (orange); ±4 and more is darkest" },
};
const shade = (x, most) => (x === null ? null : Math.min(1, Math.max(0, x / most)));
const depthLevel = (m, depth) => (m.model.num_recursions < 2 ? 0 : Math.max(0, depth - 1) / (m.model.num_recursions - 1));

function paint(node, mode, m, t) {
  const value = mode.level(m, t);
  const level = value === null ? 0 : mode.diverging ? shade(Math.abs(value), mode.diverging) : value;
  node.style.setProperty("--level", level);
  node.style.setProperty("--bars", mode.bars ? mode.bars(t) : 0);
  node.style.setProperty("--tint", mode.diverging && value < 0 ? "var(--high-worse)" : "var(--high)");
  node.classList.toggle("none", value === null);
  node.classList.toggle("up", Boolean(mode.diverging) && value > 0.05);
  node.classList.toggle("down", Boolean(mode.diverging) && value < -0.05);
}

function prose(m, k) {
  const tokens = m.tokens.map((t, i) => el("span", {
    class: `tok${t.piece.startsWith("\n") ? " newline" : ""}${t.piece === "" ? " partial" : ""}`,
    id: `t${k}-${i}`, role: "option", "data-i": i, "aria-label": `${label(t)}, depth ${t.depth}`,
  }, t.piece));
  return el("div", { class: "prose", role: "listbox", tabindex: 0, "aria-label": "Text, token by token" }, tokens);
}

function legend() {
  const place = document.getElementById("legend"), mode = MODES[state.mode];
  const swatch = (level, text, bars, tint, cls) => el("span", { class: `tok ${cls || ""}`, style: `--level:${level};--bars:${bars || 0};--tint:var(--${tint || "high"})` }, text);
  if (mode.bars) {
    const deepest = Math.max(...models.map((x) => x.model.num_recursions));
    const steps = Array.from({ length: deepest }, (_, d) => swatch(deepest < 2 ? 0 : d / (deepest - 1), `depth ${d + 1}`, d + 1));
    place.replaceChildren(...steps, "as many lines below as recursions");
  } else if (mode.diverging) {
    place.replaceChildren(swatch(1, "worse", 0, "high-worse", "down"), swatch(0, "no change"), swatch(1, "better", 0, "high", "up"), mode.unit);
  } else place.replaceChildren(swatch(0, "none"), swatch(0.5, "some"), swatch(1, "much"), mode.unit);
}

function setMode(name) {
  state.mode = name;
  models.forEach((m, k) => m.tokens.forEach((t, i) => paint(document.getElementById(`t${k}-${i}`), MODES[name], m, t)));
  legend();
}

function modes() {
  const offered = Object.entries(MODES).filter(([, mode]) => mode.needs());
  state.mode = offered[0][0];
  offered.forEach(([name, mode]) => {
    const input = el("input", { type: "radio", name: "mode", value: name });
    input.checked = name === state.mode;
    input.addEventListener("change", () => setMode(name));
    document.getElementById("modes").append(el("label", {}, input, " ", mode.name));
  });
}

// ---- columns under tokens
function columns(m, k, cls, words, cell) {
  const head = (t) => el("div", { class: "head" }, label(t));
  const key = el("div", { class: "col key" }, el("div", { class: "head" }, " "), m.tokens[0].steps.map((s) => el("div", { class: "cell" }, `recursion ${s.recursion}`)));
  const made = m.tokens.map((t, i) => el("div", { class: "col", id: `${cls}${k}-${i}`, role: "option", "data-i": i, "aria-label": `${label(t)}: ${words(t)}` }, head(t), t.steps.map((s) => cell(t, s))));
  return el("div", { class: `columns ${cls}`, role: "listbox", tabindex: 0, "aria-label": cls }, key, made);
}

const filled = (level, text, cls) => el("div", { class: `cell on ${cls || ""}`, style: `--level:${level.toFixed(3)}` }, text);

function scores(m, k) {
  if (!routed(m)) return el("p", { class: "note" }, looped(m) ? "No router: every token takes every recursion." : "A single pass and no router.");
  const words = (t) => t.steps.map((s) => (s.score === null ? (s.taken ? "taken" : "not asked") : `${num(s.score)} ${s.taken ? "taken" : "refused"}`)).join(", ");
  return columns(m, k, "scores", words, (t, s) => {
    if (s.taken) return filled(s.score === null ? 0.5 : s.score, s.score === null ? "✓" : hundredths(s.score));
    return el("div", { class: `cell ${s.score === null ? "unasked" : "refused"}` }, s.score === null ? "·" : hundredths(s.score));
  });
}

function exits(m, k) {
  const words = (t) => t.steps.map((s) => `${visible(s.exit_guesses[0].text)} ${hundredths(s.exit_guesses[0].probability)} percent`).join(", ");
  return columns(m, k, "exits", words, (t, s) => {
    const guess = s.exit_guesses[0], right = guess.token_id === m.tokens[t.index + 1]?.token_id;
    return filled(1 - s.exit_entropy / Math.log(m.model.vocab_size), visible(guess.text), `${right ? "true " : ""}${s.recursion === t.depth ? "chosen" : ""}`);
  });
}

// ---- drawings
const drawing = (attributes, ...children) => el("div", { class: "drawing" }, svg("svg", { role: "img", ...attributes }, children));
const scale = (from, to, a, b) => (x) => a + ((x - from) / (to - from)) * (b - a);
function ticks(from, to) {
  const rough = (to - from) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough);
  const found = [];
  for (let i = Math.ceil(from / step - 1e-9); i * step <= to + 1e-9; i++) found.push(i * step);
  return { at: found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}
function axis(x, from, to, y, title) {
  const t = ticks(from, to);
  return [svg("line", { class: "axis", x1: x(from), x2: x(to), y1: y, y2: y }),
    t.at.map((v) => [svg("line", { class: "grid", x1: x(v), x2: x(v), y1: 14, y2: y }), svg("text", { class: "soft", x: x(v), y: y + 15, "text-anchor": "middle" }, num(v, t.digits))]),
    svg("text", { class: "soft", x: (x(from) + x(to)) / 2, y: y + 31, "text-anchor": "middle" }, title)];
}
function interval(x, y, g) {
  return [g.low === null ? null : svg("line", { class: "interval", x1: x(g.low), x2: x(g.high), y1: y, y2: y }), svg("circle", { class: "mean", cx: x(g.mean), cy: y, r: 4.5 })];
}
const range = (g, digits = 2) => (g.low === null ? "no interval" : `${num(g.low, digits)} to ${num(g.high, digits)}`);
function table(heads, rows) {
  return el("details", {}, el("summary", {}, "Numbers"), el("table", {}, el("tr", {}, heads.map((h, i) => el("th", { class: i ? "n" : null }, h))), rows.map((r) => el("tr", {}, r.map((c, i) => el("td", { class: i ? "n" : null }, c))))));
}

// 98% of all changes, of both models, lie within this many nats.
function widest() {
  const sizes = models.flatMap((m) => m.tokens.flatMap((t) => [t.fewer, t.more])).filter((x) => x !== null).map(Math.abs).sort((a, b) => a - b);
  return Math.max(0.05, sizes[Math.floor(0.98 * (sizes.length - 1))] || 0);
}
function counterfactuals(m) {
  const rows = ["fewer", "more"].flatMap((name) => m.counterfactuals[name].map((g) => ({ name, g, depth: +g.group, values: m.tokens.filter((t) => t.depth === +g.group && t[name] !== null) })));
  if (!rows.length) return el("p", { class: "note" }, "There is no other depth to take, or no next token to judge by.");
  const most = widest();
  const W = 700, left = 132, right = 590, x = scale(-most, most, left, right), H = 22 + rows.length * 34;
  const clamp = (v) => Math.max(-most, Math.min(most, v));
  const drawn = rows.map((r, j) => {
    const y = 32 + j * 34, to = r.depth + (r.name === "more" ? 1 : -1);
    return [svg("text", { x: 8, y: y + 4 }, `depth ${r.depth} → ${to}`), svg("text", { class: "soft", x: left - 8, y: y + 4, "text-anchor": "end" }, count(r.g.count)),
      r.values.map((t) => svg("line", { class: `stroke ${t[r.name] < 0 ? "worse" : "better"}`, "data-i": t.index, x1: x(clamp(t[r.name])), x2: x(clamp(t[r.name])), y1: y - 9, y2: y + 9 })),
      interval(x, y, r.g), svg("text", { x: right + 12, y: y + 4 }, `${signed(r.g.mean)} nats`)];
  });
  return [drawing({ viewBox: `0 0 ${W} ${H + 42}`, "aria-label": "Change of log-probability with one recursion fewer or more", class: "strokes" },
    axis(x, -most, most, H, "change of the next token's log-probability, nats (left of 0 is worse; the outermost 2% at the edge)"), svg("line", { class: "zero", x1: x(0), x2: x(0), y1: 14, y2: H }), drawn),
  table(["depth", "tokens", "mean, nats", "95% interval", "better for"], rows.map((r) => [`${r.depth} → ${r.depth + (r.name === "more" ? 1 : -1)}`, count(r.g.count), signed(r.g.mean, 3), range(r.g, 3), `${Math.round((100 * r.values.filter((t) => t[r.name] > 0).length) / r.values.length)}%`]))];
}

function classes(m) {
  if (!routed(m)) return el("p", { class: "note" }, "Every token has the same depth.");
  const groups = Object.entries(m.by_class), rows = groups.flatMap(([name, found]) => [{ title: `by ${name}${name === "position" ? " in the window" : ""}` }, ...found]);
  const W = 700, left = 210, right = 640, most = Math.max(...models.map((x) => x.model.num_recursions)), x = scale(1, most, left, right), H = 20 + rows.length * 22;
  const drawn = rows.map((g, j) => {
    const y = 26 + j * 22;
    if (g.title) return svg("text", { class: "soft", x: 8, y: y + 4 }, g.title);
    return [svg("text", { x: 22, y: y + 4 }, g.group), svg("text", { class: "soft", x: left - 14, y: y + 4, "text-anchor": "end" }, count(g.count)), interval(x, y, g), svg("text", { class: "soft", x: right + 14, y: y + 4 }, num(g.mean))];
  });
  return [drawing({ viewBox: `0 0 ${W} ${H + 42}`, "aria-label": "Mean depth by class of token" }, axis(x, 1, most, H, "mean depth, recursions"), drawn),
    table(["class", "tokens", "mean depth", "95% interval"], rows.filter((g) => !g.title).map((g) => [g.group, count(g.count), num(g.mean), range(g)]))];
}

function flow(m) {
  if (!looped(m)) return el("p", { class: "note" }, "A single pass: there is nothing to follow.");
  const R = m.model.num_recursions, T = m.tokens.length, W = 700, H = 226, tall = 150, top = 46, wide = 12;
  const inside = Array.from({ length: R }, (_, r) => m.tokens.filter((t) => t.steps[r].taken).length);
  const at = (r) => 30 + (r * (W - 120)) / R, unit = tall / T, gap = 16;
  const lane = (r, isIn) => (isIn ? top : top + gap + inside[r] * unit);
  const nodes = inside.flatMap((n, r) => [
    n ? svg("rect", { class: "node in", x: at(r), y: top, width: wide, height: n * unit }) : null,
    n < T ? svg("rect", { class: "node out", x: at(r), y: lane(r, false), width: wide, height: (T - n) * unit }) : null,
    svg("text", { x: at(r), y: top - 24 }, `recursion ${r + 1}`), svg("text", { class: "soft", x: at(r), y: top - 9 }, `${count(n)} in (${Math.round((100 * n) / T)}%)`),
    n < T ? svg("text", { class: "soft", x: at(r) + wide + 5, y: lane(r, false) + (T - n) * unit - 4 }, `${count(T - n)} out`) : null]);
  const end = at(R);
  nodes.push(svg("rect", { class: "node in", x: end, y: top, width: wide, height: tall + gap }), svg("text", { x: end + wide, y: top - 24, "text-anchor": "end" }, "coda, head"), svg("text", { class: "soft", x: end + wide, y: top - 9, "text-anchor": "end" }, count(T)));
  const moves = [...m.flow, ...[1, 0].map((a) => ({ recursion: R, taken: a, next_taken: 1, tokens: a ? inside[R - 1] : T - inside[R - 1] }))];
  return [drawing({ viewBox: `0 0 ${W} ${H}`, "aria-label": `Tokens in each recursion: ${inside.join(", ")} of ${T}` }, bands(moves, { at, lane, unit, wide, R, top, tall, gap }), nodes),
    table(["recursion", "in", "out"], inside.map((n, r) => [String(r + 1), count(n), count(T - n)]))];
}

function bands(moves, g) {
  const leaving = {}, arriving = {}, drawn = [];
  moves.sort((a, b) => a.recursion - b.recursion || b.taken - a.taken || b.next_taken - a.next_taken);
  for (const f of moves.filter((f) => f.tokens)) {
    const from = `${f.recursion}${f.taken}`, to = `${f.recursion}${f.next_taken}`, last = f.recursion === g.R, height = f.tokens * g.unit;
    const y1 = g.lane(f.recursion - 1, f.taken) + (leaving[from] || 0);
    const y2 = last ? (f.taken ? g.top : g.top + g.tall + g.gap - height) : g.lane(f.recursion, f.next_taken) + (arriving[to] || 0);
    leaving[from] = (leaving[from] || 0) + height; arriving[to] = (arriving[to] || 0) + height;
    const x1 = g.at(f.recursion - 1) + g.wide, x2 = g.at(f.recursion), mid = (x1 + x2) / 2;
    const d = `M${x1},${y1} C${mid},${y1} ${mid},${y2} ${x2},${y2} v${height} C${mid},${y2 + height} ${mid},${y1 + height} ${x1},${y1 + height} z`;
    drawn.push(svg("path", { class: `band ${f.taken && f.next_taken ? "in" : "out"}`, d }, svg("title", {}, `${count(f.tokens)} tokens`)));
  }
  return drawn;
}

// ---- one token
function gauge(s) {
  if (s.score === null) return s.taken ? "taken" : "not asked";
  const bar = el("span", { class: "gauge" }, el("i", { style: `width:${100 * s.score}%` }), s.threshold === null ? null : el("b", { style: `left:${100 * s.threshold}%` }));
  return el("span", {}, bar, ` ${num(s.score)} ${s.taken ? "✓" : "✗"}`);
}
function change(name, x) {
  return x === null ? null : el("li", {}, `${name}: log-probability ${signed(x)} nats, ${Math.abs(x) < 0.005 ? "no difference" : x < 0 ? "worse" : "better"}`);
}
function one(m, i) {
  const t = m.tokens[i], next = m.tokens[i + 1], R = m.model.num_recursions;
  const facts = [["depth", `${"●".repeat(t.depth)}${"○".repeat(R - t.depth)} ${t.depth} of ${R}`], ["kind", t.kind],
    ["place", `token ${t.index + 1} of ${m.tokens.length}, position ${t.position} in its window`], ["vocabulary", `${t.token} (${t.token_id}), seen ${count(t.count)}×`],
    ["predicted with", surprise(m, i) === null ? "–" : `log-probability ${num(-surprise(m, i))} nats`],
    ["next token", next ? `${label(next)} · log-probability ${num(t.logprob)} · rank ${t.rank}` : "the text ends here"], ["doubt", `${num(t.entropy)} nats of entropy`]];
  const rows = t.steps.flatMap((s) => [
    el("tr", { class: `main${s.recursion === t.depth ? " own" : ""}` }, [`${s.recursion}${s.recursion === t.depth ? " ◂" : ""}`, gauge(s), num(s.gate, 3), num(s.exit_logprob), num(s.exit_entropy)].map((c, j) => el("td", { class: j > 1 ? "n" : null }, c))),
    el("tr", { class: "guesses" }, el("td", {}), el("td", { colspan: 4 }, s.exit_guesses.map((g) => `${visible(g.text)} ${hundredths(g.probability)}%`).join("  ")))]);
  const heads = ["", routed(m) ? "score" : "", routed(m) ? "gate" : "", "log p", "entropy"];
  return el("div", { class: "one" }, models.length > 1 ? el("p", { class: "name" }, m.name) : null, el("p", { class: "big" }, label(t)),
    el("dl", {}, facts.map(([a, b]) => [el("dt", {}, a), el("dd", {}, b)]).flat()),
    el("table", {}, el("tr", {}, heads.map((h, j) => el("th", { class: j > 1 ? "n" : null }, h))), rows),
    looped(m) ? el("ul", {}, change("One recursion fewer", t.fewer), change("One recursion more", t.more)) : null);
}

// ---- choosing
function twin(k, i, other) {
  const t = models[k].tokens[i], tokens = models[other].tokens;
  const found = tokens.findIndex((o) => o.end > t.start);
  return found < 0 ? tokens.length - 1 : found;
}
function choose(k, i, scroll) {
  i = Math.max(0, Math.min(models[k].tokens.length - 1, i));
  document.querySelectorAll(".now").forEach((node) => { node.classList.remove("now"); node.removeAttribute("aria-selected"); });
  models.forEach((m, other) => {
    const j = (state.at[other] = other === k ? i : twin(k, i, other));
    for (const prefix of ["t", "scores", "exits"]) {
      const node = document.getElementById(`${prefix}${other}-${j}`);
      if (!node) continue;
      node.classList.add("now");
      node.setAttribute("aria-selected", "true");
      const box = node.parentElement;
      box.setAttribute("aria-activedescendant", node.id);
      if (scroll !== box) reveal(box, node);
    }
    document.querySelectorAll(`[data-model="${other}"] .stroke[data-i="${j}"]`).forEach((node) => node.classList.add("now"));
  });
  document.getElementById("detail").replaceChildren(...models.map((m, other) => one(m, state.at[other])));
}
// Scrolls the panel, not the page.
function reveal(box, node) {
  const a = box.getBoundingClientRect(), b = node.getBoundingClientRect();
  if (b.top < a.top + 4) box.scrollTop -= a.top + 4 - b.top;
  if (b.bottom > a.bottom - 4) box.scrollTop += b.bottom - a.bottom + 4;
}
function lineStep(box, i, down) {
  const nodes = [...box.querySelectorAll("[data-i]")], here = nodes[i].getClientRects()[0], centre = (here.left + here.right) / 2;
  let best = i, nearest = Infinity, line = null;
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
function key(event) {
  const box = event.target.closest("[role=listbox]");
  if (event.key === "Escape") return hold(false);
  if (!box) return undefined;
  const k = +box.closest("[data-model]").dataset.model, i = state.at[k];
  const to = { ArrowRight: () => i + 1, ArrowLeft: () => i - 1, ArrowDown: () => lineStep(box, i, true), ArrowUp: () => lineStep(box, i, false), Home: () => 0, End: () => Infinity }[event.key];
  if (event.key === "Enter" || event.key === " ") hold(!state.held);
  else if (to) choose(k, to());
  else return undefined;
  return event.preventDefault();
}
function hold(on) { state.held = on; document.body.classList.toggle("held", on); }
function pointed(event) {
  const node = event.target.closest("[data-i]");
  return node && [+node.closest("[data-model]").dataset.model, +node.dataset.i, node.parentElement];
}

// ---- comparison: nats by which each stretch between common token ends is predicted better than by the other model
function against() {
  if (models.length < 2) return;
  const ends = models.map((m) => new Set(m.tokens.map((t) => t.end))), common = new Set([...ends[0]].filter((e) => ends[1].has(e)));
  const totals = models.map((m) => {
    const byEnd = new Map(), members = new Map();
    let sum = 0, known = true, open = [];
    m.tokens.forEach((t, i) => {
      const s = surprise(m, i);
      known = known && s !== null; sum += s === null ? 0 : s; open.push(i);
      if (common.has(t.end) && m.tokens[i + 1]?.end !== t.end) { byEnd.set(t.end, known ? sum : null); members.set(t.end, open); [sum, known, open] = [0, true, []]; }
    });
    return { byEnd, members };
  });
  models.forEach((m, k) => {
    m.against = m.tokens.map(() => null);
    for (const [end, mine] of totals[k].byEnd) {
      const theirs = totals[1 - k].byEnd.get(end);
      if (mine !== null && theirs !== null && theirs !== undefined) totals[k].members.get(end).forEach((i) => { m.against[i] = theirs - mine; });
    }
  });
}

function about() {
  const long = models.some((m) => m.tokens.length > m.window);
  document.getElementById("about").append(...[
    "Depth is the number of recursions that a token took when it was read; it is what the model spent on predicting the token after it. Log-probabilities and entropies are in nats.",
    "Exits and changes of depth: only the token looked at takes another depth, the tokens before it are as they were, and state, coda and head are those of the model. Depths that training never reached for such a token are shown all the same; they say what this network does, not what another training would give.",
    long ? `The text is longer than the ${models[0].window} tokens that are read together: it was read in windows that overlap by half, and each token is shown as in the window that gives it most context.` : null,
    models.length > 1 ? "The two models are aligned by the characters of the text." : null,
  ].filter(Boolean).map((text) => el("p", {}, text)));
}

document.documentElement.style.setProperty("--models", models.length);
against();
part("summary", summary); part("text", prose); part("scores", scores); part("exits", exits);
part("counterfactuals", counterfactuals); part("classes", classes); part("flow", flow);
if (!models.some(routed)) document.querySelectorAll('[data-section="scores"], [data-section="classes"], [data-section="flow"]').forEach((s) => s.remove());
if (!models.some(looped)) document.querySelectorAll('[data-section="counterfactuals"]').forEach((s) => s.remove());
modes(); setMode(state.mode); about(); choose(0, 0);
document.addEventListener("mouseover", (event) => { const at = pointed(event); if (at && !state.held) choose(...at); });
document.addEventListener("click", (event) => { const at = pointed(event); if (at) { choose(...at); hold(true); } });
document.addEventListener("keydown", key);
