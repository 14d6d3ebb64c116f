// Every episode of a run: filters, the list, and beside it the one that is open.

import { ask } from "./api.js";
import { el, fill, mood, num, settled } from "./dom.js";
import { Reader } from "./reader.js";
import { Rows } from "./rows.js";
import { endBadge } from "./tokens.js";

const SORTS = { "-step": "newest", step: "oldest", "-reward": "best", reward: "worst", typical: "typical", "-tokens": "longest", tokens: "shortest", "-turns": "most turns", prompt: "by prompt" };
const isNarrow = () => innerWidth < 1000;

export class Episodes {
  fills = true;

  constructor(run, open, query) {
    this.run = run;
    this.filter = Object.fromEntries(query);
    this.isOpen = Boolean(open);
    this.reader = new Reader(run, { moved: (id) => this.remember(id) });
    this.rows = new Rows({
      label: "Episodes", height: () => 58,
      load: async (offset, limit) => {
        const answer = await ask(`/api/runs/${run}/episodes`, { ...this.filter, offset, limit });
        fill(this.total, `${answer.total.toLocaleString("en")} episodes`);
        return { ...answer, why: Object.keys(this.filter).length ? "No episode matches." : this.detail?.files_left ? "The episodes are being read." : "No episode is kept in this folder." };
      },
      draw: (row) => this.draw(row),
      open: (row) => this.open(row.id),
      moved: (row) => { if (!isNarrow()) this.later(row.id); },
    });
    this.later = settled((id) => this.open(id), 40);
    this.total = el("span", { class: "soft count" });
    this.bar = el("div", { class: "tools filters" });
    this.node = el("div", { class: "episodes-page" + (open ? " opened" : "") },
      el("div", { class: "list-side" }, this.bar, this.rows.node),
      el("div", { class: "reader-side" }, this.reader.node));
    if (open) this.reader.show(Number(open));
  }

  draw(row) {
    return el("div", { class: "episode-row" },
      el("span", { class: "pill number " + mood(row.reward) }, num(row.reward)),
      el("div", { class: "glimpse" }, el("span", { class: "mono" }, row.said || "–"), el("span", { class: "soft" }, el("span", { class: "narrow" }, `${row.phase === "eval" ? "eval" : "step"} ${row.step} · prompt ${row.uid} · `), row.asked || "")),
      el("div", { class: "about number" },
        el("span", {}, el("b", {}, row.phase === "eval" ? "eval " : "step "), row.step, el("span", { class: "soft" }, `  prompt ${row.uid} · ${row.repetition ?? ""}`)),
        el("span", { class: "soft" }, endBadge(row.end), ` · ${row.turns} ${row.turns === 1 ? "turn" : "turns"} · ${row.tokens} tok`)));
  }

  open(id) {
    this.isOpen = true;
    this.node.classList.add("opened");
    this.remember(id);
    this.reader.show(id);
  }

  remember(id) {
    const query = new URLSearchParams(this.filter).toString();
    history.replaceState(null, "", `#/run/${this.run}/episodes` + (id ? "/" + id : "") + (query ? "?" + query : ""));
  }

  set(name, value) {
    if (value === "" || value === undefined) delete this.filter[name];
    else this.filter[name] = value;
    this.remember(isNarrow() ? "" : this.reader.id || "");
    this.rows.cursor = -1;
    return this.rows.reload().catch((error) => { this.rows.empty.textContent = error.message; });
  }

  async refresh(detail) {
    this.detail = detail;
    const signature = JSON.stringify([detail.phases, detail.ends, detail.envs, detail.sources]);
    if (signature !== this.signature && !this.bar.contains(document.activeElement)) {
      this.signature = signature;
      this.build(detail);
    }
    await this.rows.reload({ keep: this.loaded });
    if (!this.loaded && !this.isOpen && !isNarrow() && this.rows.total) { this.rows.cursor = 0; this.rows.paint(); this.reader.show(this.rows.row(0)?.id); }
    this.loaded = true;
  }

  build(detail) {
    const later = settled((name, value) => this.set(name, value), 120);
    const choice = (name, label, options) => {
      const node = el("select", { "aria-label": label, onchange: (event) => this.set(name, event.target.value) },
        options.map(([value, words]) => el("option", { value }, words)));
      node.value = this.filter[name] || (name === "sort" ? "-step" : "");
      return node;
    };
    const of = (name, label, counts) => (Object.keys(counts || {}).length > 1
      ? choice(name, label, [["", label], ...Object.entries(counts).map(([value, count]) => [value, `${value.replaceAll("_", " ")} (${count.toLocaleString("en")})`])]) : null);
    const field = (name, words, extra = {}) => el("input", { inputmode: "decimal", placeholder: words, "aria-label": extra.label || words, class: "short",
      value: this.filter[name] || "", oninput: (event) => later(name, event.target.value.trim()) });
    fill(this.bar,
      el("input", { type: "search", class: "grows", "aria-label": "Search what was said", value: this.filter.text || "",
        placeholder: "Search what was said  ( / )", oninput: (event) => later("text", event.target.value) }),
      of("phase", "train and eval", detail.phases), of("end", "any end", detail.ends),
      of("env", "any environment", detail.envs), of("source", "any data", detail.sources),
      el("span", { class: "pair" }, "step", field("step_from", "from", { label: "first step" }), field("step_to", "to", { label: "last step" })),
      el("span", { class: "pair" }, "reward", field("reward_from", "from", { label: "least reward" }), field("reward_to", "to", { label: "most reward" })),
      el("span", { class: "pair" }, "prompt", field("prompt", "id", { label: "prompt" })),
      choice("sort", "order", Object.entries(SORTS)), this.total);
  }

  get keys() {
    const list = this.rows.keys, reader = this.reader;
    return { ...list, ...Object.fromEntries(Object.entries(reader.keys).map(([key, action]) => [key, () => reader.id && action()])) };
  }

  escape() {
    if (this.reader.conversation?.leave()) return true;
    if (this.isOpen && isNarrow()) {
      this.isOpen = false;
      this.node.classList.remove("opened");
      this.remember("");
      return true;
    }
    return false;
  }

  close() {
    this.rows.close();
  }
}
