// The browsable sample: a list of which only the visible rows exist, and a reader beside it.
// Texts of documents enter the page as text nodes and as nothing else.
"use strict";

const data = JSON.parse(document.getElementById("documents").textContent);
const $ = (id) => document.getElementById(id);
const ROW = 76; // pixels; page.css has it, too
const count = data.text.length;
const lower = []; // texts to search in, made when first wanted
let shown = Array.from({ length: count }, (_, i) => i);
let words = [];
let current = -1; // place in `shown`

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// ---- choosing and ordering --------------------------------------------------------------------

function searched(i) {
  if (!words.length) return true;
  lower[i] ??= (data.text[i] + "\n" + data.place[i]).toLowerCase();
  return words.every((word) => lower[i].includes(word));
}

function order(name) {
  const [column, direction] = name.split(" ");
  const sign = direction === "low" ? 1 : -1;
  const values = column === "tokens" ? data.tokens : data.scores[column].values;
  return (a, b) => {
    if (values[a] === null || values[b] === null) return (values[a] === null) - (values[b] === null);
    return sign * (values[a] - values[b]) || a - b;
  };
}

function update() {
  const sought = $("query").value.toLowerCase().match(/"[^"]+"|[^\s"]+/g) ?? [];
  words = sought.map((word) => word.replaceAll('"', ""));
  const kept = $("kept_by").value && data.kept[$("kept_by").value].in;
  const dropped = $("dropped_by").value && data.kept[$("dropped_by").value].in;
  const source = $("source").value;
  shown = [];
  for (let i = 0; i < count; i++) {
    if (kept && kept[i] !== "1") continue;
    if (dropped && dropped[i] !== "0") continue;
    if (source && data.source[i] !== Number(source)) continue;
    if (searched(i)) shown.push(i);
  }
  if ($("sort").value) shown.sort(order($("sort").value));
  $("count").textContent = `${shown.length.toLocaleString("en")} of ${count.toLocaleString("en")} documents`;
  $("rows").style.height = `${shown.length * ROW}px`;
  $("list").scrollTop = 0;
  open(shown.length ? 0 : -1);
}

// ---- the list ---------------------------------------------------------------------------------

function draw() {
  const list = $("list");
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
  const rows = [];
  for (let place = first; place < last; place++) rows.push(row(place));
  $("rows").replaceChildren(...rows);
}

function row(place) {
  const i = shown[place];
  const made = element("button", place === current ? "current" : "");
  made.type = "button";
  made.tabIndex = place === current ? 0 : -1;
  made.style.transform = `translateY(${place * ROW}px)`;
  made.append(element("small", "", about(i)), excerpt(i));
  made.onclick = () => open(place);
  return made;
}

function about(i) {
  const sort = $("sort").value.split(" ")[0];
  const score = sort && sort !== "tokens" ? `${number(data.scores[sort].values[i])} · ` : "";
  const parts = [data.sources[data.source[i]], data.place[i]].filter(Boolean);
  return `${score}${data.tokens[i].toLocaleString("en")} tokens · ${parts.join(" · ")}`;
}

function excerpt(i) {
  const text = data.text[i];
  const found = words.length ? text.toLowerCase().indexOf(words[0]) : 0;
  const start = found > 60 ? found - 40 : 0;
  return marked((start ? "… " : "") + text.slice(start, start + 240), element("span"));
}

function marked(text, into) {
  const sought = words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  if (!sought.length) {
    into.textContent = text;
    return into;
  }
  text.split(new RegExp(`(${sought.join("|")})`, "gi")).forEach((part, k) => {
    into.append(k % 2 ? element("mark", "", part) : part);
  });
  return into;
}

function number(value) {
  return value === null ? "no score" : value.toPrecision(4).replace("-", "−");
}

// ---- the reader -------------------------------------------------------------------------------

function open(place) {
  current = place;
  draw();
  const reader = $("reader");
  if (place < 0) {
    reader.replaceChildren(element("p", "note", "No document is like this."));
    return;
  }
  const i = shown[place];
  const scores = element("dl", "scores");
  for (const score of data.scores) {
    const pair = element("div");
    pair.append(element("dt", "", score.title), element("dd", "", number(score.values[i])));
    pair.title = score.axis;
    scores.append(pair);
  }
  const verdicts = element("p", "verdicts");
  for (const selection of data.kept) {
    const kept = selection.in[i] === "1";
    const chip = element("span", kept ? "kept" : "dropped", selection.title);
    chip.title = kept ? "kept" : "dropped";
    verdicts.append(chip, " ");
  }
  const text = marked(data.text[i], element("pre"));
  if (data.cut[i] === "1") text.append(element("span", "more", " […]"));
  const shaded = data.shaded[i] ? shading(data.shaded[i], text) : [];
  reader.replaceChildren(element("p", "source", about(i)), scores, verdicts, ...shaded, text);
  reader.scrollTop = 0;
}

let shade = false; // kept from document to document

function shading(tokens, plain) {
  const label = element("label", "shading");
  const box = element("input");
  box.type = "checkbox";
  box.checked = shade;
  label.append(box, " shade the tokens by how unlikely they are");
  const shaded = element("pre", "shaded");
  tokens.pieces.forEach((piece, k) => {
    const level = tokens.levels[k];
    shaded.append(element("span", level === "-" ? "" : `level${level}`, piece));
  });
  box.onchange = () => {
    shade = box.checked;
    plain.hidden = shade;
    shaded.hidden = !shade;
  };
  box.onchange();
  return [label, shaded];
}

// ---- controls ---------------------------------------------------------------------------------

function option(select, value, text) {
  const made = element("option", "", text);
  made.value = value;
  select.append(made);
}

data.kept.forEach((selection, k) => {
  option($("kept_by"), k, selection.title);
  option($("dropped_by"), k, selection.title);
});
data.scores.forEach((score, k) => {
  option($("sort"), `${k} high`, `${score.title}, highest first`);
  option($("sort"), `${k} low`, `${score.title}, lowest first`);
});
option($("sort"), "tokens high", "Longest first");
option($("sort"), "tokens low", "Shortest first");
data.sources.forEach((name, k) => option($("source"), k, name || "(none)"));
$("source").parentElement.hidden = data.sources.length < 2;

let waiting = 0;
$("query").oninput = () => {
  clearTimeout(waiting);
  waiting = setTimeout(update, 120);
};
for (const id of ["sort", "kept_by", "dropped_by", "source"]) $(id).onchange = update;
let drawing = false;
$("list").onscroll = () => {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => ((drawing = false), draw()));
};
$("list").onkeydown = (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 }[event.key];
  if (!step || !shown.length) return;
  event.preventDefault();
  const place = Math.min(Math.max(current + step, 0), shown.length - 1);
  const list = $("list");
  if (place * ROW < list.scrollTop) list.scrollTop = place * ROW;
  const below = (place + 1) * ROW - list.clientHeight;
  if (below > list.scrollTop) list.scrollTop = below;
  open(place);
  list.querySelector(".current")?.focus({ preventScroll: true });
};
new ResizeObserver(draw).observe($("list"));
$("browser").hidden = false;
update();
