// A text with its continuation, or a conversation; asking for the next answer, and stopping it.
"use strict";

// completion: {prompt, answer} · chat: turns {role, text} and {role, answer} · drafts: the text field in each mode
const talk = { completion: null, chat: [], drafts: { completion: "", chat: "" } };
const ASKS = { completion: "Text to go on from", chat: "Your message" };
const KEYS = {
  completion: "Ctrl+Enter generates, Esc stops.",
  chat: "Enter sends, Shift+Enter begins a new line, Esc stops.",
};
const BOX = { completion: "page", chat: "talk" };

function setMode(mode) {
  talk.drafts[state.mode] = byId("text").value;
  state.mode = mode;
  document.querySelector(`[name=mode][value=${mode}]`).checked = true;
  byId("text").value = talk.drafts[mode];
  byId("asks").textContent = ASKS[mode];
  byId("keys").textContent = KEYS[mode];
  byId("send").textContent = mode === "chat" ? "Send" : "Generate";
  byId("clear").textContent = mode === "chat" ? "New conversation" : "Clear";
  byId("system-row").hidden = mode !== "chat";
  show();
}
// Which parts are there, by mode and by what has been said.
function show() {
  const there = { completion: Boolean(talk.completion), chat: talk.chat.length > 0 };
  for (const mode of Object.keys(BOX)) byId(BOX[mode]).hidden = state.mode !== mode || !there[mode];
  const idle = !state.running;
  byId("clear").hidden = !there[state.mode];
  byId("onward").hidden = !(state.mode === "completion" && talk.completion?.answer.text);
  for (const id of ["send", "clear", "onward"]) byId(id).disabled = !idle;
  byId("stop").disabled = idle;
  for (const node of document.querySelectorAll("[name=mode]"))
    node.disabled = !idle || (node.value === "chat" && !state.model?.has_chat_template);
}
function problem(words) {
  byId("problem").hidden = !words;
  byId("problem").textContent = words;
  if (words) byId("problem").scrollIntoView({ block: "nearest" });
}

const turn = (role, ...parts) => el("div", { class: `turn ${role}` }, parts);
function showTurn({ role, text, answer }) {
  const node = answer
    ? turn(role, el("p", { class: "who" }, "model"), answer.node, answer.about)
    : turn(role, el("p", { class: "who" }, "you"), el("p", { class: "given" }, text));
  byId("talk").append(node);
}
function showCompletion({ prompt, answer }) {
  byId("page").replaceChildren(el("span", { class: "given" }, prompt), answer.node, answer.about);
}

function requestFor(text) {
  const body = {
    model: state.model.id,
    stream: true,
    stream_options: { include_usage: true },
    return_depths: true,
    ...chosenSettings(),
  };
  if (state.mode === "completion") return ["v1/completions", { ...body, prompt: text, logprobs: 5 }];
  const system = byId("system").value.trim();
  const messages = [
    ...(system ? [{ role: "system", content: system }] : []),
    ...talk.chat.map(({ role, text: said, answer }) => ({ role, content: answer ? answer.text : said })),
    { role: "user", content: text },
  ];
  return ["v1/chat/completions", { ...body, messages, logprobs: true, top_logprobs: 5 }];
}

// The text counts as sent when the server has taken it; before that it stays in its field.
function begin(text, answer) {
  if (state.mode === "completion") showCompletion((talk.completion = { prompt: text, answer }));
  else {
    talk.chat.push({ role: "user", text }, { role: "assistant", answer });
    talk.chat.slice(-2).forEach(showTurn);
    if (byId("text").value === text) byId("text").value = "";
  }
  hold(false);
  show();
  following.on = true;
}
// A message that got no answer goes back into its field.
function takeBack(text) {
  talk.chat.splice(-2);
  byId("talk").lastChild.remove();
  byId("talk").lastChild.remove();
  const typed = byId("text").value;
  byId("text").value = typed ? `${text}\n${typed}` : text;
}

async function run() {
  const text = byId("text").value;
  if (state.running || !isReady(text)) return;
  state.running = new AbortController();
  const answer = newAnswer();
  const signal = state.running.signal;
  let begun = false;
  problem("");
  byId("progress").textContent = "Waiting for the first token …";
  byId("said").textContent = "Waiting for the first token";
  byId("stop").disabled = false;
  if (document.activeElement === byId("send")) byId("stop").focus();
  show();
  try {
    for await (const event of events(await ask(...requestFor(text), signal), signal)) {
      if (!begun) begin(text, answer);
      begun = true;
      event.choices.forEach((choice) => grow(answer, choice));
      if (answer.tokens.length) byId("progress").textContent = "";
      if (event.usage) answer.meanDepth = event.usage.completion_tokens_details?.mean_depth ?? answer.meanDepth;
      follow(answer);
    }
  } catch (error) {
    fail(error, answer, signal);
    if (begun && state.mode === "chat" && !answer.tokens.length) takeBack(text);
  } finally {
    end(answer, begun);
  }
}
function isReady(text) {
  if (!state.model) problem(GONE);
  else if (state.mode === "chat" && !text.trim()) problem("Type a message first.");
  else return byId("settings").reportValidity();
  return false;
}
function fail(error, answer, signal) {
  if (signal.aborted) answer.reason = "stopped by you";
  else if (error instanceof Problem) {
    answer.reason = "broke off";
    problem(error.message);
    if (error.status === 401) {
      byId("key-row").hidden = false;
      byId("key").focus();
    }
  } else throw error;
}
function end(answer, begun) {
  const wasStop = document.activeElement === byId("stop");
  state.running = null;
  byId("progress").textContent = "";
  answer.about.textContent = summary(answer);
  byId("said").textContent = begun ? `${answer.text} (${answer.about.textContent})` : "";
  show();
  if (wasStop) byId("send").focus();
  save();
  saveTalk();
}
const stop = () => state.running?.abort();

// The newest line stays in sight, unless someone has scrolled away from it.
const following = { on: true, top: 0, asked: false };
function follow(answer) {
  if (following.asked) return;
  following.asked = true;
  requestAnimationFrame(() => {
    following.asked = false;
    answer.about.textContent = summary(answer);
    const box = answer.node.closest(".prose");
    if (box && following.on && !state.held) box.scrollTop = box.scrollHeight;
  });
}
function scrolled({ target }) {
  const isUp = target.scrollTop < following.top,
    isAtEnd = target.scrollHeight - target.scrollTop - target.clientHeight < 24;
  following.on = isAtEnd || (following.on && !isUp);
  following.top = target.scrollTop;
}

function onward() {
  byId("text").value = talk.completion.prompt + talk.completion.answer.text;
  byId("text").focus();
  byId("text").setSelectionRange(byId("text").value.length, byId("text").value.length);
  save();
}
function clear() {
  byId(BOX[state.mode]).replaceChildren();
  if (state.mode === "chat") talk.chat = [];
  else talk.completion = null;
  if (state.at && !state.at.answer.node.isConnected) state.at = null;
  hold(false);
  show();
  byId("text").focus();
  saveTalk();
}

// What was typed and said outlives a reload, in this tab. The API key does not.
const KEPT = ["system", "temperature", "top-p", "max-tokens", "seed"];
function save() {
  talk.drafts[state.mode] = byId("text").value;
  const fields = Object.fromEntries(KEPT.map((id) => [id, byId(id).value]));
  const depth = byId("own-depth").checked ? null : byId("depth").value;
  store("mor-drafts", { mode: state.mode, drafts: talk.drafts, fields, depth });
}
function saveTalk() {
  const plain = ({ answer: { tokens, text, meanDepth, reason = "stopped by you", speed: said } }) => ({
    tokens,
    text,
    meanDepth,
    reason,
    speed: said,
  });
  store("mor-talk", {
    completion: talk.completion && { prompt: talk.completion.prompt, answer: plain(talk.completion) },
    chat: talk.chat.map((t) => (t.answer ? { role: t.role, answer: plain(t) } : t)),
  });
}
function store(name, value) {
  try {
    sessionStorage.setItem(name, JSON.stringify(value));
  } catch {
    // No room or no permission: the page works, a reload forgets.
  }
}
function stored(name) {
  try {
    return JSON.parse(sessionStorage.getItem(name));
  } catch {
    return null;
  }
}
function restore() {
  const kept = stored("mor-drafts"),
    said = stored("mor-talk");
  if (said?.completion) {
    talk.completion = { prompt: said.completion.prompt, answer: newAnswer(said.completion.answer) };
    showCompletion(talk.completion);
  }
  talk.chat = (said?.chat || []).map((t) => (t.answer ? { role: t.role, answer: newAnswer(t.answer) } : t));
  talk.chat.forEach(showTurn);
  for (const [id, value] of Object.entries(kept?.fields || {})) byId(id).value = value;
  state.keptDepth = kept?.depth ?? null;
  Object.assign(talk.drafts, kept?.drafts);
  byId("text").value = talk.drafts[kept?.mode ?? "completion"];
  state.mode = kept?.mode ?? "completion";
  setMode(state.mode);
}
