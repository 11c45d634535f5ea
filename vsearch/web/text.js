// How numbers, times and names are written for people, and read from what they type.

export function clock(seconds) {
  const tenths = Math.round(Math.max(0, seconds) * 10);
  const hours = Math.floor(tenths / 36000);
  const minutes = Math.floor((tenths % 36000) / 600);
  const rest = ((tenths % 600) / 10).toFixed(1).padStart(4, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

/** Seconds of "90", "1:30" or "1:02:03.5"; null of nothing, NaN of what is no time. */
export function seconds(typed) {
  const text = typed.trim().replace(",", ".");
  if (!text) return null;
  if (!/^(\d+:){0,2}\d+(\.\d+)?$/.test(text)) return NaN;
  return text.split(":").reduce((total, part) => total * 60 + Number(part), 0);
}

/** A number as typed, with a comma or a point; null of nothing, NaN of what is no number. */
export function number(typed) {
  const text = typed.trim().replace(",", ".");
  return text ? Number(text) : null;
}

export function count(n, one, many = `${one}s`) {
  return `${n.toLocaleString()} ${n === 1 ? one : many}`;
}

export function hours(h) {
  if (h >= 10) return count(Math.round(h), "hour");
  if (h >= 1) return `${h.toFixed(1)} hours`;
  return h * 60 >= 1 ? count(Math.round(h * 60), "minute") : count(Math.round(h * 3600), "second");
}

export function fileName(uri) {
  return uri.split("/").pop() || uri;
}

const moment = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
const exact = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "medium" });

export function when(iso, precise = false) {
  const date = new Date(iso);
  return Number.isNaN(date.getTime()) ? "" : (precise ? exact : moment).format(date);
}

/** An element with properties, attributes (named with a dash or "role") and children. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "role" || name.includes("-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}
