// Answers: their tokens, coloured, and what is known of the one that is chosen.
"use strict";

// model: what the server says of it; at: the chosen token; running: what stops the request that runs
// least, deepest: depths that the legend shows; made: how many answers there have been
// keptDepth: the budget of an earlier visit, until it is known whether the model has budgets
const state = {
  mode: "completion",
  model: null,
  at: null,
  held: false,
  colour: "depth",
  running: null,
  least: 1,
  deepest: 1,
  made: 0,
  keptDepth: null,
};
const owners = new WeakMap(); // node of an answer: the answer
const answerOf = (node) => owners.get(node.closest(".answer"));
const COLOURS = {
  depth: { level: (t) => (t.depth === null ? null : depthLevel(t.depth, state.deepest)), bars: (t) => t.depth || 0 },
  surprise: {
    level: (t) => (t.logprob === null ? null : shade(-t.logprob, 10)),
    bars: () => 0,
    unit: "nats that it cost to predict this token; 10 and more is darkest",
  },
};
const looped = () => state.deepest > 1;

// An empty answer, or one of an earlier visit.
function newAnswer(saved) {
  const node = el("span", { class: "answer", role: "listbox", tabindex: 0, "aria-label": "Answer, token by token" });
  const answer = { id: state.made++, node, tokens: [], text: "", about: el("p", { class: "hint" }), times: [], ...saved };
  owners.set(node, answer);
  answer.tokens.forEach((_, i) => addNode(answer, i));
  if (saved) answer.about.textContent = summary(answer);
  return answer;
}
function addNode(answer, i) {
  answer.node.append(el("span", { id: `t${answer.id}-${i}`, role: "option", "aria-selected": "false", "data-i": i }));
  reach(answer.tokens[i].depth);
  draw(answer, i);
}
// A depth that the legend does not show yet.
function reach(depth) {
  if (depth === null || (depth >= state.least && depth <= state.deepest)) return;
  state.least = Math.min(state.least, depth);
  state.deepest = Math.max(state.deepest, depth);
  repaint();
}
function draw(answer, i) {
  const token = answer.tokens[i],
    node = nodeOf(answer, i),
    colour = COLOURS[state.colour];
  node.textContent = token.text;
  node.className = `tok${token.text.startsWith("\n") ? " newline" : ""}${token.text === "" ? " partial" : ""}`;
  node.setAttribute("aria-label", [label(token), ...facts(token).map((f) => f.join(" ")), instead(token)].filter(Boolean).join(", "));
  tint(node, colour.level(token), colour.bars(token));
}
const nodeOf = (answer, i) => answer.node.children[i];
// The server names a part of a character by its bytes.
const named = (name) => (name.startsWith("bytes:") ? `‹${name.slice(6).replaceAll("\\x", " ").trim()}›` : visible(name));
const label = (token) => (token.text ? visible(token.text) : named(token.name)) || "nothing visible";
const instead = (token) =>
  token.others.length ? `likeliest: ${token.others.map(([name, p]) => `${named(name)} ${percent(p)}`).join(", ")}` : "";

// Takes one event of the stream.
function grow(answer, choice) {
  const { text, tokens } = added(choice);
  answer.text += text;
  if (tokens.length) answer.times.push([performance.now(), tokens.length]);
  for (const token of tokens) addNode(answer, answer.tokens.push(token) - 1);
  if (text && !tokens.length) addText(answer, text);
  answer.meanDepth = choice.mean_depth ?? answer.meanDepth;
  answer.reason = choice.finish_reason ?? answer.reason;
}
// Text that was held back and comes without a token of its own belongs to the last one.
function addText(answer, text) {
  if (!answer.tokens.length) answer.tokens.push({ text: "", name: "", depth: null, logprob: null, others: [] });
  const last = answer.tokens.length - 1;
  if (!nodeOf(answer, last)) addNode(answer, last);
  answer.tokens[last].text += text;
  draw(answer, last);
}

const ENDS = { stop: "came to its end", length: "reached the most new tokens", abort: "broken off by the server" };
function summary(answer) {
  const depths = answer.tokens.map((t) => t.depth).filter((d) => d !== null);
  const mean = answer.meanDepth ?? (depths.length ? depths.reduce((a, b) => a + b) / depths.length : null);
  const recursions = state.model?.num_recursions || state.deepest;
  return [
    `${count(answer.tokens.length)} token${answer.tokens.length === 1 ? "" : "s"}`,
    looped() && mean !== null ? `mean depth ${num(mean)} of ${recursions}` : null,
    speed(answer),
    ENDS[answer.reason] ?? answer.reason,
  ]
    .filter(Boolean)
    .join(" · ");
}
// Tokens per second after the first ones.
function speed(answer) {
  const [first, last] = [answer.times[0], answer.times.at(-1)];
  if (!first || last[0] - first[0] < 50) return answer.speed ?? null;
  const later = answer.times.slice(1).reduce((sum, [, n]) => sum + n, 0);
  answer.speed = `${num((1000 * later) / (last[0] - first[0]), 1)} tokens per second`;
  return answer.speed;
}

function repaint() {
  for (const node of document.querySelectorAll(".answer .tok")) draw(answerOf(node), +node.dataset.i);
  legend();
  if (state.at) mark(true);
}
function legend() {
  const colour = COLOURS[state.colour];
  byId("legend").replaceChildren(
    ...(colour.unit
      ? [swatch("expected", 0), swatch("unlikely", 0.5), swatch("a surprise", 1), colour.unit]
      : depthLegend(state.deepest, state.least)),
  );
}
function colours() {
  const offered = Object.keys(COLOURS).filter((name) => name !== "depth" || looped());
  if (!offered.includes(state.colour)) [state.colour] = offered;
  const inputs = offered.map((name) => {
    const input = el("input", { type: "radio", name: "colour", value: name });
    input.checked = name === state.colour;
    input.addEventListener("change", () => {
      state.colour = name;
      repaint();
    });
    return el("label", {}, input, " ", name);
  });
  byId("modes").replaceChildren(byId("modes").firstElementChild, ...inputs);
  repaint();
}
