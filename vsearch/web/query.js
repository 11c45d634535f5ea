// A query: what is typed, its further terms, and its filters; as an address, and as the service takes it.

import { clock, fileName, when } from "./text.js";

export const AGAINST = -0.5;
const MIN_CONFIDENCE = 0.95; // as the command line has it

/** Terms are { weight } with one of text, image (base64 of a JPEG), or video_id and at_s. */
export function emptyQuery() {
  return {
    text: "",
    terms: [],
    where: { path: "", video: "", tags: {}, after: "", before: "", from_s: null, to_s: null },
    min_score: null,
    weak: false, // whether weak matches are shown as well
  };
}

export function isEmpty(query) {
  return !query.text && !query.terms.length && !hasFilters(query);
}

export function seeks(query) {
  return Boolean(query.text) || query.terms.some((term) => term.weight > 0);
}

export function hasFilters(query) {
  return filterChips(query).length > 0;
}

/** The query of an address; pictures are too long for one, they come from the history's `state`. */
export function fromAddress(search, state) {
  const params = new URLSearchParams(search);
  const query = emptyQuery();
  const text = (name, weight) => params.getAll(name).map((value) => ({ text: value, weight }));
  const example = (name, weight) => params.getAll(name).map((value) => {
    const [id, at] = value.split("@");
    return { video_id: id, at_s: Number(at) || 0, weight };
  });
  query.text = params.get("q") ?? "";
  query.terms = [
    ...text("and", 1),
    ...text("without", AGAINST),
    ...example("like", 1),
    ...example("unlike", AGAINST),
    ...(state?.images ?? []),
  ];
  const { where } = query;
  for (const name of ["path", "video", "after", "before"]) where[name] = params.get(name) ?? "";
  for (const name of ["from_s", "to_s"]) where[name] = numberOf(params.get(name));
  for (const tag of params.getAll("tag")) {
    const [name, ...value] = tag.split("=");
    where.tags[name] = value.join("=");
  }
  query.min_score = numberOf(params.get("min_score"));
  query.weak = params.has("weak");
  return query;
}

function numberOf(text) {
  return text === null || text === "" || Number.isNaN(Number(text)) ? null : Number(text);
}

export function toAddress(query) {
  const params = new URLSearchParams();
  if (query.text) params.set("q", query.text);
  for (const term of query.terms) {
    if (term.text) params.append(term.weight > 0 ? "and" : "without", term.text);
    if (term.video_id) params.append(term.weight > 0 ? "like" : "unlike", `${term.video_id}@${term.at_s}`);
  }
  const { where } = query;
  for (const name of ["path", "video", "after", "before"]) if (where[name]) params.set(name, where[name]);
  for (const name of ["from_s", "to_s"]) if (where[name] !== null) params.set(name, where[name]);
  for (const [name, value] of Object.entries(where.tags)) params.append("tag", `${name}=${value}`);
  if (query.min_score !== null) params.set("min_score", query.min_score);
  if (query.weak) params.set("weak", "");
  const text = params.toString();
  return text ? `?${text}` : location.pathname;
}

export function historyState(query) {
  return { images: query.terms.filter((term) => term.image) };
}

/** What is looked for, as the service takes it. */
export function lookedFor(query) {
  const body = { terms: query.terms };
  if (query.text) body.q = query.text;
  return body;
}

/** The whole body of a search. */
export function toBody(query) {
  const { path, video, tags, after, before, from_s: fromS, to_s: toS } = query.where;
  const where = {};
  if (path) where.paths = [pathGlob(path)];
  if (video) where.videos = [video];
  if (Object.keys(tags).length) where.tags = tags;
  if (after) where.after = after;
  if (before) where.before = before;
  if (fromS !== null) where.from_s = fromS;
  if (toS !== null) where.to_s = toS;
  const sure = query.weak ? 0 : MIN_CONFIDENCE;
  return { ...lookedFor(query), where, min_score: query.min_score, min_confidence: sure };
}

/** A pattern is taken as it is; other text may stand anywhere, in whatever case. */
function pathGlob(path) {
  if (/[*?[]/.test(path)) return path;
  const letters = [...path].map((letter) => {
    const [lower, upper] = [letter.toLowerCase(), letter.toUpperCase()];
    return lower !== upper && lower.length === 1 && upper.length === 1 ? `[${lower}${upper}]` : letter;
  });
  return `*${letters.join("")}*`;
}

/** The active filters: a label, and what takes each away. */
export function filterChips(query) {
  const { where } = query;
  const chips = [];
  const add = (label, remove) => chips.push({ label, remove });
  if (where.path) add(`file: ${where.path}`, () => { where.path = ""; });
  if (where.video) add(`only ${fileName(where.video)}`, () => { where.video = ""; });
  for (const [name, value] of Object.entries(where.tags)) {
    add(`${name}: ${value}`, () => { delete where.tags[name]; });
  }
  if (where.after) add(`after ${when(where.after)}`, () => { where.after = ""; });
  if (where.before) add(`before ${when(where.before)}`, () => { where.before = ""; });
  if (where.from_s !== null) add(`from ${clock(where.from_s)}`, () => { where.from_s = null; });
  if (where.to_s !== null) add(`to ${clock(where.to_s)}`, () => { where.to_s = null; });
  if (query.min_score !== null) {
    add(`score at least ${query.min_score}`, () => { query.min_score = null; });
  }
  return chips;
}
