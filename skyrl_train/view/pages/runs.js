// All runs in a table: search, sort, choose several, compare.

import { ask } from "./api.js";
import { spark } from "./chart.js";
import { ago, clock, count, el, fill, fixed, mood, settled } from "./dom.js";
import { Rows } from "./rows.js";

const COLUMNS = [
  ["name", "run", (r) => r.name], ["spark", "reward", (r) => (r.after ?? -Infinity) - (r.before ?? 0)],
  ["after", "before → after", (r) => r.after ?? -Infinity], ["step", "steps", (r) => r.step || 0],
  ["episodes", "episodes", (r) => r.episodes || 0], ["seconds", "worked", (r) => r.seconds || 0],
  ["updated", "last step", (r) => r.updated || 0],
];
const chosen = new Set();  // ids; stays while other views are looked at

export function runsView({ query }) {
  let all = [], shown = [], known = false, failure = "";
  let sort = query.get("sort") || "-updated";
  const search = el("input", {
    type: "search", placeholder: "Search runs: name, model, environment  ( / )", "aria-label": "Search runs",
    value: query.get("text") || "", oninput: settled(() => { remember(); apply(); }, 60),
  });
  const total = el("span", { class: "soft count" });
  const bar = el("div", { class: "chosen", hidden: true });
  const rows = new Rows({
    label: "Runs",
    height: () => (innerWidth < 700 ? 76 : 54),
    load: async (offset, limit) => ({
      total: shown.length, rows: shown.slice(offset, offset + limit),
      why: !known ? "" : all.length ? "No run matches." : "No run is in these folders. A run's folder holds metrics.jsonl or trajectories/.",
    }),
    draw,
    open: (run) => { location.hash = `#/run/${run.id}`; },
  });
  const heads = el("div", { class: "heads run-grid" });
  const problem = el("p", { class: "problem", hidden: true });

  function draw(run) {
    const box = el("input", { type: "checkbox", checked: chosen.has(run.id), "aria-label": "choose " + run.name,
      onchange: () => { choose(run.id); } });
    const steps = run.total_steps ? `${run.step ?? 0}/${run.total_steps}` : `${run.step ?? 0}`;
    return el("div", { class: "run-grid" },
      el("label", { class: "box" }, box),
      el("div", { class: "run-name" },
        el("a", { href: `#/run/${run.id}`, class: "strong" }, run.name),
        el("span", { class: "soft" }, el("span", { class: "state " + (run.state || "") }, run.state || "not read yet"),
          [run.model, run.environment].filter(Boolean).map((text) => " · " + text),
          run.problems ? el("span", { class: "warn" }, ` · ${run.problems} damaged`) : null)),
      el("div", { class: "run-spark" }, spark(run.spark || [], run.spark_evals || [])),
      el("div", { class: "run-reward number" }, fixed(run.before), el("span", { class: "soft" }, " → "),
        el("b", { class: mood(run.after - run.before) }, fixed(run.after))),
      el("div", { class: "number wide" }, steps),
      el("div", { class: "number wide" }, count(run.episodes)),
      el("div", { class: "number wide" }, clock(run.seconds)),
      el("div", { class: "number wide" }, ago(run.updated)));
  }

  function choose(id) {
    if (!chosen.delete(id)) chosen.add(id);
    showChosen();
    rows.paint();
  }

  function showChosen() {
    const ids = [...chosen].filter((id) => all.some((run) => run.id === id));
    bar.hidden = !ids.length;
    fill(bar, el("span", {}, `${ids.length} chosen`),
      el("a", { class: "button primary", href: compareAddress() }, `Compare (c)`),
      el("button", { onclick: () => { chosen.clear(); showChosen(); rows.paint(); } }, "None"));
  }

  const compareAddress = () => "#/curves?" + new URLSearchParams([...chosen].map((id) => ["run", id]));

  function apply(keep = false) {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const of = COLUMNS.find(([name]) => name === sort.replace("-", ""))?.[2] || COLUMNS[0][2];
    const sign = sort.startsWith("-") ? -1 : 1;
    shown = all.filter((run) => {
      const text = [run.name, run.model, run.environment, run.state, run.device].join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    }).sort((a, b) => {
      const [x, y] = [of(a), of(b)];
      return (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y) * sign;
    });
    total.textContent = known ? (shown.length === all.length ? `${all.length} runs` : `${shown.length} of ${all.length} runs`) : "";
    fill(heads, el("span"), COLUMNS.map(([name, title], i) => el("button", {
      class: "head" + (i > 2 ? " wide" : "") + (i > 1 ? " number" : ""),
      "aria-pressed": sort.replace("-", "") === name ? "true" : "false",
      onclick: () => { sort = sort === "-" + name ? name : "-" + name; remember(); apply(); },
    }, title, el("span", { class: "arrow" }, sort.replace("-", "") === name ? (sort.startsWith("-") ? "↓" : "↑") : ""))));
    return rows.reload({ keep });
  }

  function remember() {
    const found = new URLSearchParams({ ...(search.value && { text: search.value }), ...(sort !== "-updated" && { sort }) });
    history.replaceState(null, "", "#/" + (found.size ? "?" + found : ""));
  }

  return {
    node: el("section", { class: "page runs-page" }, el("div", { class: "tools" }, search, total), problem,
      heads, rows.node, bar),
    keys: {
      ...rows.keys,
      x: () => { const run = rows.row(rows.cursor); if (run) choose(run.id); },
      c: () => { if (chosen.size) location.hash = compareAddress(); },
    },
    async refresh() {
      const answer = await ask("/api/runs");
      const first = !known;
      [all, known] = [answer.rows, true];
      problem.hidden = true;
      showChosen();
      await apply(!first);
    },
    failed(error) { failure = error.message; problem.hidden = false; fill(problem, failure); return true; },
    close: () => rows.close(),
  };
}
