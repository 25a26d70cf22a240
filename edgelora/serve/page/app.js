// The page: which view is open, what the keys do, and how its parts hang together.

import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { Conversation } from "./conversation.js";
import { el, holdEnd } from "./elements.js";
import { Load } from "./load.js";
import { Models } from "./models.js";
import { Settings } from "./settings.js";
import { Speech } from "./speech.js";
import { Choices } from "./tokens.js";
import { Votes } from "./votes.js";

const MODELS_EVERY_MS = 15000;
const LONGEST_NAMES = 24; // that stand in the empty prompt of a phone

const get = (id) => document.getElementById(id);
const [prompt, send, keyForm] = ["prompt", "send", "key"].map(get);

const api = new Api(askForKey);
const speech = new Speech(get("spoken"));
const models = new Models(api);
const settings = new Settings(get("settings"), models, showWhom);
const choices = new Choices(get("choices"), speech);
const votes = new Votes(showVotes);
const conversation = new Conversation(api);
const views = {
  chat: new Chat(api, settings, conversation, get("chat"), speech, onReply),
  compare: new Compare(api, settings, get("compare"), speech, choices, votes, onReply),
};
models.watch(() => (get("base").textContent = models.base?.root ?? ""));
const load = new Load(api, get("load"), get("banner"), () => {
  speech.say("The server is back.");
  models.refresh();
});
let open = views.chat;

function openView() {
  const name = location.hash.slice(1) in views ? location.hash.slice(1) : "chat";
  open = views[name];
  settings.mode = name;
  choices.hide();
  for (const [each, view] of Object.entries(views)) {
    view.view.hidden = each !== name;
    document.querySelector(`nav a[href="#${each}"]`).setAttribute("aria-current", each === name ? "page" : "false");
  }
  alignComposer();
  showState();
}

/** The prompt stands exactly below the text, whose view keeps room for a scroll bar. */
function alignComposer() {
  const { offsetWidth, clientWidth } = open.view;
  get("stage").style.setProperty("--bars", `${offsetWidth - clientWidth}px`);
}

function showState() {
  const runs = open.running;
  send.textContent = runs ? "Stop" : "Send";
  send.classList.toggle("stop", Boolean(runs));
  const chats = open === views.chat;
  get("kept").textContent = chats ? views.chat.keptSays : "";
  get("clear").textContent = chats ? "New conversation" : "Clear";
  get("clear").hidden = open.view.querySelector(".empty") !== null;
}

/** A reply has begun or ended. */
function onReply() {
  showState();
  load.look();
}

function showWhom(chosen) {
  const names = new Intl.ListFormat("en").format(chosen.map(({ name }) => name));
  const isShort = names.length <= LONGEST_NAMES;
  prompt.placeholder = names ? `Ask ${isShort ? names : chosen.length > 1 ? "them" : "it"}` : "No adapter to ask yet";
}

function submit() {
  if (open.running) return open.stop();
  const text = prompt.value.trim();
  if (!text || !settings.check()) return;
  prompt.value = "";
  open.ask(text);
}

function onKey(event) {
  // While an input method composes, Enter ends the composing.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!open.running) submit();
}

function onEscape(event) {
  if (event.key !== "Escape") return;
  if (choices.isShown) choices.hide();
  else open.stop();
}

function askForKey(wasGiven) {
  get("key-says").textContent = wasGiven ? "The server does not know this key." : "This server asks for a key.";
  if (keyForm.hidden && !prompt.value) setTimeout(() => get("key-field").focus());
  keyForm.hidden = false;
}

function useKey(event) {
  event.preventDefault();
  setKey(get("key-field").value.trim());
  get("key-field").value = "";
  prompt.focus();
}

function setKey(value) {
  if (value !== api.key) changeOwner(value);
  keyForm.hidden = true;
  get("forget-key").hidden = !value;
  models.refresh();
  load.look();
}

/** What one key was told is not the next one's to see; what was said without a key goes on with the first. */
function changeOwner(key) {
  if (api.key && (views.chat.hasAnswers || !key)) views.chat.clear();
  views.compare.clear();
  if (key) conversation.handOver();
  api.key = key;
  views.chat.keep();
  showState();
}

function showVotes(all, isKept) {
  const tally = votes.tally.map(([adapter, count]) => `${adapter} (${count})`).join(", ");
  const unkept = isKept ? "" : " (this browser keeps them only until you leave)";
  get("votes").dataset.count = all.length;
  get("votes-say").textContent = `${all.length === 1 ? "1 vote" : `${all.length} votes`}: ${tally}${unkept}`;
}

function exportVotes() {
  const url = URL.createObjectURL(new Blob([votes.jsonl], { type: "application/jsonl" }));
  el("a", { href: url, download: "preferences.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function deleteVotes() {
  const all = votes.all.length;
  if (confirm(all === 1 ? "Delete the vote?" : `Delete all ${all} votes?`)) votes.deleteAll();
}

get("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
prompt.addEventListener("keydown", onKey);
document.addEventListener("keydown", onEscape);
keyForm.addEventListener("submit", useKey);
get("forget-key").addEventListener("click", () => setKey(""));
get("clear").addEventListener("click", () => {
  open.clear();
  showState();
  prompt.focus();
});
get("export-votes").addEventListener("click", exportVotes);
get("delete-votes").addEventListener("click", deleteVotes);
window.addEventListener("hashchange", openView);
window.addEventListener("resize", alignComposer);

for (const { view } of Object.values(views)) holdEnd(view);
get("forget-key").hidden = !api.key;
showVotes(votes.all, true);
openView();
models.refresh();
load.look();
setInterval(() => document.hidden || models.refresh(), MODELS_EVERY_MS);
