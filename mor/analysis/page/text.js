// The heading, the coloured text, and the columns under tokens.

function summary(m) {
  const s = m.summary;
  const what = { vanilla: "Vanilla Transformer", recursive: "Recursive Transformer", mor: "Mixture of Recursions" }[
    m.model.family
  ];
  const about = [`layers ${m.model.layers}`, `width ${m.model.dim}`, `vocabulary ${count(m.model.vocab_size)}`];
  if (routed(m))
    about.unshift(
      `${m.model.router.replace("_", "-")} router`,
      `${m.model.kv_strategy.replace("_", "-")} keys and values`,
    );
  const tiles = [
    ["tokens", count(s.tokens)],
    ["mean depth", `${num(s.mean_depth)} of ${m.model.num_recursions}`],
    [answers(m) ? "nats per answer" : "nats per token", num(s.nll, 3)],
    answers(m) ? null : ["bits per byte", num(s.bits_per_byte, 3)],
  ].filter(Boolean);
  return [
    models.length === 1
      ? el("p", { class: "kind" }, el("b", {}, m.name), ` · ${what} · ${about.join(" · ")}`)
      : el("p", { class: "kind" }, `${what} · ${about.join(" · ")}`),
    el(
      "dl",
      { class: "tiles" },
      tiles.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
    ),
  ];
}

// 98% of all changes with another depth, of both models, lie within this many nats.
function widest() {
  const sizes = models
    .flatMap((m) => m.tokens.flatMap((t) => [t.fewer, t.more]))
    .filter((x) => x !== null)
    .map(Math.abs)
    .sort((a, b) => a - b);
  return Math.max(0.05, sizes[Math.floor(0.98 * (sizes.length - 1))] || 0);
}
// Nats that it cost to predict token i, or that its own answer cost.
function surprise(m, i) {
  const logprob = m.tokens[answers(m) ? i : i - 1]?.logprob ?? null;
  return logprob === null ? null : -logprob;
}
const asked = models[0].asked;
const changed = (way) => ({
  name: `one recursion ${way}`,
  needs: () => models.some(looped),
  level: (m, t) => t[way],
  diverging: widest(),
  unit: `change of the ${asked}'s log-probability, nats; ±${num(widest())} and more is darkest`,
});
const MODES = {
  depth: {
    name: "depth",
    needs: () => models.some(looped),
    level: (m, t) => depthLevel(t.depth, m.model.num_recursions),
    bars: (t) => t.depth,
  },
  surprise: {
    name: "surprise",
    needs: () => true,
    level: (m, t) => shade(surprise(m, t.index), 10),
    unit: `nats it cost to predict ${asked === "answer" ? "its answer" : "this token"}; 10 and more is darkest`,
  },
  entropy: {
    name: "doubt",
    needs: () => true,
    level: (m, t) => shade(t.entropy, Math.log(m.model.vocab_size)),
    unit: `entropy of the ${asked}, nats; a uniform guess is darkest`,
  },
  fewer: changed("fewer"),
  more: changed("more"),
  against: {
    name: "against the other model",
    needs: () => models.length > 1,
    level: (m, t) => m.against[t.index],
    diverging: 4,
    unit: "nats by which this model predicts this stretch better (blue) or worse (orange); ±4 and more is darkest",
  },
};
// Tokens that take no recursion are there: without colour, like those that take one, and no line below.
const leastDepth = () => (models.some((m) => m.tokens.some((t) => t.depth === 0)) ? 0 : 1);

function paint(node, mode, m, t) {
  const value = mode.level(m, t);
  tint(node, mode.diverging ? shade(value && Math.abs(value), mode.diverging) : value, mode.bars ? mode.bars(t) : 0);
  diverge(node, mode.diverging ? value : 0, mode.diverging);
}
function diverge(node, value, most) {
  node.style.setProperty("--tint", value < 0 ? "var(--high-worse)" : "var(--high)");
  node.classList.toggle("up", value > most / 20);
  node.classList.toggle("down", value < -most / 20);
  return node;
}

function prose(m, k) {
  const tokens = m.tokens.map((t, i) =>
    el(
      "span",
      {
        class: `tok${t.piece.startsWith("\n") ? " newline" : ""}${t.piece === "" ? " partial" : ""}`,
        id: `t${k}-${i}`,
        role: "option",
        "data-i": i,
        "aria-label": `${label(t)}, depth ${t.depth}`,
      },
      t.piece,
    ),
  );
  return el("div", { class: "prose", role: "listbox", tabindex: 0, "aria-label": "Text, token by token" }, tokens);
}

function legend() {
  const place = document.getElementById("legend"),
    mode = MODES[state.mode];
  if (mode.bars) place.replaceChildren(...depthLegend(Math.max(...models.map((x) => x.model.num_recursions)), leastDepth()));
  else if (mode.diverging)
    place.replaceChildren(
      diverge(swatch("worse", 1), -1, 1),
      swatch("no change", 0),
      diverge(swatch("better", 1), 1, 1),
      mode.unit,
    );
  else place.replaceChildren(swatch("none", 0), swatch("some", 0.5), swatch("much", 1), mode.unit);
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

// Columns wrap; a strip of the same height names the recursions beside every line of them.
function columns(m, k, cls, words, cell) {
  const made = m.tokens.map((t, i) =>
    el(
      "div",
      { class: "col", id: `${cls}${k}-${i}`, role: "option", "data-i": i, "aria-label": `${label(t)}: ${words(t)}` },
      el("div", { class: "head" }, label(t)),
      t.steps.map((s) => cell(t, s)),
    ),
  );
  const names = m.tokens[0].steps.map((s) =>
    el("div", { class: "cell" }, el("span", { class: "long" }, "recursion "), s.recursion),
  );
  const key = el("div", { class: "col" }, el("div", { class: "head" }, " "), names);
  const lines = Math.ceil(m.tokens.length / 3); // more than there can be; what is left over is hidden
  const keys = Array.from({ length: lines }, () => key.cloneNode(true));
  return el(
    "div",
    { class: `columns ${cls}`, role: "listbox", tabindex: 0, "aria-label": cls },
    el("div", { class: "lines" }, el("div", { class: "keys", "aria-hidden": "true" }, keys), made),
  );
}

const filled = (level, text, cls) =>
  el("div", { class: `cell on ${cls || ""}`, style: `--level:${level.toFixed(3)}` }, text);

function scores(m, k) {
  if (!routed(m))
    return el(
      "p",
      { class: "note" },
      looped(m) ? "No router: every token takes every recursion." : "One pass and no router.",
    );
  const words = (t) =>
    t.steps
      .map((s) =>
        s.score === null ? (s.taken ? "taken" : "not asked") : `${num(s.score)} ${s.taken ? "taken" : "refused"}`,
      )
      .join(", ");
  return columns(m, k, "scores", words, (t, s) => {
    if (s.taken) return filled(s.score === null ? 0.5 : s.score, s.score === null ? "✓" : hundredths(s.score));
    return el(
      "div",
      { class: `cell ${s.score === null ? "unasked" : "refused"}` },
      s.score === null ? "·" : hundredths(s.score),
    );
  });
}

function exits(m, k) {
  const words = (t) =>
    t.steps
      .map((s) => `${visible(s.exit_guesses[0].text)} ${hundredths(s.exit_guesses[0].probability)} percent`)
      .join(", ");
  return columns(m, k, "exits", words, (t, s) => {
    const guess = s.exit_guesses[0],
      right = guess.token_id === t.target_id;
    return filled(
      1 - s.exit_entropy / Math.log(m.model.vocab_size),
      visible(guess.text),
      `${right ? "true " : ""}${s.recursion === t.depth ? "chosen" : ""}`,
    );
  });
}
