// A card for a moment: its picture, through which the pointer scrubs, and what is known of it.

import { frameAt } from "./api.js";
import { clock, fileName, when } from "./text.js";

const template = document.getElementById("card");
const WIDTHS = [160, 320, 480, 640, 960];
const SCRUB_STEPS = 12;
const SCRUB_STEP_S = 0.2;
const DWELL_MS = 60;
const TRIES = 2;
const RETRY_MS = 1500;

/** `actions` are open, like, also and unlike, each called with the segment. */
export function makeCard(segment, widthPx, actions) {
  const card = template.content.cloneNode(true).firstElementChild;
  const part = (name) => card.querySelector(`.${name}`);
  const name = fileName(segment.video);
  const span = `${clock(segment.start_s)} – ${clock(segment.end_s)}`;
  const picture = card.querySelector("img");
  const width = frameWidth(widthPx);
  const still = frameAt(segment.video_id, segment.best_s, width);
  picture.addEventListener("load", () => fit(picture));
  let tries = 0;
  picture.addEventListener("error", () => {
    tries += 1;
    card.classList.toggle("without-picture", tries > TRIES);
    if (tries <= TRIES) setTimeout(() => { picture.src = still; }, tries * RETRY_MS); // it may be busy
  });
  picture.src = still;
  part("open").style.setProperty("--still", `url("${picture.src}")`);
  picture.alt = `${name} at ${clock(segment.best_s)}`;
  part("clock").textContent = span;
  part("open").setAttribute("aria-label", `Play ${name}, ${span}`);
  part("file").textContent = name;
  part("file").title = segment.video;
  part("when").textContent = when(segment.recorded_at);
  part("when").title = when(segment.recorded_at, true);
  for (const [action, run] of Object.entries(actions)) {
    part(action).addEventListener("click", () => run(segment));
  }
  scrub(part("open"), picture, part("scrub"), part("clock"), segment, width, still, span);
  return card;
}

/** A bar from the query's background (0) to its best answer (1). */
export function showStrength(card, { score, confidence }, background, best) {
  const share = best > background ? (score - background) / (best - background) : 0;
  const percent = Math.round(Math.min(1, Math.max(0, share)) * 100);
  const meter = card.querySelector(".meter");
  meter.setAttribute("aria-valuenow", percent);
  meter.setAttribute("aria-label", `Score ${score.toFixed(3)}, ${percent} % of the best`);
  meter.firstElementChild.style.width = `${percent}%`;
  card.querySelector(".score").textContent = score.toFixed(3);
  const known = confidence !== null && confidence !== undefined;
  card.querySelector(".score").title = known ? `confidence ${confidence.toFixed(2)}` : "";
}

function frameWidth(widthPx) {
  const wanted = widthPx * Math.min(2, window.devicePixelRatio);
  return WIDTHS.find((width) => width >= wanted) ?? WIDTHS.at(-1);
}

/** Fills the box, unless that would cut much away. */
function fit(picture) {
  const shape = picture.naturalWidth / picture.naturalHeight;
  const box = picture.clientWidth / picture.clientHeight || 1;
  picture.classList.toggle("whole", Math.min(shape / box, box / shape) < 0.7);
}

function scrub(area, picture, bar, label, segment, width, still, span) {
  const length = segment.end_s - segment.start_s;
  const steps = Math.max(1, Math.min(SCRUB_STEPS, Math.floor(length / SCRUB_STEP_S)));
  let wanted = null;
  let dwell = 0;

  function show(step) {
    if (step === wanted) return;
    wanted = step;
    const at = segment.start_s + ((step + 0.5) / steps) * length;
    const frame = new Image();
    frame.src = frameAt(segment.video_id, at, width);
    frame.decode().then(() => {
      if (wanted === step) picture.src = frame.src;
    }, () => {
      // A frame that cannot be had leaves the picture as it is.
    });
    label.textContent = clock(at);
  }

  area.addEventListener("pointermove", (event) => {
    if (event.pointerType !== "mouse") return;
    const box = area.getBoundingClientRect();
    const share = Math.min(0.999, Math.max(0, (event.clientX - box.left) / box.width));
    area.classList.add("scrubbing");
    bar.style.width = `${share * 100}%`;
    clearTimeout(dwell);
    dwell = setTimeout(show, DWELL_MS, Math.floor(share * steps));
  });
  area.addEventListener("pointerleave", () => {
    clearTimeout(dwell);
    wanted = null;
    area.classList.remove("scrubbing");
    picture.src = still;
    label.textContent = span;
  });
}

/** Arrow keys move the focus among the cards of a list as they lie on the screen; `leave` is called
 * above the first row. */
export function moveByKeys(list, leave) {
  list.addEventListener("keydown", (event) => {
    const card = event.target.closest(".card");
    if (!card || event.altKey || event.ctrlKey || event.metaKey) return;
    const to = neighbour(list, card, event.key);
    if (to === undefined) return;
    event.preventDefault();
    if (to) focusCard(to);
    else leave();
  });
}

export function focusCard(card) {
  card.querySelector(".open").focus();
  card.scrollIntoView({ block: "nearest" });
}

/** The card that a key leads to, null for out of the list, undefined for keys that do not move. */
function neighbour(list, card, key) {
  const cards = [...list.children];
  const place = cards.indexOf(card);
  const columns = cards.filter((other) => other.offsetTop === cards[0].offsetTop).length;
  const last = cards.length - 1;
  switch (key) {
    case "ArrowLeft": return cards[Math.max(0, place - 1)];
    case "ArrowRight": return cards[Math.min(last, place + 1)];
    case "ArrowUp": return cards[place - columns] ?? null;
    case "ArrowDown": return cards[Math.min(last, place + columns)];
    case "Home": return cards[0];
    case "End": return cards[last];
    default: return undefined;
  }
}
