// A shop with two products, and the smallest router there is in place of yours.
import { useState } from "react";
import { createRoot } from "react-dom/client";
import { Product } from "./Product";

function Shop() {
  const [sku, show] = useState("cup");
  const next = () => {
    history.pushState(null, "", "/plate");
    show("plate");
  };
  return (
    <>
      <h1>{sku}</h1>
      <Product sku={sku} />
      <button onClick={next}>Next product</button>
    </>
  );
}

createRoot(document.getElementById("shop")!).render(<Shop />);
