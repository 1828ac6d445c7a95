// One token: choosing it by pointer or keys, holding it, and everything known about it.
"use strict";

const recursions = () => state.model?.num_recursions || state.deepest;
const depthWords = (depth) => (depth > recursions() ? `${depth}, trained with ${recursions()}` : `${depth} of ${recursions()}`);
function facts(token) {
  return [
    token.depth === null || !looped() ? null : ["depth", depthWords(token.depth)],
    token.logprob === null ? null : ["log-probability", `${num(token.logprob)} (${percent(token.logprob)})`],
  ].filter(Boolean);
}
// Never 100% of what is not certain, nor 0% of what happened.
function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  if (p > 99.9) return "over 99.9%";
  return p < 0.1 ? "under 0.1%" : `${num(p, p < 10 ? 1 : 0)}%`;
}
function one(answer, i) {
  const token = answer.tokens[i];
  const dots = token.depth === null ? "" : "●".repeat(token.depth) + "○".repeat(Math.max(0, recursions() - token.depth));
  return [
    el("p", { class: "big" }, label(token)),
    el(
      "dl",
      {},
      facts(token).map(([name, said]) => [el("dt", {}, name), el("dd", {}, name === "depth" ? `${dots} ${said}` : said)]),
      [el("dt", {}, "place"), el("dd", {}, `token ${i + 1} of ${answer.tokens.length} in the answer`)],
    ),
    alternatives(token),
  ];
}
function alternatives(token) {
  const rows = token.others.slice();
  if (!rows.length) return el("p", { class: "note" }, "The server gave no alternatives for this token.");
  if (!rows.some(([other]) => other === token.name)) rows.push([token.name, token.logprob]);
  rows.sort((a, b) => b[1] - a[1]);
  return el(
    "table",
    {},
    el("caption", {}, "What could have come here; ◂ came"),
    el("tr", {}, ["token", "probability", "log p"].map((head, j) => el("th", { scope: "col", class: j > 1 ? "n" : null }, head))),
    rows.map(([other, logprob]) =>
      el(
        "tr",
        { class: other === token.name ? "own" : null },
        el("th", { scope: "row" }, `${named(other)}${other === token.name ? " ◂" : ""}`),
        el("td", {}, gauge(Math.exp(logprob)), ` ${percent(logprob)}`),
        el("td", { class: "n" }, num(logprob)),
      ),
    ),
  );
}
function gauge(share) {
  const filled = el("i", {});
  filled.style.width = `${100 * share}%`;
  return el("span", { class: "gauge", "aria-hidden": "true" }, filled);
}

function choose(answer, i, scroll = true) {
  if (!answer.tokens.length) return;
  mark(false);
  state.at = { answer, i: Math.max(0, Math.min(answer.tokens.length - 1, i)) };
  mark(true);
  const node = nodeOf(answer, state.at.i),
    token = answer.tokens[state.at.i];
  answer.node.setAttribute("aria-activedescendant", node.id);
  if (scroll) reveal(node.closest(".prose"), node);
  byId("bar").replaceChildren(el("span", {}, [label(token), ...facts(token).map((f) => f.join(" ").replace("log-probability", "log p"))].join(" · ")));
  byId("facts").replaceChildren(...one(answer, state.at.i));
}
function mark(on) {
  if (!state.at) return;
  const node = nodeOf(state.at.answer, state.at.i);
  node.classList.toggle("now", on);
  node.setAttribute("aria-selected", on);
}
function hold(on) {
  state.held = on;
  document.body.classList.toggle("held", on);
}
function pointed(event) {
  const node = event.target.closest("[data-i]");
  return node && [answerOf(node), +node.dataset.i, false];
}
function walk(event) {
  const box = event.target.closest(".answer");
  if (!box || event.ctrlKey || event.metaKey || event.altKey) return;
  const answer = answerOf(box),
    i = state.at?.answer === answer ? state.at.i : 0;
  const to = moved(event.key, box, i);
  if (event.key === "Enter" || event.key === " ") hold(!state.held);
  else if (to !== undefined) choose(answer, to);
  else return;
  event.preventDefault();
}

function listen() {
  document.addEventListener("mouseover", (event) => {
    const at = pointed(event);
    if (at && !state.held) choose(...at);
  });
  document.addEventListener("click", (event) => {
    const at = pointed(event);
    if (!at) return;
    choose(...at);
    hold(true);
  });
  document.addEventListener("focusin", (event) => {
    const box = event.target.closest(".answer");
    if (box && state.at?.answer !== answerOf(box)) choose(answerOf(box), 0);
  });
  document.addEventListener("keydown", walk);
  const bar = byId("bar");
  bar.addEventListener("click", () => bar.setAttribute("aria-expanded", bar.getAttribute("aria-expanded") === "false"));
}
