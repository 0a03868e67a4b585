import Link from "next/link";
import { Product } from "../Product";

export default async function Page({ params }: { params: Promise<{ sku: string }> }) {
  const { sku } = await params;
  return (
    <>
      <h1>{sku}</h1>
      <Product sku={sku} />
      <Link href="/plate">Next product</Link>
    </>
  );
}
