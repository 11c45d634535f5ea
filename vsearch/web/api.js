// Requests to the service: its problems in words, one more try where it asks for patience, and the key.

const MAX_WAIT_S = 60;

/** What the service refused, in a sentence. `status` is 0 if it cannot be reached. */
export class Problem extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** The answer of the service. Throws `Problem`, or AbortError when `signal` says so. `onWait(seconds)`
 * is called before the one repetition that a busy service asks for. */
export async function call(path, { body, signal, onWait = () => {} } = {}) {
  const options = { signal };
  if (body !== undefined) {
    options.method = "POST";
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  let response = await reach(path, options);
  const wait = Number(response.headers.get("Retry-After"));
  if ([429, 503].includes(response.status) && wait > 0 && wait <= MAX_WAIT_S) {
    onWait(wait);
    await pause(wait * 1000, signal);
    response = await reach(path, options);
  }
  if (!response.ok) throw await problem(response);
  return response;
}

export async function json(path, options) {
  return (await call(path, options)).json();
}

async function reach(path, options) {
  for (;;) {
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem(0, "The service cannot be reached. Is the connection there?");
    }
    if (response.status !== 401) return response;
    if (!(await unlock())) throw new Problem(401, "This archive is locked: a key is needed to search it.");
    options.signal?.throwIfAborted();
  }
}

const WORDS = {
  404: "That is not there (any more).",
  410: "The index has changed since: search again.",
  413: "That is too large.",
  422: "The service did not understand the query.",
  429: "The service is busy: try again in a moment.",
  503: "The service cannot answer just now: try again in a moment.",
};

async function problem(response) {
  let detail;
  try {
    ({ detail } = await response.json());
  } catch {
    // A proxy in between answers in a form of its own; the status says enough.
  }
  const known = WORDS[response.status] ?? `The service failed (${response.status}).`;
  return new Problem(response.status, typeof detail === "string" && detail ? detail : known);
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, ms);
    signal?.addEventListener("abort", stop, { once: true });
  });
}

const dialog = document.getElementById("key");
const form = document.getElementById("key-form");
const input = document.getElementById("key-input");
const note = document.getElementById("key-note");
const logout = document.getElementById("logout");
logout.hidden = !localStorage.getItem("signed-in");  // the cookie itself is out of a script's sight
let asking = null;

/** Asks for the key, once for all who wait; tells whether the archive is open now. */
function unlock() {
  asking ??= new Promise((resolve) => {
    note.textContent = "";
    dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      asking = null;
      input.value = "";
      resolve(dialog.returnValue === "open");
    }, { once: true });
  });
  return asking;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  note.textContent = "";
  try {
    const response = await fetch("v1/login", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ key: input.value }),
    });
    if (response.ok) {
      localStorage.setItem("signed-in", "yes");
      logout.hidden = false;
      dialog.close("open");
      return;
    }
    note.textContent = response.status === 401
      ? "That key does not fit. Try again."
      : (await problem(response)).message;
  } catch {
    note.textContent = "The service cannot be reached. Is the connection there?";
  }
  input.select();
});

document.getElementById("key-cancel").addEventListener("click", () => dialog.close());

logout.addEventListener("click", async () => {
  await fetch("v1/logout", { method: "POST" });
  localStorage.removeItem("signed-in");
  location.assign("./");
});

export const frameAt = (videoId, atS, width) =>
  `v1/videos/${videoId}/frame?at_s=${round(atS)}&width=${width}`;
export const mediaOf = (videoId) => `v1/videos/${videoId}/media`;
export const clipOf = (videoId, startS, endS) =>
  `v1/videos/${videoId}/clip?start_s=${round(startS)}&end_s=${round(endS)}`;

function round(value) {
  return String(Math.round(value * 1e6) / 1e6);
}
