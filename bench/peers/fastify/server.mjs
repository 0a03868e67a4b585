// Peer of the benchmark: node server.mjs PORT UPSTREAM REDIS
import rateLimit from "@fastify/rate-limit";
import replyFrom from "@fastify/reply-from";
import Fastify from "fastify";
import Redis from "ioredis";

const [port, upstream, redis] = process.argv.slice(2);
const app = Fastify({ trustProxy: "127.0.0.1" });
await app.register(rateLimit, {
  max: 120,
  timeWindow: "1 minute",
  redis: new Redis(redis),
});
await app.register(replyFrom, { base: upstream, undici: { connections: 512 } });
app.post("/track", (request, reply) =>
  reply.from("/client/v1/events", {
    rewriteRequestHeaders: (_, { cookie, ...headers }) => ({
      ...headers,
      "x-client-application-id": "sandbox-application",
      "x-client-token": "sandbox-token",
      origin: "https://shop.example",
    }),
  }),
);
await app.listen({ port: Number(port), host: "127.0.0.1", backlog: 2048 });
