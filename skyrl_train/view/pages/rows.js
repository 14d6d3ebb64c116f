// A list of any length of which only the rows in sight exist. Rows have one height, so nothing shifts while pages arrive.

import { el, keepingFocus } from "./dom.js";

const PAGE = 100, BEYOND = 6;

export class Rows {
  /**
   * height(): of a row in pixels. load(offset, limit) -> Promise of { total, rows }. draw(row, index) -> children of it.
   * open(row, index): Enter or a click. moved(row, index): the cursor moved there.
   */
  constructor({ height, load, draw, open, moved, label }) {
    Object.assign(this, { height, load, draw, open, moved });
    this.pages = new Map();
    this.total = 0;
    this.cursor = -1;
    this.generation = 0;
    this.space = el("div", { class: "rows-space" });
    this.empty = el("p", { class: "rows-empty soft" });
    this.node = el("div", { class: "rows", tabindex: 0, role: "listbox", "aria-label": label, onscroll: () => this.paint() },
      this.space, this.empty);
    this.resized = new ResizeObserver(() => this.paint());
    this.resized.observe(this.node);
    this.node.addEventListener("click", (event) => this.clicked(event));
  }

  close() {
    this.resized.disconnect();
  }

  clicked(event) {
    const row = event.target.closest(".row");
    if (!row || event.target.closest("input, a, button")) return;
    this.select(Number(row.dataset.index), true);
  }

  /** Ask anew. keep: the place and the cursor stay, as when new rows arrive while somebody reads. */
  async reload({ keep = false } = {}) {
    const generation = ++this.generation;
    const first = keep ? Math.floor(this.node.scrollTop / this.height() / PAGE) * PAGE : 0;
    const answer = await this.load(first, PAGE);
    if (generation !== this.generation) return;
    this.pages = new Map([[first / PAGE, answer.rows]]);
    this.total = answer.total;
    if (!keep) this.node.scrollTop = 0;
    if (this.cursor >= this.total) this.cursor = this.total - 1;
    this.empty.textContent = this.total ? "" : answer.why || "Nothing is here.";
    this.paint();
  }

  row(index) {
    return this.pages.get(Math.floor(index / PAGE))?.[index % PAGE];
  }

  paint() {
    const height = this.height();
    this.space.style.height = this.total * height + "px";
    const first = Math.max(0, Math.floor(this.node.scrollTop / height) - BEYOND);
    const last = Math.min(this.total, Math.ceil((this.node.scrollTop + this.node.clientHeight) / height) + BEYOND);
    const drawn = [];
    for (let index = first; index < last; index++) {
      const row = this.row(index);
      if (!row) this.fetch(Math.floor(index / PAGE));
      const node = el("div", {
        class: index === this.cursor ? "row cursor" : "row", role: "option", id: "row-" + index,
        "aria-selected": index === this.cursor ? "true" : "false", data: { index },
      }, row ? this.draw(row, index) : el("span", { class: "soft" }, "…"));
      node.style.transform = `translateY(${index * height}px)`;
      node.style.height = height + "px";
      drawn.push(node);
    }
    keepingFocus(this.space, () => this.space.replaceChildren(...drawn), this.node);
    if (this.cursor >= 0) this.node.setAttribute("aria-activedescendant", "row-" + this.cursor);
  }

  async fetch(page) {
    if (this.pages.has(page)) return;
    this.pages.set(page, undefined);
    const generation = this.generation;
    try {
      const answer = await this.load(page * PAGE, PAGE);
      if (generation !== this.generation) return;
      this.pages.set(page, answer.rows);
      this.paint();
    } catch {
      this.pages.delete(page);
    }
  }

  /** Move the cursor to a row and into sight. */
  select(index, opens = false) {
    if (!this.total) return;
    this.cursor = Math.max(0, Math.min(this.total - 1, index));
    const height = this.height(), top = this.cursor * height;
    if (top < this.node.scrollTop) this.node.scrollTop = top;
    if (top + height > this.node.scrollTop + this.node.clientHeight) {
      this.node.scrollTop = top + height - this.node.clientHeight;
    }
    this.paint();
    const row = this.row(this.cursor);
    if (!row) return;
    this.moved?.(row, this.cursor);
    if (opens) this.open?.(row, this.cursor);
  }

  get keys() {
    const page = () => Math.max(1, Math.floor(this.node.clientHeight / this.height()) - 1);
    return {
      j: () => this.select(this.cursor + 1), k: () => this.select(this.cursor - 1),
      ArrowDown: () => this.select(this.cursor + 1), ArrowUp: () => this.select(this.cursor - 1),
      PageDown: () => this.select(this.cursor + page()), PageUp: () => this.select(this.cursor - page()),
      Home: () => this.select(0), End: () => this.select(this.total - 1),
      Enter: () => this.cursor >= 0 && this.row(this.cursor) && this.open?.(this.row(this.cursor), this.cursor),
    };
  }
}
