// What the script of the page finds in a browser, as far as it uses it; then conversations with a server that is not there.
"use strict";
class Element {
  constructor() { Object.assign(this, {textContent: "", value: "", disabled: false, style: {}, kids: [], heard: {}}); }
  append(one) { this.kids.push(one); one.parent = this; }
  remove() { this.parent.kids = this.parent.kids.filter(one => one !== this); }
  replaceChildren(...kids) { this.kids = kids; }
  addEventListener(name, does) { this.heard[name] = does; }
  get firstElementChild() { return this.first = this.first || new Element(); }
}
const elements = {};
globalThis.document = {
  getElementById: id => elements[id] = elements[id] || new Element(), createElement: () => new Element(),
};
let served = null;
globalThis.fetch = async (path, asked) => path === "v1/models"
  ? {ok: true, status: 200, json: async () => ({chat: true, data: [{id: "tiny", jaxcompress: {slots: 4, policy: "tova"}}]})}
  : served(JSON.parse(asked.body), asked.signal);

// An answer of these events; the last one may be an error to throw, or a promise to wait for until the stop.
const stream = (...events) => async (body, signal) => ({ok: true, body: {getReader: () => ({
  read: async () => {
    const event = events.shift();
    if (event instanceof Error) throw event;
    if (event === "wait") await new Promise((_, fail) => signal.addEventListener("abort", () => {
      fail(new DOMException("stopped", "AbortError"));
    }));
    return event ? {value: new TextEncoder().encode("data: " + JSON.stringify(event) + "\n\n")} : {done: true};
  },
})}});
const text = (content, extra) => Object.assign({choices: [{delta: {content}}]}, extra);
const until = async holds => { while (!holds()) await new Promise(done => setTimeout(done, 1)); };
const send = async (message, answer) => {
  served = answer;
  document.getElementById("message").value = message;
  document.getElementById("form").heard.submit({preventDefault() {}});
};
const equal = (found, expected) => {
  if (JSON.stringify(found) !== JSON.stringify(expected)) throw new Error(JSON.stringify({found, expected}));
};

async function conversations(page) {
  const at = document.getElementById, idle = () => !at("send").disabled;
  await send("one", stream(text("first", {jaxcompress: {prompt: ["one"], tokens: ["first"], held: [100, 50]}})));
  await until(idle);
  equal(page.said().map(one => one.content), ["one", "first"]);
  await send("two", stream(text("sec"), "wait"));  // the conversation is left while the answer comes
  await until(() => page.said().length === 3 && at("said").kids.at(-1).textContent === "sec");
  at("new").heard.click();
  await until(idle);
  equal(page.said(), []);
  equal(at("facts").textContent, "nothing was read yet");
  const refusal = {ok: false, json: async () => ({error: {message: "no"}})};
  for (const fails of [async () => refusal, stream(new Error("no")), stream({error: {message: "no"}, choices: []})]) {
    await send("three", fails);
    await until(idle);
    equal(page.said(), []);
    equal(at("message").value, "three");
    equal(at("said").kids.map(one => one.textContent), ["no"]);
    at("new").heard.click();
  }
  await send("four", stream(text("part"), {error: {message: "no"}, choices: []}));
  await until(idle);
  equal(page.said().map(one => one.content), ["four", "part"]);
  await send("five", stream(text("", {}), text("")));  // an empty answer is one, and nothing is told of the state
  await until(idle);
  equal(page.said().map(one => one.content), ["four", "part", "five", ""]);
  equal(at("facts").textContent, "the prompt is too long for a picture of what the state holds");
  console.log("sound");
}
