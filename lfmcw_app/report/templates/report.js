"use strict";
// Values under the pointer, read back from the drawn lines by the chart's own scale.
const tip = document.getElementById("tip");
for (const svg of document.querySelectorAll(".chart > svg")) {
  const [x0, x1, y0, y1] = svg.dataset.domain.split(" ").map(Number);
  const [left, top, right, bottom] = svg.dataset.box.split(" ").map(Number);
  const log = svg.dataset.log === "1";
  const lines = [...svg.querySelectorAll(".mean")].map(line => ({
    label: line.dataset.label, colour: line.style.stroke,
    points: line.getAttribute("points").split(" ").map(pair => pair.split(",").map(Number)),
  }));
  const hair = document.createElementNS("http://www.w3.org/2000/svg", "line");
  hair.setAttribute("class", "hair"); hair.setAttribute("y1", top); hair.setAttribute("y2", bottom); hair.style.display = "none";
  svg.append(hair);
  const value = y => {
    const share = (bottom - y) / (bottom - top);
    return log ? y0 * Math.pow(y1 / y0, share) : y0 + share * (y1 - y0);
  };
  let at = right;
  const read = (clientX, clientY) => {
    const box = svg.getBoundingClientRect(), unit = (right - left) / box.width;
    const x = at = Math.min(Math.max((clientX - box.left) * unit, left), right);
    for (const end of ["x1", "x2"]) hair.setAttribute(end, `${100 * x / right}%`);
    hair.style.display = "";
    const rows = [`round ${Math.round(x0 + (x - left) / (right - left) * (x1 - x0)).toLocaleString("en")}`];
    tip.replaceChildren(document.createTextNode(rows[0]));
    for (const { label, colour, points } of lines) {
      let next = points.findIndex(point => point[0] >= x);
      if (next < 0) {
        if (x > points[points.length - 1][0] + 1) continue; // it has ended
        next = points.length - 1;
      }
      const [a, b] = [points[Math.max(next - 1, 0)], points[next]];
      const share = b[0] > a[0] ? (Math.min(x, b[0]) - a[0]) / (b[0] - a[0]) : 0;
      const row = document.createElement("div"), key = document.createElement("i");
      key.style.background = colour;
      row.append(key, `${label} ${Number(value(a[1] + share * (b[1] - a[1])).toPrecision(3))}`);
      tip.append(row);
    }
    tip.hidden = false;
    const size = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(clientX + 14, innerWidth - size.width - 6))}px`;
    tip.style.top = `${Math.max(4, clientY - size.height - 12)}px`;
  };
  const leave = () => { tip.hidden = true; hair.style.display = "none"; };
  svg.addEventListener("pointermove", event => read(event.clientX, event.clientY));
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", event => {
    if (event.key === "Escape") return leave();
    const steps = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!steps) return;
    event.preventDefault();
    const box = svg.getBoundingClientRect(), unit = (right - left) / box.width;
    const width = Math.max((right - left) / 50, (right - left) / Math.max(x1 - x0, 1)); // a round, or more
    read(box.left + (tip.hidden ? at : at + steps * width) / unit, box.top + 40);
  });
}

// The slider through the recorded α.
const frames = document.getElementById("frames");
if (frames) {
  const data = JSON.parse(frames.textContent);
  const slider = document.querySelector(".slider"), input = slider.querySelector("input"), button = slider.querySelector("button");
  const several = new Set(data.frames.map(frame => frame.stage)).size > 1;
  const show = index => {
    const frame = data.frames[index];
    document.querySelector("[data-frame]").textContent = `round ${frame.round}${several ? `, ${frame.stage}` : ""}`;
    for (const table of document.querySelectorAll(".alpha")) {
      const kind = table.dataset.kind, [low, high] = data.ranges[kind], cells = table.querySelectorAll("td");
      const chosen = new Set(frame.chosen[kind].map(String));
      frame.weights[kind].forEach((row, edge) => row.forEach((weight, column) => {
        const cell = cells[edge * row.length + column];
        cell.className = weight === null ? "w gone" : chosen.has(`${edge},${column}`) ? "w chosen" : "w";
        const relative = frame.relative[kind][edge][column];
        const share = weight === null || high <= low ? 0 : (relative / 1000 - low) / (high - low);
        cell.style.setProperty("--share", `${Math.round(100 * Math.min(Math.max(share, 0), 1))}%`);
        cell.textContent = weight === null ? "" : (weight / 10).toFixed(1);
      }));
    }
  };
  let timer = 0;
  const stop = () => { clearInterval(timer); timer = 0; button.textContent = "▶"; button.setAttribute("aria-label", "play"); };
  input.addEventListener("input", () => { stop(); show(Number(input.value)); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(input.value) >= data.frames.length - 1) input.value = -1;
    button.textContent = "❚❚"; button.setAttribute("aria-label", "pause");
    timer = setInterval(() => {
      input.value = Number(input.value) + 1; show(Number(input.value));
      if (Number(input.value) >= data.frames.length - 1) stop();
    }, 160);
  });
  slider.hidden = data.frames.length < 2;
}
