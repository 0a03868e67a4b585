import { useEffect } from "react";
import { relay } from "./relay";

export function Product({ sku }: { sku: string }) {
  // For each product that is shown, after a change of the route too.
  useEffect(() => relay("track", "product_viewed", { sku }), [sku]);

  return (
    <button onClick={() => relay("track", "added_to_cart", { sku })}>Add to cart</button>
  );
}
