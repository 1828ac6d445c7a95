// What goes into a request beside the text, and what the server and its model say of themselves.
"use strict";

const NUMBERS = { temperature: "temperature", top_p: "top-p", max_tokens: "max-tokens", seed: "seed" };

// Fields of a request; a field left empty is left to the server.
function chosenSettings() {
  const found = {};
  for (const [name, id] of Object.entries(NUMBERS)) if (byId(id).value !== "") found[name] = Number(byId(id).value);
  if (state.model.depths && !byId("own-depth").checked) found.depth = chosenDepth();
  return found;
}
function chosenDepth() {
  const { min, max } = state.model.depths;
  return Math.min(max, Math.max(min, Number(Number(byId("depth").value).toFixed(3))));
}
function sayDepth() {
  const own = byId("own-depth").checked,
    said = own ? "left to the server" : `${num(chosenDepth())} recursions`;
  byId("depth-said").textContent = said;
  byId("depth").setAttribute("aria-valuetext", said);
  byId("depth").classList.toggle("unused", own);
}
function offerBudget(depths) {
  byId("budget").hidden = !depths;
  if (!depths) return;
  const slider = byId("depth"),
    chosen = byId("own-depth").checked ? state.keptDepth : slider.value;
  const steps = Math.max(1, Math.round((depths.max - depths.min) / 0.05));
  // A little more than the most, so that rounding cannot keep it out of reach.
  Object.assign(slider, { min: depths.min, max: depths.max + 1e-6, step: (depths.max - depths.min) / steps || 1 });
  slider.value = chosen ?? depths.max;
  byId("own-depth").checked = chosen === null;
  state.keptDepth = null;
  byId("depth-range").textContent = `from ${num(depths.min)} to ${num(depths.max)}`;
  sayDepth();
}

async function loadModel() {
  const [found] = (await json("v1/models")).data;
  state.model = { id: found.id, ...found.mor };
  const { num_recursions, depths, has_chat_template } = state.model;
  document.title = `${found.id} · mor playground`;
  byId("model").textContent = found.id;
  byId("about").textContent = num_recursions > 1 ? ` · up to ${num_recursions} recursions per token` : " · one pass per token";
  state.deepest = Math.max(num_recursions, Math.ceil(depths?.max ?? 0));
  document.querySelectorAll(".answer").forEach((node) => answerOf(node).tokens.forEach((t) => reach(t.depth)));
  offerBudget(depths);
  const chat = document.querySelector("[name=mode][value=chat]");
  chat.disabled = !has_chat_template;
  byId("no-chat").hidden = has_chat_template;
  if (state.mode === "chat" && !has_chat_template) setMode("completion");
  colours();
}

function showStats(found) {
  byId("speed").textContent = num(found.tokens_per_second, 1);
  byId("pages").textContent = `${count(found.pages_used)} of ${count(found.pages)}`;
  byId("running").textContent = count(found.running);
  byId("waiting").textContent = count(found.waiting);
}
const noStats = () => ["speed", "pages", "running", "waiting"].forEach((id) => byId(id).replaceChildren("–"));

// Asks for the numbers as long as the page is seen. Once the server is back, its model may be another.
async function watch() {
  for (;;) {
    if (!document.hidden) await look();
    await new Promise((done) => setTimeout(done, state.running ? 400 : 1000));
  }
}
async function look() {
  try {
    if (!state.model) await loadModel();
    showStats(await json("stats", AbortSignal.timeout(5000)));
    byId("lost").hidden = true;
  } catch (error) {
    if (!(error instanceof Problem || error instanceof DOMException)) throw error;
    noStats();
    if (error.status === 401) return keyAfter(error).then(look);
    if (!state.running) state.model = null;
    byId("lost").hidden = false;
    byId("lost").textContent = error instanceof Problem ? error.message : GONE;
  }
}
// Asks for one, and waits until it is typed.
async function keyAfter(problem) {
  byId("key-row").hidden = false;
  byId("lost").hidden = false;
  byId("lost").textContent = problem.message;
  await new Promise((done) => byId("key").addEventListener("change", done, { once: true }));
}
