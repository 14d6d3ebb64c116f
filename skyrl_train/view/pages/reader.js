// One episode, to read: facts, its siblings in the group, and the conversation.

import { ask } from "./api.js";
import { said, short } from "./curves.js";
import { clock, el, fill, mood, num } from "./dom.js";
import { hideTip } from "./tip.js";
import { COLOURINGS, Conversation, endBadge, scaleOf } from "./tokens.js";

export const look = { colouring: "logprob" };  // stays while episodes change

/** The switch between colourings. */
export function colouringSwitch(onChange) {
  const choice = el("select", { "aria-label": "colour tokens by", onchange: (event) => { look.colouring = event.target.value; onChange(); } },
    COLOURINGS.map((name) => el("option", { value: name }, name)));
  choice.value = look.colouring;
  return choice;
}

export class Reader {
  constructor(run, { moved }) {
    Object.assign(this, { run, moved, id: 0 });
    this.node = el("article", { class: "reader" }, el("p", { class: "soft centred" }, "Choose an episode: j and k walk through the list."));
  }

  async show(id) {
    if (!id) return;
    this.id = id;
    this.asked?.abort();
    this.asked = new AbortController();
    hideTip();
    try {
      const episode = await ask(`/api/runs/${this.run}/episodes/${id}`, {}, this.asked.signal);
      if (this.id === id) this.draw(episode);
    } catch (error) {
      if (error.name !== "AbortError" && this.id === id) fill(this.node, el("p", { class: "problem" }, error.message));
    }
  }

  draw(episode) {
    this.episode = episode;
    const siblings = episode.group || [];
    this.conversation = new Conversation(episode, { colouring: look.colouring });
    const scale = el("span", {});
    this.recolour = () => {
      this.conversation.colour(look.colouring);
      fill(scale, scaleOf(look.colouring, this.conversation.knowsAdvantages));
      choice.value = look.colouring;
    };
    const choice = colouringSwitch(() => this.recolour());
    const version = episode.turns[0]?.policy_version;
    fill(this.node,
      el("header", { class: "reader-head" },
        el("button", { class: "back", onclick: () => history.length && document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" })) }, "‹ list"),
        el("span", { class: "pill big number " + mood(episode.reward) }, num(episode.reward)),
        el("div", {},
          el("b", {}, `${episode.phase === "eval" ? "evaluation after step" : "step"} ${episode.step}`),
          el("span", { class: "soft" }, ` · prompt ${short(String(episode.uid), 40)} · repetition ${episode.repetition}`),
          el("div", { class: "soft small number" }, endBadge(episode.end),
            ` · ${episode.turns.length} ${episode.turns.length === 1 ? "turn" : "turns"} · ${episode.segments.reduce((n, s) => n + (s.sampled ? s.ids.length : 0), 0)} tokens sampled · ${clock(episode.seconds)}`,
            version === undefined ? "" : ` · policy ${version}`,
            Object.entries(episode.rewards || {}).map(([name, paid]) => ` · ${name} ${num(paid)}`)))),
      siblings.length > 1 ? el("nav", { class: "siblings", "aria-label": "The group" },
        siblings.map((row) => el("button", { class: "pill number " + mood(row.reward) + (row.id === episode.id ? " here" : ""),
          "aria-current": row.id === episode.id ? "true" : null, title: `repetition ${row.repetition}`, onclick: () => this.go(row.id) }, num(row.reward))),
        el("a", { class: "button", href: `#/run/${this.run}/group/${episode.id}` }, "Side by side (g)")) : null,
      el("div", { class: "tools slim" }, el("label", { class: "field" }, "colour", choice), scale,
        episode.phase === "eval" ? el("a", { class: "button", href: `#/run/${this.run}/task/${encodeURIComponent(episode.uid)}` }, "Over the steps") : null),
      episode.advantages_problem ? el("p", { class: "problem" }, episode.advantages_problem) : null,
      this.conversation.node,
      el("details", { class: "extras" }, el("summary", {}, "What the environment said of it, and the row of the data set"),
        table({ ...episode.env_metrics }, "environment metrics"), table({ environment: episode.env_class, data_source: episode.data_source, seed: episode.seed, attempts: episode.num_attempts, ...episode.env_extras }, "row")));
    this.recolour();
    this.node.parentElement?.scrollTo(0, 0);
  }

  go(id) {
    this.moved(id);
    this.show(id);
  }

  step(by) {
    const siblings = this.episode?.group || [];
    const at = siblings.findIndex((row) => row.id === this.id);
    if (siblings[at + by]) this.go(siblings[at + by].id);
  }

  get keys() {
    return {
      ArrowRight: () => this.conversation?.keys.ArrowRight(), ArrowLeft: () => this.conversation?.keys.ArrowLeft(),
      n: () => this.conversation?.keys.n(), p: () => this.conversation?.keys.p(),
      "[": () => this.step(-1), "]": () => this.step(1),
      g: () => { if (this.episode?.group?.length > 1) location.hash = `#/run/${this.run}/group/${this.id}`; },
      v: () => { look.colouring = COLOURINGS[(COLOURINGS.indexOf(look.colouring) + 1) % COLOURINGS.length]; this.recolour?.(); },
    };
  }
}

function table(values, title) {
  const rows = Object.entries(values);
  if (!rows.length) return null;
  return el("div", {}, el("h3", {}, title), el("table", { class: "settings" }, el("tbody", {}, rows.slice(0, 100).map(([key, value]) =>
    el("tr", {}, el("th", { scope: "row" }, key), el("td", {}, short(said(value), 2000)))))));
}
