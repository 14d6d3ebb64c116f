// Curves of one or several runs over each other, and what differs in their settings.

import { ask } from "./api.js";
import { Chart, lookOf } from "./chart.js";
import { el, fill, num, own, settled } from "./dom.js";

const FIRST = [
  "reward/avg_raw_reward", "eval/all/avg_score", "policy/policy_entropy", "policy/policy_kl", "policy/grad_norm",
  "generate/avg_num_tokens", "reward/equal_group_share", "timing/step",
];
const AXES = { step: "step", elapsed_s: "hours", "trainer/num_tokens": "million tokens" };
const kept = { weight: 0.6, axis: "step", log: false };  // while views change

/** The curves of given runs as a part of a page. keys: metrics that the address names. */
export class Curves {
  constructor(runs, keys, onKeys) {
    Object.assign(this, { runs, keys, onKeys, details: new Map(), hidden: new Set(), charts: new Map(), series: {} });
    this.legend = el("div", { class: "legend" });
    this.grid = el("div", { class: "chart-grid" });
    this.names = el("datalist", { id: "metric-names" });
    this.picker = el("input", {
      type: "search", list: "metric-names", placeholder: "Add a metric  ( / )", "aria-label": "Add a metric",
      onchange: () => this.pick(), onkeydown: (event) => { if (event.key === "Enter") this.pick(); },
    });
    const slider = el("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: kept.weight, "aria-label": "smoothing",
      oninput: (event) => { kept.weight = Number(event.target.value); label.textContent = kept.weight.toFixed(2); this.later(); } });
    slider.value = kept.weight;
    const label = el("span", { class: "number soft" }, kept.weight.toFixed(2));
    const axis = el("select", { "aria-label": "horizontal axis", onchange: (event) => { kept.axis = event.target.value; this.refresh(); } },
      Object.entries(AXES).map(([key, name]) => el("option", { value: key }, name)));
    axis.value = kept.axis;
    this.later = settled(() => this.draw(), 30);
    this.node = el("div", { class: "curves" },
      el("div", { class: "tools" }, this.picker, this.names,
        el("label", { class: "field" }, "smooth", slider, label), el("label", { class: "field" }, "over", axis),
        el("label", { class: "field" }, el("input", { type: "checkbox", checked: kept.log, onchange: (event) => { kept.log = event.target.checked; this.draw(); } }), "log")),
      this.legend, this.grid);
  }

  async refresh() {
    const details = await Promise.all(this.runs.map((run) => ask("/api/runs/" + run)));
    this.details = new Map(details.map((detail) => [detail.id, detail]));
    const known = [...new Set(details.flatMap((detail) => detail.metrics))].sort();
    this.known = new Set(known);
    if (this.names.childElementCount !== known.length) fill(this.names, known.map((key) => el("option", { value: key })));
    const shown = this.shown();
    this.series = (await ask("/api/series", { run: this.runs, key: [...shown, kept.axis === "step" ? "" : kept.axis] })).series;
    this.draw();
  }

  shown() {
    const named = [...this.known].filter((key) => /^rewards\/.*\/mean$/.test(key));
    return this.keys.length ? this.keys : [...named, ...FIRST.filter((key) => this.known.has(key))];
  }

  pick() {
    const key = this.picker.value.trim();
    if (!this.known?.has(key)) return;
    this.picker.value = "";
    this.set([key, ...this.shown().filter((other) => other !== key)]);
  }

  set(keys) {
    this.keys = keys;
    this.onKeys(keys);
    this.refresh();
  }

  nameOf(run) {
    const names = this.runs.map((id) => this.details.get(id)?.name || id);
    const name = this.details.get(run)?.name || run;
    const first = names[0].split("/");
    let same = 0;
    while (names.length > 1 && same < first.length - 1 && names.every((other) => other.split("/")[same] === first[same])) same++;
    return name.split("/").slice(names.length > 1 ? same : -1).join("/");
  }

  draw() {
    fill(this.legend, this.runs.length < 2 ? [] : this.runs.map((run, n) => {
      const mark = el("i", { class: "mark" });
      mark.style.background = lookOf(n).colour;
      return el("button", { class: "legend-run", "aria-pressed": this.hidden.has(run) ? "false" : "true",
        onclick: () => { if (!this.hidden.delete(run)) this.hidden.add(run); this.draw(); } }, mark, this.nameOf(run));
    }));
    const keys = this.shown();
    for (const [key, chart] of this.charts) if (!keys.includes(key)) { chart.close(); this.charts.delete(key); }
    for (const key of keys) {
      if (!this.charts.has(key)) {
        this.charts.set(key, new Chart(key, { remove: () => this.set(this.shown().filter((other) => other !== key)), xName: () => AXES[kept.axis] }));
      }
    }
    const nodes = keys.map((key) => this.charts.get(key).node);
    if (nodes.length !== this.grid.childElementCount || nodes.some((node, i) => this.grid.children[i] !== node)) fill(this.grid, nodes);
    for (const key of keys) this.charts.get(key).draw(this.lines(key), kept);
    if (!keys.length) fill(this.grid, el("p", { class: "soft" }, "No metric has been logged yet."));
  }

  lines(key) {
    return this.runs.map((run, n) => {
      const [steps, values] = own(this.series[run], key) || [[], []];
      return { label: this.nameOf(run), look: lookOf(n), ...this.placed(run, steps, values) };
    }).filter((line, n) => line.xs.length && !this.hidden.has(this.runs[n]));
  }

  /** Put the values over the chosen axis. */
  placed(run, steps, values) {
    if (kept.axis === "step") return { xs: steps, ys: values };
    const [at, places] = own(this.series[run], kept.axis) || [[], []];
    const by = new Map(at.map((step, i) => [step, places[i] / (kept.axis === "elapsed_s" ? 3600 : 1e6)]));
    const points = steps.map((step, i) => [by.get(step), values[i]]).filter(([x]) => Math.abs(x) < 1e12).sort((a, b) => a[0] - b[0]);
    return { xs: points.map(([x]) => x), ys: points.map(([, y]) => y) };
  }

  close() {
    for (const chart of this.charts.values()) chart.close();
  }
}

/** Several runs, from the table. */
export function curvesView({ query }) {
  const runs = [...new Set(query.getAll("run"))].slice(0, 100);
  const settings = el("section", { class: "card" });
  const curves = new Curves(runs, query.getAll("key"), (keys) => {
    history.replaceState(null, "", "#/curves?" + new URLSearchParams([...runs.map((id) => ["run", id]), ...keys.map((key) => ["key", key])]));
  });
  return {
    node: el("section", { class: "page scrolls" }, curves.node, el("h2", {}, "What differs"), settings),
    path: `/ ${runs.length} runs`,
    title: `${runs.length} runs`,
    async refresh() {
      await curves.refresh();
      fill(settings, differences(runs.map((run, n) => ({ name: curves.nameOf(run), look: lookOf(n), ...curves.details.get(run) }))));
    },
    themed: () => curves.draw(),
    close: () => curves.close(),
  };
}

function differences(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.description?.changed || {})))].sort();
  const value = (run, key) => {
    const here = own(run.description?.changed, key);
    if (here) return said(Array.isArray(here) ? here[0] : here);
    const other = runs.map((one) => own(one.description?.changed, key)).find(Boolean);
    return said(Array.isArray(other) ? other[1] : null);
  };
  const rows = [
    ["before → after", (run) => `${num(run.summary?.before)} → ${num(run.summary?.after)}`],
    ["model", (run) => run.summary?.model], ["environment", (run) => run.summary?.environment],
    ["device", (run) => run.summary?.device],
    ...keys.map((key) => [key, (run) => value(run, key)]),
  ].map(([key, of]) => [key, runs.map((run) => String(of(run) ?? "–"))])
    .filter(([, values], i) => i === 0 || new Set(values).size > 1);
  return el("div", { class: "scrolls-x" }, el("table", { class: "settings" },
    el("thead", {}, el("tr", {}, el("th", {}, ""), runs.map((run) => {
      const mark = el("i", { class: "mark" });
      mark.style.background = run.look.colour;
      return el("th", {}, mark, el("a", { href: "#/run/" + run.id }, run.name));
    }))),
    el("tbody", {}, rows.map(([key, values]) => el("tr", {}, el("th", { scope: "row" }, key), values.map((text) => el("td", {}, short(text, 300))))))));
}

export function said(value) {
  return typeof value === "string" ? value : JSON.stringify(value) ?? "–";
}

export function short(text, limit) {
  return text.length <= limit ? text : text.slice(0, limit) + " …";
}
