// Colours, then the list. Without a choice of the reader's the colours are the system's.

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").setAttribute("aria-pressed", String(theme === "dark"));
}

function buildTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("vtg-report-theme"); } catch { /* a page from a disk may have no storage */ }
  setTheme(chosen === "light" || chosen === "dark" ? chosen : dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => { if (!chosen) setTheme(dark.matches ? "dark" : "light"); });
  byId("theme").addEventListener("click", () => {
    chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    setTheme(chosen);
    try { localStorage.setItem("vtg-report-theme", chosen); } catch { /* as above */ }
  });
}

buildTheme();
buildTable();
buildPlayer();
sortBy(state.order);
