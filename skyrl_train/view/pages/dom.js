// Builds the page. Every text goes through a text node, so nothing that a model, a server or a folder says becomes markup.

const HIDDEN = /(?![\n\t])[\p{C}\p{Zl}\p{Zp}]/gu;  // as skyrl_train/visible.py has it

/** Return the text with control, direction and other invisible characters as pictures or codes. */
export function visible(text) {
  return String(text).replace(HIDDEN, (c) => {
    const code = c.codePointAt(0);
    return code < 0x20 ? String.fromCharCode(0x2400 + code) : "\\u" + code.toString(16).padStart(4, "0");
  });
}

/** Return an element: el("a", { class: "x", href: "#/", onclick: f }, "text", child). */
export function el(tag, props = {}, ...children) {
  return filled(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

function filled(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name === "value" || name === "checked" || name === "disabled") node[name] = value;
    else node.setAttribute(name, value === true ? "" : visible(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === undefined || child === null || child === false) continue;
    node.append(child instanceof Node ? child : visible(child));
  }
  return node;
}

/** Return what stands under a name that others chose: "constructor" is a name like any other. */
export function own(object, name) {
  return object && Object.hasOwn(object, name) ? object[name] : undefined;
}

export function fill(node, ...children) {
  keepingFocus(node, () => node.replaceChildren(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false)
    .map((c) => (c instanceof Node ? c : visible(c)))));
  return node;
}

/** Change what stands in a node. A focus in it goes to the control of the same name, else to `otherwise` or a neighbour. */
export function keepingFocus(node, change, otherwise) {
  const controls = () => [...node.querySelectorAll("a, button, input, select, summary, [tabindex]")];
  const nameOf = (one) => [one.tagName, one.getAttribute("aria-label") || one.getAttribute("href") || one.textContent].join(" ");
  const focused = document.activeElement, at = controls().indexOf(focused);
  const name = at < 0 ? "" : nameOf(focused);
  change();
  if (at < 0 || node.contains(document.activeElement)) return;
  const after = controls();
  const same = [after[at], ...after].find((one) => one && nameOf(one) === name);
  (same || otherwise || after[Math.min(at, after.length - 1)])?.focus({ preventScroll: true });
}

/** 0.12345 -> "0.123", 12345 -> "12,345", null -> "–" */
export function num(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(+value.toFixed(Number.isInteger(value) ? 0 : digits));
}

/** 3 digits always, so that columns align. */
export function fixed(value) {
  return value === null || value === undefined ? "–" : Math.abs(value) >= 1000 ? num(value) : value.toFixed(3);
}

export function count(value) {
  if (!value) return value === 0 ? "0" : "–";
  if (value < 10000) return value.toLocaleString("en");
  return value < 1e6 ? (value / 1e3).toFixed(value < 1e5 ? 1 : 0) + "k" : (value / 1e6).toFixed(1) + "M";
}

/** 3725 -> "1h 02m" */
export function clock(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const s = Math.round(seconds);
  if (s < 60) return s + "s";
  if (s < 3600) return Math.floor(s / 60) + "m " + String(s % 60).padStart(2, "0") + "s";
  if (s < 86400) return Math.floor(s / 3600) + "h " + String(Math.floor(s / 60) % 60).padStart(2, "0") + "m";
  return Math.floor(s / 86400) + "d " + (Math.floor(s / 3600) % 24) + "h";
}

export function ago(time) {
  if (!time || Math.abs(time) > 8e12) return "–";  // beyond it JavaScript has no dates
  const s = Date.now() / 1000 - time;
  if (s < 5) return "now";
  if (s < 60) return Math.floor(s) + "s ago";
  if (s < 3600) return Math.floor(s / 60) + "m ago";
  if (s < 86400) return Math.floor(s / 3600) + "h ago";
  if (s < 86400 * 14) return Math.floor(s / 86400) + "d ago";
  return new Date(time * 1000).toISOString().slice(0, 10);
}

export function mood(reward) {
  return reward > 0 ? "good" : reward < 0 ? "bad" : "zero";
}

export const ENDS = {
  finished: "finished", out_of_turns: "out of turns", out_of_tokens: "out of tokens", env_failure: "env failure",
};

/** Return a function that runs only once calls have stopped for so many milliseconds. */
export function settled(action, milliseconds) {
  let timer = 0;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...args), milliseconds);
  };
}
