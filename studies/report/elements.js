"use strict";
// What the charts of a report are drawn with: the data beside this script (charts.py), SVG
// elements, numbers, ticks and scales. chart.js follows in the same script.

const data = JSON.parse(document.getElementById("data").textContent);

// ---- elements, without innerHTML: text stays text

const NAMESPACE = document.querySelector("svg.swatch").namespaceURI;

function set(element, attributes) {
  for (const [key, value] of Object.entries(attributes))
    key === "onclick" ? (element.onclick = value) : element.setAttribute(key, value);
  return element;
}

function node(name, attributes, ...children) {
  const element = set(document.createElement(name), attributes);
  element.append(...children);
  return element;
}

function shape(name, attributes, text = "") {
  const element = set(document.createElementNS(NAMESPACE, name), attributes);
  element.textContent = text;
  return element;
}

const colour = (entry) => `var(--c${data.entries[entry].colour})`;

function marker(entry, x, y, r, attributes = {}) {
  const [w, h] = [r * 0.95, r * 1.1];
  const d = {
    circle: `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`,
    square: `M${x - w} ${y - w}h${2 * w}v${2 * w}h${-2 * w}z`,
    triangle: `M${x} ${y - h}l${h} ${2 * w}h${-2 * h}z`,
    diamond: `M${x} ${y - 1.3 * r}l${r} ${1.3 * r}l${-r} ${1.3 * r}l${-r} ${-1.3 * r}z`,
    cross:
      `M${x - r / 2.5} ${y - r}h${0.8 * r}v${0.6 * r}h${0.6 * r}v${0.8 * r}h${-0.6 * r}` +
      `v${0.6 * r}h${-0.8 * r}v${-0.6 * r}h${-0.6 * r}v${-0.8 * r}h${0.6 * r}z`,
  }[data.entries[entry].marker];
  return shape("path", { class: "marker", d, fill: colour(entry), ...attributes });
}

// ---- numbers

const trimmed = (value, digits) => String(Number(value.toPrecision(digits)));
const long = (value) => (Number.isInteger(value) ? value.toLocaleString("en") : trimmed(value, 5));

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e4)
    return size >= 1e6 ? `${trimmed(value / 1e6, 4)}M` : `${trimmed(value / 1e3, 4)}k`;
  return size && size < 1e-3 ? value.toExponential(0) : trimmed(value, 5);
}

function ticks([low, high], count, log) {
  if (log && high / low > 8) {
    const values = [];
    const factors =
      high / low > 10 ** count ? [1] : high / low > 10 ** (count / 3) ? [1, 3] : [1, 2, 5];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
      values.push(...factors.map((f) => Number(`${f}e${e}`)));
    return values.filter((v) => v >= low && v <= high);
  }
  const raw = (high - low) / count,
    unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * unit >= raw * 0.999) * unit;
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) =>
    Number(((first + i) * step).toPrecision(12)),
  );
}

function scale([low, high], from, to, log) {
  const [f, back] = log ? [Math.log, Math.exp] : [(v) => v, (v) => v];
  const slope = (to - from) / (f(high) - f(low));
  const to_pixel = (v) => from + (f(v) - f(low)) * slope;
  to_pixel.inverse = (pixel) => back(f(low) + (pixel - from) / slope);
  return to_pixel;
}

const span = (values) =>
  values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);

function padded([low, high], log) {
  if (log)
    return low === high
      ? [low / 1.5, high * 1.5]
      : [low * (low / high) ** 0.05, high * (high / low) ** 0.05];
  const margin = (high - low) * 0.03 || Math.abs(high) * 0.1 || 1;
  return [low - margin, high + margin];
}
