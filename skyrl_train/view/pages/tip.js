// The small box with the values of what is under the mouse or the token cursor.

import { visible } from "./dom.js";

const tip = document.getElementById("tip");

export function showTip(text, box) {
  tip.textContent = visible(text);
  tip.hidden = false;
  const size = tip.getBoundingClientRect();
  const left = Math.max(6, Math.min(box.left, innerWidth - size.width - 6));
  const below = box.bottom + 6;
  tip.style.left = left + "px";
  tip.style.top = (below + size.height > innerHeight ? Math.max(6, box.top - size.height - 6) : below) + "px";
}

export function hideTip() {
  tip.hidden = true;
}
