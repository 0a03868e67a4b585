// The stub of the tag, so that no script stands in the page itself.
window.relay = window.relay || function () { (relay.q = relay.q || []).push(arguments); };

relay("identify", document.documentElement.dataset.shopper);

document.addEventListener("click", (event) => {
  const { sku } = event.target.dataset;
  if (sku) relay("track", "added_to_cart", { sku });
});
