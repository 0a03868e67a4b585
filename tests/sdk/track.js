// Hand one event to @voucherify/sdk and tell what the library itself reports.
// A page loads this as a script; Node runs it with the job on its standard input.
"use strict";

async function track(VoucherifyClientSide, job) {
  try {
    const client = VoucherifyClientSide({
      apiUrl: job.url,
      clientApplicationId: "relay",
      clientSecretKey: "relay",
      origin: job.origin, // Node needs it; a browser sends its own
      exposeErrorCause: true,
      ...job.options,
    });
    if (job.identity !== undefined) client.setIdentity(job.identity);
    const { event, customer, metadata, referral, loyalty } = job;
    return {
      resolved: await client.track(event, customer, metadata, referral, loyalty),
    };
  } catch (error) {
    const { name, message, code, key, details, request_id } = error;
    const retry_after = error.cause?.response?.headers["retry-after"];
    return {
      thrown: { name, message, code, key, details, request_id, retry_after },
    };
  }
}

if (typeof require === "function") {
  const { VoucherifyClientSide } = require("@voucherify/sdk");
  const job = JSON.parse(require("fs").readFileSync(0, "utf8"));
  track(VoucherifyClientSide, job).then((told) =>
    console.log(JSON.stringify(told)),
  );
}
