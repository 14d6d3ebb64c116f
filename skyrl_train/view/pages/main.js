// The frame: which view an address shows, the keyboard, light and dark, and what the server is doing.

import { Watch } from "./api.js";
import { curvesView } from "./curves.js";
import { el, fill } from "./dom.js";
import { runView } from "./run.js";
import { runsView } from "./runs.js";
import { hideTip } from "./tip.js";

const main = document.getElementById("main"), top_ = document.getElementById("top"), help = document.getElementById("help");
const KEYS = [
  ["/", "search"], ["j  k  ↓  ↑", "next, previous row"], ["Enter", "open"], ["Esc", "back; out of a field"],
  ["x", "choose a run to compare"], ["c", "compare the chosen runs"], ["1 … 4", "the tabs of a run"],
  ["←  →", "token by token: id, logprob, advantage"], ["n  p", "next, previous token the policy was unsure of"],
  ["[  ]", "previous, next episode of the group"], ["g", "the group side by side"], ["v", "what colours tokens"],
  ["t", "light or dark"], ["?", "this list"],
];

let view = null;
const status = el("span", { class: "status", role: "status" }), path = el("nav", { class: "path", "aria-label": "Where you are" });
const watch = new Watch(() => view?.refresh?.(), showState);

function parsed() {
  const [place, query] = location.hash.replace(/^#\/?/, "").split("?");
  const parts = place.split("/").map((part) => { try { return decodeURIComponent(part); } catch { return part; } });
  return { parts, query: new URLSearchParams(query || "") };
}

async function show() {
  const { parts, query } = parsed();
  view?.close?.();
  hideTip();
  const make = parts[0] === "run" && parts[1] ? runView : parts[0] === "curves" ? curvesView : runsView;
  watch.run = make === runView ? parts[1] : "";
  watch.seen = undefined;
  const made = make({ parts, query });
  view = made;
  main.replaceChildren(made.node);
  fill(path, el("a", { href: "#/", class: "home" }, "skyrl view"), made.path || null);
  document.title = made.title ? made.title + " · skyrl view" : "skyrl view";
  try {
    await made.refresh();
  } catch (error) {
    if (view === made && error.name !== "AbortError") made.failed?.(error) ?? fill(main, el("p", { class: "problem" }, error.message));
  }
  watch.look();
}

function showState(state) {
  if (!state) return fill(status, el("span", { class: "dot lost" }), "the server does not answer");
  if (watch.run && state.run_version === null) return fill(status, el("span", { class: "dot lost" }), "this run is no longer there");
  if (state.files_left) return fill(status, el("span", { class: "dot busy" }), `reading ${state.files_left.toLocaleString("en")} files`);
  if (state.unread) return fill(status, el("span", { class: "dot busy" }), `reading ${state.unread} runs`);
  fill(status, el("span", { class: "dot" }), "up to date");
}

function theme(next) {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  let kept = null;
  try { kept = localStorage.getItem("theme"); } catch { /* a browser may forbid it */ }
  const now = kept || (dark ? "dark" : "light");
  const wanted = next ? (now === "dark" ? "light" : "dark") : now;
  document.documentElement.dataset.theme = wanted;
  if (next) {
    try { localStorage.setItem("theme", wanted); } catch { /* then it lasts until the page is left */ }
    view?.themed?.();
  }
}

function up() {
  const { parts } = parsed();
  if (view?.escape?.()) return;
  if (parts[0] === "run" && parts.length > 3) location.hash = `#/run/${parts[1]}/${parts[2]}`;
  else if (parts[0]) location.hash = "#/";
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches?.("input:not([type=checkbox]):not([type=range]), select, textarea");
  if (event.key === "Escape") {
    if (help.open) return;
    event.preventDefault();
    hideTip();
    if (typing) event.target.blur();
    else up();
    return;
  }
  if (typing || help.open) {
    if (typing && event.key === "Enter" && event.target.type === "search") { event.target.blur(); view?.keys?.j?.(); }
    return;
  }
  if (event.key === "Enter" && event.target.closest?.("a, button, summary")) return;
  if (event.key.startsWith("Arrow") && event.target.matches?.("input[type=range]")) return;
  const action = { "?": () => help.showModal(), t: () => theme(true), "/": () => document.querySelector("input[type=search]")?.focus(), ...view?.keys }[event.key];
  if (action) {
    event.preventDefault();
    action();
  }
});

document.addEventListener("focusin", (event) => {
  if (event.target.matches("a, button, input, select, summary")) event.target.scrollIntoView({ block: "nearest", inline: "nearest" });
});

help.append(el("h2", {}, "Keys"), el("table", {}, el("tbody", {}, KEYS.map(([key, what]) =>
  el("tr", {}, el("td", {}, key.split("  ").map((one) => el("kbd", {}, one))), el("td", {}, what))))),
  el("button", { onclick: () => help.close() }, "Close"));
top_.append(path, status,
  el("button", { class: "icon", onclick: () => theme(true), title: "light or dark (t)", "aria-label": "light or dark" }, "◐"),
  el("button", { class: "icon", onclick: () => help.showModal(), title: "keys (?)", "aria-label": "keys" }, "?"));
addEventListener("hashchange", show);
theme(false);
show();
