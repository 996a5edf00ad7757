// The chat page: talk with a model, see the probabilities of its tokens, look inside, and set two models side by side.
// A link may ask at once: #said=…&model=…&beside=…&language=zh

const WORDS = {
  en: { model: "model", beside: "beside it", temperature: "temperature", seed: "seed", longest: "tokens at most",
    clear: "new talk", send: "send", stop: "stop", none: "none", language: "中文", hint: "Say something",
    alternatives: "What else it might have said", chosen: "chosen", layer: "layer", guesses: "its guess",
    looks: "where it looks", inside: "Look inside", parted: "Here the two answers part.", same: "Both answers are the same.",
    token: "The server needs a token", welcome: "Talk with the model. Then click a token of its answer: the thicker its line, the less sure the model was." },
  zh: { model: "模型", beside: "对比", temperature: "温度", seed: "随机种子", longest: "最多词元数",
    clear: "新对话", send: "发送", stop: "停止", none: "无", language: "English", hint: "说点什么",
    alternatives: "它还可能怎么说", chosen: "选中", layer: "层", guesses: "这一层的猜测",
    looks: "它在看哪里", inside: "看看内部", parted: "两个回答从这里分岔。", same: "两个回答完全相同。",
    token: "服务器需要令牌", welcome: "和模型聊聊，再点回答里的词元：下划线越粗，模型当时越没有把握。" },
};
const $ = id => document.getElementById(id);
const preset = new URLSearchParams(location.hash.slice(1));
let language = preset.get("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
const turns = [];          // { said, answers: [{ model, text, tokens, error }] }
let running = null;        // AbortController

const say = key => WORDS[language][key];
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

function translate() {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-say]")) element.textContent = say(element.dataset.say);
  $("language").textContent = say("language");
  $("said").placeholder = say("hint");
  if ($("beside").options.length) $("beside").options[0].textContent = say("none");
  draw();
}

async function request(path, body, signal) {
  const token = sessionStorage.getItem("token");
  const answer = await fetch(path, {
    method: body ? "POST" : "GET", signal, body: body && JSON.stringify(body),
    headers: { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) },
  });
  if (answer.ok) return answer;
  if (answer.status === 401) {
    const given = prompt(say("token"));
    if (given) { sessionStorage.setItem("token", given); return request(path, body, signal); }
  }
  throw new Error((await answer.json()).error.message);
}

// The messages before a turn, as one of the models has heard and said them.
const messagesBefore = (turn, side) => turns.slice(0, turns.indexOf(turn)).flatMap(one => [
  { role: "user", content: one.said },
  { role: "assistant", content: (one.answers[side] || one.answers[0]).text },
]);

async function answer(turn, side, signal) {
  const mine = turn.answers[side];
  try {
    const response = await request("v1/chat/completions", {
      model: mine.model, messages: [...messagesBefore(turn, side), { role: "user", content: turn.said }],
      temperature: +$("temperature").value, seed: +$("seed").value, max_tokens: +$("longest").value,
      stream: true, logprobs: true, top_logprobs: 5,
    }, signal);
    const reader = response.body.getReader(), decoder = new TextDecoder();
    for (let rest = ""; ;) {
      const { done, value } = await reader.read();
      if (done) break;
      const events = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (event === "data: [DONE]") continue;
        const chunk = JSON.parse(event.slice(6));
        if (chunk.error) throw new Error(chunk.error.message);
        mine.text += chunk.choices[0].delta.content || "";
        mine.tokens.push(...(chunk.choices[0].logprobs?.content || []));
      }
      draw();
    }
  } catch (error) {
    if (error.name !== "AbortError") mine.error = error.message;
  }
  draw();
}

async function ask(said) {
  const models = [$("model").value, $("beside").value].filter(name => name);
  const turn = { said, answers: models.map(model => ({ model, text: "", tokens: [], error: "" })) };
  turns.push(turn);
  running = new AbortController();
  $("stop").hidden = false; $("send").disabled = true;
  draw();
  await Promise.all(turn.answers.map((_, side) => answer(turn, side, running.signal)));
  $("stop").hidden = true; $("send").disabled = false;
  document.body.dataset.done = turns.length;
}

// The first place at which two answers differ; the length of both if they do not.
function parting([a, b]) {
  const length = Math.min(a.tokens.length, b.tokens.length);
  for (let i = 0; i < length; i++) if (a.tokens[i].id !== b.tokens[i].id) return i;
  return length;
}

// The tokens' texts: bytes that make a character only together are shown with the last of them.
function spelled(tokens) {
  const decoder = new TextDecoder();
  return tokens.map(token => decoder.decode(new Uint8Array(token.bytes), { stream: true }));
}

function draw() {
  $("talk").replaceChildren(...(turns.length ? turns.flatMap(drawTurn) : [make("p", { textContent: say("welcome") })]));
}

function drawTurn(turn) {
  const two = turn.answers.length === 2, part = two ? parting(turn.answers) : Infinity;
  const same = two && turn.answers.every(one => one.tokens.length === part);
  const answers = turn.answers.map((one, side) => {
    const box = make("div", { className: "answer" }, make("h2", { textContent: one.model }));
    spelled(one.tokens).forEach((text, i) => {
      const token = make("button", { className: "token", type: "button", textContent: text || "▯" });
      token.style.setProperty("--doubt", 1 - Math.exp(one.tokens[i].logprob));
      if (i === part && !same) token.classList.add("parted");
      if (i > part) token.classList.add("after");
      token.onclick = () => details(turn, side, i, token);
      box.append(token);
    });
    if (one.error) box.append(make("p", { className: "error", textContent: one.error }));
    return box;
  });
  const note = two && turn.answers.every(one => one.tokens.length) ? [make("p", { className: "note", textContent: say(same ? "same" : "parted") })] : [];
  return [make("p", { className: "user", textContent: turn.said }), make("div", { className: "answers" }, ...answers), ...note];
}

const bar = share => { const one = make("span", { className: "bar" }); one.style.width = `${6 * share}rem`; return one; };
const percent = share => `${(100 * share).toFixed(share < .001 ? 3 : 1)} %`;

function details(turn, side, at, button) {
  for (const one of document.querySelectorAll("[aria-current]")) one.removeAttribute("aria-current");
  button.setAttribute("aria-current", "true");
  const rows = turn.answers.filter(one => at < one.tokens.length && (turn.answers.indexOf(one) === side || at <= parting(turn.answers))).map(one => {
    const token = one.tokens[at], known = token.top_logprobs.some(other => other.id === token.id);
    const all = known ? token.top_logprobs : [...token.top_logprobs, token];
    return make("div", {}, make("h3", { textContent: `${one.model} · ${say("alternatives")}` }), make("table", {}, ...all.map(other => {
      const share = Math.exp(other.logprob);
      return make("tr", {}, make("td", { textContent: JSON.stringify(other.token).slice(1, -1) }), make("td", { textContent: percent(share) }),
        make("td", {}, bar(share)), make("td", { textContent: other.id === token.id ? say("chosen") : "" }));
    })));
  });
  const look = make("button", { type: "button", id: "inside", textContent: say("inside") });
  look.onclick = () => inside(turn, side, at, look);
  $("details").replaceChildren(...rows, look);
}

async function inside(turn, side, at, button) {
  button.disabled = true;
  const one = turn.answers[side];
  try {
    const found = await (await request("inside", {
      model: one.model, messages: [...messagesBefore(turn, side), { role: "user", content: turn.said }],
      max_tokens: +$("longest").value, answer: one.tokens.slice(0, at).map(token => token.id),
    })).json();
    const rows = found.layers.map((layer, i) => make("tr", {}, make("th", { textContent: i }),
      make("td", {}, ...layer.guesses.slice(0, 3).map(([text, share]) => make("div", { textContent: `${JSON.stringify(text).slice(1, -1)} ${percent(share)}` }))),
      make("td", {}, ...found.tokens.map((text, t) => {
        const place = make("span", { className: "look", textContent: text, title: percent(layer.attention[t]) });
        place.style.setProperty("--share", Math.sqrt(layer.attention[t]));
        return place;
      }))));
    const head = make("tr", {}, ...["layer", "guesses", "looks"].map(key => make("th", { textContent: say(key) })));
    button.replaceWith(make("table", { id: "layers" }, head, ...rows));
  } catch (error) {
    button.replaceWith(make("p", { className: "error", textContent: error.message }));
  }
}

$("form").onsubmit = event => {
  event.preventDefault();
  const said = $("said").value;
  if (running && !$("stop").hidden) return;
  $("said").value = "";
  ask(said);
};
$("said").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("form").requestSubmit(); }
};
$("stop").onclick = () => running.abort();
$("clear").onclick = () => { if ($("stop").hidden) { turns.length = 0; $("details").replaceChildren(); draw(); } };
$("language").onclick = () => { language = language === "en" ? "zh" : "en"; translate(); };

const names = (await (await request("v1/models")).json()).data.map(one => one.id);
$("model").append(...names.map(name => new Option(name)));
$("beside").append(new Option(say("none"), ""), ...names.map(name => new Option(name)));
if (names.includes(preset.get("model"))) $("model").value = preset.get("model");
if (names.includes(preset.get("beside"))) $("beside").value = preset.get("beside");
translate();
if (preset.get("said")) {
  await ask(preset.get("said"));
  const at = preset.get("look");
  if (at !== null) document.querySelectorAll(".answer .token")[+at]?.click();
  if (preset.has("inside")) $("inside")?.click();
}
