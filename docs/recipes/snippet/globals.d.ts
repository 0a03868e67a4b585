import type { Relay } from "voucherify-relay";
import type { RelayEvents } from "./relay-events";

declare global {
  var relay: Relay<RelayEvents>;
}
