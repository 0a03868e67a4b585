// A page without a browser: the few things that the snippet touches, with a clock that
// stands still until it is moved. What real browsers do is tested in one; here is what
// takes hours there, or cannot be provoked.
import { createContext, runInContext } from "node:vm";
import { build } from "esbuild";

const { outputFiles } = await build({
  entryPoints: [new URL("../src/relay.ts", import.meta.url).pathname],
  bundle: true,
  write: false,
  format: "iife",
  globalName: "made",
});
const SOURCE = outputFiles[0].text;

/** What several pages of one browser share: time, and what they have stored. */
export class Browser {
  now = 1_700_000_000_000;
  storage = {};
  timers = [];
  pages = [];
  random = 1; // of the backoff: the longest

  open(options, surroundings) {
    return new Page(this, options, surroundings);
  }

  /** Let time pass, timer by timer. */
  async pass(ms) {
    const end = this.now + ms;
    await settled();
    for (;;) {
      const next = this.timers.sort((a, b) => a.at - b.at)[0];
      if (!next || next.at > end) break;
      this.timers.shift();
      this.now = Math.max(this.now, next.at);
      next.run();
      await settled();
    }
    this.now = end;
  }
}

/** All that needs no time has happened. */
const settled = () => new Promise((resolve) => setImmediate(() => setImmediate(resolve)));

export const OK = { status: 202 };

export class Page {
  sent = []; // bodies, with how they left: { by, at, events, report }
  answers = []; // to come; then `answer` for ever
  answer = OK;
  listeners = {};
  errors = [];
  said = [];
  hidden = false;

  constructor(browser, options = {}, surroundings = {}) {
    this.browser = browser;
    const page = this;
    const { storage = browser.storage, quota = Infinity, ...more } = surroundings;
    this.navigator = {
      onLine: true,
      sendBeacon: (_, body) => body.length <= quota && page.take("beacon", body),
      ...more.navigator,
    };
    this.document = { prerendering: false, get hidden() { return page.hidden; } };
    const globals = {
      console: { log: (...words) => page.said.push(words) },
      crypto: globalThis.crypto,
      Blob,
      Date: class extends Date { static now() { return browser.now; } },
      Math: Object.assign(Object.create(Math), { random: () => browser.random }),
      setTimeout: (run, ms = 0) => {
        // As browsers do: what does not fit into 31 bits is no wait at all.
        const timer = { run, at: browser.now + (ms > 2 ** 31 - 1 ? 0 : ms) };
        browser.timers.push(timer);
        return timer;
      },
      clearTimeout: (timer) => {
        browser.timers = browser.timers.filter((other) => other !== timer);
      },
      addEventListener: (name, heard) => (page.listeners[name] ||= []).push(heard),
      navigator: this.navigator,
      document: this.document,
      fetch: async (url, { body }) => {
        page.url = url;
        page.take("fetch", body);
        const { status, headers = {}, text, ...told } = await page.reply(body);
        if (!status) throw new TypeError("Failed to fetch");
        return {
          status,
          headers: { get: (name) => headers[name] ?? null },
          text: async () => text ?? JSON.stringify({ ...told }),
        };
      },
      XMLHttpRequest: class {
        open() {}
        getResponseHeader() { return null; }
        async send(body) {
          page.take("xhr", body);
          const { status, headers: _, text, ...told } = await page.reply(body);
          this.status = status;
          this.responseText = text ?? JSON.stringify(told);
          this.onloadend();
        }
      },
      ...more.globals,
    };
    Object.defineProperty(globals, "localStorage", {
      get() {
        if (!storage) throw new Error("SecurityError");
        return storage;
      },
    });
    createContext(globals);
    runInContext(SOURCE, globals);
    this.relay = globals.made.createRelay({
      onerror: (trouble) => page.errors.push(trouble),
      ...options,
    });
  }

  take(by, body) {
    this.sent.push({ by, at: this.browser.now, ...JSON.parse(body) });
    return true;
  }

  /** The relay's answer; by default every event is queued. */
  async reply(body) {
    const { events } = JSON.parse(body);
    const answer = await (this.answers.shift() ?? this.answer);
    const fate = answer.fate ?? { status: "queued" };
    const told = { events: events.map(({ id }) => ({ id, ...fate })) };
    return "text" in answer || "whole" in answer
      ? { ...answer, ...answer.whole }
      : { ...told, ...answer };
  }

  fire(name) {
    for (const heard of this.listeners[name] ?? []) heard();
  }

  track(n = 1, parts) {
    for (let i = 0; i < n; i++) this.relay("track", "e", { n: i }, parts);
  }

  /** How many times each event left. */
  get times() {
    const times = {};
    for (const { events } of this.sent)
      for (const { id } of events) times[id] = (times[id] ?? 0) + 1;
    return times;
  }

  get kept() {
    return Object.keys(this.browser.storage).filter((key) => key.startsWith("relay:event:"));
  }

  /** What the relay was told over all requests. */
  get reported() {
    const sums = {};
    for (const { report } of this.sent)
      for (const [kind, n] of Object.entries(report)) sums[kind] = (sums[kind] ?? 0) + n;
    return sums;
  }
}
