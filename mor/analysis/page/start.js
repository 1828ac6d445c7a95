// Two models against each other, the notes, and the start of it all.

// Comparison: nats by which each stretch between common token ends is predicted better than by the other model
function against() {
  if (models.length < 2) return;
  const ends = models.map((m) => new Set(m.tokens.map((t) => t.end))),
    common = new Set([...ends[0]].filter((e) => ends[1].has(e)));
  const totals = models.map((m) => {
    const byEnd = new Map(),
      members = new Map();
    let sum = 0,
      known = true,
      open = [];
    m.tokens.forEach((t, i) => {
      const s = surprise(m, i);
      known = known && s !== null;
      sum += s === null ? 0 : s;
      open.push(i);
      if (common.has(t.end) && m.tokens[i + 1]?.end !== t.end) {
        byEnd.set(t.end, known ? sum : null);
        members.set(t.end, open);
        [sum, known, open] = [0, true, []];
      }
    });
    return { byEnd, members };
  });
  models.forEach((m, k) => {
    m.against = m.tokens.map(() => null);
    for (const [end, mine] of totals[k].byEnd) {
      const theirs = totals[1 - k].byEnd.get(end);
      if (mine !== null && theirs !== null && theirs !== undefined)
        totals[k].members.get(end).forEach((i) => {
          m.against[i] = theirs - mine;
        });
    }
  });
}

// Says so where a panel holds more than is seen. Below its full height it shows everything: there the mark would make room for itself.
function markCut(box, content = box) {
  const mark = () => {
    const isFull = box.offsetHeight >= parseFloat(getComputedStyle(box).maxHeight) - 1;
    box.classList.toggle("cut", isFull && box.scrollHeight - box.scrollTop - box.clientHeight > 4);
  };
  const observer = new ResizeObserver(mark);
  box.addEventListener("scroll", mark);
  [box, content].forEach((node) => observer.observe(node));
}

function about() {
  const long = models.some((m) => m.tokens.length > m.window);
  document
    .getElementById("about")
    .append(
      ...[
        "Depth is the number of recursions that a token took when it was read; it is what the model spent on its prediction there. Log-probabilities and entropies are in nats.",
        "Exits and changes of depth: only the token looked at takes another depth, the tokens before it are as they were, and state, coda and head are those of the model. Depths that training never reached for such a token are shown all the same; they say what this network does, not what another training would give.",
        long
          ? `The text is longer than the ${models[0].window} tokens that are read together: it was read in windows that overlap by half, and each token is shown as in the window that gives it most context.`
          : null,
        models.length > 1 ? "The two models are aligned by the characters of the text." : null,
      ]
        .filter(Boolean)
        .map((text) => el("p", {}, text)),
    );
}

document.documentElement.style.setProperty("--models", models.length);
document.querySelectorAll(".asked").forEach((node) => node.replaceChildren(asked));
against();
part("summary", summary);
part("text", prose);
part("budgets", budgets);
part("scores", scores);
part("exits", exits);
part("counterfactuals", counterfactuals);
part("classes", classes);
part("flow", flow);
if (!models.some(routed))
  document
    .querySelectorAll('.routed, [data-section="scores"], [data-section="classes"], [data-section="flow"]')
    .forEach((s) => s.remove());
if (!models.some((m) => m.budgets.length)) document.querySelector('[data-section="budgets"]').remove();
if (!models.some(looped)) document.querySelectorAll('[data-section="counterfactuals"]').forEach((s) => s.remove());
modes();
setMode(state.mode);
about();
choose(0, 0);
document.querySelectorAll(".prose, .columns").forEach((box) => markCut(box));
markCut(document.getElementById("detail"), document.getElementById("facts"));
document.addEventListener("mouseover", (event) => {
  const at = pointed(event);
  if (at && !state.held) choose(...at);
});
document.addEventListener("click", (event) => {
  const at = pointed(event);
  if (at) {
    choose(...at);
    hold(true);
  }
});
document.addEventListener("keydown", key);
const bar = document.getElementById("bar");
bar.addEventListener("click", () => bar.setAttribute("aria-expanded", bar.getAttribute("aria-expanded") === "false"));
