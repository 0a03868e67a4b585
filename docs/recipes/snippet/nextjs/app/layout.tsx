import type { ReactNode } from "react";
import { cookies } from "next/headers";
import { relayToken } from "./relay_token.mjs";

export default async function Layout({ children }: { children: ReactNode }) {
  // In place of your own session, which proves who is logged in; this cookie does not.
  const customer = (await cookies()).get("session")?.value;
  const token = customer && relayToken(process.env.TOKEN_KEY!, customer);

  return (
    <html lang="en" data-shopper={token}>
      <body>{children}</body>
    </html>
  );
}
