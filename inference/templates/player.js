// The dialog of one query: its video, a seek bar with the windows, and what was answered.

const dialog = byId("player");
const video = byId("video");
const seekBar = byId("seek");
const player = { place: 0, row: null, first: 0, last: 1, wanted: null, frame: 0 };

function openPlayer(place, time = null) {
  const row = state.shown[place];
  const start = time ?? row.pred?.[row.counted ?? 0]?.[0] ?? row.truth[0]?.[0] ?? row.clip[0];
  const isSame = dialog.open && player.row?.video === row.video;
  Object.assign(player, { place, row });
  showRow();
  if (!dialog.open) dialog.showModal();
  if (isSame && video.readyState > 0) seek(start);
  else loadVideo(data.videos[row.video], start);
  seekBar.focus({ focusVisible: false });
}

function loadVideo({ src, note }, start) {
  player.wanted = start;
  player.triedUri = false;
  video.parentElement.classList.toggle("failed", src === null);
  byId("video-note").textContent = note ? `There is no video to show. ${note}` : "";
  if (src === null) video.removeAttribute("src");
  else video.src = src;
  video.load();
  drawCursor();
}

function onVideoError() {
  if (!video.hasAttribute("src")) return;
  const { uri } = data.videos[player.row.video];
  if (uri && location.protocol === "file:" && video.src !== uri && !player.triedUri) {
    player.triedUri = true;  // the report was moved, or opened through a link
    video.src = uri;
    video.load();
    return;
  }
  video.parentElement.classList.add("failed");
  byId("video-note").textContent =
    `This video cannot be played: it is no longer at ${decodeURI(video.src)}, or it is in a format that this browser does not know.`;
}

function onMetadata() {
  setRange();
  if (player.wanted !== null) seek(player.wanted);
}

function seek(time) {
  player.wanted = time;
  if (video.readyState > 0) {
    const most = Number.isFinite(video.duration) ? video.duration : Infinity;
    video.currentTime = Math.min(Math.max(time, 0), most);
    player.wanted = null;
  }
  drawCursor();
}

const now = () => player.wanted ?? video.currentTime;

// The axis: the clip, or the whole file where the clip is the file.
function setRange() {
  const { row } = player;
  const whole = row.trimmed || !Number.isFinite(video.duration) ? 0 : video.duration;
  player.first = row.clip[0];
  player.last = Math.max(row.clip[1], whole);
  drawLanes(seekBar.querySelector(".lanes"), lanesOf(row), player.first, player.last, 22, 4);
  byId("seek-start").textContent = formatTime(player.first, player.last);
  byId("seek-end").textContent = formatTime(player.last, player.last) + unitOf(player.last);
  seekBar.setAttribute("aria-valuemin", player.first.toFixed(1));
  seekBar.setAttribute("aria-valuemax", player.last.toFixed(1));
  drawCursor();
}

function drawCursor() {
  const time = now();
  const share = Math.min(Math.max((time - player.first) / (player.last - player.first || 1), 0), 1);
  seekBar.querySelector(".cursor").style.left = `${100 * share}%`;
  const output = byId("seek-now");
  output.textContent = formatTime(time, player.last) + unitOf(player.last);
  output.style.left = `${100 * Math.min(Math.max(share, 0.04), 0.96)}%`;
  const box = output.getBoundingClientRect();
  for (const end of [byId("seek-start"), byId("seek-end")]) {
    const { left, right } = end.getBoundingClientRect();
    end.style.visibility = right + 6 > box.left && left - 6 < box.right ? "hidden" : "";
  }
  seekBar.setAttribute("aria-valuenow", time.toFixed(1));
  seekBar.setAttribute("aria-valuetext", `${formatTime(time, player.last)}${unitOf(player.last)}`);
}

function animate() {
  cancelAnimationFrame(player.frame);
  drawCursor();
  if (!video.paused && !video.ended) player.frame = requestAnimationFrame(animate);
}

function showRow() {
  const { row, place } = player;
  byId("player-title").textContent = row.sentence;
  byId("player-previous").disabled = place === 0;
  byId("player-next").disabled = place >= state.shown.length - 1;
  const names = lanesOf(row).map((lane) => make("span", { textContent: lane.name, title: lane.name }));
  dialog.querySelector(".lanes-names").replaceChildren(...names);
  setRange();
  byId("jumps").replaceChildren(...lanesOf(row).flatMap(jumpsOf));
  byId("facts").replaceChildren(...factsOf(row).flatMap(([name, value, isLong]) => [
    make("div", { className: isLong ? "long" : "" }, make("dt", { textContent: name }), make("dd", {}, value)),
  ]));
  byId("answers").replaceChildren(...[[data.name, row], [data.vs, row.vs]].flatMap(([name, answer]) =>
    answer?.fault || answer?.text
      ? [make("p", { textContent: answer.fault ? `${name}: the video could not be read` : `${name} answered` }), make("pre", { textContent: answer.fault ?? answer.text })]
      : []));
}

function jumpsOf(lane) {
  return lane.windows.filter(isDrawn).map((window) => {
    const words = formatWindow(window, player.last);
    const score = window.length > 2 && window[2] !== null ? ` · score ${window[2].toFixed(2)}` : "";
    const button = make("button", { type: "button", dataset: { kind: lane.kind }, attributes: { "aria-label": `Jump to ${lane.name}, ${words}${score}` } },
      make("i", { className: lane.kind }), `${lane.name} ${words}${score}`);
    button.addEventListener("click", () => seek(window[0]));
    return button;
  });
}

function factsOf(row) {
  const facts = [["IoU", scoreOf(row, row)]];
  if (row.vs) facts.push([`IoU, ${data.vs}`, scoreOf(row.vs, row)], ["change", changeOf(row)]);
  if (row.offsets) facts.push(["start, predicted − labelled", `${signed(row.offsets[0], 2)} s`], ["end, predicted − labelled", `${signed(row.offsets[1], 2)} s`]);
  if (row.ious.length > 1) facts.push(["IoU of each window", row.ious.map((iou) => iou.toFixed(2)).join(", ")]);
  if (row.trimmed) facts.push(["searched stretch of the file", formatWindow(row.clip, row.clip[1])]);
  else facts.push(["duration", `${row.duration.toFixed(1)} s`]);
  facts.push(["qid", row.qid], ["line of the annotations", String(row.line)]);
  for (const [key, value] of Object.entries(row.groups)) facts.push([key, value]);
  facts.push(["video", data.videos[row.video].name, true]);
  return facts;
}

function step(by) {
  const place = player.place + by;
  if (place >= 0 && place < state.shown.length) openPlayer(place);
}

function jumpTo(kind) {
  byId("jumps").querySelector(`[data-kind="${kind}"]`)?.click();
}

function onPlayerKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target === video) return;
  const isButton = event.target.tagName === "BUTTON";
  const seconds = event.shiftKey ? 5 : 1;
  const actions = {
    ArrowLeft: () => seek(Math.max(now() - seconds, 0)),
    ArrowRight: () => seek(now() + seconds),
    Home: () => seek(player.first),
    End: () => seek(player.last),
    j: () => step(1), k: () => step(-1), t: () => jumpTo("truth"), p: () => jumpTo("prediction"),
    ...(isButton ? {} : { " ": () => (video.paused ? video.play().catch(() => {}) : video.pause()) }),
  };
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (action) {
    event.preventDefault();
    action();
  }
}

function timeAt(event) {
  const box = seekBar.getBoundingClientRect();
  return player.first + Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * (player.last - player.first);
}

function onPointer(event) {
  if (event.type === "pointerdown") {
    seekBar.setPointerCapture(event.pointerId);
    seek(event.target.dataset.start ? Number(event.target.dataset.start) : timeAt(event));
  } else if (event.buttons & 1 && seekBar.hasPointerCapture(event.pointerId) && Math.abs(event.movementX) > 0) seek(timeAt(event));
}

function onClose() {
  video.pause();
  video.removeAttribute("src");
  video.load();
  focusRow(player.place);
}

function buildPlayer() {
  video.addEventListener("error", onVideoError);
  video.addEventListener("loadedmetadata", onMetadata);
  for (const name of ["play", "seeked", "timeupdate", "pause"]) video.addEventListener(name, animate);
  seekBar.addEventListener("pointerdown", onPointer);
  seekBar.addEventListener("pointermove", onPointer);
  dialog.addEventListener("keydown", onPlayerKey);
  dialog.addEventListener("close", onClose);
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  byId("player-close").addEventListener("click", () => dialog.close());
  byId("player-previous").addEventListener("click", () => step(-1));
  byId("player-next").addEventListener("click", () => step(1));
}
