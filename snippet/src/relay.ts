/**
 * The snippet: takes a page's events and sees them off to the relay, whatever becomes
 * of the page. Never throws into it.
 *
 * An event is kept (localStorage, bounded) from the call until the relay has said what
 * became of it. A beacon gets no answer, so what left by beacon is sent once more by
 * whoever finds it, and the relay knows it by its id: `duplicate`. That is the whole
 * trick: to send twice costs a request, and nothing is delivered twice.
 *
 * Every byte here is paid for by every shopper: 2,048 gzipped, held by a check.
 */
import type { Create, Entry, Fate, Options, Parts, RelayEvent, Report } from "./types.js";

export type * from "./types.js";

const PREFIX = "relay:event:"; // of the keys in localStorage; one for each event
const MAX_EVENTS = 100;
const MAX_CHARS = 32_768; // 64 KiB: a character takes up to two bytes there
const BATCH = 20;
const MAX_BODY = 21_000; // characters, of at most 3 bytes; browsers and the relay stop at 65,536
const BATCH_MS = 1_000; // the longest that an event waits for company
const BACKOFF_MS = 60_000; // the longest between two attempts, if nobody says more
const ANSWER_MS = 15_000; // a request without an answer has failed
const LEASE_MS = 20_000; // over ANSWER_MS: until then nobody else sends an event
// The relay knows an id for RELAY_DEDUPE_WINDOW (72 h) after it has seen it. What may
// have arrived is not sent again after this time: it could pay points twice.
const REPEAT_MS = 24 * 3_600_000;
const LONGEST_MS = 2e9; // browsers take what is over 2 ** 31 - 1 for nothing

// The end of a token of the relay's: a signature, HMAC-SHA-256 in base64url.
const TOKEN = /\.[\w-]{43}$/;
// Statuses of events: queued, duplicate, dropped or coalesced is done with;
// rate_limited and unavailable may come again; the others are refusals.
const TAKEN = /^[qdc]/;
const LATER = /^r|av/;
const FINAL = /^4(?!08|29)/; // HTTP statuses that stay as they are

/** Status, seconds of Retry-After, body. Status 0: no answer. */
type Answer = [status: number, wait?: number, body?: string];

export const createRelay: Create = (options = {}) => {
  const url = options.url || "/track";
  // Of this page view; with a number after it, of an event.
  const view = crypto.getRandomValues(new Uint32Array(3)).join("-");
  const entries: Record<string, Entry> = {}; // by key: not known to have arrived
  let store: Record<string, string> = {}; // the same for other pages, and the next one
  let identity: Partial<RelayEvent> = {};
  // 0 until somebody has asked the shopper.
  let consent: unknown = +!(
    options.consent == "required" ||
    (navigator.globalPrivacyControl && options.gpc != "ignore")
  );
  let count = 0; // events of this page view
  let report: Report = {}; // since the relay heard last
  let failures = 0; // one after the other
  let busy: unknown; // until the answer, and as long as it told to wait
  let stopped: unknown;
  let timer: ReturnType<typeof setTimeout> | 0 | undefined; // of a batch
  let nap: typeof timer; // of what has to wait
  try {
    store = localStorage || store;
  } catch {} // shut, for this frame or by the shopper; null in some apps

  const say = (...words: unknown[]) => options.debug && console.log(PREFIX, ...words);
  const may = () => !(stopped || document.prerendering) && consent;
  const keys = () => Object.keys(entries);

  const tally = (kind: string, n = 1) => {
    report[kind] = (report[kind] || 0) + n;
  };

  /** The page may be gone before it is told: whoever sends this event tells it, too. */
  const lose = (kind: string, key: string, lost = key) => {
    say((entries[key].lost = kind), entries[lost]);
  };

  // --- the store: other pages write there, too --------------------------------------

  const stored = () => Object.keys(store).filter((key) => !key.indexOf(PREFIX));

  const forget = (key: string) => {
    delete entries[key];
    delete store[key];
  };

  /** Keep these events as this page's own for so long, as far as there is room. */
  const hold = (ms: number, mine = keys()) => {
    let events = MAX_EVENTS;
    let chars = MAX_CHARS;
    for (const key of stored())
      if (!mine.includes(key)) {
        events--;
        chars -= store[key].length;
      }
    for (const key of mine)
      try {
        const value = JSON.stringify([view, Date.now() + ms, entries[key]]);
        if (may() && entries[key] && events-- > 0 && (chars -= value.length) > 0) {
          store[key] = value; // or it throws, and nobody else can have it
          entries[key].until = Date.now() + ms;
        }
      } catch {} // the page itself has filled it
  };

  // --- requests ---------------------------------------------------------------------

  /** As many of these events as one request may carry, and its body. */
  const pack = (some: string[], most = BATCH): [string[], string] => {
    some = some.slice(0, most);
    const body = JSON.stringify({
      // By the clock that it was called by, so a wrong one does not matter.
      events: some.map((key) => ({ ...entries[key].event, age: Date.now() - entries[key].at })),
      report,
    });
    return most > 1 && body.length > MAX_BODY ? pack(some, most >> 1) : [some, body];
  };

  const byFetch = async (body: string): Promise<Answer> => {
    const answer = await fetch(url, { method: "POST", body, keepalive: true });
    return [answer.status, +answer.headers.get("retry-after")!, await answer.text()];
  };

  // For pages that have put something else in the place of fetch.
  const byXhr = (body: string) =>
    new Promise<Answer>((resolve) => {
      const xhr = new XMLHttpRequest();
      xhr.open("POST", url);
      xhr.onloadend = () =>
        resolve([xhr.status, +xhr.getResponseHeader("retry-after")!, xhr.responseText]);
      xhr.send(body);
    });

  const send = async () => {
    clearTimeout(timer as number);
    timer = 0;
    if (busy || !may()) return;
    clearTimeout(nap as number);
    const now = Date.now();
    let next = LONGEST_MS; // milliseconds until there is something to do
    for (const key of stored())
      try {
        const [owner, lease, entry] = JSON.parse(store[key]);
        if (owner != view)
          if (lease > now) {
            delete entries[key]; // another page has taken it over
            next = Math.min(next, lease - now);
          } else if (PREFIX + entry.event.id == key) {
            entry.tried || tally("called");
            entries[key] = entry;
          } else forget(key);
      } catch {
        forget(key); // not an event
      }
    const due = keys().filter((key) => {
      const entry = entries[key];
      if (entry.lost) tally(entry.lost);
      entry.lost = "";
      // It was another page's to send while this one slept, and is gone from the store.
      if (entry.until! < now && !store[key]) forget(key);
      else if (entry.tried! < now - REPEAT_MS) {
        tally("late");
        say("late", entry);
        forget(key);
      } else if (entry.due! > now) next = Math.min(next, entry.due! - now);
      else return 1;
    });
    if (due[0] && navigator.onLine) {
      const [some, body] = pack(due);
      const reported = report;
      report = {};
      for (const key of some) entries[key].tried ||= now;
      hold(LEASE_MS);
      busy = 1;
      const [status, wait, text] = await Promise.race([
        (failures & 1 ? byXhr : byFetch)(body),
        new Promise<never>((_, reject) => setTimeout(reject, ANSWER_MS)),
      ]).catch((): Answer => [0]);
      const fates: Record<string, Fate> = {};
      let whole: Fate = {};
      try {
        whole = JSON.parse(text!) || whole;
        stopped = whole.disabled;
        for (const fate of whole.events!) fates[PREFIX + fate.id] = fate;
      } catch {
        for (const kind in reported) tally(kind, reported[kind]); // not the relay's
      }
      const backoff = Math.random() * Math.min(BACKOFF_MS, 1e3 * 2 ** ++failures);
      busy = 0;
      for (const key of some) {
        const fate = fates[key] || { ...whole, status: "" };
        const word = fate.status as string;
        const entry = entries[key] || {}; // forgotten meanwhile
        say(word || status, entry, fate.detail);
        if (LATER.test(word)) {
          // It has not arrived, so it is not too late for it as long as it waits.
          entry.tried = entry.due = Date.now() + Math.max(fate.retry_after! * 1e3 || 0, backoff);
        } else if (word || FINAL.test(status as never)) {
          failures = 0;
          forget(key);
          if (!TAKEN.test(word))
            try {
              options.onerror!({ ...fate, status, event: entry.event });
            } catch {} // there is none, or the page's own fault
        } else busy = 1; // nobody knows what became of it
      }
      next = busy ? Math.max(wait! * 1e3 || 0, backoff) : keys()[BATCH - 1] ? 0 : BATCH_MS;
      hold(next + LEASE_MS);
    } else hold(LEASE_MS);
    nap = setTimeout(() => {
      busy = 0;
      flush();
    }, Math.min(next, LONGEST_MS));
  };
  const flush = () => send().catch(say);

  // --- the page ---------------------------------------------------------------------

  /** The page may be gone at any moment: whatever may still leave leaves now. */
  const hide = () => {
    const rest = keys().filter((key) => may() && navigator.onLine && !entries[key].left);
    let most = BATCH;
    while (rest[0] && most) {
      const [some, body] = pack(rest, most);
      most = some.length >> 1;
      try {
        if (navigator.sendBeacon?.(url, body) || fetchLater(url, { method: "POST", body })) {
          for (const key of rest.splice(0, some.length))
            entries[key].left = entries[key].tried ||= Date.now();
          report = {};
          most = BATCH;
        }
      } catch {}
    }
    for (const key of rest) lose("quota", key);
    hold(0); // the next page may have them
  };

  for (const name of ["online", "pageshow", "pagehide", "visibilitychange", "prerenderingchange"])
    addEventListener(
      name,
      () => (name == "pagehide" || document.hidden ? hide() : flush()),
      true, // those of the document do not all bubble
    );
  flush();

  const commands = {
    track(name: string, metadata?: object, parts: Parts = {}) {
      if (stopped || consent === false) return say("skipped", name);
      const id = view + "-" + ++count;
      const event = {
        ...identity,
        ...parts,
        customer: { ...identity.customer, ...parts.customer },
        event: name,
        metadata,
        id,
      };
      // As it is now, whatever the page does to its objects; or an error, here.
      const text = JSON.stringify({ event, at: Date.now() });
      const mine = PREFIX + id;
      tally("called");
      say(event);
      if (text[MAX_CHARS]) return say("full", tally("full"));
      entries[mine] = JSON.parse(text);
      while (
        keys()[MAX_EVENTS] ||
        (keys()[1] && JSON.stringify(entries).length > MAX_CHARS)
      ) {
        const oldest =
          keys().find((key) => !entries[key].event.loyalty && !entries[key].event.referral) ||
          keys()[0];
        lose(navigator.onLine ? "full" : "offline", mine, oldest);
        forget(oldest);
      }
      hold(LEASE_MS, [mine]);
      // The page's own listeners come after this one's; what they call goes together.
      if (document.hidden) Promise.resolve().then(hide);
      if (count % BATCH) timer ||= setTimeout(flush, BATCH_MS);
      else flush();
    },
    identify(who?: string) {
      identity = !who ? {} : TOKEN.test(who) ? { token: who } : { customer: { source_id: who + "" } };
    },
    consent(given: boolean) {
      consent = given === true;
      if (consent) flush();
      else [...keys(), ...stored()].forEach(forget);
    },
    onerror(callback: Options["onerror"]) {
      options.onerror = callback;
    },
    flush,
  } as Record<string, Function>;

  return ((command: string, ...rest: unknown[]) => {
    try {
      commands[command](...rest);
    } catch (error) {
      say(error);
    }
  }) as never;
};
