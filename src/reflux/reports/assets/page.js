"use strict";
// Charts: the page contains the compressed library. The browser unpacks it, and the page's policy allows it by its hash.
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function themed() {
  const axis = { gridcolor: colour("--grid"), linecolor: colour("--line"), tickcolor: colour("--line") };
  const changes = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", "font.color": colour("--ink"),
    "font.family": getComputedStyle(document.body).fontFamily, "font.size": 13,
    "hoverlabel.bgcolor": colour("--card"), "hoverlabel.bordercolor": colour("--line"), "hoverlabel.font.color": colour("--ink"),
  };
  for (const which of ["xaxis", "yaxis"]) for (const [key, value] of Object.entries(axis)) changes[`${which}.${key}`] = value;
  return changes;
}

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (char) => char.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

async function drawCharts() {
  const boxes = [...document.querySelectorAll("[data-chart]")];
  if (!boxes.length) return;
  const script = document.createElement("script");
  script.textContent = await unpacked("library");
  document.head.append(script);
  const touch = matchMedia("(pointer: coarse)").matches;
  for (const box of boxes) {
    const figure = JSON.parse(document.getElementById(box.dataset.chart).textContent);
    if (touch) figure.layout.dragmode = false;
    box.replaceChildren();
    await Plotly.newPlot(box, figure.data, figure.layout, { responsive: true, displaylogo: false, displayModeBar: false });
    await Plotly.relayout(box, themed());
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => boxes.forEach((box) => Plotly.relayout(box, themed())));
}

// Tokens: one tooltip for all tokens. Without this script, the browser shows the same text as titles.
const tip = document.getElementById("tip");

function show(token) {
  if (token.title) {
    token.dataset.words = token.title;
    token.removeAttribute("title");
  }
  tip.textContent = token.dataset.words;
  tip.hidden = false;
  const box = token.getClientRects()[0], size = tip.getBoundingClientRect();
  const below = box.top < size.height + 12;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - size.width - 8))}px`;
  tip.style.top = `${below ? box.bottom + 8 : box.top - size.height - 8}px`;
}

function hide() {
  tip.hidden = true;
}

function walk(event) {
  const group = event.currentTarget, tokens = [...group.querySelectorAll(".t")];
  const at = tokens.indexOf(document.activeElement), last = tokens.length - 1;
  const moves = { ArrowRight: at + 1, ArrowDown: at + 10, ArrowLeft: at - 1, ArrowUp: at - 10, Home: 0, End: last };
  if (event.key === "Escape") group.focus();
  if (!(event.key in moves)) return;
  event.preventDefault();
  const token = tokens[Math.max(0, Math.min(last, moves[event.key]))];
  token.tabIndex = -1;
  token.setAttribute("aria-describedby", "tip");
  token.focus();
}

for (const group of document.querySelectorAll(".tokens")) {
  const act = (event) => (event.target.classList.contains("t") ? show(event.target) : hide());
  for (const kind of ["mouseover", "focusin", "click"]) group.addEventListener(kind, act);
  for (const kind of ["mouseleave", "focusout"]) group.addEventListener(kind, hide);
  group.addEventListener("keydown", walk);
}
const follow = () => (document.activeElement.matches(".tokens .t") ? show(document.activeElement) : hide());
addEventListener("scroll", follow, { passive: true, capture: true });
drawCharts();
