// What goes over the wire: requests, streams of events, and failures in plain words.
"use strict";

// A failure that a person is told in these words. status: of the HTTP answer, if there was one
class Problem extends Error {
  constructor(words, status) {
    super(words);
    this.status = status;
  }
}
const GONE = "The server cannot be reached. Is mor serve still running? What you typed is still here.";

function headers() {
  const key = byId("key").value.trim();
  if (/[^\x21-\x7e]/.test(key)) throw new Problem("The API key holds a character that no key can have.", 401);
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}
// The answer to a request. Throws Problem; of a request that was stopped, the browser's AbortError.
async function ask(path, body, signal) {
  const how = { headers: headers(), signal, cache: "no-store" };
  if (body) Object.assign(how, { method: "POST", body: JSON.stringify(body) });
  let response;
  try {
    response = await fetch(path, how);
  } catch (error) {
    throw signal?.aborted ? error : new Problem(GONE);
  }
  if (!response.ok) throw new Problem(refusal(response, await messageOf(response)), response.status);
  return response;
}
async function json(path, signal) {
  const response = await ask(path, null, signal);
  try {
    return await response.json();
  } catch {
    throw new Problem(GONE);
  }
}
async function messageOf(response) {
  try {
    return (await response.json()).error.message || response.statusText;
  } catch {
    return response.statusText || "no reason given";
  }
}
function refusal(response, message) {
  const seconds = Number(response.headers.get("Retry-After") || NaN);
  const when = Number.isFinite(seconds) ? `in about ${count(seconds)} s` : "a little later";
  const status = response.status;
  if (status === 401)
    return byId("key").value ? "The server does not know this API key." : "The server asks for an API key; type it below.";
  if (status === 429) return `The server is busy. Try again ${when}; what you typed is still here. (${message})`;
  if (status === 413) return `That is more text than the server takes at once: ${message}`;
  if (status === 408 || status === 504) return `The server took too long: ${message}`;
  if (status === 503) return `The server takes no requests now. Try again ${when}; what you typed is still here. (${message})`;
  return status < 500 ? `The server refuses this request: ${message}` : `The server failed (${status}): ${message}`;
}

// The events of a stream, up to [DONE]. Throws Problem if it breaks off or reports an error.
async function* events(response, signal) {
  for await (const data of messages(response, signal)) {
    if (data === "[DONE]") return;
    let event;
    try {
      event = JSON.parse(data);
    } catch {
      throw new Problem("The answer broke off: the server sent something that is no answer.");
    }
    if (event.error) throw new Problem(`The server broke the answer off: ${event.error.message}`);
    yield event;
  }
  throw new Problem("The answer broke off: the connection was lost. What had arrived is kept.");
}
// The data of each server-sent event.
async function* messages(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "",
    data = [];
  try {
    for (;;) {
      const { value, done } = await next(reader, signal);
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((l) => l.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
async function next(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal.aborted) throw error;
    return { done: true };
  }
}

// The text and the tokens that an event adds; completions and chats say it differently.
function added(choice) {
  const scores = choice.logprobs?.content || asContent(choice.logprobs),
    depths = choice.depths || [];
  const tokens = Array.from({ length: Math.max(depths.length, scores.length) }, (_, i) => ({
    text: "",
    name: scores[i]?.token ?? "",
    depth: depths[i] ?? null,
    logprob: scores[i]?.logprob ?? null,
    others: (scores[i]?.top_logprobs || []).map((o) => [o.token, o.logprob]),
  }));
  const text = choice.text ?? choice.delta?.content ?? "";
  spread(text, tokens);
  return { text, tokens };
}
const asContent = (found) =>
  (found?.tokens || []).map((token, i) => ({
    token,
    logprob: found.token_logprobs[i],
    top_logprobs: Object.entries(found.top_logprobs?.[i] || {}).map(([other, logprob]) => ({ token: other, logprob })),
  }));
// Which token shows which part. Characters that were held back come with a later token: the last takes what is left.
function spread(text, tokens) {
  tokens.forEach((token, i) => {
    const own = i < tokens.length - 1 ? (text.startsWith(token.name) ? token.name : "") : text;
    token.text = own;
    text = text.slice(own.length);
  });
}
