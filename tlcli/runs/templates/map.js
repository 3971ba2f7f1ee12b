"use strict";
const data = JSON.parse(document.getElementById("points").textContent);
const canvas = document.querySelector("canvas"), card = document.querySelector(".card");
const legend = document.querySelector(".legend"), dark = matchMedia("(prefers-color-scheme: dark)");
const margin = 12, n = data.classes.length, aspect = Math.max(...data.y);
let chosen = null, current = -1, size = 0;

// Hues that differ as much as they can; every second class is darker, so that neighbors differ in two ways
const color = (k) => k < 0 ? "#8a8f96" : `hsl(${(360 * k) / n + 210} 70% ${(dark.matches ? 62 : 46) - (k % 2 ? 14 : 0)}%)`;
const place = (i) => [data.x[i], aspect - data.y[i]].map((v) => margin + v * (size - 2 * margin));
const isShown = (i) => chosen === null || data.label[i] === chosen;

function draw() {
  const ratio = window.devicePixelRatio || 1, context = canvas.getContext("2d");
  size = canvas.clientWidth;
  canvas.width = Math.round(size * ratio);
  canvas.height = Math.round((aspect * (size - 2 * margin) + 2 * margin) * ratio);
  context.scale(ratio, ratio);
  const radius = Math.max(2, Math.min(5, size / 12 / Math.sqrt(data.x.length)) + 1);
  for (const front of [false, true]) {
    for (let i = 0; i < data.x.length; i++) {
      if (isShown(i) !== front) continue;
      const [x, y] = place(i);
      context.globalAlpha = front ? 0.85 : 0.12;
      context.fillStyle = color(data.label[i]);
      context.beginPath();
      context.arc(x, y, i === current ? radius + 3 : radius, 0, 7);
      context.fill();
    }
  }
}

function show(event) {
  const box = canvas.getBoundingClientRect(), at = [event.clientX - box.left, event.clientY - box.top];
  let nearest = -1, least = 16 ** 2;
  for (let i = 0; i < data.x.length; i++) {
    const [x, y] = place(i), distance = (x - at[0]) ** 2 + (y - at[1]) ** 2;
    if (isShown(i) && distance < least) [nearest, least] = [i, distance];
  }
  if (nearest === current) return;
  current = nearest;
  card.hidden = current < 0;
  draw();
  if (current < 0) return;
  card.querySelector("img").src = data.image[current];
  card.querySelector("strong").textContent = data.classes[data.label[current]] || "";
  card.querySelector("bdi").textContent = data.path[current];
  const [x, y] = place(current), below = y < canvas.clientHeight / 2;
  card.style.left = Math.max(0, Math.min(size - card.offsetWidth, x - card.offsetWidth / 2)) + "px";
  card.style.top = (below ? y + 14 : y - 14 - card.offsetHeight) + "px";
}

data.classes.forEach((name, k) => {
  const button = document.createElement("button"), dot = document.createElement("i"), text = document.createElement("bdi");
  text.textContent = name;
  button.append(dot, text);
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    chosen = chosen === k ? null : k;
    [...legend.children].forEach((one, j) => one.setAttribute("aria-pressed", String(j === chosen)));
    draw();
  });
  legend.append(button);
});

function paint() {
  [...legend.children].forEach((button, k) => { button.firstChild.style.background = color(k); });
  draw();
}

for (const kind of ["pointermove", "pointerdown"]) canvas.addEventListener(kind, show);
canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") show({ clientX: -99, clientY: -99 }); });
dark.addEventListener("change", paint);
new ResizeObserver(draw).observe(canvas);
paint();
