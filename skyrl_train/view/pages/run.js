// One run: its curves, episodes, validation tasks and settings.

import { ask } from "./api.js";
import { Curves, said, short } from "./curves.js";
import { clock, count, el, fill, fixed, mood, num } from "./dom.js";
import { Episodes } from "./episodes.js";
import { SideBySide } from "./side.js";
import { Tasks } from "./tasks.js";

const TABS = [["curves", "Curves"], ["episodes", "Episodes"], ["tasks", "Validation tasks"], ["settings", "Settings"]];

export function runView({ parts, query }) {
  const [, run, tab = "curves", rest] = parts;
  const head = el("div", { class: "run-head" }), problems = el("details", { class: "problems", hidden: true });
  const title = el("span", {}, "/ …");
  const tabs = el("nav", { class: "tabs", "aria-label": "Parts of the run" }, TABS.map(([name, words], i) =>
    el("a", { href: `#/run/${run}/${name}`, "aria-current": name === tab || (name === "tasks" && tab === "task") || (name === "episodes" && tab === "group") ? "page" : null, title: String(i + 1) }, words)));
  const body = part(run, tab, rest, query);
  const view = {
    node: el("section", { class: "page run-page" + (body.fills ? " fills" : " scrolls") }, head, tabs, problems, body.node),
    path: title,
    title: "run",
    keys: { ...Object.fromEntries(TABS.map(([name], i) => [String(i + 1), () => { location.hash = `#/run/${run}/${name}`; }])), ...body.keys },
    async refresh() {
      const detail = await ask("/api/runs/" + run);
      fill(title, "/", el("a", { href: "#/run/" + run }, detail.name));
      document.title = detail.name + " · skyrl view";
      fill(head, facts(detail));
      problems.hidden = !detail.problems.length;
      fill(problems, el("summary", {}, `${detail.problems.length} ${detail.problems.length === 1 ? "file or line" : "files or lines"} cannot be read whole`),
        el("ul", {}, detail.problems.slice(0, 50).map((text) => el("li", {}, text))));
      await body.refresh(detail);
    },
    escape: () => body.escape?.(),
    themed: () => body.themed?.(),
    close: () => body.close?.(),
  };
  return view;
}

function part(run, tab, rest, query) {
  if (tab === "episodes") return new Episodes(run, rest, query);
  if (tab === "group") return new SideBySide(run, { group: rest });
  if (tab === "tasks") return new Tasks(run, query);
  if (tab === "task") return new SideBySide(run, { prompt: rest, phase: query.get("phase") || "eval" });
  if (tab === "settings") return settings();
  const curves = new Curves([run], query.getAll("key"), (keys) => {
    history.replaceState(null, "", `#/run/${run}/curves` + (keys.length ? "?" + new URLSearchParams(keys.map((key) => ["key", key])) : ""));
  });
  return { node: curves.node, refresh: () => curves.refresh(), themed: () => curves.draw(), close: () => curves.close() };
}

function facts(detail) {
  const { summary } = detail, shown = [
    ["state", el("span", { class: "state " + (summary.state || "") }, summary.state || "not read yet")],
    ["model", summary.model], ["environment", summary.environment],
    [(summary.reward_of || "") + " reward", summary.after === null || summary.after === undefined ? null
      : el("span", {}, fixed(summary.before), el("span", { class: "soft" }, " → "), el("b", { class: mood(summary.after - summary.before) }, fixed(summary.after)))],
    ["steps", summary.total_steps ? `${summary.step} of ${summary.total_steps}` : num(summary.step)],
    ["episodes", count(detail.episodes)], ["tokens", count(summary.tokens)], ["worked", clock(summary.seconds)],
  ];
  return shown.filter(([, value]) => value).map(([name, value]) => el("div", { class: "fact" }, el("span", { class: "soft" }, name), el("b", {}, value)));
}

function settings() {
  const node = el("div", { class: "card scrolls-x" });
  return {
    node,
    async refresh(detail) {
      const { changed = {}, starts, ...others } = detail.description || {};
      const rows = Object.entries(changed || {}).sort(([a], [b]) => a.localeCompare(b));
      fill(node,
        el("table", { class: "settings" }, el("tbody", {}, [["folder", detail.folder], ...Object.entries(others)].map(([key, value]) =>
          el("tr", {}, el("th", { scope: "row" }, key), el("td", {}, short(said(value), 2000)))))),
        el("h3", {}, "Starts, the newest first"), startsOf(starts),
        el("h3", {}, "Settings that differ from their defaults"),
        rows.length ? el("table", { class: "settings" },
          el("thead", {}, el("tr", {}, el("th", {}, "setting"), el("th", {}, "here"), el("th", {}, "default"))),
          el("tbody", {}, rows.map(([key, value]) => el("tr", {}, el("th", { scope: "row" }, key),
            el("td", {}, short(said(Array.isArray(value) ? value[0] : value), 500)), el("td", { class: "soft" }, short(said(Array.isArray(value) ? value[1] : null), 500))))))
          : el("p", { class: "soft" }, "None, or run.json is missing."));
    },
  };
}

/** Return a table per start of the run: when, how it ended, with what. run.json may hold anything under these names. */
function startsOf(starts) {
  const known = (Array.isArray(starts) ? starts : []).filter((start) => start && typeof start === "object");
  if (!known.length) return el("p", { class: "soft" }, "None is recorded.");
  return [...known].reverse().map((start) => el("table", { class: "settings start" }, el("tbody", {}, [
    ["started", start.started], ["ended", [start.ended, start.ended_at].filter(Boolean).map(said).join(", ") || "not recorded"],
    ["error", start.error], ["after step", start.first_step], ["command", start.command], ["in folder", start.folder],
    ["commits", pairs(start.commits)], ["versions", pairs(start.versions)], ["machine", start.machine], ["process", start.process],
  ].filter(([, value]) => value !== undefined && value !== null && value !== "").map(([key, value]) =>
    el("tr", {}, el("th", { scope: "row" }, key), el("td", {}, short(said(value), 2000)))))));
}

/** {torch: "2.13.0", ray: "2.60.0"} -> "torch 2.13.0, ray 2.60.0" */
function pairs(value) {
  if (!value || typeof value !== "object") return value;
  return Object.entries(value).map(([name, one]) => `${name} ${said(one)}`).join(", ");
}
