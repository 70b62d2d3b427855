// The list of queries: filters, order, pages of rows, and keys to move in it.

const PAGE_SIZE = 50;
const data = JSON.parse(byId("data").textContent);
const rows = data.rows;
const table = byId("list");
const hasVs = data.vs !== null;
const magnitude = (value) => (value === null || value === undefined ? null : Math.abs(value));

rows.forEach((row, place) => {
  row.place = place;
  row.words = `${row.sentence}\n${row.qid}\n${data.videos[row.video].name}`.toLowerCase();
});

// What can be sorted by: the value of a row (null: always last) and which way round it starts.
const ORDERS = {
  ...(hasVs ? { biggest: { label: "biggest change", value: (row) => magnitude(row.change), down: true } } : {}),
  place: { label: "order of the file", value: (row) => row.place },
  labelled: { label: "labelled start", value: (row) => (row.truth.length ? row.truth[0][0] - row.clip[0] : null) },
  sentence: { label: "query", value: (row) => row.sentence.toLowerCase() },
  score: { label: "IoU", value: (row) => row.score },
  ...(hasVs ? {
    vs: { label: `IoU of ${data.vs}`, value: (row) => row.vs?.score ?? null },
    change: { label: "change", value: (row) => row.change ?? null },
  } : {}),
  start: { label: "start error", value: (row) => magnitude(row.offsets?.[0]), down: true },
  end: { label: "end error", value: (row) => magnitude(row.offsets?.[1]), down: true },
  duration: { label: "duration", value: (row) => row.duration },
};
const COLUMNS = [
  { order: "sentence", title: "query", className: "c-query" },
  { order: "labelled", title: "timeline", className: "c-line" },
  { order: "score", title: "IoU", className: "c-score" },
  ...(hasVs ? [
    { order: "vs", title: data.vs, className: "c-score" },
    { order: "change", title: "change", className: "c-change" },
  ] : []),
  { order: "start", title: "start, s", className: "c-number" },
  { order: "end", title: "end, s", className: "c-number" },
  { order: "duration", title: "length, s", className: "c-number" },
];
const state = { order: Object.keys(ORDERS)[0], down: hasVs, page: 0, shown: rows, focus: 0 };

const ANSWERS = {
  "window": (row) => row.pred !== null && row.pred.length > 0,
  "unparsable": (row) => row.pred === null && !row.fault,
  "says-absent": (row) => row.pred !== null && row.pred.length === 0,
  "unreadable": (row) => Boolean(row.fault),
  "labelled-absent": (row) => row.truth.length === 0,
  "several": (row) => row.truth.length > 1 || (row.pred ?? []).length > 1,
};
const SAME = 1e-9;
const CHANGES = {
  better: (row) => row.change > SAME,
  worse: (row) => row.change < -SAME,
  same: (row) => Math.abs(row.change) <= SAME,
};

function filters() {
  const tests = [];
  const text = byId("f-text").value.trim().toLowerCase();
  if (text) tests.push((row) => row.words.includes(text));
  const group = byId("f-group")?.selectedOptions[0]?.dataset;
  if (group?.key !== undefined) tests.push((row) => row.groups[group.key] === group.value);
  const answer = byId("f-answer").value;
  if (answer) tests.push(ANSWERS[answer]);
  const change = byId("f-change")?.value;
  if (change) tests.push(CHANGES[change]);
  const low = Number(byId("f-low").value);
  const high = byId("f-high").value === "" ? 1 : Number(byId("f-high").value);
  // of a row that is labelled absent there is no IoU
  if (low > 0 || high < 1) tests.push((row) => row.truth.length > 0 && row.score >= low && row.score <= high);
  return tests;
}

function update() {
  const tests = filters();
  const { value } = ORDERS[state.order];
  const sign = state.down ? -1 : 1;
  const keyed = rows.filter((row) => tests.every((test) => test(row))).map((row) => [value(row), row]);
  keyed.sort(([a, x], [b, y]) => {
    if (a === null || b === null) return (a === null) - (b === null) || x.place - y.place;
    return a < b ? -sign : a > b ? sign : x.place - y.place;
  });
  state.shown = keyed.map(([, row]) => row);
  state.page = 0;
  state.focus = 0;
  draw();
}

function sortBy(order, down) {
  state.order = order;
  state.down = down ?? Boolean(ORDERS[order].down);
  update();
}

function draw() {
  const pages = Math.max(1, Math.ceil(state.shown.length / PAGE_SIZE));
  const first = state.page * PAGE_SIZE;
  const shown = state.shown.slice(first, first + PAGE_SIZE);
  table.tBodies[0].replaceChildren(...shown.map((row, index) => rowElement(row, index)));
  const all = state.shown.length === rows.length;
  byId("found").textContent = state.shown.length === 0
    ? "No query fits these filters."
    : `${all ? "" : `${state.shown.length.toLocaleString("en")} of `}${rows.length.toLocaleString("en")} queries`;
  for (const span of document.querySelectorAll(".page")) span.textContent = `${state.page + 1} / ${pages}`;
  for (const button of document.querySelectorAll(".previous")) button.disabled = state.page === 0;
  for (const button of document.querySelectorAll(".next")) button.disabled = state.page >= pages - 1;
  byId("f-sort").value = `${state.order} ${state.down ? "down" : "up"}`;
  table.querySelectorAll("thead th").forEach((cell, index) => {
    if (COLUMNS[index].order === state.order) cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    else cell.removeAttribute("aria-sort");
  });
}

function turnTo(page) {
  state.page = page;
  state.focus = 0;
  draw();
}

function badge(words, isGood) {
  return make("span", { className: `badge ${isGood === undefined ? "" : isGood ? "good" : "bad"}`, textContent: words });
}

// IoU, or in words why there is none.
function scoreOf(answer, row) {
  if (!answer) return "–";
  if (answer.fault) return badge("unreadable", false);
  if (answer.pred === null) return badge("unparsable", false);
  if (!row.truth.length) return badge(answer.score ? "right" : "wrong", Boolean(answer.score));
  if (!answer.pred.length) return badge("says absent", false);
  return answer.score.toFixed(2);
}

function changeOf(row) {
  if (row.change === undefined) return "–";
  if (Math.abs(row.change) <= SAME) return "0.00";
  const isUp = row.change > 0;
  return make("span", {}, make("span", { className: isUp ? "up" : "down", textContent: isUp ? "▲ " : "▼ " }), signed(row.change, 2));
}

// A lane in words, for those who do not see it.
function describe({ name, note, windows }) {
  const longest = Math.max(...windows.flat().filter(Number.isFinite), 0);
  return `${name}: ${note || windows.filter(isDrawn).map((window) => formatWindow(window, longest)).join(", ")}`;
}

function rowElement(row, index) {
  const open = make("button", { type: "button", className: "open", textContent: row.sentence, tabIndex: index === state.focus ? 0 : -1 });
  const about = make("span", { className: "about", textContent: `${row.qid} · ${data.videos[row.video].name.split("/").slice(-2).join("/")}` });
  about.title = `${row.qid} · ${data.videos[row.video].name}`;
  const lanes = lanesOf(row);
  const strip = make("div", { className: "strip", attributes: { role: "img", "aria-label": lanes.map(describe).join("; ") } });
  drawLanes(strip, lanes, row.clip[0], row.clip[1], 14, 4);
  const number = (name, content) => make("td", { dataset: { name } }, content);
  return make("tr", { dataset: { qid: row.qid, index } },
    make("td", { className: "query" }, open, about),
    make("td", { className: "line" }, strip),
    number("IoU", scoreOf(row, row)),
    ...(hasVs ? [number(data.vs, scoreOf(row.vs, row)), number("change", changeOf(row))] : []),
    number("start", row.offsets ? signed(row.offsets[0], 1) : "–"),
    number("end", row.offsets ? signed(row.offsets[1], 1) : "–"),
    number("length", row.duration.toFixed(1)),
  );
}

// Move the focus to a row by its place in the whole list, on another page if need be.
function focusRow(place) {
  if (place < 0 || place >= state.shown.length) return;
  const page = Math.floor(place / PAGE_SIZE);
  if (page !== state.page) turnTo(page);
  const buttons = table.querySelectorAll(".open");
  buttons[state.focus]?.setAttribute("tabindex", "-1");
  state.focus = place % PAGE_SIZE;
  buttons[state.focus].setAttribute("tabindex", "0");
  buttons[state.focus].focus();
}

function onKey(event) {
  if (!event.target.classList.contains("open") || event.altKey || event.ctrlKey || event.metaKey) return;
  const place = state.page * PAGE_SIZE + state.focus;
  const last = state.shown.length - 1;
  const targets = {
    ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: last,
    PageDown: Math.min(place + PAGE_SIZE, last), PageUp: Math.max(place - PAGE_SIZE, 0),
  };
  if (event.key in targets) {
    event.preventDefault();
    focusRow(targets[event.key]);
  }
}

function onClick(event) {
  const element = event.target.closest("tr");
  if (!element || window.getSelection()?.toString()) return;
  const place = state.page * PAGE_SIZE + Number(element.dataset.index);
  const strip = event.target.closest(".strip");
  let time = null;
  if (event.target.dataset.start) time = Number(event.target.dataset.start);
  else if (strip) {
    const box = strip.getBoundingClientRect();
    const { clip } = state.shown[place];
    time = clip[0] + ((event.clientX - box.left) / box.width) * (clip[1] - clip[0]);
  }
  focusRow(place);
  openPlayer(place, time);
}

function buildTable() {
  const head = COLUMNS.map(({ order, title, className }) => {
    const button = make("button", { type: "button", textContent: title });
    button.addEventListener("click", () => sortBy(order, order === state.order ? !state.down : undefined));
    return make("th", { className, scope: "col" }, button);
  });
  table.tHead.append(make("tr", {}, ...head));
  for (const [order, { label, down }] of Object.entries(ORDERS)) {
    for (const isDown of order === "biggest" || order === "place" ? [Boolean(down)] : [Boolean(down), !down]) {
      const suffix = order === "biggest" || order === "place" ? "" : isDown ? " ↓" : " ↑";
      byId("f-sort").append(make("option", { value: `${order} ${isDown ? "down" : "up"}`, textContent: label + suffix }));
    }
  }
  const form = byId("filters");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => { if (event.target.id !== "f-sort") update(); });
  form.addEventListener("reset", () => setTimeout(() => sortBy(Object.keys(ORDERS)[0]), 0));
  byId("f-sort").addEventListener("change", (event) => {
    const [order, way] = event.target.value.split(" ");
    sortBy(order, way === "down");
  });
  for (const button of document.querySelectorAll(".previous")) button.addEventListener("click", () => turnTo(state.page - 1));
  for (const button of document.querySelectorAll(".next")) button.addEventListener("click", () => turnTo(state.page + 1));
  table.addEventListener("keydown", onKey);
  table.tBodies[0].addEventListener("click", onClick);
}
