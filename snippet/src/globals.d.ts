/** What the snippet uses and TypeScript's library does not know. */
interface Document {
  prerendering?: boolean;
}
interface Navigator {
  globalPrivacyControl?: boolean;
}
interface Window {
  relay?: ((...call: never[]) => void) & { q?: never[][]; on?: 1 };
}
declare function fetchLater(url: string, init: RequestInit): object;
