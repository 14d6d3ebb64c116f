// Several episodes in columns: a group's samples, or one validation task over the steps.

import { ask } from "./api.js";
import { el, fill, mood, num } from "./dom.js";
import { colouringSwitch, look } from "./reader.js";
import { COLOURINGS, Conversation, endBadge, scaleOf } from "./tokens.js";

export class SideBySide {
  fills = true;

  constructor(run, { group, prompt, phase }) {
    Object.assign(this, { run, group, prompt, phase, shown: "", conversations: [], onlySampled: true, cursor: 0 });
    this.columns = el("div", { class: "columns", tabindex: 0, "aria-label": "Episodes side by side" });
    this.title = el("b", {});
    this.scale = el("span", {});
    this.choice = colouringSwitch(() => this.recolour());
    const only = el("input", { type: "checkbox", checked: true, onchange: (event) => { this.onlySampled = event.target.checked; this.draw(); } });
    this.node = el("div", { class: "side-page" },
      el("div", { class: "tools" }, this.title, el("label", { class: "field" }, "colour", this.choice), this.scale,
        el("label", { class: "field" }, only, "only what the policy said")),
      this.columns);
  }

  async refresh() {
    let params;
    if (this.group) {
      const { group } = await ask(`/api/runs/${this.run}/episodes/${this.group}`);
      params = { id: group.slice(0, 64).map((row) => row.id) };
    } else params = { prompt: this.prompt, phase: this.phase };
    const wanted = JSON.stringify(params);
    if (this.group && wanted === this.shown) return;  // nothing of a group changes once it is written
    const { episodes } = await ask(`/api/runs/${this.run}/side-by-side`, params);
    const ids = JSON.stringify(episodes.map((episode) => episode.id));
    if (ids === this.ids) return;
    [this.shown, this.ids, this.episodes] = [wanted, ids, episodes];
    this.draw();
  }

  draw() {
    const first = this.episodes[0];
    fill(this.title, first ? (this.group ? `step ${first.step}, prompt ${first.uid}: ${this.episodes.length} samples` : `validation task ${this.prompt} over ${new Set(this.episodes.map((e) => e.step)).size} evaluations`) : "No episode.");
    const advantages = this.episodes.flatMap((e) => e.segments.flatMap((s) => s.advantages || []));
    const largest = advantages.reduce((most, a) => Math.max(most, Math.abs(a ?? 0)), 0);  // too many to be arguments of one call
    this.conversations = this.episodes.map((episode) => new Conversation(episode, { colouring: look.colouring, scale: largest, onlySampled: this.onlySampled }));
    fill(this.columns, this.episodes.map((episode, i) => el("article", { class: "column card" },
      el("header", {}, el("span", { class: "pill number " + mood(episode.reward) }, num(episode.reward)),
        el("a", { href: `#/run/${this.run}/episodes/${episode.id}` }, this.group ? `repetition ${episode.repetition}` : `step ${episode.step}`),
        endBadge(episode.end)),
      this.conversations[i].node)));
    this.recolour();
  }

  recolour() {
    for (const conversation of this.conversations) conversation.colour(look.colouring);
    this.choice.value = look.colouring;
    fill(this.scale, scaleOf(look.colouring, this.conversations.some((one) => one.knowsAdvantages)));
  }

  move(by) {
    this.cursor = Math.max(0, Math.min(this.columns.childElementCount - 1, this.cursor + by));
    for (const [i, column] of [...this.columns.children].entries()) column.classList.toggle("cursor", i === this.cursor);
    this.columns.children[this.cursor]?.scrollIntoView({ inline: "nearest", block: "nearest" });
  }

  get keys() {
    const one = () => this.conversations[this.cursor];
    return {
      j: () => this.move(1), k: () => this.move(-1),
      ArrowRight: () => one()?.keys.ArrowRight(), ArrowLeft: () => one()?.keys.ArrowLeft(),
      n: () => one()?.keys.n(), p: () => one()?.keys.p(),
      v: () => { look.colouring = COLOURINGS[(COLOURINGS.indexOf(look.colouring) + 1) % COLOURINGS.length]; this.recolour(); },
      Enter: () => { const episode = this.episodes?.[this.cursor]; if (episode) location.hash = `#/run/${this.run}/episodes/${episode.id}`; },
    };
  }

  escape() {
    if (this.conversations.some((one) => one.leave())) return true;
    if (history.length > 1) history.back();
    else location.hash = `#/run/${this.run}`;
    return true;
  }
}
