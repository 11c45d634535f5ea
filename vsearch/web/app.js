"use strict";

const form = document.getElementById("form");
const input = document.getElementById("query");
const note = document.getElementById("note");
const results = document.getElementById("results");
const card = document.getElementById("card");
let latest = 0;

function clock(seconds) {
  const total = Math.max(0, seconds);
  const hours = Math.floor(total / 3600);
  const minutes = Math.floor((total % 3600) / 60);
  const rest = (total % 60).toFixed(1);
  const pad = (value, width) => String(value).padStart(width, "0");
  return hours ? `${hours}:${pad(minutes, 2)}:${pad(rest, 4)}` : `${minutes}:${pad(rest, 4)}`;
}

function show(segment) {
  const item = card.content.cloneNode(true).firstElementChild;
  const video = item.querySelector("video");
  video.src = `v1/media/${segment.video_id}`;
  video.dataset.startS = segment.start_s;
  // The picture at rest is the strongest frame; playing starts where the moment starts, unless the
  // viewer has moved the playhead before.
  let seeks = 0;
  video.addEventListener("seeking", () => { seeks += 1; });
  video.addEventListener("loadedmetadata", () => { video.currentTime = segment.best_s; }, { once: true });
  video.addEventListener("play", () => {
    if (seeks <= 1) video.currentTime = segment.start_s;
  }, { once: true });
  const name = segment.video.split("/").pop();
  video.setAttribute("aria-label", `${name} at ${clock(segment.start_s)}`);
  item.querySelector(".time").textContent = `${clock(segment.start_s)} – ${clock(segment.end_s)}`;
  const meter = item.querySelector("meter");
  meter.value = Math.max(0, segment.score);
  meter.textContent = segment.score.toFixed(3);
  meter.title = `similarity ${segment.score.toFixed(3)}`;
  item.querySelector(".file").textContent = name;
  item.querySelector(".file").title = segment.video;
  item.querySelector(".recorded").textContent = new Date(segment.recorded_at).toLocaleString();
  results.append(item);
}

async function search(query) {
  const turn = ++latest;
  note.textContent = "Searching …";
  try {
    const response = await fetch(`v1/search?${new URLSearchParams({ q: query })}`);
    const answer = await response.json();
    if (turn !== latest) return;
    results.replaceChildren();
    if (!response.ok) {
      note.textContent = typeof answer.detail === "string" ? answer.detail : "The query was refused.";
      return;
    }
    answer.segments.forEach(show);
    note.textContent = `${answer.segments.length} moments in ${answer.took_ms.toFixed(0)} ms`;
  } catch {
    if (turn === latest) note.textContent = "The service cannot be reached.";
  }
}

async function greet() {
  try {
    const status = await (await fetch("v1/status")).json();
    note.textContent = `${status.videos} videos, ${status.rows.toLocaleString()} frames indexed. `
      + "Try a sentence about what can be seen.";
  } catch {
    note.textContent = "The service cannot be reached.";
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const query = input.value.trim();
  if (!query) return;
  history.replaceState(null, "", `?${new URLSearchParams({ q: query })}`);
  search(query);
});

const asked = new URLSearchParams(location.search).get("q");
if (asked) {
  input.value = asked;
  search(asked);
} else {
  greet();
}
