"use strict";
// Draws the charts of a report from the data beside this script (studies/report.py, `charts`), again at each change of width, axis, zoom or legend.
// A view is {x: [low, high], y: [low, high]} in the data's units; a `scale` takes them to pixels.

const data = JSON.parse(document.getElementById("data").textContent);
const [hidden, drawn] = [new Set(), []]; // entries, in all charts; charts
const PAD = { left: 58, right: 16, top: 26, bottom: 44 };
const REACH = 30; // pixels around a point that the pointer finds it in

// ---- elements, without innerHTML: text stays text

const NAMESPACE = document.querySelector("svg.swatch").namespaceURI;

function set(element, attributes) {
  for (const [key, value] of Object.entries(attributes)) key === "onclick" ? (element.onclick = value) : element.setAttribute(key, value);
  return element;
}

function node(name, attributes, ...children) {
  const made = set(document.createElement(name), attributes);
  made.append(...children);
  return made;
}

function shape(name, attributes, text = "") {
  const made = set(document.createElementNS(NAMESPACE, name), attributes);
  made.textContent = text;
  return made;
}

const colour = (entry) => `var(--c${data.entries[entry].colour})`;

function marker(entry, x, y, r, attributes = {}) {
  const [w, h] = [r * 0.95, r * 1.1];
  const d = {
    circle: `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`,
    square: `M${x - w} ${y - w}h${2 * w}v${2 * w}h${-2 * w}z`,
    triangle: `M${x} ${y - h}l${h} ${2 * w}h${-2 * h}z`,
    diamond: `M${x} ${y - 1.3 * r}l${r} ${1.3 * r}l${-r} ${1.3 * r}l${-r} ${-1.3 * r}z`,
    cross: `M${x - r / 2.5} ${y - r}h${0.8 * r}v${0.6 * r}h${0.6 * r}v${0.8 * r}h${-0.6 * r}v${0.6 * r}h${-0.8 * r}v${-0.6 * r}h${-0.6 * r}v${-0.8 * r}h${0.6 * r}z`,
  }[data.entries[entry].marker];
  return shape("path", { class: "marker", d, fill: colour(entry), ...attributes });
}

// ---- numbers

const trimmed = (value, digits) => String(Number(value.toPrecision(digits)));
const long = (value) => (Number.isInteger(value) ? value.toLocaleString("en") : trimmed(value, 5));

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e4) return size >= 1e6 ? `${trimmed(value / 1e6, 4)}M` : `${trimmed(value / 1e3, 4)}k`;
  return size && size < 1e-3 ? value.toExponential(0) : trimmed(value, 5);
}

function ticks([low, high], count, log) {
  if (log && high / low > 8) {
    const found = [];
    const factors = high / low > 10 ** count ? [1] : high / low > 10 ** (count / 3) ? [1, 3] : [1, 2, 5];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) found.push(...factors.map((f) => Number(`${f}e${e}`)));
    return found.filter((v) => v >= low && v <= high);
  }
  const raw = (high - low) / count, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * unit >= raw * 0.999) * unit;
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function scale([low, high], from, to, log) {
  const [f, back] = log ? [Math.log, Math.exp] : [(v) => v, (v) => v];
  const slope = (to - from) / (f(high) - f(low));
  const to_pixel = (v) => from + (f(v) - f(low)) * slope;
  to_pixel.inverse = (pixel) => back(f(low) + (pixel - from) / slope);
  return to_pixel;
}

const span = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);

function padded([low, high], log) {
  if (log) return low === high ? [low / 1.5, high * 1.5] : [low * (low / high) ** 0.05, high * (high / low) ** 0.05];
  const margin = (high - low) * 0.03 || Math.abs(high) * 0.1 || 1;
  return [low - margin, high + margin];
}

// ---- a chart

class Chart {
  constructor(figure) {
    this.spec = data.charts[Number(figure.dataset.chart)];
    this.figure = figure;
    this.column = 0;
    this.log = false; // the axis of losses
    this.choice = this.spec.filters.map(() => 0);
    this.view = null; // what was zoomed to; null: `home`
    this.points = []; // what the pointer can find: {x, y, line, point}
    this.at = null; // of them, the one that is told
    this.legend = node("div", { class: "legend", role: "group", "aria-label": "entries" });
    // Not a title element, which browsers show over what the pointer is told.
    this.svg = shape("svg", { class: "chart", tabindex: 0, role: "img", "aria-label": `${this.spec.title}. ${this.spec.about}` });
    this.tip = node("div", { class: "tip", role: "status" });
    figure.querySelector("noscript").after(this.controls(), this.legend, this.svg, this.tip);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(figure);
  }

  // Groups of buttons of which one is pressed, and the zoom's.
  controls() {
    const { x, filters } = this.spec;
    const groups = [];
    const group = (label, names, current, pick) => {
      const buttons = names.map((name, i) =>
        node("button", { type: "button", "aria-pressed": i === current, onclick: () => (buttons.forEach((b, j) => b.setAttribute("aria-pressed", i === j)), pick(i), this.draw()) }, name));
      groups.push(node("span", { role: "group", "aria-label": label }, label, ...buttons));
    };
    if (x.length > 1) group("against", x.map((a) => a.name), 0, (i) => ((this.column = i), (this.view = null)));
    filters.forEach((f, k) => f.options.length > 1 && group(f.label, f.options, 0, (i) => (this.choice[k] = i)));
    group("loss axis", ["linear", "log"], 0, (i) => (this.log = i === 1));
    const zoom = [["+", "zoom in", 0.6], ["−", "zoom out", 1 / 0.6], ["reset", "reset the zoom", null]].map(([text, label, factor]) =>
      node("button", { type: "button", "aria-label": label, onclick: () => (factor ? this.zoom(factor) : (this.view = null), this.draw()) }, text));
    groups.push(node("span", { role: "group", "aria-label": "zoom" }, "zoom", ...zoom));
    return node("div", { class: "controls" }, ...groups);
  }

  shown() {
    const { lines, filters } = this.spec;
    return lines.filter((l) => !hidden.has(l.entry) && filters.every((f, k) => l.within[k].includes(f.options[this.choice[k]])));
  }

  home() {
    const axis = this.spec.x[this.column];
    const values = this.shown().flatMap((l) => l.points.map((p) => p[this.column]));
    const all = values.length ? values : this.spec.lines.flatMap((l) => l.points.map((p) => p[this.column]));
    const x = axis.categories ? [-0.5, axis.categories.length - 0.5] : padded(span(all), axis.log);
    return { x, y: [...this.spec.view] };
  }

  zoom(factor, at = [0.7, 0.2]) { // where curves end
    const { x, y } = this.scales;
    const around = (s, share, from, to) => [s.inverse(from + (to - from) * share * (1 - factor)), s.inverse(to - (to - from) * (1 - share) * (1 - factor))];
    this.view = { x: around(x, at[0], ...this.area.x), y: around(y, at[1], ...this.area.y) };
  }

  draw() {
    const width = this.figure.clientWidth, height = Math.round(Math.min(460, Math.max(280, width * 0.5)));
    if (!width) return;
    const view = this.view ?? this.home(), axis = this.spec.x[this.column];
    if (this.log && view.y[0] <= 0) view.y[0] = view.y[1] / 1e3;
    this.area = { x: [PAD.left, width - PAD.right], y: [height - PAD.bottom, PAD.top] };
    const [x, y] = [scale(view.x, ...this.area.x, axis.log), scale(view.y, ...this.area.y, this.log)];
    this.scales = { x, y };
    this.points = [];
    set(this.svg, { viewBox: `0 0 ${width} ${height}` }).replaceChildren();
    this.axes(view, x, y, width, height);
    // An SVG within: it clips what is outside of its rectangle.
    const [left, top] = [PAD.left, PAD.top - 6];
    const frame = { x: left, y: top, width: width - left - PAD.right, height: height - top - PAD.bottom };
    const inside = shape("svg", { ...frame, viewBox: Object.values(frame).join(" ") });
    this.svg.append(inside);
    const { target, marks } = this.spec;
    if (target !== null) {
      inside.append(shape("path", { class: "target", d: `M${PAD.left} ${y(target)}H${width - PAD.right}` }));
      inside.append(shape("text", { x: PAD.left + 5, y: y(target) - 5 }, `target ${long(target)}`));
    }
    for (const line of this.shown()) this.line(line, x, y, inside);
    for (const { entry, point, label } of marks)
      if (!hidden.has(entry)) {
        inside.append(shape("circle", { class: "mark", cx: x(point[0]), cy: y(point[1]), r: 8, fill: "none", stroke: colour(entry), "stroke-width": 2 }));
        this.points.push({ x: x(point[0]), y: y(point[1]), label, point });
      }
    this.hit = shape("circle", { class: "hit", r: 6, visibility: "hidden" });
    this.box = shape("rect", { class: "box", visibility: "hidden" });
    this.svg.append(this.hit, this.box);
    this.points = this.points.filter((p) => p.x >= PAD.left - 1 && p.x <= width - PAD.right + 1 && p.y >= PAD.top - 7 && p.y <= height - PAD.bottom + 1);
    this.tell(null);
    this.legend.replaceChildren(...this.keys());
  }

  axes(view, x, y, width, height) {
    const axis = this.spec.x[this.column], names = axis.categories, bottom = height - PAD.bottom;
    for (const v of ticks(view.y, 6, this.log)) {
      this.svg.append(shape("path", { class: "grid", d: `M${PAD.left} ${y(v)}H${width - PAD.right}` }));
      this.svg.append(shape("text", { x: PAD.left - 8, y: y(v) + 4, "text-anchor": "end" }, short(v)));
    }
    for (const v of names ? names.map((_, i) => i).filter((i) => i >= view.x[0] && i <= view.x[1]) : ticks(view.x, Math.max(3, width / 130), axis.log)) {
      this.svg.append(shape("path", { class: "grid", d: `M${x(v)} ${PAD.top}V${bottom}` }));
      this.svg.append(shape("text", { x: x(v), y: bottom + 17, "text-anchor": "middle" }, names ? names[v] : short(v)));
    }
    this.svg.append(shape("text", { x: 4, y: 14 }, this.spec.y));
    this.svg.append(shape("text", { x: width - PAD.right, y: height - 6, "text-anchor": "end" }, axis.label));
  }

  line(line, x, y, inside) {
    const { entry, kind, bars } = line;
    const last = this.spec.x.length; // the loss's place in a point
    const places = line.points.map((p) => ({ x: x(p[this.column]), y: p[last] === null ? null : y(p[last]), line, point: p }));
    const path = (points) => points.map((p, i) => `${i ? "L" : "M"}${p.x.toFixed(1)} ${p.y.toFixed(1)}`).join("");
    const finite = places.filter((p) => p.y !== null);
    if (kind === "band") {
      const edge = (k) => line.points.map((p, i) => ({ x: places[i].x, y: y(p.at(k)) }));
      inside.append(shape("path", { class: "band", d: `${path(edge(-1))}L${path(edge(-2).reverse()).slice(1)}Z`, fill: colour(entry) }));
      return;
    }
    if (kind !== "dots") inside.append(shape("path", { class: "line", d: path(finite), stroke: colour(entry), "stroke-dasharray": data.entries[entry].dash.join(" ") }));
    const marked = kind === "line" ? finite.slice(-1) : finite; // of a line its end alone
    inside.append(...marked.map((p) => marker(entry, p.x, p.y, kind === "joined" ? 5 : 3.5, { opacity: kind === "dots" ? 0.6 : 1 })));
    (bars ?? []).forEach((bar, i) => {
      if (bar) inside.append(shape("path", { class: "bar", d: `M${places[i].x} ${y(bar[0])}V${y(bar[1])}M${places[i].x - 4} ${y(bar[0])}h8M${places[i].x - 4} ${y(bar[1])}h8`, stroke: colour(entry), "stroke-width": 1.5 }));
    });
    for (const p of places.filter((p) => p.y === null)) {
      p.y = PAD.top;
      inside.append(shape("path", { class: "diverged", d: `M${p.x - 5} ${p.y - 5}l10 10m0 -10l-10 10`, stroke: colour(entry), "stroke-width": 2.5 }));
    }
    for (const p of places) if (Number.isFinite(p.y)) this.points.push(p);
  }

  keys() {
    const present = [...new Set(this.spec.lines.map((l) => l.entry))].sort((a, b) => a - b);
    return present.map((entry) => {
      const swatch = shape("svg", { width: 34, height: 12, "aria-hidden": "true" });
      swatch.append(shape("path", { d: "M0 6H34", stroke: colour(entry), "stroke-width": 2, "stroke-dasharray": data.entries[entry].dash.join(" ") }), marker(entry, 17, 6, 4));
      const toggle = () => {
        hidden.has(entry) ? hidden.delete(entry) : hidden.add(entry);
        for (const chart of drawn) chart.draw();
        this.legend.children[present.indexOf(entry)].focus(); // it was drawn anew
      };
      return node("button", { type: "button", "aria-pressed": !hidden.has(entry), onclick: toggle }, swatch, data.entries[entry].name);
    });
  }

  // Tells of one of the points; null: of none.
  tell(place) {
    this.at = place;
    set(this.hit, place ? { cx: place.x, cy: place.y, visibility: "visible" } : { visibility: "hidden" });
    this.tip.textContent = "";
    if (!place) return;
    const { x } = this.spec, y = place.point[x.length];
    const where = x.map((a, i) => (a.categories ? a.categories[place.point[i]] : `${a.name} ${long(place.point[i])}`)).join(" · ");
    const bar = place.line?.bars?.[place.line.points.indexOf(place.point)];
    this.tip.textContent = `${place.label ?? place.line.label}\n${where}\n${y === null ? "diverged" : `loss ${y.toFixed(4)}`}${bar ? ` [${bar[0].toFixed(4)}, ${bar[1].toFixed(4)}]` : ""}`;
    const room = this.figure.clientWidth - this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, Math.min(room, place.x + 14))}px`;
    const above = this.svg.getBoundingClientRect().top - this.figure.getBoundingClientRect().top;
    this.tip.style.top = `${above + place.y + 14}px`;
  }

  listen() {
    const { svg } = this;
    let from = null; // where a drag began
    const place = (event) => {
      const { left, top } = svg.getBoundingClientRect();
      return [event.clientX - left, event.clientY - top];
    };
    const within = (v, [a, b]) => Math.max(Math.min(a, b), Math.min(Math.max(a, b), v));
    // What a drag chose: a rectangle, or, of a drag along one axis, all of the other.
    const chosen = ([px, py]) => {
      const wide = Math.abs(px - from[0]) > 8, tall = Math.abs(py - from[1]) > 14;
      const sides = (k, area) => [within(from[k], area), within([px, py][k], area)].sort((a, b) => a - b);
      return wide || tall ? { x: wide ? sides(0, this.area.x) : this.area.x, y: tall ? sides(1, this.area.y) : [...this.area.y].reverse() } : null;
    };
    const end = () => ((from = null), set(this.box, { visibility: "hidden" }));
    svg.addEventListener("pointerdown", (event) => event.button === 0 && ((from = place(event)), svg.setPointerCapture(event.pointerId)));
    svg.addEventListener("pointermove", (event) => {
      const [px, py] = place(event);
      const box = from && chosen([px, py]);
      if (box) set(this.box, { x: box.x[0], y: box.y[0], width: box.x[1] - box.x[0], height: box.y[1] - box.y[0], visibility: "visible" });
      const far = (p) => Math.hypot(p.x - px, p.y - py), nearest = this.points.reduce((best, p) => (best && far(best) <= far(p) ? best : p), null);
      this.tell(!box && nearest && far(nearest) < REACH ? nearest : null);
    });
    svg.addEventListener("pointerup", (event) => {
      const box = from && chosen(place(event));
      end();
      if (!box) return;
      const { x, y } = this.scales;
      this.view = { x: box.x.map(x.inverse), y: box.y.map(y.inverse).reverse() };
      this.draw();
    });
    svg.addEventListener("pointercancel", end);
    svg.addEventListener("pointerleave", () => from || this.tell(null));
    svg.addEventListener("dblclick", () => ((this.view = null), this.draw()));
    svg.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return; // the page's
      event.preventDefault();
      const [px, py] = place(event);
      const share = (v, [a, b]) => within((v - a) / (b - a), [0, 1]);
      this.zoom(event.deltaY < 0 ? 0.8 : 1.25, [share(px, this.area.x), share(py, this.area.y)]);
      this.draw();
    }, { passive: false });
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], turn = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") return this.tell(null);
      if (!(step || turn) || !this.points.length) return;
      event.preventDefault();
      const lines = [...new Set(this.points.map((p) => p.line))];
      const line = lines.at((lines.indexOf(this.at?.line ?? lines[0]) + (turn ?? 0)) % lines.length);
      const of = this.points.filter((p) => p.line === line);
      this.tell(this.at && step ? (of.at((of.indexOf(this.at) + step) % of.length)) : of[0]);
    });
  }
}

for (const figure of document.querySelectorAll("figure[data-chart]")) drawn.push(new Chart(figure));
for (const hint of document.querySelectorAll(".script")) hint.hidden = false;
