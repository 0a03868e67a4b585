// Build a recipe as Vite and its like do: node bundle.mjs ENTRY DIRECTORY.
import { readFile } from "node:fs/promises";
import { basename } from "node:path";
import { build } from "esbuild";
import { compileScript, parse } from "vue/compiler-sfc";

const vue = {
  name: "vue",
  setup: ({ onLoad }) =>
    onLoad({ filter: /\.vue$/ }, async ({ path }) => {
      const { descriptor } = parse(await readFile(path, "utf8"), { filename: path });
      const { content } = compileScript(descriptor, { id: basename(path), inlineTemplate: true });
      return { contents: content, loader: "ts" };
    }),
};

const [entry, directory] = process.argv.slice(2);
await build({
  entryPoints: [entry],
  outdir: directory,
  bundle: true,
  minify: true,
  format: "esm",
  jsx: "automatic",
  define: {
    "process.env.NODE_ENV": '"production"',
    __VUE_OPTIONS_API__: "false",
    __VUE_PROD_DEVTOOLS__: "false",
    __VUE_PROD_HYDRATION_MISMATCH_DETAILS__: "false",
  },
  plugins: [vue],
});
