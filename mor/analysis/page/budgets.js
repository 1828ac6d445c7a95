// The text under other depth budgets: a slider moves from one to the next.

const asksFor = (b) => (b.asked === "full" ? "full depth" : `budget ${num(b.asked, 2).replace(/\.?0+$/, "")}`);
const spends = (m, b) =>
  `mean depth ${num(b.mean_depth)}` +
  (b.nll === null ? "" : ` · ${num(b.nll, 3)} nats per ${answers(m) ? "answer" : "token"}`);

function budgets(m, k) {
  if (!m.budgets.length) return el("p", { class: "note" }, "This model was read at its own depths alone.");
  const deepest = Math.max(...m.budgets.flatMap((b) => b.depth)),
    least = Math.min(...m.budgets.flatMap((b) => b.depth));
  const tokens = m.tokens.map((t) => el("span", { class: "tok" }, t.piece));
  const look = { class: "prose", style: `--deepest:${deepest}` };
  const text = el("div", { ...look, tabindex: 0, role: "group", "aria-label": "The text under this budget" }, tokens);
  const said = el("output", { for: `budget${k}` });
  const slider = el("input", { type: "range", id: `budget${k}`, min: 0, max: m.budgets.length - 1, step: 1, list: `budgets${k}` });
  const move = () => {
    const b = m.budgets[+slider.value];
    tokens.forEach((node, i) => {
      tint(node, depthLevel(b.depth[i], deepest), b.depth[i]);
      node.title = `depth ${b.depth[i]}${b.logprob[i] === null ? "" : ` · log p ${num(b.logprob[i])}`}`;
    });
    said.replaceChildren(el("b", {}, asksFor(b)), ` · ${spends(m, b)}`);
    slider.setAttribute("aria-valuetext", `${asksFor(b)}, ${spends(m, b)}`);
  };
  slider.addEventListener("input", move);
  slider.value = Math.floor((m.budgets.length - 1) / 2);
  move();
  return [
    el(
      "div",
      { class: "slider" },
      el("label", { for: `budget${k}` }, "Depth budget"),
      slider,
      el("datalist", { id: `budgets${k}` }, m.budgets.map((_, i) => el("option", { value: i }))),
      said,
    ),
    el("p", { class: "legend" }, depthLegend(deepest, least)),
    text,
    table(
      ["budget", "mean depth", `nats per ${answers(m) ? "answer" : "token"}`, "deepest token"],
      m.budgets.map((b) => [asksFor(b), num(b.mean_depth), num(b.nll, 3), Math.max(...b.depth)]),
    ),
  ];
}
