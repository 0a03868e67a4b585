import assert from "node:assert/strict";
import { test } from "node:test";
import { Browser, OK } from "./page.mjs";

const DAY = 24 * 3_600_000;
const opened = (options, surroundings) => new Browser().open(options, surroundings);
const wait = (page, ms) => page.browser.pass(ms);

// --- batches ---------------------------------------------------------------------------

test("events of a second leave together, with ids of their own and a count", async () => {
  const page = opened();
  page.relay("identify", "u1");
  page.track(3);
  await wait(page, 999);
  assert.equal(page.sent.length, 0);
  await wait(page, 1);
  const [{ events, report, by }] = page.sent;
  assert.equal(by, "fetch");
  assert.deepEqual(events.map(({ metadata }) => metadata.n), [0, 1, 2]);
  assert.equal(new Set(events.map(({ id }) => id)).size, 3);
  for (const { id } of events) assert.match(id, /^[\w-]{1,64}$/);
  assert.deepEqual(events[0].customer, { source_id: "u1" });
  assert.deepEqual(report, { called: 3 });
  await wait(page, DAY);
  assert.equal(page.sent.length, 1);
  assert.deepEqual(page.kept, []);
});

test("twenty events wait for nobody, and no batch has more", async () => {
  const page = opened();
  page.track(50);
  await wait(page, 0);
  assert.deepEqual(page.sent.map(({ events }) => events.length), [20, 20]);
  await wait(page, 1_000);
  assert.deepEqual(page.sent.map(({ events }) => events.length), [20, 20, 10]);
});

test("a batch stays under what browsers and the relay take", async () => {
  const page = opened({}, { storage: {} });
  for (let i = 0; i < 6; i++) page.relay("track", "e", { text: "é".repeat(5_000) });
  await wait(page, 10_000);
  for (const body of page.sent) assert.ok(new Blob([JSON.stringify(body)]).size <= 64_000);
  assert.equal(Object.values(page.times).length, 6);
});

test("flush does not wait", async () => {
  const page = opened();
  page.track();
  page.relay("flush");
  await wait(page, 0);
  assert.equal(page.sent.length, 1);
});

// --- what an event says ----------------------------------------------------------------

test("a token and a source_id are told apart, and the last one counts", async () => {
  const page = opened();
  const token = `eyJzb3VyY2VfaWQiOiJ1MSJ9.aRtq.${"x".repeat(43)}`;
  page.relay("identify", token);
  page.track();
  page.relay("identify", "a.b@shop.example");
  page.track(1, { customer: { email: "a@b.example" }, loyalty: { code: "C" } });
  await wait(page, 1_000);
  const [first, second] = page.sent[0].events;
  assert.equal(first.token, token);
  assert.deepEqual(first.customer, {});
  assert.equal(second.token, undefined);
  assert.deepEqual(second.customer, { source_id: "a.b@shop.example", email: "a@b.example" });
  assert.deepEqual(second.loyalty, { code: "C" });
});

test("a number is a source_id, too, and without one it is nobody again", async () => {
  const page = opened();
  page.relay("identify", 42);
  page.track();
  page.relay("identify");
  page.track();
  await wait(page, 1_000);
  assert.deepEqual(
    page.sent[0].events.map(({ customer }) => customer),
    [{ source_id: "42" }, {}],
  );
});

test("an event is what it was at the call", async () => {
  const page = opened();
  const metadata = { n: 1 };
  page.relay("track", "e", metadata);
  metadata.n = 2;
  await wait(page, 1_000);
  assert.equal(page.sent[0].events[0].metadata.n, 1);
});

// --- never harm ------------------------------------------------------------------------

test("nothing is thrown into the page, whatever it hands over", async () => {
  const page = opened({ debug: true });
  const circular = {};
  circular.self = circular;
  const trap = new Proxy({}, { get() { throw new Error("trap"); }, ownKeys() { throw new Error("trap"); } });
  for (const call of [
    [], ["nothing"], ["track"], ["track", circular], ["track", "e", circular],
    ["track", "e", 1n], ["track", "e", {}, null], ["track", "e", trap], ["track", "e", {}, trap],
    ["identify"], ["identify", {}], ["consent"], ["toString"], ["__proto__"], ["onerror", 7], [null],
  ])
    assert.equal(page.relay(...call), undefined);
  page.relay("consent", true);
  page.track();
  await wait(page, 60_000);
  assert.ok(page.sent.some(({ events }) => events.some(({ metadata }) => metadata?.n === 0)));
});

test("an onerror that throws harms nobody", async () => {
  const page = opened({ onerror() { throw new Error("page"); } });
  page.answers = [{ status: 400, fate: { status: "invalid", reason: "r" } }];
  page.track();
  await wait(page, 1_000);
  page.track();
  await wait(page, 1_000);
  assert.equal(page.sent.length, 2);
});

for (const [name, storage] of [
  ["shut", null],
  ["full", new Proxy({}, { set() { throw new Error("QuotaExceededError"); } })],
])
  test(`a store that is ${name} costs only what it is for`, async () => {
    const page = opened({}, { storage });
    page.answers = [{ status: 0 }];
    page.track(2);
    await wait(page, 60_000);
    assert.deepEqual(Object.values(page.times), [2, 2]);
    assert.equal(page.sent.at(-1).by, "xhr");
  });

test("a fetch that never answers gives way to another way out", async () => {
  const page = opened({}, { globals: { fetch: () => new Promise(() => {}) } });
  page.track();
  await wait(page, 1_000 + 15_000 + 2_000);
  assert.deepEqual(page.sent.map(({ by }) => by), ["xhr"]);
});

test("a fetch that answers nonsense is no answer", async () => {
  const page = opened({}, { globals: { fetch: async () => "ok" } });
  page.track();
  await wait(page, 10_000);
  assert.deepEqual(page.sent.map(({ by }) => by), ["xhr"]);
});

// --- retries ---------------------------------------------------------------------------

for (const status of [0, 408, 429, 500, 502, 503, 504, 200, 302])
  test(`${status} without a word of the relay comes again, ever later, once it is over`, async () => {
    const page = opened();
    page.answers = Array(7).fill({ status, text: "<h1>Bad Gateway</h1>" });
    page.track();
    await wait(page, 10 * 60_000);
    const gaps = page.sent.slice(1).map(({ at }, i) => at - page.sent[i].at);
    assert.deepEqual(gaps, [2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000]);
    assert.deepEqual(Object.values(page.times), [8]);
    assert.deepEqual(page.sent.at(-1).report, { called: 1 }); // heard at last, and whole
    assert.deepEqual([page.kept, page.errors], [[], []]);
  });

test("the jitter is full: the next attempt comes at any time up to the backoff", async () => {
  const browser = new Browser();
  browser.random = 0.25;
  const page = browser.open();
  page.answers = [{ status: 503, text: "" }];
  page.track();
  await browser.pass(1_000 + 499);
  assert.equal(page.sent.length, 1);
  await browser.pass(1);
  assert.equal(page.sent.length, 2);
});

test("Retry-After is obeyed, of the answer and of each event", async () => {
  const page = opened();
  page.answers = [{ status: 503, text: "", headers: { "retry-after": "120" } }];
  page.track();
  await wait(page, 1_000 + 119_000);
  assert.equal(page.sent.length, 1);
  await wait(page, 2_000);
  assert.equal(page.sent.length, 2);
  page.answers = [{ status: 429, fate: { status: "rate_limited", retry_after: 90 } }];
  page.track();
  await wait(page, 1_000 + 89_000);
  assert.equal(page.sent.length, 3);
  await wait(page, 3_000);
  assert.equal(page.sent.length, 4);
});

test("one event that has to wait does not hold up the others", async () => {
  const page = opened();
  page.track(2);
  page.reply = async (body) => {
    const { events } = JSON.parse(body);
    return page.sent.length > 1
      ? { status: 202, events: events.map(({ id }) => ({ id, status: "queued" })) }
      : {
          status: 202,
          events: [
            { id: events[0].id, status: "rate_limited", retry_after: 600 },
            { id: events[1].id, status: "queued" },
          ],
        };
  };
  await wait(page, 1_000);
  page.track();
  await wait(page, 2_000);
  assert.equal(page.sent.length, 2);
  assert.equal(page.sent[1].events.length, 1);
  await wait(page, 600_000);
  assert.equal(page.sent.length, 3);
  assert.deepEqual(page.kept, []);
});

for (const [status, fate] of [
  [400, "invalid"],
  [401, "unauthenticated"],
  [403, "forbidden"],
])
  test(`${status} is final and told to the page`, async () => {
    const page = opened();
    page.answers = [{ status, fate: { status: fate, reason: "why", detail: "Because." } }];
    page.track();
    await wait(page, DAY);
    assert.equal(page.sent.length, 1);
    assert.deepEqual(page.kept, []);
    const [{ event, ...trouble }] = page.errors;
    assert.deepEqual([trouble.status, trouble.reason, trouble.detail], [status, "why", "Because."]);
    assert.equal(event.event, "e");
  });

test("a refusal of the whole request is final for all of it", async () => {
  const page = opened();
  page.answers = [{ status: 403, whole: { status: 403, reason: "origin", detail: "No." } }];
  page.track(2);
  await wait(page, DAY);
  assert.deepEqual(page.errors.map(({ reason }) => reason), ["origin", "origin"]);
  assert.equal(page.sent.length, 1);
});

test("what may have arrived a day ago is not sent again", async () => {
  const page = opened();
  page.answer = { status: 503, text: "" };
  page.track();
  await wait(page, DAY + 10 * 60_000);
  const last = page.sent.at(-1);
  assert.ok(last.at - page.sent[0].at <= DAY);
  assert.deepEqual(page.kept, []);
  page.answer = OK;
  page.track();
  await wait(page, 1_000_000);
  assert.equal(page.reported.late, 1);
});

test("offline waits for the network, and asks nobody meanwhile", async () => {
  const page = opened({}, { navigator: { onLine: false } });
  page.track(3);
  await wait(page, DAY / 2);
  assert.equal(page.sent.length, 0);
  page.navigator.onLine = true;
  page.fire("online");
  await wait(page, 0);
  assert.equal(page.sent[0].events.length, 3);
});

test("a wait of years is no loop", async () => {
  for (const answer of [
    { status: 503, text: "", headers: { "retry-after": "99999999999" } },
    { status: 429, fate: { status: "rate_limited", retry_after: 99_999_999_999 } },
  ]) {
    const page = opened();
    page.answer = answer;
    page.track();
    await wait(page, 60_000);
    assert.equal(page.sent.length, 1);
  }
});

test("what is refused for a limit comes back together, and ever later", async () => {
  const page = opened();
  page.answer = { status: 429, fate: { status: "rate_limited", retry_after: 1 } };
  page.track(20);
  await wait(page, 120_000);
  assert.ok(page.sent.length <= 8, `${page.sent.length}`);
});

test("words that the relay never says do not make a loop", async () => {
  const page = opened();
  page.answer = { status: 202, text: '{"events":[]}' };
  page.track(3);
  await wait(page, 60_000);
  assert.ok(page.sent.length <= 7, `${page.sent.length}`);
});

// --- the store -------------------------------------------------------------------------

test("an event is in the store from its call to its answer", async () => {
  const page = opened();
  page.track();
  assert.equal(page.kept.length, 1);
  await wait(page, 1_000);
  assert.equal(page.kept.length, 0);
});

test("a hundred events are kept; the oldest that earns nothing makes room", async () => {
  const page = opened({}, { navigator: { onLine: false } });
  page.track(1, { loyalty: { code: "C" } });
  page.track(120);
  assert.equal(page.kept.length, 100);
  page.navigator.onLine = true;
  page.fire("online");
  await wait(page, 60_000);
  const events = page.sent.flatMap(({ events }) => events);
  assert.equal(events.length, 100);
  assert.equal(events[0].loyalty.code, "C");
  assert.deepEqual(events.slice(1, 3).map(({ metadata }) => metadata.n), [21, 22]);
  assert.deepEqual(page.reported, { called: 121, offline: 21 });
});

test("64 KiB are kept at most, and the rest of the store is the shop's", async () => {
  const browser = new Browser();
  Object.assign(browser.storage, { cart: "theirs", "relay:settings": "theirs" });
  const page = browser.open({}, { navigator: { onLine: false } });
  for (let i = 0; i < 30; i++) page.relay("track", "e", { text: "x".repeat(4_000) });
  const bytes = page.kept.reduce((sum, key) => sum + 2 * browser.storage[key].length, 0);
  assert.ok(bytes <= 65_536, `${bytes}`);
  assert.ok(page.kept.length >= 6);
  assert.equal(browser.storage.cart, "theirs");
  assert.equal(browser.storage["relay:settings"], "theirs");
});

test("an event that is too large for the store costs no other one", async () => {
  const page = opened({}, { navigator: { onLine: false } });
  page.track(5);
  page.relay("track", "e", { text: "x".repeat(33_000) });
  assert.equal(page.kept.length, 5);
  page.navigator.onLine = true;
  page.fire("online");
  await wait(page, 2_000);
  assert.deepEqual(page.reported, { called: 6, full: 1 });
});

test("the next page sends what the last one left", async () => {
  const browser = new Browser();
  const page = browser.open({}, { navigator: { onLine: false } });
  page.track(3); // and then it crashes
  browser.timers = [];
  const next = browser.open();
  await browser.pass(19_999);
  assert.equal(next.sent.length, 0); // it may still live
  await browser.pass(2_000);
  assert.equal(next.sent[0].events.length, 3);
  assert.deepEqual(next.reported, { called: 3 });
  assert.deepEqual(next.kept, []);
});

test("two tabs never send one event twice", async () => {
  const browser = new Browser();
  const tabs = [browser.open(), browser.open()];
  for (let i = 0; i < 60; i++) {
    tabs[i % 2].track(1);
    if (i % 7 == 0) tabs[i % 2].answers = [{ status: 503, text: "" }];
    await browser.pass(1_500);
  }
  await browser.pass(120_000);
  const owners = tabs.map((tab) => new Set(Object.keys(tab.times)));
  assert.deepEqual([...owners[0]].filter((id) => owners[1].has(id)), []);
  assert.equal(owners[0].size + owners[1].size, 60);
});

test("what others have put there under its names does no harm", async () => {
  const browser = new Browser();
  Object.assign(browser.storage, {
    "relay:event:a": "not JSON",
    "relay:event:b": "null",
    "relay:event:c": "[]",
    "relay:event:d": '["v",0,{}]',
    "relay:event:e": '["v",0,{"event":7}]',
  });
  const page = browser.open();
  page.track();
  await browser.pass(10_000);
  assert.equal(Object.values(page.times).length, 1);
  assert.ok(page.kept.length <= 1, page.kept.join());
});

// --- on the way out --------------------------------------------------------------------

test("what is left leaves by beacon, and is asked after when the page is back", async () => {
  const page = opened();
  page.track(2);
  page.hidden = true;
  page.fire("visibilitychange");
  assert.deepEqual(page.sent.map(({ by, events }) => [by, events.length]), [["beacon", 2]]);
  page.fire("pagehide");
  assert.equal(page.sent.length, 1); // not again
  assert.equal(page.kept.length, 2); // nobody has answered yet
  page.hidden = false;
  page.answers = [{ status: 202, fate: { status: "duplicate" } }];
  page.fire("visibilitychange");
  await wait(page, 2_000);
  assert.deepEqual(page.kept, []);
  assert.deepEqual(page.reported, { called: 2 });
});

test("a beacon that is refused is halved until it fits", async () => {
  const page = opened({}, { quota: 450 });
  page.track(12);
  page.fire("pagehide");
  const sizes = page.sent.map(({ events }) => events.length);
  assert.equal(sizes.reduce((a, b) => a + b), 12);
  assert.ok(sizes.length > 2 && sizes.every((size) => size < 12));
});

test("what no beacon takes is kept for the next page, and told", async () => {
  const browser = new Browser();
  const page = browser.open({}, { quota: 0 });
  page.track(3);
  page.fire("pagehide");
  assert.equal(page.sent.length, 0);
  const next = browser.open();
  await browser.pass(0);
  assert.equal(next.sent[0].events.length, 3);
});

test("what the page calls for after it was hidden leaves at once, and together", async () => {
  const page = opened();
  page.hidden = true;
  page.fire("visibilitychange");
  page.track(3); // in a listener of the page's own, which comes after the snippet's
  await Promise.resolve();
  assert.deepEqual(page.sent.map(({ by, events }) => [by, events.length]), [["beacon", 3]]);
});

test("without sendBeacon it is fetchLater's, and nothing breaks", async () => {
  const later = [];
  const fetchLater = (_, { body }) => later.push(JSON.parse(body).events.length);
  const page = opened({}, { navigator: { sendBeacon: undefined }, globals: { fetchLater } });
  page.track(2);
  page.fire("pagehide");
  assert.deepEqual(later, [2]);
});

test("fetchLater takes what no beacon does", async () => {
  const later = [];
  const fetchLater = (_, { body }) => later.push(JSON.parse(body).events.length);
  const page = opened({}, { quota: 0, globals: { fetchLater } });
  page.track(3);
  page.fire("pagehide");
  assert.deepEqual(later, [3]);
});

// --- consent, and the relay's own word -------------------------------------------------

test("before consent nothing is stored or sent; then everything", async () => {
  const page = opened({ consent: "required" });
  page.track(2);
  page.fire("pagehide");
  await wait(page, DAY / 4);
  assert.deepEqual([page.sent, page.kept], [[], []]);
  page.relay("consent", true);
  await wait(page, 1_000);
  assert.equal(page.sent[0].events.length, 2);
});

test("consent that is given offline keeps what waits, for a crash may come", async () => {
  const page = opened({ consent: "required" }, { navigator: { onLine: false } });
  page.track(2);
  assert.equal(page.kept.length, 0);
  page.relay("consent", true);
  assert.equal(page.kept.length, 2);
});

test("consent that is refused forgets what there is and takes no more", async () => {
  const browser = new Browser();
  const other = browser.open({}, { navigator: { onLine: false } });
  other.track();
  browser.timers = [];
  const page = browser.open({ consent: "required" });
  page.track(2);
  page.relay("consent", false);
  page.track();
  await browser.pass(60_000);
  assert.deepEqual([page.sent, page.kept], [[], []]);
});

test("Global Privacy Control asks for consent unless the shop says otherwise", async () => {
  const navigator = { globalPrivacyControl: true };
  const page = opened({}, { navigator });
  const other = opened({ gpc: "ignore" }, { navigator });
  for (const each of [page, other]) {
    each.track();
    await wait(each, 5_000);
  }
  assert.deepEqual([page.sent.length, other.sent.length], [0, 1]);
  page.relay("consent", true);
  await wait(page, 1_000);
  assert.equal(page.sent.length, 1);
});

test("a page that is only being prepared sends nothing until it is shown", async () => {
  const browser = new Browser();
  const page = browser.open();
  page.document.prerendering = true;
  page.track();
  await browser.pass(60_000);
  page.fire("pagehide");
  assert.deepEqual([page.sent, page.kept], [[], []]);
  page.document.prerendering = false;
  page.fire("prerenderingchange");
  await browser.pass(0);
  assert.equal(page.sent.length, 1);
});

test("disabled is the end for the page", async () => {
  const page = opened();
  page.answers = [{ ...OK, disabled: true }];
  page.track();
  await wait(page, 1_000);
  page.track(30);
  page.fire("pagehide");
  page.relay("flush");
  await wait(page, DAY);
  assert.equal(page.sent.length, 1);
  assert.deepEqual(page.kept, []);
});

test("debug names each event that will not be sent, and why", async () => {
  const said = (page) => page.said.map((words) => JSON.stringify(words)).join("\n");
  const large = opened({ debug: true });
  large.relay("track", "large", { text: "x".repeat(33_000) });
  assert.match(said(large), /"event":"large".*\n.*"full"/);
  const offline = opened({ debug: true }, { navigator: { onLine: false } });
  offline.relay("track", "first");
  offline.track(100);
  assert.match(said(offline), /"offline",\{.*"event":"first"/);
  const late = opened({ debug: true });
  late.answer = { status: 503, text: "" };
  late.relay("track", "old");
  await wait(late, 2 * DAY);
  assert.match(said(late), /"late",\{.*"event":"old"/);
  const going = opened({ debug: true }, { quota: 0 });
  going.relay("track", "going");
  going.fire("pagehide");
  assert.match(said(going), /"quota",\{.*"event":"going"/);
});

test("debug explains every event that it sends or skips", async () => {
  const page = opened({ debug: true, consent: "required" });
  page.track();
  page.relay("consent", true);
  await wait(page, 1_000);
  page.relay("consent", false);
  page.track();
  const said = page.said.map((words) => JSON.stringify(words)).join("\n");
  for (const word of ["relay:", "queued", "skipped"]) assert.ok(said.includes(word), word);
  const quiet = opened();
  quiet.track();
  await wait(quiet, 1_000);
  assert.deepEqual(quiet.said, []);
});

// --- time ------------------------------------------------------------------------------

test("an event says how old it is, at each sending anew", async () => {
  const page = opened();
  page.answers = [{ status: 503, text: "" }];
  page.track();
  await wait(page, 500);
  page.track();
  await wait(page, 10_000);
  assert.deepEqual(page.sent[0].events.map(({ age }) => age), [1_000, 500]);
  const again = page.sent[1].at - page.sent[0].at;
  assert.deepEqual(page.sent[1].events.map(({ age }) => age), [1_000 + again, 500 + again]);
});

test("the age is kept over a reload", async () => {
  const browser = new Browser();
  const first = browser.open({}, { navigator: { onLine: false } });
  first.track();
  first.fire("pagehide");
  await browser.pass(DAY);
  const next = browser.open();
  await browser.pass(1_000);
  assert.equal(next.sent[0].events[0].age, DAY);
});

// --- a page that slept -----------------------------------------------------------------

test("what another page has delivered while this one slept is not sent again", async () => {
  const browser = new Browser();
  const asleep = browser.open({}, { navigator: { onLine: false } });
  asleep.track(2);
  asleep.fire("pagehide");
  browser.timers = []; // frozen
  const other = browser.open();
  await browser.pass(2_000);
  assert.equal(other.sent[0].events.length, 2);
  await browser.pass(4 * DAY); // by now the relay has forgotten the ids
  asleep.navigator.onLine = true;
  asleep.fire("pageshow");
  await browser.pass(60_000);
  assert.deepEqual(asleep.sent, []);
});

test("what is nobody else's is sent by the page that slept", async () => {
  const browser = new Browser();
  const asleep = browser.open({}, { navigator: { onLine: false } });
  asleep.track(2);
  asleep.fire("pagehide");
  await browser.pass(4 * DAY);
  asleep.navigator.onLine = true;
  asleep.fire("pageshow");
  await browser.pass(60_000);
  assert.equal(asleep.sent.flatMap(({ events }) => events).length, 2);
  assert.deepEqual(browser.storage, {});
});

test("a store that takes nothing makes no event another page's", async () => {
  const full = new Proxy({}, { set() { throw new Error("QuotaExceededError"); } });
  const page = opened({}, { storage: full, navigator: { onLine: false } });
  page.track(2);
  await wait(page, DAY);
  page.navigator.onLine = true;
  page.fire("online");
  await wait(page, 2_000);
  assert.equal(page.sent[0].events.length, 2);
});

test("consent that was refused on the next page counts when this one comes back", async () => {
  const browser = new Browser();
  const first = browser.open({}, { navigator: { onLine: false } });
  first.track();
  first.fire("pagehide");
  const next = browser.open({}, { navigator: { onLine: false } });
  next.relay("consent", false);
  await browser.pass(1_000);
  first.navigator.onLine = true;
  first.fire("pageshow");
  await browser.pass(60_000);
  assert.deepEqual(first.sent, []);
});

test("only true is consent", async () => {
  for (const word of ["denied", "granted", 1, {}, null]) {
    const page = opened({ consent: "required" });
    page.track();
    page.relay("consent", word);
    page.track();
    await wait(page, 5_000);
    assert.deepEqual([page.sent, page.kept], [[], []], String(word));
  }
});

test("what was told to wait for longer than a day is not late", async () => {
  const page = opened();
  page.answers = [{ status: 202, fate: { status: "rate_limited", retry_after: 2 * 86_400 } }];
  page.track();
  await wait(page, 2 * DAY + 60_000);
  assert.deepEqual(page.sent.map(({ events }) => events.length), [1, 1]);
  assert.equal(page.reported.late, undefined);
});

// --- what was lost, told by the next page -----------------------------------------------

test("what no beacon took is told by the next page, and arrives", async () => {
  const browser = new Browser();
  const first = browser.open({}, { quota: 0 });
  first.track(3);
  first.fire("pagehide");
  browser.timers = [];
  const next = browser.open();
  await browser.pass(2_000);
  assert.equal(next.sent[0].events.length, 3);
  assert.deepEqual(next.reported, { called: 3, quota: 3 });
});

test("what made room while offline is told by the next page", async () => {
  const browser = new Browser();
  const first = browser.open({}, { navigator: { onLine: false } });
  first.track(105);
  first.fire("pagehide");
  browser.timers = [];
  const next = browser.open();
  await browser.pass(60_000);
  assert.equal(next.sent.flatMap(({ events }) => events).length, 100);
  assert.equal(next.reported.offline, 5);
});

test("an answer of any shape leaves the page able to send", async () => {
  for (const whole of [{ events: [{ id: 1, status: {} }] }, { events: 5 }, { events: [null] }]) {
    const page = opened();
    page.answers = [{ status: 200, whole }];
    page.track();
    await wait(page, 60_000);
    page.track();
    await wait(page, 60_000);
    assert.ok(page.sent.length >= 2, JSON.stringify(whole));
  }
});
