// Hand one event to voucherify.js and tell what the library gives to its callback.
"use strict";

function run({ url, event, customer, metadata, identity }) {
  Voucherify.initialize("relay", "relay");
  Voucherify.setBaseUrl(url);
  if (identity !== undefined) Voucherify.setIdentity(identity);
  return new Promise((resolve) => {
    Voucherify.track(event, metadata, customer, (said) => {
      const failed = said.type === "error" && "message" in said;
      resolve(failed ? { thrown: plain(said) } : { resolved: said });
    });
  });
}

// The context of an error: a status, a network's event, or jQuery's request.
function plain({ message, context }) {
  if (typeof context === "number") return { message, code: context };
  if (!context.getResponseHeader) return { message };
  return {
    ...context.responseJSON,
    message,
    code: context.status,
    retry_after: context.getResponseHeader("Retry-After"),
  };
}
