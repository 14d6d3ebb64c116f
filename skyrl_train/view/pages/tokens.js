// An episode's conversation: every token with its id, logprob, advantage and mask, by colour, hover and keyboard.

import { el, ENDS, mood, num, own } from "./dom.js";
import { hideTip, showTip } from "./tip.js";

export const COLOURINGS = ["logprob", "advantage", "mask", "none"];
const SPECIAL = /^(<\|[^|]*\|>|<\/?s>|<(bos|eos|pad|start_of_turn|end_of_turn)>)$/;
const MAX_TOKENS = 20000;  // of one conversation; of a longer one the middle is left out
const UNSURE = Math.log(0.25);

/** The bubbles of an episode. scale: the advantage that has the strongest colour. */
export class Conversation {
  constructor(episode, { colouring = "logprob", scale = 0, onlySampled = false } = {}) {
    this.episode = episode;
    this.tokens = [];  // { node, ... } of all tokens in order
    this.cursor = -1;
    this.scale = scale || this.largest();
    this.node = el("div", { class: "talk" });
    this.node.addEventListener("mouseover", (event) => this.over(event));
    this.node.addEventListener("mouseleave", hideTip);
    this.node.addEventListener("click", (event) => { const at = this.at(event); if (at >= 0) this.select(at); });
    this.build(onlySampled);
    this.colour(colouring);
  }

  largest() {
    const all = this.episode.segments.flatMap((segment) => segment.advantages || []).filter((value) => value !== null);
    return all.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;
  }

  build(onlySampled) {
    const total = this.episode.segments.reduce((sum, segment) => sum + segment.ids.length, 0);
    const cut = total > MAX_TOKENS ? [MAX_TOKENS / 2, total - MAX_TOKENS / 2] : [Infinity, Infinity];
    let seen = 0;
    for (const segment of this.episode.segments) {
      if (!onlySampled || segment.sampled) this.node.append(this.bubble(segment, seen, cut));
      seen += segment.ids.length;
    }
    const lastTurn = this.episode.turns.at(-1);
    if (!onlySampled) {
      for (const message of lastTurn?.observation || []) {
        this.node.append(el("div", { class: "bubble given" }, el("div", { class: "who" }, "environment, at the end"),
          el("div", { class: "said" }, String(message?.content ?? ""))));
      }
    }
    if (!this.episode.segments.length) {
      for (const message of this.episode.messages) {
        this.node.append(el("div", { class: "bubble given" }, el("div", { class: "who" }, message?.role), el("div", { class: "said" }, String(message?.content ?? ""))));
      }
    }
    if (this.episode.failure) {
      this.node.append(el("p", { class: "problem" }, `After ${this.episode.num_attempts} attempts: ${this.episode.failure}`));
    }
  }

  bubble(segment, seen, [cutFrom, cutTo]) {
    const turn = this.episode.turns[segment.turn], said = el("div", { class: "said" });
    let left = 0;
    for (let i = 0; i < segment.ids.length; i++) {
      if (seen + i >= cutFrom && seen + i < cutTo) { left++; continue; }
      if (left) { said.append(el("span", { class: "cut" }, ` ${left} tokens left out `)); left = 0; }
      said.append(this.token(segment, i));
    }
    if (left) said.append(el("span", { class: "cut" }, ` ${left} tokens left out `));
    const edited = segment.new_history && segment.turn > 0;
    const who = segment.sampled ? `policy, turn ${segment.turn + 1}` : edited ? "history, edited" : segment.turn === 0 ? "prompt" : "environment";
    return el("div", { class: "bubble " + (segment.sampled ? "sampled" : "given") },
      el("div", { class: "who" }, who,
        segment.sampled && turn?.stop_reason === "length" ? el("span", { class: "warn" }, "cut by length") : null,
        segment.sampled && turn ? el("span", { class: "paid number " + mood(turn.reward) }, (turn.reward > 0 ? "+" : "") + num(turn.reward)) : null),
      said);
  }

  token(segment, i) {
    const text = segment.texts[i], node = el("i", SPECIAL.test(text) ? { class: "x" } : {}, text);
    node.dataset.at = this.tokens.length;
    this.tokens.push({
      node, text, id: segment.ids[i], sampled: segment.sampled, turn: segment.turn,
      logprob: segment.sampled ? segment.logprobs[i] : null,
      trained: segment.trained ? segment.trained[i] : null,
      advantage: segment.advantages ? segment.advantages[i] : null,
    });
    return node;
  }

  /** Colour by logprob, advantage, mask or nothing. */
  colour(name) {
    this.node.dataset.colouring = name;
    for (const token of this.tokens) {
      const classes = [SPECIAL.test(token.text) ? "x" : ""];
      if (name === "logprob" && token.sampled) classes.push("s" + shade(token.logprob));
      if (name === "advantage" && token.advantage !== null) classes.push(tint(token.advantage / this.scale));
      if (name === "mask" && (token.trained ?? token.sampled)) classes.push("trained");
      token.node.className = classes.join(" ").trim();
    }
  }

  get knowsAdvantages() {
    return this.tokens.some((token) => token.advantage !== null);
  }

  at(event) {
    const node = event.target.closest?.("i[data-at]");
    return node && this.node.contains(node) ? Number(node.dataset.at) : -1;
  }

  over(event) {
    const at = this.at(event);
    if (at >= 0) showTip(this.words(at), this.tokens[at].node.getBoundingClientRect());
    else if (this.cursor < 0) hideTip();
  }

  words(at) {
    const token = this.tokens[at];
    const lines = [`${JSON.stringify(token.text)}   id ${token.id}`];
    if (token.sampled) lines.push(`logprob ${num(token.logprob, 4)}   ${(100 * Math.exp(token.logprob)).toPrecision(3)}%`);
    else lines.push("given to the policy");
    if (token.advantage !== null) lines.push(`advantage ${num(token.advantage, 4)}`);
    if (token.sampled) lines.push(token.trained === null ? "mask: sampled (advantages were not kept)" : token.trained ? "mask: trained on" : "mask: not trained on");
    return lines.join("\n");
  }

  /** Move the token cursor and show the values there. */
  select(at) {
    if (!this.tokens.length) return;
    this.tokens[this.cursor]?.node.removeAttribute("data-cursor");
    this.cursor = Math.max(0, Math.min(this.tokens.length - 1, at));
    const { node } = this.tokens[this.cursor];
    node.setAttribute("data-cursor", "");
    node.scrollIntoView({ block: "nearest" });
    showTip(this.words(this.cursor), node.getBoundingClientRect());
  }

  unsure(direction) {
    for (let at = this.cursor + direction; at >= 0 && at < this.tokens.length; at += direction) {
      if (this.tokens[at].sampled && this.tokens[at].logprob < UNSURE) return this.select(at);
    }
  }

  /** Take the token cursor away; false if there was none. */
  leave() {
    if (this.cursor < 0) return false;
    this.tokens[this.cursor]?.node.removeAttribute("data-cursor");
    this.cursor = -1;
    hideTip();
    return true;
  }

  get keys() {
    return {
      ArrowRight: () => this.select(this.cursor < 0 ? Math.max(0, this.tokens.findIndex((token) => token.sampled)) : this.cursor + 1),
      ArrowLeft: () => this.select(this.cursor - 1),
      n: () => this.unsure(1), p: () => this.unsure(-1),
    };
  }
}

/** 0 (at least 90% sure) to 5 (less than 1%). */
function shade(logprob) {
  if (typeof logprob !== "number") return 5;
  return [0.9, 0.6, 0.25, 0.05, 0.01].filter((bound) => logprob < Math.log(bound)).length;
}

function tint(share) {
  const strength = Math.min(4, Math.ceil(Math.abs(share) * 4 - 1e-9));
  return strength ? (share > 0 ? "up" : "down") + strength : "flat";
}

/** The legend of a colouring. */
export function scaleOf(name, known = true) {
  const boxes = (classes) => classes.map((one) => el("i", { class: one }));
  if (name === "logprob") return el("span", { class: "scale" }, "sure", boxes(["s0", "s1", "s2", "s3", "s4", "s5"]), "surprised");
  if (name === "advantage") {
    return known ? el("span", { class: "scale" }, "worse", boxes(["down4", "down2", "flat", "up2", "up4"]), "better than expected")
      : el("span", { class: "scale" }, "no advantages are kept of this episode");
  }
  if (name === "mask") return el("span", { class: "scale" }, boxes(["trained"]), "trained on");
  return el("span", { class: "scale" });
}

export function endBadge(end) {
  return el("span", { class: "end end-" + (own(ENDS, end) ? end : "other") }, own(ENDS, end) || end);
}
