// Asks the server. It only answers questions; nothing here changes anything.

export class Refused extends Error {}

/** Return the answer to an address with parameters; lists are repeated. Refused with the server's words. */
export async function ask(path, params = {}, signal) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== undefined && one !== null && one !== "") query.append(name, one);
    }
  }
  const text = query.toString();
  const response = await fetch(text ? path + "?" + text : path, { signal });
  const answer = await response.json();
  if (!response.ok) throw new Refused(answer.error || "the server refused");
  return answer;
}

/** Calls back when something changed on the disk: every 1.5 s while the page is seen, and quicker while files are read. */
export class Watch {
  constructor(onChange, onState) {
    this.onChange = onChange;
    this.onState = onState;
    this.run = "";
    this.seen = undefined;
    this.timer = 0;
    document.addEventListener("visibilitychange", () => !document.hidden && this.look());
  }

  async look() {
    clearTimeout(this.timer);
    let wait = 1500;
    try {
      const state = await ask("/api/state", { run: this.run });
      if (state.unread) wait = 700;
      const version = this.run ? this.run + state.run_version : String(state.version);
      const changed = this.seen !== undefined && version !== this.seen;
      this.seen = version;
      this.onState(state);
      if (changed && !(this.run && state.run_version === null)) await this.onChange(); // what is shown stays
    } catch {
      this.onState(null);
      wait = 4000;
    }
    clearTimeout(this.timer);
    if (!document.hidden) this.timer = setTimeout(() => this.look(), wait);
  }
}
