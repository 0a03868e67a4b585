import { createRelay, type Relay } from "voucherify-relay";

// A server that renders pages has no shopper, and sends nothing.
export const relay: Relay = typeof document === "undefined" ? () => {} : start();

function start() {
  const relay = createRelay();
  // A token, or a source_id, that your backend wrote into the page: <html data-shopper="…">.
  const { shopper } = document.documentElement.dataset;
  if (shopper) relay("identify", shopper);
  return relay;
}
