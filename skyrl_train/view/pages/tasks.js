// The validation tasks over the steps: a row per task, a cell per evaluation, coloured by reward.

import { ask } from "./api.js";
import { el, fill, num, settled } from "./dom.js";
import { Rows } from "./rows.js";
import { hideTip, showTip } from "./tip.js";

const ORDERS = { change: "most changed", last: "best at the end", worst: "worst at the end", uid: "as in the data" };

export class Tasks {
  fills = true;

  constructor(run, query) {
    this.run = run;
    this.order = query.get("order") || "change";
    this.answer = { steps: [], tasks: [] };
    this.shown = [];
    this.search = el("input", { type: "search", class: "grows", placeholder: "Search tasks  ( / )", "aria-label": "Search tasks", oninput: settled(() => this.apply(), 80) });
    const order = el("select", { "aria-label": "order", onchange: (event) => { this.order = event.target.value; this.apply(); } },
      Object.entries(ORDERS).map(([name, words]) => el("option", { value: name }, words)));
    order.value = this.order;
    this.total = el("span", { class: "soft count" });
    this.heads = el("div", { class: "task-row task-heads number" });
    this.rows = new Rows({
      label: "Validation tasks", height: () => 38,
      load: async (offset, limit) => ({ total: this.shown.length, rows: this.shown.slice(offset, offset + limit), why: this.known ? "No evaluation is kept in this folder." : "" }),
      draw: (task) => this.draw(task),
      open: (task) => { location.hash = `#/run/${run}/task/${encodeURIComponent(task.uid)}`; },
    });
    this.rows.node.addEventListener("mouseover", (event) => {
      const text = event.target.dataset?.tip;
      if (text) showTip(text, event.target.getBoundingClientRect()); else hideTip();
    });
    this.node = el("div", { class: "tasks-page" },
      el("div", { class: "tools" }, this.search, order, this.total,
        el("span", { class: "scale" }, "least", [0, 1, 2, 3, 4, 5, 6].map((i) => el("i", { class: "r" + i })), "most reward")),
      this.heads, this.rows.node);
  }

  draw(task) {
    const text = (cell, i) => `after step ${this.columns[i]}: ${num(cell[0])}${cell[1] > 1 ? ` (mean of ${cell[1]})` : ""}`;
    const cells = this.places.map((at) => task.cells[at]);
    return el("div", { class: "task-row" },
      el("span", { class: "task-name" }, el("b", { class: "number" }, task.uid), " ", el("span", { class: "soft" }, task.asked)),
      el("span", { class: "cells" }, cells.map((cell, i) => (cell ? el("i", { class: "cell r" + this.shade(cell[0]), data: { tip: text(cell, i) } }, cells.length < 13 ? num(cell[0], 2) : "") : el("i", { class: "cell none" })))),
      el("span", { class: "number " + (task.change > 0 ? "good" : task.change < 0 ? "bad" : "soft") }, (task.change > 0 ? "+" : "") + num(task.change, 2)));
  }

  shade(reward) {
    if (reward === null) return 0;
    const [low, high] = this.range;
    return high > low ? Math.round(((reward - low) / (high - low)) * 6) : 3;
  }

  apply(keep = false) {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const by = {
      change: (a, b) => Math.abs(b.change) - Math.abs(a.change), last: (a, b) => b.last - a.last, worst: (a, b) => a.last - b.last,
      uid: (a, b) => a.uid.localeCompare(b.uid, "en", { numeric: true }),
    }[this.order] || (() => 0);
    this.shown = this.answer.tasks.filter((task) => words.every((word) => (task.uid + " " + task.asked).toLowerCase().includes(word))).sort(by);
    fill(this.total, `${this.shown.length} tasks, ${this.answer.steps.length} evaluations`);
    return this.rows.reload({ keep });
  }

  async refresh() {
    const first = !this.known;
    this.answer = await ask(`/api/runs/${this.run}/tasks`);
    this.known = true;
    const rewards = this.answer.tasks.flatMap((task) => task.cells.filter(Boolean).map((cell) => cell[0])).filter((r) => r !== null);
    this.range = [rewards.reduce((a, b) => Math.min(a, b), Infinity), rewards.reduce((a, b) => Math.max(a, b), -Infinity)];
    const steps = this.answer.steps, most = innerWidth < 700 ? 8 : 40;  // more cells than this cannot be told apart
    this.places = steps.length <= most ? steps.map((_, i) => i) : Array.from({ length: most }, (_, i) => Math.round((i * (steps.length - 1)) / (most - 1)));
    this.columns = this.places.map((at) => steps[at]);
    for (const task of this.answer.tasks) {
      const found = task.cells.filter(Boolean).map((cell) => cell[0] ?? 0);
      [task.last, task.change] = [found.at(-1), found.at(-1) - found[0]];
    }
    const every = Math.ceil(this.columns.length / 12);
    fill(this.heads, el("span", { class: "task-name soft" }, "task"),
      el("span", { class: "cells" }, this.columns.map((step, i) => el("span", { class: "cell-head soft" }, i % every === 0 ? step : ""))),
      el("span", { class: "soft" }, "change"));
    await this.apply(!first);
  }

  get keys() {
    return this.rows.keys;
  }

  close() {
    hideTip();
    this.rows.close();
  }
}
