// Small pieces that the other scripts use. Text reaches the page as text, never as HTML.

const byId = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const { dataset = {}, style = {}, attributes = {}, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, dataset);
  Object.assign(element.style, style);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// 12.5, 3:05.0 or 1:02:03, by the length of what is shown.
function formatTime(seconds, longest) {
  if (seconds === null || !Number.isFinite(seconds)) return "?";
  if (Math.abs(seconds) >= 1e7) return seconds.toPrecision(3);
  const sign = seconds < 0 ? "−" : "";
  const value = Math.abs(seconds);
  if (longest < 60) return sign + value.toFixed(longest < 10 ? 2 : 1);
  const tenths = Math.round(value * 10);
  const minutes = Math.floor(tenths / 600);
  const rest = ((tenths % 600) / 10).toFixed(1).padStart(4, "0");
  if (longest < 3600) return `${sign}${minutes}:${rest}`;
  return `${sign}${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}:${rest}`;
}

const unitOf = (longest) => (longest < 60 ? " s" : "");
const formatWindow = (window, longest) =>
  `${formatTime(window[0], longest)} – ${formatTime(window[1], longest)}${unitOf(longest)}`;
const signed = (value, digits) => {
  if (value === null || value === undefined) return "–";
  const words = Math.abs(value).toFixed(digits);
  return Number(words) === 0 ? words : (value < 0 ? "−" : "+") + words;
};

const isDrawn = (window) => Number.isFinite(window[0] ?? NaN) && Number.isFinite(window[1] ?? NaN);

// The rows of a timeline: what is labelled, what was answered, and what the other evaluation answered.
function lanesOf(row) {
  const lanes = [
    { kind: "truth", name: "labelled", windows: row.truth, counted: null, note: row.truth.length ? "" : "labelled absent" },
    { kind: "prediction", name: data.name, ...laneOfAnswer(row) },
  ];
  if (data.vs !== null) lanes.push({ kind: "vs", name: data.vs, ...laneOfAnswer(row.vs) });
  return lanes;
}

function laneOfAnswer(answer) {
  if (!answer) return { windows: [], counted: null, note: "not evaluated" };
  const windows = answer.pred ?? [];
  let note = "";
  if (answer.fault) note = "video unreadable";
  else if (answer.pred === null) note = "unparsable";
  else if (!windows.length) note = "says absent";
  else if (!windows.some(isDrawn)) note = "not a window in time";
  return { windows, counted: answer.counted, note };
}

// Bars of the lanes on an axis from `first` to `last` seconds; `pitch` pixels from lane to lane.
function drawLanes(parent, lanes, first, last, pitch, margin) {
  const span = last - first || 1;
  parent.replaceChildren();
  parent.style.height = `${lanes.length * pitch + margin}px`;
  lanes.forEach((lane, place) => {
    const top = `${place * pitch + margin}px`;
    if (lane.note) parent.append(make("span", { className: "nothing", textContent: lane.note, style: { top } }));
    const order = lane.windows.map((_, index) => index).sort((a, b) => (a === lane.counted) - (b === lane.counted));
    for (const index of order) {
      const window = lane.windows[index];
      if (!isDrawn(window)) continue;
      const start = Math.min(Math.max((window[0] - first) / span, 0), 0.995);
      const end = Math.min(Math.max((window[1] - first) / span, start), 1);
      const isFaint = lane.counted !== null && lane.counted !== index;
      parent.append(make("div", {
        className: `window ${lane.kind}${isFaint ? " faint" : ""}`,
        title: `${lane.name}: ${formatWindow(window, last)}`,
        dataset: { start: window[0], kind: lane.kind },
        style: { left: `${100 * start}%`, width: `${100 * (end - start)}%`, top },
      }));
    }
  });
}
