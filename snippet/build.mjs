// Build the snippet: ../relay/static/relay.js, which the relay serves, with a brotli
// twin (Python has no brotli of its own).
// With --package it builds dist/relay.mjs instead, for npm.
// With --check nothing is written: it fails when what is there is not what this builds,
// or when it has grown too large.
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { brotliCompressSync, brotliDecompressSync, constants, gzipSync } from "node:zlib";
import { build } from "esbuild";
import { minify } from "terser";

const MAX_BYTES = 2048; // gzipped
const OUT = new URL("../relay/static/relay.js", import.meta.url);
const TWIN = new URL("../relay/static/relay.js.br", import.meta.url);

const made = async (entry, format) => {
  const { outputFiles } = await build({
    entryPoints: [new URL(entry, import.meta.url).pathname],
    bundle: true,
    minify: true,
    write: false,
    tsconfigRaw: "{}", // without "use strict"
    target: "es2021",
    format,
    // Names of what is kept in a page's store: the same in every version, since another
    // one may find it there.
    mangleProps: /^(at|due|left|lost|tried|until)$/,
    mangleCache: { at: "e", due: "d", left: "n", lost: "c", tried: "s", until: "t" },
  });
  // Its names go by how often they are used, and so compress better.
  const { code } = await minify(outputFiles[0].text, {
    compress: false,
    module: format == "esm",
  });
  return Buffer.from(code);
};

if (process.argv.includes("--package")) {
  mkdirSync(new URL("dist", import.meta.url), { recursive: true });
  writeFileSync(new URL("dist/relay.mjs", import.meta.url), await made("src/relay.ts", "esm"));
  process.exit();
}

const script = await made("src/tag.ts", "iife");
const bytes = gzipSync(script, { level: 9 }).length;
console.log(`relay.js: ${script.length} bytes, ${bytes} gzipped (at most ${MAX_BYTES})`);
if (bytes > MAX_BYTES) fail("The snippet has grown too large.");

if (process.argv.includes("--check")) {
  const same =
    existsSync(OUT) &&
    existsSync(TWIN) &&
    readFileSync(OUT).equals(script) &&
    brotliDecompressSync(readFileSync(TWIN)).equals(script);
  if (!same) fail("relay/static/relay.js is not what snippet/ builds: run make snippet.");
} else {
  const params = { [constants.BROTLI_PARAM_SIZE_HINT]: script.length };
  writeFileSync(OUT, script);
  writeFileSync(TWIN, brotliCompressSync(script, { params }));
}

function fail(why) {
  console.error(why);
  process.exit(1);
}
