// The panel of the demo: where each event is, and the two switches.
//
// It reads what the snippet keeps in localStorage, and asks the shop's server what has
// become of the rest. In a real shop there is none of this: the snippet needs no help.
"use strict";

// Before the snippet: what it sees must be true from its first look on.
const OFFLINE = "relay_demo_offline=1"; // a cookie, so that the server plays along
const isOffline = () => document.cookie.split("; ").includes(OFFLINE);
{
  const real = Object.getOwnPropertyDescriptor(Navigator.prototype, "onLine").get;
  const get = () => !isOffline() && real.call(navigator);
  Object.defineProperty(navigator, "onLine", { get, configurable: true });
}

const byId = (id) => document.getElementById(id);

// Everything is shown through textContent, never as markup.
const node = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

const panel = (() => {
  // By status: where the event is, how that looks, what is said, and what is added.
  const STATES = {
    kept: ["browser", "wait", "Kept in the browser"],
    sent: ["relay", "wait", "On its way"],
    queued: ["relay", "wait", "Queued"],
    duplicate: ["relay", "good", "Known already", "The relay had it before: it counts once."],
    coalesced: ["relay", "good", "Coalesced", "A later one of its kind took its place."],
    rate_limited: ["browser", "warn", "Comes again"],
    unavailable: ["browser", "warn", "Comes again", "The relay did not answer."],
    unfollowed: ["relay", "warn", "In the relay", "The panel follows it no longer."],
    delivered: ["voucherify", "good", "Delivered"],
    rejected: ["voucherify", "bad", "Rejected"],
    ambiguous: ["voucherify", "warn", "Ambiguous", "It may have arrived, and is not sent twice."],
    expired: ["relay", "bad", "Expired"],
    dropped: ["relay", "bad", "Dropped", "An operator decided so."],
    lost: ["browser", "bad", "Dropped", "The browser keeps 100: it made room for newer ones."],
  };
  const REFUSED = ["relay", "bad", "Refused"];
  const OPEN = ["kept", "sent", "queued", "rate_limited", "unavailable"];
  const STOPS = ["browser", "relay", "voucherify"];
  const MAX_ROWS = 60;
  const [SOON_MS, LATER_MS] = [500, 2000];

  const events = new Map(); // what is shown, by id, the oldest first
  const rows = new Map(); // its elements
  let told = { events: [], down: false, held: false, waiting: "" };
  let news = []; // for the screen reader, until the next look
  let first = true; // the first look tells no news
  let timer, busy;

  const storeKeys = () => {
    try {
      return Object.keys(localStorage);
    } catch {
      return []; // shut by the shopper
    }
  };

  /** What the snippet keeps, by id: each entry is [view, lease, {event, …}]. */
  const kept = () => {
    const found = new Map();
    for (const key of storeKeys().filter((key) => key.startsWith("relay:")))
      try {
        const { event } = JSON.parse(localStorage[key])[2];
        if (event.id) found.set(event.id, event);
      } catch {} // not an event
    return found;
  };

  const stateOf = (status) => STATES[status] || REFUSED;

  /** Bring the list up to date; `whole`: the server was asked after `local` was read. */
  const merge = (local, whole) => {
    for (const event of told.events) events.set(event.id, { ...events.get(event.id), ...event });
    // The store has no order, the snippet's ids have: their last part is a number.
    const place = ([id]) => parseInt(id.split("-").pop(), 36);
    for (const [id, event] of [...local].sort((a, b) => place(a) - place(b))) {
      const known = events.get(id);
      if (!known)
        events.set(id, {
          id,
          event: event.event,
          status: "kept",
          sent: JSON.stringify(event, null, 2),
        });
      else if (known.status === "lost") known.status = "kept";
    }
    for (const [id, event] of events) {
      // Never seen by the server, and no longer kept.
      if (whole && event.status === "kept" && !local.has(id)) event.status = "lost";
    }
    for (const id of [...events.keys()].slice(0, -MAX_ROWS)) {
      events.delete(id);
      rows.get(id)?.item.remove();
      rows.delete(id);
    }
  };

  const time = (ms) => {
    if (ms < 1000) return `${ms} ms`;
    return `${ms < 9_950 ? (ms / 1000).toFixed(1) : Math.round(ms / 1000)} s`;
  };

  const saysOf = ({ status, took_ms, wait_s }) => {
    if (status === "delivered" && took_ms !== null) return `Delivered after ${time(took_ms)}`;
    if (status === "queued" && (told.held || told.down)) return "Waits in the relay";
    if (status === "queued" && wait_s > 2) return `Queued, about ${wait_s} s`;
    return stateOf(status)[2];
  };

  /** What tells it from others of its name. */
  const gistOf = ({ sent }) => {
    try {
      const { name, lot, total } = JSON.parse(sent).metadata;
      if (name) return name;
      if (lot) return `lot ${lot}`;
      return total ? `€${total.toFixed(2)}` : "";
    } catch {
      return ""; // no metadata, or too long to be told whole
    }
  };

  const moreOf = ({ status, reason, detail, sent }) => {
    if (detail) return reason ? `${detail} (${reason})` : detail;
    if (status === "kept" && isOffline()) return "It leaves when the network is back.";
    const more = stateOf(status)[3];
    if (more) return more;
    return /"(loyalty|referral)": {/.test(sent) ? "Worth something: delivered once at most." : "";
  };

  const rowOf = (id) => {
    let row = rows.get(id);
    if (row) return row;
    const item = node("li");
    const fold = node("details");
    const summary = node("summary");
    row = {
      item,
      dot: node("i", "dot"),
      name: node("b"),
      gist: node("span", "gist"),
      says: node("span", "says"),
      more: node("span", "more"),
      sent: node("pre"),
    };
    row.sent.tabIndex = 0; // it may scroll
    const name = node("span", "name");
    name.append(row.name, " ", row.gist);
    summary.append(row.dot, name, row.says, row.more);
    fold.append(summary, row.sent);
    item.append(fold);
    byId("rows").prepend(item);
    rows.set(id, row);
    return row;
  };

  const write = (element, text) => {
    if (element.textContent !== text) element.textContent = text;
  };

  const draw = () => {
    const counts = { browser: 0, relay: 0, voucherify: 0 };
    for (const event of events.values()) {
      const [stop, mood] = stateOf(event.status);
      const waits = OPEN.includes(event.status);
      if (waits || event.status === "delivered") counts[stop]++;
      const row = rowOf(event.id);
      const look = `${stop} ${mood}`;
      if (row.item.className !== look) row.item.className = look;
      write(row.name, event.event);
      write(row.gist, gistOf(event));
      write(row.says, saysOf(event));
      write(row.more, moreOf(event));
      write(row.sent, event.sent || "");
      if (event.shown !== event.status) {
        if (!waits || (event.status === "kept" && isOffline()))
          news.push([event.event, stateOf(event.status)[2].toLowerCase()]);
        event.shown = event.status;
      }
    }
    for (const stop of STOPS) {
      const place = document.querySelector(`[data-stop=${stop}]`);
      write(place.querySelector("dd"), String(counts[stop]));
      place.classList.toggle("busy", stop !== "voucherify" && counts[stop] > 0);
    }
    byId("none").hidden = events.size > 0;
    byId("rows").hidden = events.size === 0;
    byId("offline").setAttribute("aria-checked", isOffline());
    byId("down").setAttribute("aria-checked", told.down);
    byId("way").classList.toggle("no-network", isOffline());
    byId("way").classList.toggle("no-voucherify", told.down);
    write(byId("waiting"), told.waiting);
    byId("waiting").classList.toggle("held", told.held);
    const switched = [isOffline() && "Offline", told.down && "Voucherify is down"];
    write(byId("dock-off"), switched.filter(Boolean).join(" · "));
    write(
      byId("dock"),
      `Browser ${counts.browser} → Relay ${counts.relay} → Voucherify ${counts.voucherify}`,
    );
  };

  /** One line for the screen reader, however much has happened. */
  const tell = () => {
    const heard = first ? [] : news;
    news = [];
    first = false;
    if (!heard.length) return;
    const counts = {};
    for (const [, what] of heard) counts[what] = (counts[what] || 0) + 1;
    byId("news").textContent =
      heard.length === 1
        ? `${heard[0][0].replaceAll("_", " ")}: ${heard[0][1]}.`
        : Object.entries(counts).map(([what, n]) => `${n} ${what}`).join(", ") + ".";
  };

  const ask = async () => {
    const local = kept();
    try {
      const answer = await fetch("/demo/panel");
      if (!answer.ok) throw new Error(answer.status);
      told = await answer.json();
      merge(local, true);
    } catch {
      told = { ...told, events: [], waiting: "The shop does not answer: does `relay demo` still run?" };
    }
  };

  const wasOffline = { now: isOffline() };
  const refresh = async () => {
    if (busy) return;
    clearTimeout(timer);
    busy = true;
    if (!document.hidden) await ask();
    busy = false;
    if (wasOffline.now !== isOffline()) heardNetwork(); // switched in another tab
    draw();
    tell();
    const open = [...events.values()].some(({ status }) => OPEN.includes(status));
    timer = setTimeout(refresh, open || told.held || told.down ? SOON_MS : LATER_MS);
  };

  /** Show what the page has just called for, before it has left. */
  const look = () => {
    merge(kept(), false);
    draw();
    clearTimeout(timer);
    timer = setTimeout(refresh, SOON_MS / 2);
  };

  const heardNetwork = () => {
    wasOffline.now = isOffline();
    dispatchEvent(new Event(isOffline() ? "offline" : "online"));
  };

  const switchNetwork = () => {
    document.cookie = `${OFFLINE}; path=/; samesite=lax${isOffline() ? "; max-age=0" : ""}`;
    heardNetwork();
    look();
  };

  const switchVoucherify = async () => {
    const down = byId("down").getAttribute("aria-checked") !== "true";
    try {
      await fetch("/demo/voucherify", {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ down }),
      });
      told = { ...told, down };
    } catch {} // the next look says what is wrong
    look();
  };

  addEventListener("DOMContentLoaded", () => {
    byId("offline").addEventListener("click", switchNetwork);
    byId("down").addEventListener("click", switchVoucherify);
    relay("onerror", look); // an event was refused
    refresh();
  });
  document.addEventListener("visibilitychange", () => document.hidden || refresh());

  return { look };
})();
