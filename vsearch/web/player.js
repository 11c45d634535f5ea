// The player: a moment in its video, above a timeline of how similar all of that video is to the query.

import { Problem, call, clipOf, frameAt, json, mediaOf } from "./api.js";
import { clock, element, fileName, when } from "./text.js";

const BUCKETS = 400;
const CLIP_S = 20;
const MAX_CLIP_S = 59.9; // the service gives 60, whatever rounding adds
const NEAR_S = 0.05;
const HINT_STEPS = 100;

const find = (id) => document.getElementById(id);
const dialog = find("player");
const video = find("video");
const note = find("player-note");
const slider = find("timeline");
const canvas = find("curve");
const hint = find("hint");
const band = element("span", { className: "band" });
const head = element("span", { className: "head" });
const others = element("span", { className: "others" });
const hintPicture = element("img", { alt: "", width: 128 });
const hintText = element("span");
slider.append(others, band, head);
hint.append(hintPicture, hintText);

let list = null; // { segments, best, hasMore(), more(), query, onLike, onOnly, onClose }
let place = 0;
let segment = null;
let details = null; // of the video, once they are there
let scores = null; // the timeline, once it is there
let clip = null; // { startS, endS } while a preview stands in for the file
let pendingS = null; // where to go as soon as the source can seek
let turn = 0; // answers for a moment that is no longer shown are dropped
let loading = new AbortController();

/** Shows the moment number `at` of a list; `onClose(place)` is told the last one that was shown. */
export function openPlayer(moments, at) {
  list = moments;
  show(at);
  if (!dialog.open) dialog.showModal();
}

function show(at) {
  place = at;
  segment = list.segments[at];
  turn += 1;
  loading.abort();
  loading = new AbortController();
  details = scores = null;
  const name = fileName(segment.video);
  find("player-name").textContent = name;
  find("player-name").title = segment.video;
  find("player-place").textContent = `${at + 1} of ${list.segments.length}${list.hasMore() ? "+" : ""}`;
  find("player-back").disabled = at === 0;
  find("player-next").disabled = at === list.segments.length - 1 && !list.hasMore();
  find("player-save").href = mediaOf(segment.video_id);
  find("player-save").download = name;
  video.setAttribute("aria-label", `${name} from ${clock(segment.start_s)}`);
  video.poster = frameAt(segment.video_id, segment.start_s, 640);
  showFacts();
  say("");
  playFile();
  draw();
  fetchTimeline(turn);
  fetchDetails(turn);
}

function showFacts() {
  const facts = [
    ["Moment", `${clock(segment.start_s)} – ${clock(segment.end_s)}`],
    ["Score", segment.score.toFixed(3)],
    ["Recorded", when(segment.recorded_at, true)],
    ["File", segment.video],
  ];
  if (details) {
    for (const [name, value] of Object.entries(details.tags ?? {})) facts.push([name, value]);
    if (details.copies?.length) facts.push(["Also at", details.copies.join("\n")]);
    if (details.status !== "indexed" && details.reason) facts.push(["Not in full", details.reason]);
  }
  find("facts").replaceChildren(...facts.map(([name, value]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
}

async function fetchTimeline(mine) {
  try {
    const answer = await json(`v1/videos/${segment.video_id}/timeline?buckets=${BUCKETS}`,
      { body: list.query, signal: loading.signal });
    if (mine !== turn) return;
    scores = answer;
    draw();
  } catch (error) {
    if (mine === turn && error instanceof Problem) say(`The timeline is missing: ${error.message}`);
  }
}

async function fetchDetails(mine) {
  try {
    const answer = await json(`v1/videos/${segment.video_id}`, { signal: loading.signal });
    if (mine !== turn) return;
    details = answer;
    showFacts();
    draw();
  } catch (error) {
    if (mine === turn && error instanceof Problem) say(`Details are missing: ${error.message}`);
  }
}

function say(text) {
  note.textContent = text;
  note.hidden = !text;
}

// Playing: the file itself, or, where the browser cannot play it, previews of a part of it.

function playFile() {
  clip = null;
  pendingS = segment.start_s;
  video.src = mediaOf(segment.video_id);
}

function playClip(fromS) {
  const endS = Math.max(fromS + CLIP_S, inMoment(fromS) ? segment.end_s : 0);
  clip = { startS: fromS, endS: Math.min(endS, fromS + MAX_CLIP_S, durationS() || Infinity) };
  pendingS = fromS;
  video.src = clipOf(segment.video_id, clip.startS, clip.endS);
}

const inMoment = (atS) => segment.start_s <= atS && atS < segment.end_s;

function nowS() {
  return pendingS ?? (clip ? clip.startS : 0) + video.currentTime;
}

/** Goes to a time of the whole video. */
function seek(atS) {
  const toS = Math.min(Math.max(0, atS), Math.max(0, durationS() - NEAR_S));
  if (clip && (toS < clip.startS || toS >= clip.endS)) playClip(toS);
  else if (pendingS !== null) pendingS = toS;
  else video.currentTime = toS - (clip ? clip.startS : 0);
  moveHead();
}

function durationS() {
  if (!clip && Number.isFinite(video.duration) && video.duration > 0) return video.duration;
  if (scores) return scores.start_s + scores.step_s * scores.scores.length;
  return details?.duration_s ?? segment?.end_s ?? 0;
}

async function play() {
  try {
    await video.play();
  } catch {
    // Refused (the controls are there) or replaced by another source; what is broken is an error event.
  }
}

function toggle() {
  if (video.paused) play();
  else video.pause();
}

video.addEventListener("loadedmetadata", () => {
  if (!clip && !video.videoWidth) {
    fallBack();
    return;
  }
  const toS = pendingS;
  pendingS = null;
  if (toS !== null) video.currentTime = toS - (clip ? clip.startS : 0);
  draw();
  play();
});

video.addEventListener("error", () => {
  if (!dialog.open || !video.getAttribute("src")) return;
  if (clip) giveUp(turn);
  else fallBack();
});

function fallBack() {
  say("This browser cannot play the file itself: a small preview without sound is shown.");
  playClip(nowS());
}

async function giveUp(mine) {
  let why = "";
  try {
    await call(clipOf(segment.video_id, clip.startS, clip.endS), { signal: loading.signal });
  } catch (error) {
    if (error instanceof Problem) why = ` ${error.message}`;
  }
  if (mine === turn) say(`Neither the file nor a preview of it can be played here.${why}`);
}

// A preview ends before its video does: the next one follows.
video.addEventListener("ended", () => {
  if (clip && clip.endS < durationS() - NEAR_S) playClip(clip.endS);
});

const loop = find("player-loop");
loop.addEventListener("click", () => {
  const on = loop.getAttribute("aria-pressed") !== "true";
  loop.setAttribute("aria-pressed", on);
  if (on && !inMoment(nowS())) seek(segment.start_s);
});

function follow() {
  moveHead();
  const looping = loop.getAttribute("aria-pressed") === "true";
  if (looping && !video.paused && pendingS === null && nowS() >= segment.end_s) seek(segment.start_s);
  if (!video.paused && dialog.open) requestAnimationFrame(follow);
}
video.addEventListener("playing", () => requestAnimationFrame(follow));
for (const name of ["timeupdate", "seeked", "pause"]) video.addEventListener(name, moveHead);

// The timeline.

function moveHead() {
  if (!segment) return;
  const atS = nowS();
  const endS = durationS();
  head.style.left = `${percent(atS)}%`;
  slider.setAttribute("aria-valuemax", endS.toFixed(1));
  slider.setAttribute("aria-valuenow", atS.toFixed(1));
  slider.setAttribute("aria-valuetext", `${clock(atS)} of ${clock(endS)}${likeness(atS)}`);
}

function percent(atS) {
  const endS = durationS();
  return endS ? Math.min(100, Math.max(0, (atS / endS) * 100)) : 0;
}

function scoreAt(atS) {
  if (!scores) return undefined;
  return scores.scores[Math.floor((atS - scores.start_s) / scores.step_s)] ?? null;
}

function likeness(atS) {
  const score = scoreAt(atS);
  if (score === undefined) return "";
  return score === null ? ", not indexed" : `, similarity ${score.toFixed(2)}`;
}

function stretch(mark, startS, endS) {
  mark.style.left = `${percent(startS)}%`;
  mark.style.width = `${percent(endS) - percent(startS)}%`;
}

function draw() {
  if (!segment) return;
  stretch(band, segment.start_s, segment.end_s);
  others.replaceChildren(...list.segments
    .filter((other) => other.video_id === segment.video_id && other !== segment)
    .map((other) => {
      const mark = element("span");
      stretch(mark, other.start_s, other.end_s);
      return mark;
    }));
  moveHead();
  drawCurve();
}

function drawCurve() {
  const { clientWidth: width, clientHeight: height } = canvas;
  const scale = window.devicePixelRatio;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  if (!scores || !width) return;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const { color: curveColour, borderTopColor: gapColour } = getComputedStyle(canvas);
  const { start_s: startS, step_s: stepS, scores: values, background } = scores;
  const known = values.filter((value) => value !== null);
  const best = Math.max(list.best, ...known);
  const endS = durationS();
  const x = (atS) => (atS / endS) * width;
  const missing = values
    .map((value, n) => [startS + n * stepS, startS + (n + 1) * stepS, value])
    .filter(([, , value]) => value === null);
  hatch(context, [...missing, ...(details?.gaps ?? [])].map(([a, b]) => [x(a), x(b)]), height, gapColour);
  context.fillStyle = curveColour;
  values.forEach((value, n) => {
    if (value === null) return;
    const share = best > background ? Math.max(0, (value - background) / (best - background)) : 0;
    const tall = 2 + Math.min(1, share) * (height - 8);
    const left = x(startS + n * stepS);
    context.fillRect(left, height - tall, Math.max(1, x(startS + (n + 1) * stepS) - left + 0.3), tall);
  });
}

/** Slanted lines over the stretches from left to right, which says 'nothing is here' without colour. */
function hatch(context, stretches, height, colour) {
  if (!stretches.length) return;
  context.save();
  context.beginPath();
  for (const [left, right] of stretches) context.rect(left, 0, Math.max(1, right - left), height);
  context.clip();
  context.strokeStyle = colour;
  context.lineWidth = 1.5;
  context.beginPath();
  for (let x = -height; x < canvas.clientWidth; x += 7) {
    context.moveTo(x, height);
    context.lineTo(x + height, 0);
  }
  context.stroke();
  context.restore();
}

new ResizeObserver(draw).observe(canvas);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

function pointed(event) {
  const box = canvas.getBoundingClientRect();
  return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
}

slider.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  slider.setPointerCapture(event.pointerId);
  seek(pointed(event) * durationS());
});

slider.addEventListener("pointermove", (event) => {
  const share = pointed(event);
  if (slider.hasPointerCapture(event.pointerId)) seek(share * durationS());
  if (event.pointerType !== "mouse") return;
  const atS = share * durationS();
  hint.hidden = false;
  hint.style.left = `${share * 100}%`;
  hintText.textContent = clock(atS) + likeness(atS);
  const step = Math.floor(share * HINT_STEPS);
  const address = frameAt(segment.video_id, ((step + 0.5) / HINT_STEPS) * durationS(), 160);
  clearTimeout(hint.dwell);
  hint.dwell = setTimeout(() => { hintPicture.src = address; }, 60);
});

slider.addEventListener("pointerleave", () => {
  clearTimeout(hint.dwell);
  hint.hidden = true;
});

slider.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const step = event.shiftKey ? 0.1 : 1;
  const far = Math.max(5, durationS() / 10);
  const to = {
    ArrowLeft: () => nowS() - step,
    ArrowDown: () => nowS() - step,
    ArrowRight: () => nowS() + step,
    ArrowUp: () => nowS() + step,
    PageDown: () => nowS() - far,
    PageUp: () => nowS() + far,
    Home: () => 0,
    End: () => durationS(),
  }[event.key];
  if (!to) return;
  event.preventDefault();
  seek(to());
});

// The dialog.

async function step(by) {
  const to = place + by;
  if (to === list.segments.length && list.hasMore()) await list.more();
  if (to >= 0 && to < list.segments.length) show(to);
}
find("player-back").addEventListener("click", () => step(-1));
find("player-next").addEventListener("click", () => step(1));
find("player-close").addEventListener("click", () => dialog.close());

find("player-like").addEventListener("click", () => {
  dialog.close();
  list.onLike(segment);
});
find("player-only").addEventListener("click", () => {
  dialog.close();
  list.onOnly(segment);
});

dialog.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const own = event.target.closest("button, a, video");
  if (event.key === " " && !own) {
    event.preventDefault();
    toggle();
  }
  if (event.key === "n") step(1);
  if (event.key === "p") step(-1);
});

dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close(); // the backdrop: all else lies in children
});

dialog.addEventListener("close", () => {
  turn += 1;
  loading.abort();
  video.pause();
  video.removeAttribute("src");
  video.load();
  list.onClose(place);
});
