// What can be found and what cannot: the line at the foot, and the list of videos with their reasons.

import { Problem, json } from "./api.js";
import { count, element, fileName, hours } from "./text.js";

const PAGE = 50;
const MAX_PAGES = 20;

const find = (id) => document.getElementById(id);
const dialog = find("library");
const note = find("library-note");
const rows = find("library-list");
const moreButton = find("library-more");

const KINDS = [
  ["failed", "failed", "could not be read"],
  ["partial", "partial", "in part only"],
  ["pending", "pending", "still to be read"],
  ["not_in_index", "not in the index", "not yet in the index"],
];

/** "20 videos, 10 minutes are searchable." */
export function searchable(status) {
  return `${count(status.videos, "video")}, ${hours(status.hours)}, can be searched.`;
}

/** What is not searchable, as [kind, sentence] of each kind that there is. */
export function lacking(status) {
  return KINDS
    .filter(([kind]) => status.coverage?.[kind])
    .map(([kind, , words]) => [kind, `${count(status.coverage[kind], "video")} ${words}`]);
}

/** A paragraph that says what is not searchable, with a button that lists it; null if all is. */
export function lackingNote(status) {
  const parts = lacking(status);
  const missing = status.missing ?? [];
  if (!parts.length && !missing.length && !status.problem) return null;
  const said = element("p", { className: "lacking" });
  if (parts.length) {
    const show = element("button", { type: "button", className: "link", textContent: "Which, and why" });
    show.addEventListener("click", () => openLibrary(status, parts[0][0]));
    said.append(`Not found in full: ${parts.map(([, words]) => words).join(", ")}. `, show);
  }
  if (missing.length) said.append(` Not answering just now: ${missing.join(", ")}.`);
  if (status.problem) said.append(` A newer index is not in use: ${status.problem}`);
  return said;
}

let turn = 0;
let cursor = null;
let kind = "failed";

function openLibrary(status, first) {
  find("library-kinds").replaceChildren(...KINDS
    .filter(([name]) => status.coverage[name])
    .map(([name, label]) => {
      const button = element("button", { type: "button", value: name,
        textContent: `${label} ${status.coverage[name].toLocaleString()}` });
      button.addEventListener("click", () => choose(name));
      return button;
    }));
  dialog.showModal();
  choose(first);
}

function choose(name) {
  kind = name;
  cursor = null;
  rows.replaceChildren();
  for (const button of find("library-kinds").children) {
    button.setAttribute("aria-pressed", button.value === name);
  }
  load();
}

async function load() {
  const mine = ++turn;
  note.textContent = "Looking …";
  moreButton.hidden = true;
  try {
    const found = kind === "not_in_index" ? await outOfIndex() : await page(kind, cursor);
    if (mine !== turn) return;
    rows.append(...found.videos.map(row));
    cursor = found.cursor;
    note.textContent = `${count(rows.children.length, "video")} of ${found.total.toLocaleString()}`;
    moreButton.hidden = cursor === null;
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (mine === turn) note.textContent = error.message;
  }
}

function page(status, after) {
  const params = new URLSearchParams({ status, limit: PAGE });
  if (after !== null) params.set("cursor", after);
  return json(`v1/videos?${params}`);
}

/** Videos that are read but not yet in the index: the service lists them among the others. */
async function outOfIndex() {
  const videos = [];
  for (const status of ["indexed", "partial"]) {
    let after = null;
    for (let pages = 0; pages < MAX_PAGES; pages += 1) {
      const found = await page(status, after);
      videos.push(...found.videos.filter((video) => !video.in_index));
      after = found.cursor;
      if (after === null) break;
    }
  }
  return { videos, total: videos.length, cursor: null };
}

function row(video) {
  const name = element("strong", { textContent: fileName(video.uri), title: video.uri });
  const item = element("li", {}, name);
  const reason = video.reason ?? (video.in_index ? "" : "waits for the next build of the index");
  if (reason) item.append(element("span", { textContent: reason }));
  if (video.status === "partial" && video.expected_s) {
    const share = Math.round((video.indexed_s / video.expected_s) * 100);
    item.append(element("span", { className: "share", textContent: `${share} % of it can be found` }));
  }
  return item;
}

moreButton.addEventListener("click", load);
find("library-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
