// The page: what is typed becomes a query, the query an address and an answer, the answer cards.

import { Problem, call, frameAt, json } from "./api.js";
import { focusCard, makeCard, moveByKeys, showStrength } from "./cards.js";
import { lackingNote, searchable } from "./coverage.js";
import { acceptPictures, pictureAddress, smallJpeg } from "./picture.js";
import { openPlayer } from "./player.js";
import {
  AGAINST, emptyQuery, filterChips, fromAddress, hasFilters, historyState, isEmpty, lookedFor, seeks,
  toAddress, toBody,
} from "./query.js";
import { clock, count, element, fileName, icon, number, seconds, when } from "./text.js";

const LIMIT = 24;
const DEBOUNCE_MS = 250;
const THOUGHT_MS = 3000;
const SAMPLES = 6;
const EXAMPLES = [
  "a red car in the city", "a boat at the seaside", "a tree in the snow", "a white house at night",
  "fish under water",
];

const find = (id) => document.getElementById(id);
const input = find("query");
const results = find("results");
const countLine = find("count");
const note = find("note");
const moreButton = find("more");
const filters = find("filters");
const filtersButton = find("filters-button");

let query = emptyQuery();
let status = null; // of the archive, once it is there
let answer = null; // the first page of what is shown
let segments = [];
let cursor = null;
let searching = new AbortController();
let typing = 0; // the timer of the debounce
let draft = 0; // until when more typing belongs to the newest entry of the history

// Queries and history.

/** The query has changed: by typing, which makes one entry of the history until Enter or a pause, or
 * by a decision. */
function changed({ typed = false } = {}) {
  clearTimeout(typing);
  const write = typed && performance.now() < draft ? "replaceState" : "pushState";
  const address = toAddress(query);
  const same = new URL(address, location.href).href === location.href;
  if (!same || historyState(query).images.length) {
    try {
      history[same ? "replaceState" : write](historyState(query), "", address);
    } catch {
      // A browser may refuse large pictures in its history: Back then lacks them.
      history[same ? "replaceState" : write](null, "", address);
    }
  }
  draft = typed ? performance.now() + THOUGHT_MS : 0;
  showQuery();
  search();
}

function restore() {
  query = fromAddress(location.search, history.state);
  input.value = query.text;
  draft = 0;
  showQuery();
  search();
}

function showQuery() {
  const empty = isEmpty(query);
  document.body.classList.toggle("home", empty);
  document.title = empty ? "vsearch" : `${titleOf(query)} – vsearch`;
  const chips = query.terms.map(termChip);
  const set = filterChips(query).map(filterChip);
  find("chips").replaceChildren(...chips, ...set);
  filtersButton.classList.toggle("active", set.length > 0);
  filtersButton.setAttribute("aria-label", set.length ? `Filters, ${set.length} active` : "Filters");
  if (!filters.contains(document.activeElement)) fillFilters();
}

function titleOf({ text, terms }) {
  return text || terms.find((term) => term.text)?.text || "moments";
}

function termChip(term) {
  const words = term.text ?? (term.image ? "picture" : `moment at ${clock(term.at_s)}`);
  const against = term.weight < 0;
  const sign = element("button", {
    type: "button", className: "sign", textContent: against ? "−" : "+",
    title: against ? "Counts against: click to look for it" : "Looked for: click to count it against",
    "aria-label": `${words}: ${against ? "counts against" : "looked for"}; turn round`,
  });
  sign.addEventListener("click", () => {
    term.weight = against ? 1 : AGAINST;
    changed();
  });
  const chip = element("li", { className: against ? "chip against" : "chip" }, sign);
  if (!term.text) {
    const address = term.image ? pictureAddress(term.image) : frameAt(term.video_id, term.at_s, 160);
    chip.append(element("img", { src: address, alt: "", draggable: false }));
  }
  chip.append(element("span", { textContent: against && term.text ? `without ${words}` : words }));
  chip.append(remover(words, () => query.terms.splice(query.terms.indexOf(term), 1)));
  return chip;
}

function filterChip({ label, remove }) {
  return element("li", { className: "chip filter" }, element("span", { textContent: label }),
    remover(label, remove));
}

function remover(words, remove) {
  const button = element("button", { type: "button", className: "remove", "aria-label": `Remove ${words}` },
    icon("close"));
  button.addEventListener("click", () => {
    remove();
    changed();
    input.focus();
  });
  return button;
}

// Searching.

async function search() {
  searching.abort();
  searching = new AbortController();
  const { signal } = searching;
  if (!seeks(query)) {
    settle();
    clearResults();
    if (!isEmpty(query)) {
      say("Say also what to look for: filters and ‘without’ only narrow it down.", "");
    }
    return;
  }
  results.setAttribute("aria-busy", "true");
  find("start").hidden = true;
  try {
    const found = await json("v1/search", {
      body: { ...toBody(query), limit: LIMIT },
      signal,
      onWait: (s) => { countLine.textContent = `The service is busy: once more in ${count(s, "second")} …`; },
    });
    if (signal.aborted) return;
    settle();
    showAnswer(found);
  } catch (error) {
    if (signal.aborted) return;
    settle();
    if (!(error instanceof Problem)) throw error;
    clearResults();
    say(error.message, "", error.status === 422 ? null : ["Try again", search]);
  }
}

function settle() {
  results.removeAttribute("aria-busy");
  note.hidden = true;
}

function clearResults() {
  answer = null;
  segments = [];
  cursor = null;
  results.replaceChildren();
  countLine.textContent = "";
  moreButton.hidden = true;
  find("export").hidden = true;
  find("weak").hidden = true;
  find("empty").hidden = true;
  find("start").hidden = !isEmpty(query);
}

function showAnswer(found) {
  const before = new Map([...results.children].map((card, n) => [keyOf(segments[n]), card]));
  answer = found;
  segments = found.segments;
  cursor = found.cursor;
  results.replaceChildren(...segments.map((segment) => cardOf(segment, before.get(keyOf(segment)))));
  find("start").hidden = true;
  find("export").hidden = !segments.length;
  moreButton.hidden = cursor === null;
  if (found.partial) sayPartial(found);
  showCount();
  showHidden(found);
  showEmpty();
}

const keyOf = ({ video_id: id, start_s: startS, end_s: endS }) => `${id} ${startS} ${endS}`;

/** A moment that was there before keeps its card, and so its picture. */
function cardOf(segment, old) {
  const width = results.firstElementChild?.clientWidth || Math.min(360, results.clientWidth || 360);
  const card = old ?? makeCard(segment, width, {
    open: (own) => play(indexOf(own)),
    like: (own) => moreLike(own),
    also: (own) => addExample(own, 1),
    unlike: (own) => addExample(own, AGAINST),
  });
  showStrength(card, segment, answer.background, best());
  return card;
}

const indexOf = (segment) => segments.findIndex((other) => keyOf(other) === keyOf(segment));
const best = () => answer?.segments[0]?.score ?? 0;

function showCount() {
  const more = cursor === null ? "" : " so far";
  const took = `${Math.max(1, Math.round(answer.took_ms))} ms`;
  countLine.replaceChildren(`${count(segments.length, "moment")}${more} · `,
    element("span", { textContent: took, title: tookInParts(answer.took) }), " · index of ",
    element("span", { textContent: builtAt(answer.snapshot), title: `snapshot ${answer.snapshot}` }));
}

/** What of the matches is too weak to be shown, and the way to it. */
function showHidden({ hidden, hidden_more: more }) {
  const weak = find("weak");
  weak.hidden = !hidden;
  if (!hidden) return;
  const some = `${count(hidden, "weak match", "weak matches")}${more ? ", and more," : ""}`;
  const words = `${some} ${hidden === 1 && !more ? "is" : "are"} hidden.`;
  const button = element("button", { type: "button", className: "quiet", textContent: "Show weak matches" });
  button.addEventListener("click", () => {
    query.weak = true;
    changed();
  });
  weak.replaceChildren(element("p", { textContent: words }), button);
}

/** A snapshot's name begins with the time at which it was built, in UTC. */
function builtAt(snapshot) {
  const parts = /^(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)/.exec(snapshot);
  return parts ? when(`${parts.slice(1, 4).join("-")}T${parts.slice(4).join(":")}Z`) : snapshot;
}

function tookInParts(took = {}) {
  return Object.entries(took)
    .map(([name, ms]) => `${name.replace(/_ms$/, "")} ${Math.round(ms)} ms`).join(", ");
}

function say(words, kind, action = null) {
  note.className = `note ${kind}`;
  note.replaceChildren(element("p", { textContent: words }));
  if (action) {
    const [label, run] = action;
    const button = element("button", { type: "button", className: "quiet", textContent: label });
    button.addEventListener("click", run);
    note.append(button);
  }
  note.hidden = false;
}

function sayPartial(found) {
  const why = found.missing.length ? `: ${found.missing.join("; ")}` : "";
  say(`Not everything was searched${why}. There may be better moments.`, "warn", ["Search again", search]);
}

function showEmpty() {
  const empty = find("empty");
  empty.hidden = segments.length > 0;
  if (segments.length) return;
  if (answer?.hidden) {
    empty.replaceChildren(element("h2", { textContent: "Nothing in the archive matches well" }));
    return;
  }
  const filtered = hasFilters(query);
  const parts = [
    element("h2", { textContent: filtered ? "Nothing passes the filters" : "Nothing found" }),
    element("p", { textContent: filtered
      ? "There are moments, but none of them satisfies all filters."
      : "No moment of the index answers this." }),
  ];
  if (filtered) {
    const button = element("button", { type: "button", className: "solid", textContent: "Remove the filters" });
    button.addEventListener("click", resetFilters);
    parts.push(element("p", {}, button));
  } else {
    parts.push(element("p", { textContent: "Try other words, fewer of them, or a picture." }));
  }
  const lacks = status && lackingNote(status);
  if (lacks) parts.push(lacks);
  empty.replaceChildren(...parts);
}

async function more() {
  const { signal } = searching;
  const first = segments.length;
  moreButton.disabled = true;
  try {
    const found = await json("v1/search", { body: { ...toBody(query), limit: LIMIT, cursor }, signal });
    if (signal.aborted) return;
    segments = [...segments, ...found.segments];
    cursor = found.cursor;
    results.append(...found.segments.map((segment) => cardOf(segment)));
    if (found.partial) sayPartial(found);
    showCount();
    showHidden(found);
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Problem)) throw error;
    say(error.message, "", ["Search again", search]);
  } finally {
    moreButton.disabled = false;
    moreButton.hidden = cursor === null;
  }
  const next = results.children[first];
  if (next && document.activeElement === document.body) focusCard(next);
}
moreButton.addEventListener("click", more);

// What cards and the player ask for.

function play(at) {
  openPlayer({
    get segments() { return segments; },
    get best() { return best(); },
    query: lookedFor(query),
    hasMore: () => cursor !== null,
    more,
    onLike: moreLike,
    onOnly: (segment) => {
      query.where.video = segment.video;
      changed();
    },
    onClose: (place) => {
      const card = results.children[place];
      if (card) focusCard(card);
    },
  }, at);
}

const exampleOf = (segment, weight) =>
  ({ video_id: segment.video_id, at_s: segment.best_s, weight });

function moreLike(segment) {
  query.text = input.value = "";
  query.terms = [exampleOf(segment, 1)];
  changed();
  window.scrollTo({ top: 0 });
}

function addExample(segment, weight) {
  query.terms.push(exampleOf(segment, weight));
  changed();
  window.scrollTo({ top: 0 });
  if (weight > 0) input.focus();
}

moveByKeys(results, () => input.focus());

for (const button of find("export").querySelectorAll("button")) {
  button.addEventListener("click", async () => {
    find("export").open = false;
    try {
      const response = await call(`v1/search?format=${button.value}`, {
        body: { ...toBody(query), limit: Math.min(100, Math.max(LIMIT, segments.length)) },
      });
      const address = URL.createObjectURL(await response.blob());
      element("a", { href: address, download: `moments.${button.value}` }).click();
      setTimeout(() => URL.revokeObjectURL(address), 60_000);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      say(error.message, "");
    }
  });
}
document.addEventListener("click", (event) => {
  if (!find("export").contains(event.target)) find("export").open = false;
});

// Typing.

/** Another sentence begins without its weak matches. */
function takeText() {
  const text = input.value.trim();
  if (text !== query.text) query.weak = false;
  query.text = text;
}

input.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => {
    takeText();
    changed({ typed: true });
  }, DEBOUNCE_MS);
});

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  takeText();
  changed({ typed: true });
  draft = 0;
  if (matchMedia("(pointer: coarse)").matches) input.blur();
});

input.addEventListener("keydown", (event) => {
  if (event.key !== "ArrowDown" || !results.children.length) return;
  event.preventDefault();
  focusCard(results.firstElementChild);
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.target.closest("input, select, textarea, dialog")) return;
  event.preventDefault();
  input.focus();
  input.select();
});

const adder = find("add");
const added = find("added");
let addedWeight = 1;

function openAdder(weight) {
  addedWeight = weight;
  adder.classList.toggle("against", weight < 0);
  adder.querySelector(".sign").textContent = weight < 0 ? "−" : "+";
  added.placeholder = weight < 0 ? "without what?" : "and what else?";
  added.value = "";
  adder.hidden = false;
  added.focus();
}

function takeAdded() {
  const text = added.value.trim();
  added.value = "";
  adder.hidden = true;
  if (!text) return;
  query.terms.push({ text, weight: addedWeight });
  changed();
}

find("add-plus").addEventListener("click", () => openAdder(1));
find("add-minus").addEventListener("click", () => openAdder(AGAINST));
adder.addEventListener("submit", (event) => {
  event.preventDefault();
  takeAdded();
  input.focus();
});
added.addEventListener("blur", takeAdded);
added.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  added.value = "";
  input.focus();
});

find("clear").addEventListener("click", () => {
  query = emptyQuery();
  input.value = "";
  changed();
  input.focus();
});

acceptPictures(find("file"), find("drop"), async (files) => {
  for (const file of files) {
    try {
      query.terms.push({ image: await smallJpeg(file), weight: 1 });
    } catch {
      say(`This browser cannot read ${file.name || "the picture"}: try a JPEG, PNG or WebP file.`, "");
      return;
    }
  }
  changed();
}, (words) => say(words, ""));

// Filters.

filtersButton.addEventListener("click", (event) => {
  filters.hidden = !filters.hidden;
  filtersButton.setAttribute("aria-expanded", !filters.hidden);
  if (!filters.hidden && event.detail === 0) filters.elements.path.focus(); // pressed by a key
});

function closeFilters() {
  filters.hidden = true;
  filtersButton.setAttribute("aria-expanded", "false");
}

filters.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  closeFilters();
  filtersButton.focus();
});

filters.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!readFilters()) return;
  closeFilters();
  filtersButton.focus();
});

filters.addEventListener("change", readFilters);

filters.addEventListener("reset", (event) => {
  event.preventDefault();
  resetFilters();
});

function resetFilters() {
  const { where, min_score: none } = emptyQuery();
  query.where = where;
  query.min_score = none;
  fillFilters();
  changed();
}

/** Takes the filters over, unless one of them is not understood, which is then said beside it. */
function readFilters() {
  const fields = filters.elements;
  const fromS = understood(fields.from_s, seconds, "Write seconds, or minutes and seconds: 90 or 1:30.");
  const toS = understood(fields.to_s, seconds, "Write seconds, or minutes and seconds: 90 or 1:30.");
  const least = understood(fields.min_score, number, "Write a number between −1 and 1.");
  if (!filters.reportValidity()) return false;
  const { where } = query;
  where.path = fields.path.value.trim();
  where.after = isoOf(fields.after.value);
  where.before = isoOf(fields.before.value);
  where.from_s = fromS;
  where.to_s = toS;
  where.tags = Object.fromEntries([...find("tags").querySelectorAll("select")]
    .filter((select) => select.value).map((select) => [select.name, select.value]));
  query.min_score = least;
  changed();
  return true;
}

function understood(field, read, sentence) {
  const value = read(field.value);
  field.setCustomValidity(Number.isNaN(value) ? sentence : "");
  return value;
}

function fillFilters() {
  const { where } = query;
  const fields = filters.elements;
  fields.path.value = where.path;
  fields.after.value = localOf(where.after);
  fields.before.value = localOf(where.before);
  fields.from_s.value = where.from_s === null ? "" : clock(where.from_s);
  fields.to_s.value = where.to_s === null ? "" : clock(where.to_s);
  fields.min_score.value = query.min_score ?? "";
  for (const select of find("tags").querySelectorAll("select")) {
    select.value = where.tags[select.name] ?? "";
  }
}

function isoOf(local) {
  return local ? new Date(local).toISOString() : "";
}

function localOf(iso) {
  if (!iso) return "";
  const date = new Date(iso);
  return new Date(date - date.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
}

function showTags(tags) {
  find("tags").replaceChildren(...Object.entries(tags).map(([name, values]) => {
    const select = element("select", { name }, element("option", { value: "", textContent: "any" }),
      ...values.map((value) => element("option", { value, textContent: value })));
    return element("label", { textContent: name }, select);
  }));
  fillFilters();
}

// Where to begin.

async function greet() {
  for (const sentence of EXAMPLES) {
    const link = element("a", { href: `?${new URLSearchParams({ q: sentence })}`, textContent: sentence });
    link.addEventListener("click", (event) => {
      event.preventDefault();
      query.text = input.value = sentence;
      changed();
    });
    find("examples").append(" ", link);
  }
  try {
    status = await json("v1/status");
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (isEmpty(query)) say(error.message, "", ["Try again", () => location.reload()]);
    return;
  }
  find("coverage").replaceChildren(searchable(status));
  const lacks = lackingNote(status);
  if (lacks) find("coverage").after(lacks);
  showTags(status.tags ?? {});
  if (answer) showEmpty();
  if (isEmpty(query)) await showSamples();
}

async function showSamples() {
  const { videos } = await json(`v1/videos?status=indexed&limit=${SAMPLES}`);
  const found = videos.filter((video) => video.in_index && video.duration_s);
  find("samples").replaceChildren(...found.map((video) => {
    const segment = { video_id: video.video_id, best_s: Math.floor(video.duration_s / 2) };
    const button = element("button", { type: "button" }, element("img", {
      src: frameAt(segment.video_id, segment.best_s, 320), loading: "lazy", draggable: false,
      alt: `Moments like ${fileName(video.uri)} at ${clock(segment.best_s)}`,
    }));
    button.addEventListener("click", () => moreLike(segment));
    return element("li", {}, button);
  }));
  find("samples-part").hidden = !found.length;
}

window.addEventListener("popstate", restore);
restore();
greet();
