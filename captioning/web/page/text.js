// Everything the page says, in English and Chinese.

export const TEXT = {
  en: {
    title: "Kantu: photo captions",
    language: "中文",
    drop: "Drop a photo here",
    paste: "or paste one, or click to choose",
    photos: "Photos",
    folder: "Folder",
    camera: "Camera",
    take: "Take the photo",
    close: "Close",
    privacy: "Photos never leave this device.",
    sent: "Photos are sent to the server of this page, which keeps none.",
    loading: "Loading the model: {loaded} of {total} MB",
    preparing: "Preparing the model",
    waiting: "Looking…",
    point: "Point at a word to see where it looked.",
    noAttention: "This model has no attention: it sees the photo as a whole.",
    pale: "Pale words come from habit, not the photo.",
    word: "“{word}”: {hints}",
    sentinel: "{photo} % from the photo, {language} % from language alone",
    evidence: "evidence {evidence}: {times} times as likely with this photo as with an average one",
    probability: "Probability that this is a good caption: {percent} %",
    good: "Good: a CIDEr-D of {cider} or more with people's captions of the photo",
    unfinished: "The caption was cut off at the longest length.",
    alternatives: "What the search found",
    likely: "the model says exactly this with probability {percent} %",
    gpu: "WebGPU",
    server: "on the server: {name}",
    cpu: "WebAssembly, threads: {threads}",
    gpuFailed: "WebGPU failed ({problem}); WebAssembly, threads: {threads}",
    seconds: "{seconds} s a photo",
    unreadable: "{name} is not a photo that this browser can read. Try a JPEG, PNG or WebP file.",
    tooLarge: "{name} has more than 89 million pixels. Make it smaller and try again.",
    failed: "The model could not be loaded ({problem}). Reload the page; if that does not help, export it again.",
    error: "{name} could not be captioned ({problem}).",
    noPhotos: "There are no photos in it.",
    tooMany: "Showing the first {most} of {count} photos.",
    noCamera: "The camera cannot be used ({problem}). Allow it in the browser's settings, or choose a photo.",
  },
  zh: {
    title: "看图说话 Kantu",
    language: "English",
    drop: "把照片拖到这里",
    paste: "也可以粘贴，或点击选择",
    photos: "照片",
    folder: "文件夹",
    camera: "相机",
    take: "拍照",
    close: "关闭",
    privacy: "照片不会离开这台设备。",
    sent: "照片会发送到本页面的服务器，服务器不保存照片。",
    loading: "正在加载模型：{loaded} / {total} MB",
    preparing: "正在准备模型",
    waiting: "正在看图……",
    point: "指向一个词，看模型当时看的是哪里。",
    noAttention: "这个模型没有注意力，它看的是整张照片。",
    pale: "颜色浅的词出于语言习惯，而不是来自照片。",
    word: "“{word}”：{hints}",
    sentinel: "{photo}% 来自照片，{language}% 来自语言本身",
    evidence: "证据 {evidence}：看着这张照片时，它出现的可能性是看着平均照片时的 {times} 倍",
    probability: "这是一条好描述的概率：{percent}%",
    good: "好描述：与人为这张照片写的描述相比，CIDEr-D 不低于 {cider}",
    unfinished: "描述达到最大长度，被截断。",
    alternatives: "搜索到的描述",
    likely: "模型一字不差地这样说的概率：{percent}%",
    gpu: "WebGPU",
    server: "在服务器上：{name}",
    cpu: "WebAssembly，{threads} 个线程",
    gpuFailed: "WebGPU 无法使用（{problem}）；WebAssembly，{threads} 个线程",
    seconds: "每张照片 {seconds} 秒",
    unreadable: "浏览器无法读取 {name}，它可能不是照片。请换成 JPEG、PNG 或 WebP 文件。",
    tooLarge: "{name} 超过 8900 万像素，请缩小后再试。",
    failed: "模型无法加载（{problem}）。请刷新页面；如果仍然不行，请重新导出。",
    error: "{name} 无法生成描述（{problem}）。",
    noPhotos: "里面没有照片。",
    tooMany: "共 {count} 张照片，显示前 {most} 张。",
    noCamera: "无法使用相机（{problem}）。请在浏览器设置中允许，或者选择照片。",
  },
};

let language = /^zh/.test(navigator.language) ? "zh" : "en";

/** Whether there is a text with this key. */
export const has = (key) => key in TEXT.en;

/** The text with this key; {name} in it is replaced by values.name. */
export function say(key, values = {}) {
  return TEXT[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Writes the text of every element with data-text, and the label of every element with data-label. */
export function translate() {
  document.documentElement.lang = language;
  document.title = say("title");
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
  for (const element of document.querySelectorAll("[data-label]")) element.ariaLabel = say(element.dataset.label);
}

/** Switches between the two languages. */
export function switchLanguage() {
  language = language === "en" ? "zh" : "en";
  translate();
}
