// Elements made in code. Text becomes text nodes: nothing that a model or a server says is ever markup.

const SVG = "http://www.w3.org/2000/svg";

/** One element, e.g. el("p", { class: "soft" }, "12 tokens"). What is null or false is left out. */
export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** As `el`, for the elements of a drawing. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter(Boolean));
  return element;
}

/** A button that does not submit. */
export function button(text, onClick, attributes = {}) {
  const made = el("button", { type: "button", class: "quiet", ...attributes }, text);
  made.addEventListener("click", onClick);
  return made;
}

/** Adds something below what a scrolling view holds, and stays at the end only if the reader was there. */
export function atEnd(view, change) {
  const follows = isAtEnd(view);
  change();
  if (follows) view.scrollTop = view.scrollHeight;
}

/** Stays at the end also when the view itself changes its size, as it does below a banner. */
export function holdEnd(view) {
  let follows = true;
  view.addEventListener("scroll", () => (follows = isAtEnd(view)), { passive: true });
  new ResizeObserver(() => follows && (view.scrollTop = view.scrollHeight)).observe(view);
}

function isAtEnd(view) {
  return view.scrollHeight - view.scrollTop - view.clientHeight < 48;
}
