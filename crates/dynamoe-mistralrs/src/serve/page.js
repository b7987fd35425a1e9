"use strict";
const element = (id) => document.getElementById(id);
const panes = [];
let running = null;
/** Of an MoE model: how many experts a token runs at the top of the dial. */
let expertsPerToken = null;
/** What the sliders set: a model without a table of budgets takes sensitivities only. */
let dialField = "budget";

/** Asks the server; a page that was refused for want of a key shows where to put one. */
async function ask(path, options = {}) {
  const key = element("api-key").value;
  const headers = { ...options.headers, ...(key && { Authorization: "Bearer " + key }) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) element("locked").hidden = false;
  return response;
}

/** The shade of a width from 0 to 1: the class w0 (narrow) to w8 (full). */
const shade = (width) => "w" + Math.max(0, Math.min(8, Math.round(width * 8)));

function addPane(budget) {
  const root = element("pane").content.firstElementChild.cloneNode(true);
  const find = (selector) => root.querySelector(selector);
  const pane = {
    root, answer: find(".answer"), figures: find(".figures"), slider: find(".budget"), usesDefault: find(".default"),
  };
  find("legend").textContent = panes.length ? "Answer B" : "Answer A";
  const show = () => {
    find("output").textContent = Number(pane.slider.value).toFixed(2);
    pane.slider.disabled = pane.usesDefault.checked;
  };
  pane.slider.value = budget;
  pane.slider.addEventListener("input", show);
  pane.usesDefault.addEventListener("change", show);
  show();
  panes.push(pane);
  element("panes").append(root);
}

/** The events of a stream, parsed, until the server says [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function request(pane) {
  const chat = element("chat").checked, prompt = element("prompt").value;
  const body = {
    model: "default", stream: true, stream_options: { include_usage: true },
    max_tokens: Number(element("tokens").value), temperature: Number(element("temperature").value),
  };
  if (chat) body.messages = [{ role: "user", content: prompt }];
  else body.prompt = prompt;
  if (!pane.slider.hidden && !pane.usesDefault.checked) body[dialField] = Number(pane.slider.value);
  return [chat ? "/v1/chat/completions" : "/v1/completions", body];
}

function append(pane, text, width, thought) {
  const span = document.createElement("span");
  span.textContent = text;
  if (typeof width === "number") {
    span.className = shade(width);
    span.title = "width " + width.toFixed(2);
  }
  if (thought) span.classList.add("thought");
  pane.answer.append(span);
}

async function fill(pane, signal) {
  pane.answer.replaceChildren();
  pane.figures.textContent = "";
  const [path, body] = request(pane);
  let tokens = 0, first = 0, mean = null;
  const share = (experts) => typeof experts === "number" ? experts / expertsPerToken : undefined;
  const figures = () => {
    const seconds = (performance.now() - first) / 1000;
    const rate = tokens > 1 ? ((tokens - 1) / seconds).toFixed(1) + " tokens/s" : "";
    const unit = expertsPerToken ? "mean share of the experts " : "mean width ";
    const width = mean === null ? "" : unit + mean.toFixed(3);
    pane.figures.textContent = [tokens + " tokens", rate, width].filter(Boolean).join(" · ");
  };
  try {
    const response = await ask(path, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      mean = event.usage?.mean_ffn_width ?? share(event.usage?.mean_experts) ?? mean;
      for (const choice of event.choices ?? []) {
        const thought = choice.delta?.reasoning_content;
        const text = thought ?? choice.delta?.content ?? choice.text;
        if (!text) continue;
        tokens += 1;
        if (tokens === 1) first = performance.now();
        append(pane, text, choice.ffn_width ?? share(choice.experts), thought !== undefined);
      }
      figures();
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    const message = document.createElement("strong");
    message.className = "error";
    message.textContent = error.message;
    pane.answer.append(message);
  }
}

async function send(event) {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  element("send").disabled = true;
  element("stop").disabled = false;
  const shown = panes.filter((pane) => !pane.root.hidden);
  await Promise.all(shown.map((pane) => fill(pane, running.signal)));
  running = null;
  element("send").disabled = false;
  element("stop").disabled = true;
}

/** Learns what the model is called and whether it has a dial. */
async function learn() {
  const answer = await ask("/v1/models");
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  element("locked").hidden = true;
  const models = (await answer.json()).data.map((model) => model.id);
  const name = models.find((id) => id !== "default" && !id.includes("@")) ?? models[0];
  const dial = await ask("/v1/dynamoe");
  if (!dial.ok) {
    element("model").textContent = name + ": a dense model, which has no dial";
    element("key").hidden = true;
    document.querySelectorAll(".dial").forEach((part) => { part.hidden = true; });
    panes.forEach((pane) => { pane.usesDefault.checked = true; });
    element("compare").parentElement.hidden = true;
    return;
  }
  const settings = await dial.json();
  element("model").textContent = name;
  expertsPerToken = settings.experts_per_token ?? null;
  dialField = settings.budgets.length ? "budget" : "sensitivity";
  const now = settings.adaptive ? " (follows the load)" : "";
  document.querySelectorAll(".adaptive").forEach((part) => { part.textContent = now; });
}

function start() {
  const tell = () => learn().catch((error) => { element("model").textContent = error.message; });
  addPane(1);
  addPane(0.5);
  const compare = () => { panes[1].root.hidden = !element("compare").checked; };
  element("compare").addEventListener("change", compare);
  compare();
  element("ask").addEventListener("submit", send);
  element("stop").addEventListener("click", () => running && running.abort());
  element("api-key").addEventListener("change", tell);
  tell();
}

start();
