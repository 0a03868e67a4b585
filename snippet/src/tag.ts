/** The script that a page loads: finds its settings in its own tag, and takes over. */
import { createRelay } from "./relay";

// None for a module, or where somebody else runs the text: then it is all defaults.
const script = document.currentScript as HTMLScriptElement | null;
const data = script?.dataset || {};
const stub = self.relay;
if (!stub?.on) {
  // Not twice: a tag manager may load what the page has already.
  const relay = createRelay({
    ...data,
    url: data.url || script?.src.replace(/[^/?]+(\?.*)?$/, "track"),
    debug: "debug" in data,
  }) as NonNullable<typeof stub>;
  relay.on = 1;
  // Some have kept the stub, and go on calling that.
  const push = (call: never[]) => relay(...call);
  relay.q = { push } as never;
  self.relay = relay;
  stub?.q?.forEach(push);
}
