// Photos from the disk, the clipboard and the camera, as File objects.

const PHOTO_NAME = /\.(jpe?g|png|webp|gif|bmp|avif|heic|heif|tiff?)$/i;
const isPhoto = (file) => file.type.startsWith("image/") || PHOTO_NAME.test(file.name);

/** The photos of a folder, by name. */
export function photosOf(files) {
  const name = (file) => file.webkitRelativePath || file.name;
  const byName = (one, other) => name(one).localeCompare(name(other), undefined, { numeric: true });
  return [...files].filter(isPhoto).sort(byName);
}

/** The files of a drop; with folders, the photos in them. */
export async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean); // before any await
  if (!entries.some((entry) => entry.isDirectory)) return [...transfer.files];
  const files = [];
  for (const entry of entries) await collect(entry, files);
  return photosOf(files);
}

async function collect(entry, files) {
  if (entry.isFile) {
    files.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
    return;
  }
  const reader = entry.createReader();
  const read = () => new Promise((resolve, reject) => reader.readEntries(resolve, reject));
  for (let batch = await read(); batch.length; batch = await read()) {
    for (const child of batch) await collect(child, files);
  }
}

/**
 * Shows what the camera sees in a dialog -> the photo, or null if the dialog was closed. dialog: holds a <video> and
 * buttons of the values "take" and "close". Rejects where there is no camera, or no permission.
 */
export async function takePhoto(dialog) {
  if (!navigator.mediaDevices) throw new Error("https");
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: 1280 } });
  const video = dialog.querySelector("video");
  try {
    video.srcObject = stream;
    await video.play();
    dialog.returnValue = "close";
    dialog.showModal();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
    return dialog.returnValue === "take" ? await frameOf(video) : null;
  } finally {
    for (const track of stream.getTracks()) track.stop();
    video.srcObject = null;
  }
}

async function frameOf(video) {
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new File([await canvas.convertToBlob({ type: "image/png" })], "camera.png", { type: "image/png" });
}
