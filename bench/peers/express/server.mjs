// Peer of the benchmark: node server.mjs PORT UPSTREAM REDIS
import http from "node:http";
import express from "express";
import { rateLimit } from "express-rate-limit";
import { createProxyMiddleware } from "http-proxy-middleware";
import { RedisStore } from "rate-limit-redis";
import { createClient } from "redis";

const [port, upstream, redis] = process.argv.slice(2);
const client = createClient({ url: redis });
await client.connect();
const app = express();
app.set("trust proxy", "127.0.0.1");
app.post(
  "/track",
  rateLimit({
    windowMs: 60_000,
    limit: 120,
    standardHeaders: true,
    legacyHeaders: false,
    store: new RedisStore({ sendCommand: (...args) => client.sendCommand(args) }),
  }),
  createProxyMiddleware({
    target: upstream,
    pathRewrite: () => "/client/v1/events",
    agent: new http.Agent({ keepAlive: true, maxSockets: 512 }),
    headers: {
      "x-client-application-id": "sandbox-application",
      "x-client-token": "sandbox-token",
      origin: "https://shop.example",
    },
  }),
);
app.listen(Number(port), "127.0.0.1", 2048);
