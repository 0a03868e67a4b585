import { createRelay } from "voucherify-relay";
import type { RelayEvents } from "./relay-events";

export const relay = createRelay<RelayEvents>();

relay("track", "review_added", { sku: "cup", rating: 5 }, { loyalty: { code: "CARD-1" } });
