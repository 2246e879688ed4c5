// The page: photos come in, captions come out word by word, and a word shows where the model looked.

import { drawVeil, photoShare } from "./attention.js";
import { Captioner } from "./captioner.js";
import { droppedFiles, photosOf, takePhoto } from "./files.js";
import { Service } from "./service.js";
import { has, say, switchLanguage, translate } from "./text.js";

const MOST_PHOTOS = 300; // shown at once
const WORD_MILLISECONDS = 220; // between two words as they appear
const STRONG_EVIDENCE = 2; // nats, from which a word is as dark as it gets; at 0 and below it is as pale as it gets
const $ = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");

const album = []; // {file, url, result, error}: result is that of Captioner.caption
let shown = -1; // index of the photo that is shown
let chosen = 0; // which of its captions
let reveal = 0; // number of the caption that is shown; older ones stop appearing
let state = { progress: null }; // the last report of the captioner
const description = await readDescription();
const device = new URLSearchParams(location.search).get("device"); // gpu or cpu, to try what is not chosen
if (description.service) $("privacy").dataset.text = "sent";
const captioner = description.service ? new Service(description.service, report) : new Captioner(device, report);

// ---- the model

/** description.json; an empty one where it cannot be read, which the captioner reports. */
async function readDescription() {
  try {
    return await (await fetch("model/description.json")).json();
  } catch {
    return {};
  }
}

function report(news) {
  state = news;
  $("loading").hidden = !news.progress;
  $("problem").hidden = !news.failed;
  if (news.progress) {
    const { loaded, total } = news.progress;
    $("progress").max = total;
    $("progress").value = loaded;
    $("progress-text").textContent = loaded < total ? say("loading", megabytes(news.progress)) : say("preparing");
  }
  if (news.failed) showProblem(say("failed", { problem: news.failed }));
  showFooter();
}

const megabytes = ({ loaded, total }) => ({ loaded: Math.round(loaded / 1e6), total: Math.round(total / 1e6) });

function showFooter() {
  const parts = [description.run, description.decoder, description.encoder].filter(Boolean);
  const { ready } = state;
  if (ready) parts.push(say(ready.problem ? "gpuFailed" : ready.device, ready));
  const result = album[shown]?.result;
  if (result) parts.push(say("seconds", { seconds: result.seconds.toFixed(2) }));
  $("about").textContent = parts.join(" · ");
}

function showProblem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

// ---- the album

/** Adds photos, shows the first of them, and captions all. */
function add(files) {
  showProblem(files.length ? "" : say("noPhotos"));
  if (!files.length) return;
  const room = Math.max(0, MOST_PHOTOS - album.length);
  if (files.length > room) showProblem(say("tooMany", { most: MOST_PHOTOS, count: album.length + files.length }));
  const first = album.length;
  for (const file of files.slice(0, room)) {
    const photo = { file, url: URL.createObjectURL(file) };
    album.push(photo);
    $("strip").append(thumbnail(photo, album.length - 1));
    caption(photo, album.length - 1);
  }
  if (first < album.length) show(first);
}

async function caption(photo, index) {
  try {
    photo.result = await captioner.caption(photo.file);
  } catch (error) {
    photo.error = error.message;
  }
  label(photo);
  if (index === shown) show(index);
}

function thumbnail(photo, index) {
  photo.button = document.createElement("button");
  photo.image = document.createElement("img");
  Object.assign(photo.image, { src: photo.url, loading: "lazy", decoding: "async", alt: photo.file.name });
  photo.button.append(photo.image);
  photo.button.onclick = () => show(index);
  const item = document.createElement("li");
  item.append(photo.button);
  return item;
}

/** Names the thumbnail of a photo by its caption. */
function label(photo) {
  const text = photo.error ? problemOf(photo) : textOf(photo.result.captions[0]);
  photo.image.alt = photo.button.title = text;
  photo.button.classList.toggle("failed", Boolean(photo.error));
  photo.button.classList.add("done");
  if (photo.result) photo.button.dataset.seconds = photo.result.seconds;
}

const textOf = ({ words }) => words.join(description.joined_by);

function problemOf({ file, error }) {
  return has(error) ? say(error, { name: file.name }) : say("error", { name: file.name, problem: error });
}

// ---- the photo that is shown

function show(index) {
  shown = index;
  chosen = 0;
  const photo = album[index];
  $("welcome").hidden = true;
  $("viewer").hidden = false;
  document.body.classList.add("viewing");
  $("strip").hidden = album.length < 2;
  album.forEach(({ button }, i) => button.toggleAttribute("aria-current", i === index));
  $("stage").hidden = Boolean(photo.error);
  bringIntoSight(photo.button);
  $("photo").src = photo.url;
  $("photo").onload = () => $("frame").style.setProperty("--ratio", $("photo").naturalWidth / $("photo").naturalHeight);
  showCaption();
}

/** Brings the thumbnail into sight within the strip, and the photo within the page. */
function bringIntoSight(button) {
  const strip = $("strip").getBoundingClientRect();
  const { left, right } = button.getBoundingClientRect();
  $("strip").scrollLeft += Math.min(0, left - strip.left) + Math.max(0, right - strip.right);
  $(album[shown].error ? "says" : "stage").scrollIntoView({ block: "nearest" });
}

function showCaption() {
  const photo = album[shown];
  hideVeil();
  $("hint").textContent = $("trust").textContent = "";
  $("alternatives").replaceChildren();
  $("others").hidden = true;
  $("caption").classList.toggle("waiting", !photo.result && !photo.error);
  showFooter();
  $("caption").classList.remove("complete");
  reveal++; // stops the words of another photo
  if (photo.error) $("caption").textContent = problemOf(photo);
  else if (!photo.result) $("caption").textContent = say("waiting");
  else showWords(photo.result.captions, reveal);
}

/** Lets the words appear, one after another. number: that of this call; a later one ends this one. */
async function showWords(captions, number) {
  const { words, attention, evidence, finished, probability } = captions[chosen];
  const buttons = words.map((word, i) => wordButton(word, attention?.[i], evidence?.[i]));
  $("caption").classList.toggle("spaced", description.joined_by === " ");
  $("caption").ariaLabel = textOf(captions[chosen]);
  $("caption").replaceChildren(...buttons);
  for (const [i, button] of buttons.entries()) {
    if (still.matches) break;
    button.classList.add("appearing");
    if (attention) look(attention[i]);
    await new Promise((resolve) => setTimeout(resolve, WORD_MILLISECONDS));
    if (number !== reveal) return;
  }
  $("caption").classList.add("complete");
  hideVeil();
  const hints = [say(attention ? "point" : "noAttention")];
  if (evidence) hints.push(say("pale"));
  if (!finished) hints.push(say("unfinished"));
  $("hint").textContent = hints.join("\n");
  showProbability(probability);
  showAlternatives(captions);
}

/** Says how probable it is that the caption is good, if that is known. */
function showProbability(probability) {
  if (probability === undefined) return;
  $("trust").dataset.probability = probability;
  $("trust").textContent = say("probability", { percent: Math.round(100 * probability) });
  $("trust").title = say("good", { cider: description.trust.probability.good });
}

function wordButton(word, attention, evidence) {
  const button = document.createElement("button");
  button.textContent = word;
  button.className = "word";
  if (evidence !== undefined) {
    const strength = Math.min(Math.max(evidence / STRONG_EVIDENCE, 0), 1);
    button.style.setProperty("--evidence", `${100 * strength}%`);
    button.dataset.evidence = evidence;
  }
  if (!attention && evidence === undefined) {
    button.disabled = true;
    return button;
  }
  if (attention && description.has_sentinel) {
    button.classList.add("shared");
    button.style.setProperty("--photo", `${100 * photoShare(attention)}%`);
  }
  button.onpointerenter = button.onfocus = button.onclick = () => point(button, word, attention, evidence);
  button.onpointerleave = button.onblur = hideVeil;
  return button;
}

/** Shows where a word looked, and where it came from. */
function point(button, word, attention, evidence) {
  if (attention) look(attention);
  for (const other of document.querySelectorAll(".word")) other.classList.toggle("looking", other === button);
  const hints = [];
  if (attention && description.has_sentinel) {
    const photo = Math.round(100 * photoShare(attention));
    hints.push(say("sentinel", { photo, language: 100 - photo }));
  }
  if (evidence !== undefined) {
    const sign = evidence < 0 ? "−" : "+";
    const values = { evidence: sign + Math.abs(evidence).toFixed(1), times: twoDigits(Math.exp(evidence)) };
    hints.push(say("evidence", values));
  }
  if (hints.length) $("hint").textContent = say("word", { word, hints: hints.join("\n") });
}

const twoDigits = (value) => (value < 99 ? value.toPrecision(2) : Number(value.toPrecision(2)).toLocaleString());

/** Lights the photo where a word looked. */
function look(attention) {
  drawVeil($("veil"), attention, description.grid);
  $("veil").classList.add("visible");
}

function hideVeil() {
  $("veil").classList.remove("visible");
  for (const word of document.querySelectorAll(".looking")) word.classList.remove("looking");
}

function showAlternatives(captions) {
  $("others").hidden = captions.length < 2;
  $("alternatives").replaceChildren(
    ...captions.map((item, i) => {
      const button = document.createElement("button");
      button.textContent = textOf(item);
      button.title = say("likely", { percent: percent(item.logProbability) });
      button.style.setProperty("--likely", `${100 * Math.exp(item.logProbability - captions[0].logProbability)}%`);
      button.toggleAttribute("aria-current", i === chosen);
      button.onclick = () => {
        chosen = i;
        showCaption();
      };
      const element = document.createElement("li");
      element.append(button);
      return element;
    }),
  );
}

const percent = (logProbability) => (100 * Math.exp(logProbability)).toPrecision(2);

// ---- where photos come from

$("choose-photos").onclick = $("welcome").onclick = () => $("photo-input").click();
$("choose-folder").onclick = () => $("folder-input").click();
$("photo-input").onchange = ({ target }) => addFrom(target, [...target.files]);
$("folder-input").onchange = ({ target }) => addFrom(target, photosOf(target.files));
$("choose-folder").hidden = !("webkitdirectory" in HTMLInputElement.prototype);

function addFrom(input, files) {
  add(files);
  input.value = ""; // so that the same photo can be chosen again
}

$("open-camera").onclick = async () => {
  try {
    const photo = await takePhoto($("camera"));
    if (photo) add([photo]);
  } catch (error) {
    showProblem(say("noCamera", { problem: error.message }));
  }
};

document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
};
document.ondragleave = (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
};
document.ondrop = async (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  add(await droppedFiles(event.dataTransfer));
};
document.onpaste = (event) => {
  if (event.clipboardData.files.length) add([...event.clipboardData.files]);
};

// ---- the keyboard, and the language

/** The arrow keys move between the words of the caption, and between the photos of the strip. */
document.onkeydown = (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const list = document.activeElement?.closest("#caption, #strip");
  if (!step || !list) return;
  const buttons = [...list.querySelectorAll("button")];
  const next = buttons[buttons.indexOf(document.activeElement) + step];
  next?.focus();
  if (list.id === "strip") next?.click();
  event.preventDefault();
};

$("language").onclick = () => {
  switchLanguage();
  if (state.progress) report(state);
  showFooter();
  for (const photo of album) if (photo.error) label(photo);
  if (album[shown]) showCaption();
};

$("static").remove();
$("app").hidden = false;
translate();
showFooter();
