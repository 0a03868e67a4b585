// The demo's shop: a cart, a card, a link for friends, a letter. What happens in it goes
// to Voucherify as events, and every event goes through `relay(…)`, the snippet.
"use strict";
{
  // The card of each customer, as the shop's server would know it.
  const CARDS = {
    guest: "MOSS-1000-0001",
    robin: "MOSS-4021-7730",
    sam: "MOSS-4021-8816",
    alex: "MOSS-4022-1154",
  };
  const euros = new Intl.NumberFormat("en", { style: "currency", currency: "EUR" });
  const products = {}; // by sku: name, price in cents, and what shows it
  const lines = {}; // of the cart, by sku

  // Kept over a reload, if the browser lets us.
  const recall = (key) => {
    try {
      return JSON.parse(localStorage["shop:" + key]);
    } catch {}
  };
  const keep = (key, value) => {
    try {
      localStorage["shop:" + key] = JSON.stringify(value);
    } catch {}
  };

  const address = new URL(location);
  const code = address.searchParams.get("ref") || "";
  const referral = /^[\w-]{1,40}$/.test(code) ? { code } : undefined;
  let cart = {};
  let who = "guest";

  const track = (name, metadata, parts) => {
    relay("track", name, metadata, parts);
    panel.look();
  };
  const say = (text) => {
    byId("said").textContent = text;
  };
  const note = (text) => {
    byId("note").textContent = text;
    byId("note").hidden = !text;
  };
  const things = (n) => (n === 1 ? "1 thing" : `${n} things`);
  const count = () => Object.values(cart).reduce((sum, n) => sum + n, 0);
  const cents = () =>
    Object.entries(cart).reduce((sum, [sku, n]) => sum + n * products[sku].cents, 0);

  // --- the cart ---------------------------------------------------------------------

  const put = (sku, n) => {
    const { name, cents: price } = products[sku];
    cart[sku] = (cart[sku] || 0) + n;
    if (cart[sku] <= 0) delete cart[sku];
    keep("cart", cart);
    byId("empty-says").textContent = "Nothing in it any more.";
    draw();
    track(n > 0 ? "product_added" : "product_removed", {
      sku,
      name,
      price: price / 100,
      in_cart: count(),
    });
    say(`${name} ${n > 0 ? "added" : "taken out"}. In the cart: ${things(count())}, ${euros.format(cents() / 100)}.`);
  };

  const button = (className, text, label, act) => {
    const made = node("button", className, text);
    made.type = "button";
    if (label) made.setAttribute("aria-label", label);
    made.addEventListener("click", act);
    return made;
  };

  const lineOf = (sku) => {
    if (lines[sku]) return lines[sku];
    const { name, art } = products[sku];
    const item = node("li");
    const line = { item, n: node("b"), price: node("span", "price") };
    const steps = node("div", "steps");
    steps.append(
      button("", "−", `One ${name} less`, () => put(sku, -1)),
      line.n,
      button("", "+", `One ${name} more`, () => put(sku, 1)),
    );
    item.append(art.cloneNode(true), node("span", "what", name), steps, line.price);
    byId("lines").append(item);
    return (lines[sku] = line);
  };

  const draw = () => {
    const lost = byId("till").contains(document.activeElement);
    for (const sku of Object.keys(products)) {
      const n = cart[sku] || 0;
      products[sku].inCart.textContent = n ? `${n} in the cart` : "";
      if (n) {
        const line = lineOf(sku);
        line.n.textContent = n;
        line.price.textContent = euros.format((n * products[sku].cents) / 100);
      } else if (lines[sku]) {
        const held = lines[sku].item.contains(document.activeElement);
        lines[sku].item.remove();
        delete lines[sku];
        if (held) byId("h-cart").focus();
      }
    }
    const n = count();
    byId("count").textContent = n;
    byId("empty").hidden = n > 0;
    byId("lines").hidden = byId("till").hidden = n === 0;
    byId("total").textContent = euros.format(cents() / 100);
    if (lost && n === 0) byId("h-cart").focus(); // the button is gone
  };

  const checkOut = () => {
    const loyalty = byId("earn").checked ? { code: CARDS[who] } : undefined;
    const [items, total] = [count(), cents() / 100];
    const order = crypto.randomUUID().slice(0, 8);
    cart = {};
    keep("cart", cart);
    draw();
    track("order_placed", { order, items, total }, { loyalty, referral });
    const thanks = `Thank you: order ${order}, ${things(items)}, ${euros.format(total)}.`;
    byId("empty-says").textContent = thanks;
    say(thanks);
  };

  const shelve = (item) => {
    const { sku, price } = item.dataset;
    const name = item.querySelector("h3").textContent;
    const art = item.querySelector("svg");
    const inCart = node("span", "in-cart");
    const foot = node("div", "foot");
    const priced = node("p", "price", euros.format(price));
    priced.append(inCart);
    foot.append(priced, button("", "Add", `Add ${name} to the cart`, () => put(sku, 1)));
    item.append(foot);
    products[sku] = { name, art, inCart, cents: Math.round(price * 100) };
  };

  // --- the customer -----------------------------------------------------------------

  const guest = recall("guest") || `guest-${crypto.randomUUID().slice(0, 8)}`;

  const signIn = (name) => {
    who = name in CARDS ? name : "guest";
    keep("guest", guest);
    keep("who", who);
    // A shop with accounts hands a token of its backend here: docs/tokens.md.
    relay("identify", who === "guest" ? guest : who);
    const shown = byId("who");
    shown.value = who;
    byId("holder").textContent = shown.selectedOptions[0].textContent;
    byId("card").textContent = CARDS[who];
    const link = new URL("/", location);
    link.searchParams.set("ref", `FRIEND-OF-${who.toUpperCase()}`);
    byId("friend").href = byId("friend").textContent = link;
  };

  const signUp = (submit) => {
    submit.preventDefault();
    const email = byId("email").value.trim();
    track("newsletter_joined", { form: "letter" }, { customer: { email }, referral });
    submit.target.reset();
    note(`The letter will go to ${email}.`);
    say(`The letter will go to ${email}.`);
  };

  const copyLink = async () => {
    const link = byId("friend").href;
    try {
      await navigator.clipboard.writeText(link);
      say("The link is in the clipboard.");
      byId("copy").textContent = "Copied";
    } catch {
      say("The browser does not let the page copy: select the link.");
    }
  };

  // --- what makes it hard -----------------------------------------------------------

  const openSale = () => {
    for (let lot = 1; lot <= 20; lot++) relay("track", "sale_joined", { lot });
    panel.look();
    say("Twenty events were called.");
  };
  // Loyalty without a code: no such event can be delivered.
  const sendFaulty = () => track("review_added", { stars: 5 }, { loyalty: {} });
  const leave = () => track("shop_left", { in_cart: count() });

  const welcome = () => {
    if (referral) note(`A friend sent you: the code ${code} goes along with your order or your sign-up.`);
    if (!address.searchParams.has("left")) return;
    note("The page you left is gone. Its last event left with it: look where it is now.");
    address.searchParams.delete("left");
    history.replaceState(null, "", address);
  };

  addEventListener("DOMContentLoaded", () => {
    for (const item of document.querySelectorAll("#products > li")) shelve(item);
    for (const [sku, n] of Object.entries(recall("cart") || {}))
      if (products[sku] && n > 0) cart[sku] = n;
    signIn(recall("who"));
    draw();
    welcome();
    if (referral) byId("leave").search = `?left&ref=${code}`;

    byId("who").addEventListener("change", (change) => {
      signIn(change.target.value);
      track("signed_in");
    });
    byId("checkout").addEventListener("click", checkOut);
    byId("letter").addEventListener("submit", signUp);
    byId("copy").addEventListener("click", copyLink);
    byId("sale").addEventListener("click", openSale);
    byId("faulty").addEventListener("click", sendFaulty);
    byId("leave").addEventListener("click", leave);
  });
}
