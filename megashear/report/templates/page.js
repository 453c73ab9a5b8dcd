"use strict";
// Show the values of a figure's lines under the pointer. A figure is complete without it.
const tip = document.getElementById("tip");

function range(area, name) {
  const ends = area.dataset[name].split(" ").map(Number);
  const log = name === "x" && "log" in area.dataset;
  const [low, high] = log ? ends.map(Math.log) : ends;
  return at => log ? Math.exp(low + at * (high - low)) : low + at * (high - low);
}

function show(value) {
  return Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : +value.toPrecision(4);
}

function follow(area) {
  const svg = area.querySelector("svg"), {width, height} = svg.viewBox.baseVal;
  const x = range(area, "x"), y = range(area, "y");
  const lines = [...area.querySelectorAll("polyline")].map(line => ({
    name: line.dataset.name,
    points: line.getAttribute("points").split(" ").map(point => point.split(",").map(Number)),
  }));
  const cursor = document.createElement("div");
  cursor.className = "cursor";
  const hide = () => { tip.hidden = true; cursor.remove(); };
  area.addEventListener("pointerleave", hide);
  area.addEventListener("pointermove", event => {
    const box = area.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * width;
    const near = points => points.reduce(
      (best, point) => Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best);
    const found = lines.map(({name, points}) => [name, near(points)]);
    const nearest = near(found.map(([, point]) => point));
    const texts = found.map(([name, point]) => `${name}: ${show(y(1 - point[1] / height))}`);
    tip.textContent = [`${area.dataset.unit} ${show(x(nearest[0] / width))}`, ...texts].join("\n");
    tip.hidden = false;
    const beyond = event.clientX + tip.offsetWidth + 20 > innerWidth;
    tip.style.left = `${Math.max(0, event.clientX + (beyond ? -tip.offsetWidth - 14 : 14))}px`;
    tip.style.top = `${event.clientY + 14}px`;
    cursor.style.left = `${100 * nearest[0] / width}%`;
    area.append(cursor);
  });
}

for (const area of document.querySelectorAll(".area[data-x]")) {
  area.addEventListener("pointerenter", () => follow(area), {once: true});
}
