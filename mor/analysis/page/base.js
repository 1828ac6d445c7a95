// The data, and what is asked of it everywhere.
"use strict";
const models = JSON.parse(document.getElementById("data").textContent).models;
const state = { at: models.map(() => -1), held: false, mode: "depth" };

const routed = (m) => m.model.family === "mor";
const answers = (m) => m.asked === "answer"; // of a task, in place of next tokens
const looped = (m) => m.model.num_recursions > 1;
const label = (t) => (t.piece === "" ? t.token : visible(t.piece));

function part(name, draw) {
  const place = document.querySelector(`[data-part="${name}"]`);
  models.forEach((m, k) => {
    const box = el("div", { class: "part", "data-model": k });
    if (models.length > 1) box.append(el("p", { class: "name" }, m.name));
    box.append(...[draw(m, k)].flat());
    place.append(box);
  });
}
