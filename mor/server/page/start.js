// Connects what is pressed and typed with what it does.
"use strict";

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
byId("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
byId("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing) return;
  const sends = event.ctrlKey || event.metaKey || (state.mode === "chat" && !event.shiftKey);
  if (!sends) return;
  event.preventDefault();
  run();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (state.held) hold(false);
  else stop();
});
byId("stop").addEventListener("click", stop);
byId("onward").addEventListener("click", onward);
byId("clear").addEventListener("click", clear);
byId("depth").addEventListener("input", () => {
  byId("own-depth").checked = false;
  sayDepth();
});
byId("own-depth").addEventListener("change", sayDepth);
document
  .querySelectorAll("[name=mode]")
  .forEach((node) =>
    node.addEventListener("change", () => {
      setMode(node.value);
      save();
    }),
  );
Object.values(BOX).forEach((id) => byId(id).addEventListener("scroll", scrolled));
document.addEventListener("input", save);
addEventListener("pagehide", () => {
  save();
  saveTalk();
});
listen();
restore();
watch();
