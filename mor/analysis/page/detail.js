// One token: everything about it, choosing it, and holding it.

function gauge(s) {
  if (s.score === null) return s.taken ? "taken" : "not asked";
  const bar = el(
    "span",
    { class: "gauge" },
    el("i", { style: `width:${100 * s.score}%` }),
    s.threshold === null ? null : el("b", { style: `left:${100 * s.threshold}%` }),
  );
  return el("span", {}, bar, ` ${num(s.score)} ${s.taken ? "✓" : "✗"}`);
}
function change(name, x) {
  return x === null
    ? null
    : el(
        "li",
        {},
        `${name}: log-probability ${signed(x)} nats, ${Math.abs(x) < 0.005 ? "no difference" : x < 0 ? "worse" : "better"}`,
      );
}
function one(m, i) {
  const t = m.tokens[i],
    R = m.model.num_recursions;
  const facts = [
    ["depth", `${"●".repeat(t.depth)}${"○".repeat(R - t.depth)} ${t.depth} of ${R}`],
    ["kind", t.kind],
    ["place", `token ${t.index + 1} of ${m.tokens.length}, position ${t.position} in its window`],
    ["vocabulary", `${t.token} (${t.token_id}), seen ${count(t.count)}×`],
    answers(m)
      ? null
      : ["predicted with", surprise(m, i) === null ? "–" : `log-probability ${num(-surprise(m, i))} nats`],
    [m.asked, t.target === null ? "none here" : `${visible(t.target)} · log-probability ${num(t.logprob)} · rank ${t.rank}`],
    ["doubt", `${num(t.entropy)} nats of entropy`],
  ].filter(Boolean);
  const rows = t.steps.flatMap((s) => [
    el(
      "tr",
      { class: `main${s.recursion === t.depth ? " own" : ""}` },
      [
        `${s.recursion}${s.recursion === t.depth ? " ◂" : ""}`,
        gauge(s),
        num(s.gate, 3),
        num(s.exit_logprob),
        num(s.exit_entropy),
      ].map((c, j) => el("td", { class: j > 1 ? "n" : null }, c)),
    ),
    el(
      "tr",
      { class: "guesses" },
      el("td", {}),
      el(
        "td",
        { colspan: 4 },
        s.exit_guesses.map((g) => `${visible(g.text)} ${hundredths(g.probability)}%`).join("  "),
      ),
    ),
  ]);
  const heads = ["", routed(m) ? "score" : "", routed(m) ? "gate" : "", "log p", "entropy"];
  return el(
    "div",
    { class: "one" },
    models.length > 1 ? el("p", { class: "name" }, m.name) : null,
    el("p", { class: "big" }, label(t)),
    el("dl", {}, facts.map(([a, b]) => [el("dt", {}, a), el("dd", {}, b)]).flat()),
    el(
      "table",
      {},
      el(
        "tr",
        {},
        heads.map((h, j) => el("th", { class: j > 1 ? "n" : null }, h)),
      ),
      rows,
    ),
    looped(m) ? el("ul", {}, change("One recursion fewer", t.fewer), change("One recursion more", t.more)) : null,
  );
}

const line = (m, i) => {
  const t = m.tokens[i],
    said = t.target === null ? "" : ` → ${visible(t.target)} · log p ${num(t.logprob)}`;
  return el("span", {}, `${label(t)} · depth ${t.depth} of ${m.model.num_recursions}${said}`);
};

function twin(k, i, other) {
  const t = models[k].tokens[i],
    tokens = models[other].tokens;
  const found = tokens.findIndex((o) => o.end > t.start);
  return found < 0 ? tokens.length - 1 : found;
}
function choose(k, i, scroll) {
  i = Math.max(0, Math.min(models[k].tokens.length - 1, i));
  document.querySelectorAll(".now").forEach((node) => {
    node.classList.remove("now");
    node.removeAttribute("aria-selected");
  });
  models.forEach((m, other) => {
    const j = (state.at[other] = other === k ? i : twin(k, i, other));
    for (const prefix of ["t", "scores", "exits"]) {
      const node = document.getElementById(`${prefix}${other}-${j}`);
      if (!node) continue;
      node.classList.add("now");
      node.setAttribute("aria-selected", "true");
      const box = node.closest("[role=listbox]");
      box.setAttribute("aria-activedescendant", node.id);
      if (scroll !== box) reveal(box, node);
    }
    document
      .querySelectorAll(`[data-model="${other}"] .stroke[data-i="${j}"]`)
      .forEach((node) => node.classList.add("now"));
  });
  document.getElementById("bar").replaceChildren(...models.map((m, other) => line(m, state.at[other])));
  document.getElementById("facts").replaceChildren(...models.map((m, other) => one(m, state.at[other])));
}
function key(event) {
  const box = event.target.closest("[role=listbox]");
  if (event.key === "Escape") return hold(false);
  if (!box) return undefined;
  const k = +box.closest("[data-model]").dataset.model,
    i = state.at[k];
  const to = moved(event.key, box, i);
  if (event.key === "Enter" || event.key === " ") hold(!state.held);
  else if (to !== undefined) choose(k, to);
  else return undefined;
  return event.preventDefault();
}
function hold(on) {
  state.held = on;
  document.body.classList.toggle("held", on);
}
function pointed(event) {
  const node = event.target.closest("[data-i]");
  return node && [+node.closest("[data-model]").dataset.model, +node.dataset.i, node.closest("[role=listbox]")];
}
