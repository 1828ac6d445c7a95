// Drawings: changes of depth, classes of tokens, flow through the recursions.

const drawing = (attributes, ...children) =>
  el("div", { class: "drawing" }, svg("svg", { role: "img", ...attributes }, children));
const scale = (from, to, a, b) => (x) => a + ((x - from) / (to - from)) * (b - a);
function ticks(from, to) {
  const rough = (to - from) / 5,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough);
  const found = [];
  for (let i = Math.ceil(from / step - 1e-9); i * step <= to + 1e-9; i++) found.push(i * step);
  return { at: found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}
function axis(x, from, to, y, title) {
  const t = ticks(from, to);
  return [
    svg("line", { class: "axis", x1: x(from), x2: x(to), y1: y, y2: y }),
    t.at.map((v) => [
      svg("line", { class: "grid", x1: x(v), x2: x(v), y1: 14, y2: y }),
      svg("text", { class: "soft", x: x(v), y: y + 15, "text-anchor": "middle" }, num(v, t.digits)),
    ]),
    svg("text", { class: "soft", x: (x(from) + x(to)) / 2, y: y + 31, "text-anchor": "middle" }, title),
  ];
}
// Of few stretches an interval can be wider than the axis, where it then ends; the table has its numbers.
function interval(x, y, g, from, to) {
  const at = (v) => x(Math.max(from, Math.min(to, v)));
  return [
    g.low === null ? null : svg("line", { class: "interval", x1: at(g.low), x2: at(g.high), y1: y, y2: y }),
    svg("circle", { class: "mean", cx: at(g.mean), cy: y, r: 4.5 }),
  ];
}
const range = (g, digits = 2) => (g.low === null ? "no interval" : `${num(g.low, digits)} to ${num(g.high, digits)}`);
function table(heads, rows) {
  return el(
    "details",
    {},
    el("summary", {}, "Numbers"),
    el(
      "table",
      {},
      el(
        "tr",
        {},
        heads.map((h, i) => el("th", { class: i ? "n" : null }, h)),
      ),
      rows.map((r) =>
        el(
          "tr",
          {},
          r.map((c, i) => el("td", { class: i ? "n" : null }, c)),
        ),
      ),
    ),
  );
}

function counterfactuals(m) {
  const rows = ["fewer", "more"].flatMap((name) =>
    m.counterfactuals[name].map((g) => ({
      name,
      g,
      depth: +g.group,
      values: m.tokens.filter((t) => t.depth === +g.group && t[name] !== null),
    })),
  );
  if (!rows.length) return el("p", { class: "note" }, `There is no other depth to take, or no ${m.asked} to judge by.`);
  const most = widest();
  const W = 700,
    left = 132,
    right = 590,
    x = scale(-most, most, left, right),
    H = 22 + rows.length * 34;
  const clamp = (v) => Math.max(-most, Math.min(most, v));
  const drawn = rows.map((r, j) => {
    const y = 32 + j * 34,
      to = r.depth + (r.name === "more" ? 1 : -1);
    return [
      svg("text", { x: 8, y: y + 4 }, `depth ${r.depth} → ${to}`),
      svg("text", { class: "soft", x: left - 8, y: y + 4, "text-anchor": "end" }, count(r.g.count)),
      r.values.map((t) =>
        svg("line", {
          class: `stroke ${t[r.name] < 0 ? "worse" : "better"}`,
          "data-i": t.index,
          x1: x(clamp(t[r.name])),
          x2: x(clamp(t[r.name])),
          y1: y - 9,
          y2: y + 9,
        }),
      ),
      interval(x, y, r.g, -most, most),
      svg("text", { x: right + 12, y: y + 4 }, `${signed(r.g.mean)} nats`),
    ];
  });
  return [
    drawing(
      {
        viewBox: `0 0 ${W} ${H + 42}`,
        "aria-label": "Change of log-probability with one recursion fewer or more",
        class: "strokes",
      },
      axis(
        x,
        -most,
        most,
        H,
        `change of the ${m.asked}'s log-probability, nats (left of 0 is worse; the outermost 2% at the edge)`,
      ),
      svg("line", { class: "zero", x1: x(0), x2: x(0), y1: 14, y2: H }),
      drawn,
    ),
    table(
      ["depth", "tokens", "mean, nats", "95% interval", "better for"],
      rows.map((r) => [
        `${r.depth} → ${r.depth + (r.name === "more" ? 1 : -1)}`,
        count(r.g.count),
        signed(r.g.mean, 3),
        range(r.g, 3),
        `${Math.round((100 * r.values.filter((t) => t[r.name] > 0).length) / r.values.length)}%`,
      ]),
    ),
  ];
}

function classes(m) {
  if (!routed(m)) return el("p", { class: "note" }, "Every token has the same depth.");
  const groups = Object.entries(m.by_class),
    rows = groups.flatMap(([name, found]) => [
      { title: `by ${name}${name === "position" ? " in the window" : ""}` },
      ...found,
    ]);
  const W = 700,
    left = 210,
    right = 640,
    most = Math.max(...models.map((x) => x.model.num_recursions)),
    least = leastDepth(),
    x = scale(least, most, left, right),
    H = 20 + rows.length * 22;
  const drawn = rows.map((g, j) => {
    const y = 26 + j * 22;
    if (g.title) return svg("text", { class: "soft", x: 8, y: y + 4 }, g.title);
    return [
      svg("text", { x: 22, y: y + 4 }, g.group),
      svg("text", { class: "soft", x: left - 14, y: y + 4, "text-anchor": "end" }, count(g.count)),
      interval(x, y, g, least, most),
      svg("text", { class: "soft", x: right + 14, y: y + 4 }, num(g.mean)),
    ];
  });
  return [
    drawing(
      { viewBox: `0 0 ${W} ${H + 42}`, "aria-label": "Mean depth by class of token" },
      axis(x, least, most, H, "mean depth, recursions"),
      drawn,
    ),
    table(
      ["class", "tokens", "mean depth", "95% interval"],
      rows.filter((g) => !g.title).map((g) => [g.group, count(g.count), num(g.mean), range(g)]),
    ),
  ];
}

function flow(m) {
  if (!looped(m)) return el("p", { class: "note" }, "One pass: there is nothing to follow.");
  const R = m.model.num_recursions,
    T = m.tokens.length,
    W = 700,
    H = 226,
    tall = 150,
    top = 46,
    wide = 12;
  const inside = Array.from({ length: R }, (_, r) => m.tokens.filter((t) => t.steps[r].taken).length);
  const at = (r) => 30 + (r * (W - 120)) / R,
    unit = tall / T,
    gap = 16;
  const lane = (r, isIn) => (isIn ? top : top + gap + inside[r] * unit);
  const nodes = inside.flatMap((n, r) => [
    n ? svg("rect", { class: "node in", x: at(r), y: top, width: wide, height: n * unit }) : null,
    n < T ? svg("rect", { class: "node out", x: at(r), y: lane(r, false), width: wide, height: (T - n) * unit }) : null,
    svg("text", { x: at(r), y: top - 24 }, `recursion ${r + 1}`),
    svg("text", { class: "soft", x: at(r), y: top - 9 }, `${count(n)} in (${Math.round((100 * n) / T)}%)`),
    n < T
      ? svg(
          "text",
          { class: "soft", x: at(r) + wide + 5, y: lane(r, false) + (T - n) * unit - 4 },
          `${count(T - n)} out`,
        )
      : null,
  ]);
  const end = at(R);
  nodes.push(
    svg("rect", { class: "node in", x: end, y: top, width: wide, height: tall + gap }),
    svg("text", { x: end + wide, y: top - 24, "text-anchor": "end" }, "coda, head"),
    svg("text", { class: "soft", x: end + wide, y: top - 9, "text-anchor": "end" }, count(T)),
  );
  const moves = [
    ...m.flow,
    ...[1, 0].map((a) => ({ recursion: R, taken: a, next_taken: 1, tokens: a ? inside[R - 1] : T - inside[R - 1] })),
  ];
  return [
    drawing(
      { viewBox: `0 0 ${W} ${H}`, "aria-label": `Tokens in each recursion: ${inside.join(", ")} of ${T}` },
      bands(moves, { at, lane, unit, wide, R, top, tall, gap }),
      nodes,
    ),
    table(
      ["recursion", "in", "out"],
      inside.map((n, r) => [String(r + 1), count(n), count(T - n)]),
    ),
  ];
}

function bands(moves, g) {
  const leaving = {},
    arriving = {},
    drawn = [];
  moves.sort((a, b) => a.recursion - b.recursion || b.taken - a.taken || b.next_taken - a.next_taken);
  for (const f of moves.filter((f) => f.tokens)) {
    const from = `${f.recursion}${f.taken}`,
      to = `${f.recursion}${f.next_taken}`,
      last = f.recursion === g.R,
      height = f.tokens * g.unit;
    const y1 = g.lane(f.recursion - 1, f.taken) + (leaving[from] || 0);
    const y2 = last
      ? f.taken
        ? g.top
        : g.top + g.tall + g.gap - height
      : g.lane(f.recursion, f.next_taken) + (arriving[to] || 0);
    leaving[from] = (leaving[from] || 0) + height;
    arriving[to] = (arriving[to] || 0) + height;
    const x1 = g.at(f.recursion - 1) + g.wide,
      x2 = g.at(f.recursion),
      mid = (x1 + x2) / 2;
    const d = `M${x1},${y1} C${mid},${y1} ${mid},${y2} ${x2},${y2} v${height} C${mid},${y2 + height} ${mid},${y1 + height} ${x1},${y1 + height} z`;
    drawn.push(
      svg(
        "path",
        { class: `band ${f.taken && f.next_taken ? "in" : "out"}`, d },
        svg("title", {}, `${count(f.tokens)} tokens`),
      ),
    );
  }
  return drawn;
}
