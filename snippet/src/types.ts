/** What pages and backends write; docs/snippet.md tells it with examples. */

/** The parts of an event beside its name and metadata, as Voucherify defines them. */
export interface Parts {
  customer?: {
    id?: string;
    source_id?: string;
    name?: string;
    email?: string;
    [field: string]: unknown;
  };
  loyalty?: { code: string; [field: string]: unknown };
  referral?: { code?: string; referrer_id?: string; [field: string]: unknown };
}

export interface RelayEvent extends Parts {
  event: string;
  /** Of this event alone, everywhere and for ever: the relay takes it once. */
  id: string;
  token?: string;
  metadata?: object;
}

/** An event that the relay refused for good, and why. */
export interface Trouble {
  event?: RelayEvent;
  /** The HTTP status of the answer. */
  status: number;
  /** A code of docs/protocol.md, as `customer_missing`. */
  reason?: string;
  detail?: string;
}

export interface Options {
  /** Where the relay takes beacons. Default: `/track` on the page's own host. */
  url?: string;
  /** `required`: nothing is kept or sent until `relay("consent", true)`. */
  consent?: string;
  /** `ignore`: Global Privacy Control does not ask for consent. */
  gpc?: string;
  /** Explain every event on the console. */
  debug?: boolean;
  onerror?: (trouble: Trouble) => void;
}

/**
 * Metadata and parts of each event, by name. `relay catalog types` writes `RelayEvents`
 * in this form, so that what the relay takes is checked where it is written.
 */
export type Catalog<Events> = { [Name in keyof Events]: { metadata?: object } };
export type AnyEvent = Record<string, Parts & { metadata?: object }>;

export interface Relay<Events extends Catalog<Events> = AnyEvent> {
  <Name extends keyof Events & string>(
    command: "track",
    event: Name,
    metadata?: Events[Name]["metadata"],
    parts?: Omit<Events[Name], "metadata">,
  ): void;
  /** A token from the shop's backend, or a source_id, for the events from now on; nobody without. */
  (command: "identify", tokenOrSourceId?: string | number): void;
  (command: "consent", given: boolean): void;
  (command: "onerror", callback: (trouble: Trouble) => void): void;
  (command: "flush"): void;
}

export type Create = <Events extends Catalog<Events> = AnyEvent>(
  options?: Options,
) => Relay<Events>;

// --- within the snippet ---------------------------------------------------------------

/** An event that is not known to have arrived; times in milliseconds since 1970. */
export interface Entry {
  event: RelayEvent;
  at: number; // when it was called
  tried?: number; // the first time that it was sent
  left?: number; // the same, when that was a beacon
  due?: number; // not to be sent before
  until?: number; // this page's own in the store
  lost?: string; // a kind of `Report`: of itself, or of one that made room for it
}

/**
 * What became of this page's events before they left, since the relay heard last:
 * `called` (all of them), `full` and `offline` (the oldest made room; while there was no
 * network), `quota` (the browser took no beacon as the page went; told with the event),
 * `late` (may have arrived, too long ago to be sent again).
 */
export type Report = Record<string, number>;

/** What the relay says of an event, or of all of them. */
export interface Fate {
  id?: string;
  status?: string | number;
  reason?: string;
  detail?: string;
  retry_after?: number; // seconds
  events?: Fate[];
  disabled?: boolean; // the snippet is to stop, until the page is loaded again
}
