// The interface: what the reader sees of the model, and what a click or a key does.

const root = document.getElementById("blm");
const find = (selector) => root.querySelector(selector);
const form = find("form"), story = find(".story"), others = find(".others"), head = find("select[name=head]");
const still = document.getElementById("blm-still"); // a story without a script; it gives its place to the first one written
const SURPRISE = 8; // bits at which the shading is darkest
const CANDIDATES = 8; // beginnings of words that are looked at for the five likeliest words
const percent = (p) => (p < 0.001 ? "<0.1 %" : `${(100 * p).toFixed(1)} %`);

let model = null;
let tokens = []; // the story so far, from the start token on; the model holds their keys and values
let notes = []; // of each token: bits of surprise, the likeliest tokens there, and whether the reader gave it
let words = []; // { first, end, span }: tokens first .. end - 1 are one word on the screen
let chosen = null; // the word that is open
let turn = 0; // counts what the reader asked for; what was asked before gives way
let current = 0; // the turn that is under way
let last = Promise.resolve(); // ends when nothing is under way
let asked = 0; // when the reader asked for the last time

// Words.

// Whether `token` goes on with the word that ends in the tokens `word`.
function continues(word, token) {
  if (token === model.vocabulary.eot || word.at(-1) === model.vocabulary.eot) return false;
  if (model.byteOf.has(token) && model.byteOf.has(word.at(-1))) return true;
  return /[\p{L}\p{N}'\u2019]$/u.test(model.decode(word)) && /^[\p{L}\p{N}'\u2019]/u.test(model.decode([token]));
}

function label(word) {
  if (word[0] === model.vocabulary.eot) return "\u25a0";
  const text = model.decode(word);
  return text === "\n" ? "\u21b5" : text.trim() || "\u2423";
}

const SPOKEN = { "\u25a0": "the end", "\u21b5": "new line", "\u2423": "space" };
const tokensOf = ({ first, end }) => tokens.slice(first, end);
const spoken = (word) => SPOKEN[label(word)] ?? label(word);
const name = (word) => (word.first ? spoken(tokensOf(word)) : "the start");

// Put the token at `at` on the screen: into the last word, or as a new one.
function show(at) {
  const last = words.at(-1);
  if (last && continues(tokensOf(last), tokens[at])) last.end = at + 1;
  else {
    const span = document.createElement("span");
    span.className = "word";
    span.setAttribute("role", "button");
    span.tabIndex = words.length === 1 ? 0 : -1; // one stop for the tab key: the first word behind the start token
    words.push({ first: at, end: at + 1, span });
    if (at && model.decode([tokens[at]]).startsWith(" ")) story.append(" ");
    story.append(span);
    if (tokens[at] === model.ids.get("\n")) story.append("\n");
  }
  const word = words.at(-1);
  word.span.textContent = label(tokensOf(word));
  word.span.classList.toggle("given", notes[word.first].given);
  word.span.classList.toggle("mark", word.span.textContent in SPOKEN);
  word.span.setAttribute("aria-label", name(word));
  word.span.classList.toggle("attention-only", word.first === 0); // the start token is seen only where heads look at it
  shade(word);
}

function shade(word, look = null) {
  const bits = notes.slice(word.first, word.end).reduce((sum, note) => sum + note.bits, 0);
  const shade = look ? Math.sqrt(look(word)) : root.classList.contains("attention") ? 0 : Math.min(1, bits / SURPRISE);
  word.span.style.setProperty("--shade", shade.toFixed(3));
  word.span.title = look ? `${percent(look(word))} of the attention` : word.first ? `${bits.toFixed(1)} bits` : "";
}

// The story.

let paused = 0;
const channel = new MessageChannel(); // timers would wait four milliseconds
async function breathe() { // lets the browser draw and answer
  if (performance.now() - paused < 12) return;
  await new Promise((done) => ((channel.port1.onmessage = done), channel.port2.postMessage(0)));
  paused = performance.now();
}

function extend(token, given) {
  if (tokens.length) {
    const p = probabilities(model.logits);
    notes.push({ bits: -Math.log2(p[token]), likely: likeliest(p, CANDIDATES).map((id) => [id, p[id]]), given });
  } else notes.push({ bits: 0, likely: [], given });
  tokens.push(token);
  model.step(token, tokens.length - 1);
  show(tokens.length - 1);
}

// Keep the first `length` tokens, and let the model stand behind the last of them.
function rewind(length) {
  tokens.length = notes.length = length;
  words = [];
  story.replaceChildren();
  for (let at = 0; at < length; at++) show(at);
  if (length) model.step(tokens[length - 1], length - 1);
}

// Do `job` as soon as what is under way has given way; of several that wait only the last is done.
function instead(job) {
  const mine = ++turn;
  asked = performance.now();
  return (last = last.then(() => mine === turn && ((current = mine), job())));
}

// Write a story that begins with the tokens `beginning`, which the reader gave from number `from` on.
async function write(beginning, from = 0) {
  const { seq_len } = model.config, { eot } = model.vocabulary;
  const settings = { temperature: Number(form.temperature.value), topP: model.sampling.topP };
  close();
  find(".write").textContent = "Stop";
  find(".views").hidden = find(".paper").hidden = false;
  if (find(".paper").getBoundingClientRect().top > innerHeight / 2) root.scrollIntoView(); // or few lines would be seen
  still?.setAttribute("hidden", "");
  story.classList.add("writing");
  find(".status").textContent = find(".spoken[aria-live]").textContent = "";
  let same = 0;
  while (same < beginning.length && tokens[same] === beginning[same]) same++;
  notes.slice(from).forEach((note) => (note.given = true));
  rewind(same);
  for (const token of beginning.slice(same)) {
    extend(token, true);
    await breathe();
    if (current !== turn) break;
  }
  const started = performance.now();
  let count = 0, first = 0, said = tokens.length;
  while (current === turn && tokens.length < seq_len && tokens.at(-1) !== eot) {
    extend(choose(model.logits, settings, random(Number(form.seed.value), tokens.length)), false);
    first ||= performance.now() - asked;
    count++;
    if (/[.!?]["\u201d]?$/.test(model.decode(tokens.slice(-2)))) said = say(said); // a screen reader hears whole sentences
    await breathe();
  }
  say(said);
  const speed = count / ((performance.now() - started) / 1000);
  find(".status").textContent = `${count} tokens, ${speed.toFixed(0)} per second` +
    (tokens.length >= seq_len ? `; the context of ${seq_len} tokens is full` : "") +
    [...model.off].map((off) => `; head ${off.split(".").map((n) => Number(n) + 1).join(".")} is off`).join("");
  Object.assign(root.dataset, { tokensPerSecond: speed.toFixed(1), firstWordMs: first.toFixed(0) });
  story.classList.remove("writing");
  find(".write").textContent = "Write";
}

function say(from) {
  find(".spoken[aria-live]").append(model.decode(tokens.slice(from)));
  return tokens.length;
}

async function load() {
  if (model) return;
  const bar = find(".bar");
  bar.hidden = false;
  const draw = (part) => new Promise((done) => ((bar.firstElementChild.value = part), setTimeout(done)));
  model = await Model.load(document.getElementById("blm-model").textContent, draw);
  bar.hidden = true;
  listHeads();
}

async function begin() {
  try {
    await load();
  } catch (error) {
    find(".bar").hidden = true;
    find(".status").textContent =
      `The model could not be unpacked by this browser (${error.message}). A browser of 2023 or later can.`;
    return;
  }
  const beginning = [model.vocabulary.eot, ...model.encode(form.beginning.value)];
  if (beginning.length >= model.config.seq_len) {
    find(".status").textContent =
      `The beginning has ${beginning.length} tokens; with ${model.config.seq_len} the context is full. Shorten it.`;
    return;
  }
  await write(beginning);
}

// Other words.

// The likeliest word that begins with `token` at position `at`, and its probability.
function complete(token, p, at) {
  const word = [token];
  while (word.length < 6 && at + word.length < model.config.seq_len) {
    const next = probabilities(model.step(word.at(-1), at + word.length - 1));
    const [best] = likeliest(next, 1);
    if (!continues(word, best)) break;
    word.push(best);
    p *= next[best];
  }
  return { word, p };
}

// The five likeliest words at the place of `place`, besides the one that stands there.
function alternatives(place) {
  const found = new Map();
  for (const [token, p] of notes[place.first].likely) {
    const other = complete(token, p, place.first);
    const text = label(other.word);
    if (text !== label(tokensOf(place)) && !found.has(text)) found.set(text, other);
  }
  const written = Math.min(tokens.length, place.first + 6);
  for (let at = place.first; at < written; at++) model.step(tokens[at], at); // these positions held other words
  return [...found.values()].sort((a, b) => b.p - a.p).slice(0, 5);
}

function row(tag, text, p, largest) {
  const line = document.createElement(tag);
  line.className = "choice";
  line.innerHTML = "<b></b><i></i><span></span>";
  line.children[0].textContent = text;
  line.children[1].style.setProperty("--part", p / largest);
  line.children[2].textContent = percent(p);
  return line;
}

function openOthers(word) {
  const bits = notes.slice(word.first, word.end).reduce((sum, note) => sum + note.bits, 0);
  const offered = alternatives(word);
  const title = document.createElement("p");
  title.textContent = `Instead of \u201c${name(word)}\u201d (${percent(2 ** -bits)}), the model thought of`;
  const shut = document.createElement("button");
  Object.assign(shut, { type: "button", className: "close", textContent: "\u00d7", onclick: () => close(true) });
  shut.setAttribute("aria-label", "Close");
  const largest = Math.max(2 ** -bits, ...offered.map((other) => other.p));
  const choices = offered.map(({ word: other, p }) => {
    const button = row("button", spoken(other), p, largest);
    button.type = "button";
    button.setAttribute("aria-label", `${spoken(other)}, ${percent(p)}: go on from there`);
    button.onclick = () => instead(() => goOn(word.first, other));
    return button;
  });
  others.replaceChildren(shut, title, ...choices);
  others.hidden = false;
  const paper = find(".paper").getBoundingClientRect(), place = word.span.getClientRects()[0];
  others.style.top = `${place.bottom - paper.top + 6}px`;
  others.style.left = `${Math.max(0, Math.min(place.left - paper.left - 12, paper.width - others.offsetWidth))}px`;
  others.scrollIntoView({ block: "nearest" });
  choices[0].focus({ preventScroll: true });
}

// Let the story go on behind the word `other` at position `at`.
async function goOn(at, other) {
  await write([...tokens.slice(0, at), ...other], at);
  if (document.activeElement === document.body) focusOn(words.find((word) => word.first === at)); // the button is gone
}

function close(refocus) {
  if (chosen) chosen.span.classList.remove("chosen");
  if (refocus && chosen) focusOn(chosen);
  chosen = null;
  others.hidden = true;
  find(".looked").replaceChildren();
}

function choosePlace(word) {
  close();
  chosen = word;
  chosen.span.classList.add("chosen");
  focusOn(chosen);
  if (root.classList.contains("attention")) look(chosen);
  else openOthers(chosen);
}

// Attention.

const headAt = () => head.value.split(".").map(Number);

function listHeads() {
  const { n_layers, n_heads } = model.config;
  const option = (layer, h, text = "") => new Option(`${layer + 1}.${h + 1}${text}`, `${layer}.${h}`);
  const group = (title, options) => {
    const element = document.createElement("optgroup");
    element.label = title;
    element.append(...options);
    return options.length ? [element] : [];
  };
  const named = model.heads.map((found) => option(found.layer - 1, found.head - 1, ` ${found.name}`));
  const all = Array.from({ length: n_layers * n_heads }, (_, i) => option(Math.floor(i / n_heads), i % n_heads));
  head.replaceChildren(...group("Found in the report (layer.head)", named), ...group("All heads (layer.head)", all));
  chooseHead();
}

function chooseHead() {
  const [layer, h] = headAt();
  const found = model.heads.find((one) => one.layer === layer + 1 && one.head === h + 1);
  find(".what").textContent = found?.what ?? "";
  find(".switch").textContent = `Switch it ${model.off.has(head.value) ? "on" : "off"} and write again`;
  if (chosen) look(chosen);
  else {
    words.forEach((word) => shade(word));
    find(".looked").textContent = "Click a word to see what this head looked at when it read it.";
  }
}

// Shade every word by how much the chosen head looked at it from the last token of `word`.
function look(word) {
  const [layer, h] = headAt();
  model.step(tokens[word.end - 1], word.end - 1);
  const weights = model.attention[layer][h].slice(0, word.end);
  const share = (seen) => weights.slice(seen.first, seen.end).reduce((sum, weight) => sum + weight, 0);
  words.forEach((seen) => shade(seen, share));
  const seen = words.filter((other) => share(other) >= 0.001).sort((a, b) => share(b) - share(a)).slice(0, 5);
  const title = document.createElement("p");
  title.textContent = `At \u201c${name(word)}\u201d, head ${layer + 1}.${h + 1} looked at`;
  find(".looked").replaceChildren(title, ...seen.map((other) => row("div", name(other), share(other), share(seen[0]))));
  const said = seen.map((other) => `${name(other)} ${percent(share(other))}`).join(", ");
  find(".spoken[aria-live]").textContent = `${title.textContent} ${said}`;
}

async function switchHead() {
  const before = model.decode(tokens), on = model.off.has(head.value);
  if (on) model.off.delete(head.value);
  else model.off.add(head.value);
  const written = notes.findIndex((note) => !note.given);
  const beginning = written < 0 ? [...tokens] : tokens.slice(0, written);
  close();
  tokens = [];
  await write(beginning);
  chooseHead();
  const now = model.decode(tokens);
  let same = 0;
  while (same < now.length && now[same] === before[same]) same++;
  const [layer, h] = headAt();
  const details = find(".before");
  details.hidden = false;
  details.firstElementChild.textContent = now === before ? "The same story as before" :
    `Before head ${layer + 1}.${h + 1} was switched ${on ? "on" : "off"}, the story went`;
  const shared = document.createElement("span");
  shared.className = "same";
  shared.textContent = before.slice(0, same);
  details.lastElementChild.replaceChildren(shared, before.slice(same));
}

function view(kind) {
  close();
  root.classList.remove("surprise", "attention");
  root.classList.add(kind);
  find(`[name=view][value=${kind}]`).checked = true;
  words.forEach((word) => shade(word));
  if (kind === "attention") chooseHead();
}

// A link to #head-6-4 anywhere in the report opens head 6.4.
async function follow(hash) {
  const link = /^#head-(\d+)-(\d+)$/.exec(hash);
  if (!link) return;
  root.scrollIntoView();
  if (!tokens.length) await begin();
  const wanted = [...head.options].find((option) => option.value === `${link[1] - 1}.${link[2] - 1}`);
  if (!wanted) return; // the model could not be unpacked, or has no such head
  head.value = wanted.value;
  view("attention");
  focusOn(words.at(-1));
}

// Keys and clicks.

function focusOn(word) {
  words.forEach((other) => (other.span.tabIndex = other === (word.first ? word : words[1]) ? 0 : -1));
  word.span.focus();
}

const wordOf = (target) => words.find((word) => word.span === target);

story.addEventListener("click", (event) => wordOf(event.target) && instead(() => choosePlace(wordOf(event.target))));
story.addEventListener("keydown", (event) => {
  const at = words.findIndex((word) => word.span === event.target);
  if (at < 0) return;
  const shown = words.filter((word) => word.span.offsetParent), i = shown.indexOf(words[at]);
  const box = event.target.getBoundingClientRect();
  const onLine = (direction) => { // the nearest word on the next line in this direction
    const away = (word) => {
      const { top, left } = word.span.getBoundingClientRect(), down = direction * (top - box.top);
      return down < box.height / 2 ? Infinity : 1000 * down + Math.abs(left - box.left);
    };
    const nearest = shown.reduce((best, word) => (away(word) < away(best) ? word : best));
    return away(nearest) < Infinity ? nearest : undefined;
  };
  const moves = { ArrowRight: () => shown[i + 1], ArrowLeft: () => shown[i - 1], Home: () => shown[0], End: () => shown.at(-1),
    ArrowDown: () => onLine(1), ArrowUp: () => onLine(-1) };
  if (event.key === "Enter" || event.key === " ") instead(() => choosePlace(words[at]));
  else if (event.key in moves) moves[event.key]() && focusOn(moves[event.key]());
  else return;
  event.preventDefault();
});
others.addEventListener("keydown", (event) => {
  const choices = [...others.querySelectorAll(".choice")], at = choices.indexOf(document.activeElement);
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (event.key === "Escape") close(true);
  else if (step) choices[(at + step + choices.length) % choices.length].focus();
  else return;
  event.preventDefault();
});
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#head-']");
  if (link) instead(() => follow(link.hash));
  if (!others.hidden && event.target.isConnected && !others.contains(event.target) && !wordOf(event.target)) close();
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  find(".before").hidden = true;
  if (story.classList.contains("writing")) turn++;
  else instead(begin);
});
form.beginning.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) event.preventDefault(), form.requestSubmit();
});
find(".another").addEventListener("click", () => {
  form.seed.value = Number(form.seed.value) + 1;
  find(".before").hidden = true;
  instead(begin);
});
form.temperature.addEventListener("input", () => (form.degree.value = Number(form.temperature.value).toFixed(1)));
root.addEventListener("change", (event) => {
  if (event.target.name === "view") view(event.target.value);
  if (event.target === head) chooseHead();
});
find(".switch").addEventListener("click", () => instead(switchHead));

form.temperature.dispatchEvent(new Event("input"));
still?.before(root);
root.hidden = false;
view("surprise");
instead(() => follow(location.hash));
