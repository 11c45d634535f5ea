// Pictures to search by: chosen, dropped or pasted, and made small before they travel.

const LONGEST_PX = 1024;
const QUALITY = 0.9;

/** Calls `take(files)` with the pictures, and `refuse(sentence)` for what is none. */
export function acceptPictures(input, curtain, take, refuse) {
  const pass = (files) => {
    const pictures = [...files].filter((file) => file.type.startsWith("image/"));
    if (pictures.length) take(pictures);
    else if (files.length) refuse(`${files[0].name} is no picture: choose a JPEG, PNG, WebP or GIF file.`);
  };
  input.addEventListener("change", () => {
    pass(input.files);
    input.value = "";
  });

  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  let depth = 0;
  const lift = () => {
    depth = 0;
    curtain.hidden = true;
  };
  document.addEventListener("dragenter", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    depth += 1;
    curtain.hidden = false;
  });
  document.addEventListener("dragover", (event) => {
    if (carriesFiles(event)) event.preventDefault();
  });
  document.addEventListener("dragleave", (event) => {
    if (carriesFiles(event) && (depth -= 1) <= 0) lift();
  });
  document.addEventListener("drop", (event) => {
    lift();
    if (!carriesFiles(event)) return;
    event.preventDefault();
    pass(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => {
    const pictures = [...(event.clipboardData?.files ?? [])].filter((f) => f.type.startsWith("image/"));
    if (!pictures.length) return;
    event.preventDefault();
    take(pictures);
  });
}

/** base64 of a JPEG whose longer side is at most 1024 pixels, upright, on white. Throws what the
 * browser throws for a file that it cannot read. */
export async function smallJpeg(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, LONGEST_PX / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL("image/jpeg", QUALITY).split(",")[1];
}

export const pictureAddress = (base64) => `data:image/jpeg;base64,${base64}`;
