// Sign a token for the relay in a shop's own backend. Needs Node 18 or newer and nothing else.
// In a program:
//
//     import { relayToken } from "./relay_token.mjs";
//     relayToken(key, "u1", { events: ["signed_up"], uses: 1, ttl: 3600 });
//
// By hand, with the newest key, which is the last one in the file:
//
//     node relay_token.mjs KEYFILE SOURCE_ID ['{"events": ["signed_up"], "uses": 1}']

import { createHmac, randomBytes } from "node:crypto";
import { readFileSync, realpathSync } from "node:fs";
import { pathToFileURL } from "node:url";

const hmac = (key, text) => createHmac("sha256", key).update(text).digest();
const base64url = (bytes) => Buffer.from(bytes).toString("base64url");

/** A token for the customer; claims are events, origin, ttl (seconds) and uses. */
export function relayToken(key, sourceId, claims = {}) {
  const payload = { source_id: sourceId, ...claims };
  if (Object.values(payload).includes(undefined)) {
    // JSON.stringify would leave it out, and so allow more than was meant.
    throw new TypeError("a claim is undefined: leave it out or give it a value");
  }
  if ("uses" in payload && !("id" in payload)) {
    // Two such tokens made in one second would else be the same, and share uses.
    payload.id = base64url(randomBytes(9));
  }
  const seconds = Math.floor(Date.now() / 1000).toString(16);
  const stamp = Buffer.from(seconds.padStart(seconds.length + (seconds.length % 2), "0"), "hex");
  const signed = `${base64url(JSON.stringify(payload))}.${base64url(stamp)}`;
  return `${signed}.${base64url(hmac(hmac(key, "relay.identity"), signed))}`;
}

const [script, keyFile, sourceId, claims = "{}"] = process.argv.slice(1);
if (script && import.meta.url === pathToFileURL(realpathSync(script)).href) {
  if (sourceId === undefined) {
    throw new Error("usage: node relay_token.mjs KEYFILE SOURCE_ID [CLAIMS]");
  }
  const keys = readFileSync(keyFile, "ascii").split(/[\s,]+/).filter(Boolean);
  if (keys.length === 0) throw new Error("the key file is empty");
  console.log(relayToken(keys.at(-1), sourceId, JSON.parse(claims)));
}
