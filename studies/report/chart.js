// Draws the charts of a report, again at each change of width, axis, zoom or legend. A view is
// {x: [low, high], y: [low, high]} in the data's units; a `scale` takes them to pixels.

// Hidden entries, in all charts; the charts.
const [hidden, drawn] = [new Set(), []];
const PAD = { left: 58, right: 16, top: 26, bottom: 44 };
// Pixels around a point in which the pointer finds it.
const REACH = 30;

class Chart {
  constructor(figure) {
    this.spec = data.charts[Number(figure.dataset.chart)];
    this.figure = figure;
    this.column = 0;
    // The axis of losses.
    this.log = false;
    this.choice = this.spec.filters.map(() => 0);
    // What was zoomed to; null: `home`.
    this.view = null;
    // What the pointer can find, {x, y, line, point}, and the one that is shown now.
    this.points = [];
    this.at = null;
    this.legend = node("div", { class: "legend", role: "group", "aria-label": "entries" });
    // Not a title element, which browsers show over the tip.
    this.svg = shape("svg", {
      class: "chart",
      tabindex: 0,
      role: "img",
      "aria-label": `${this.spec.title}. ${this.spec.about}`,
    });
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
        node(
          "button",
          {
            type: "button",
            "aria-pressed": i === current,
            onclick: () => (
              buttons.forEach((b, j) => b.setAttribute("aria-pressed", i === j)),
              pick(i),
              this.draw()
            ),
          },
          name,
        ),
      );
      groups.push(node("span", { role: "group", "aria-label": label }, label, ...buttons));
    };
    if (x.length > 1)
      group(
        "against",
        x.map((a) => a.name),
        0,
        (i) => ((this.column = i), (this.view = null)),
      );
    filters.forEach(
      (f, k) => f.options.length > 1 && group(f.label, f.options, 0, (i) => (this.choice[k] = i)),
    );
    group("loss axis", ["linear", "log"], 0, (i) => (this.log = i === 1));
    const zoom = [
      ["+", "zoom in", 0.6],
      ["−", "zoom out", 1 / 0.6],
      ["reset", "reset the zoom", null],
    ].map(([text, label, factor]) =>
      node(
        "button",
        {
          type: "button",
          "aria-label": label,
          onclick: () => (factor ? this.zoom(factor) : (this.view = null), this.draw()),
        },
        text,
      ),
    );
    groups.push(node("span", { role: "group", "aria-label": "zoom" }, "zoom", ...zoom));
    return node("div", { class: "controls" }, ...groups);
  }

  shown() {
    const { lines, filters } = this.spec;
    return lines.filter(
      (l) =>
        !hidden.has(l.entry) &&
        filters.every((f, k) => l.within[k].includes(f.options[this.choice[k]])),
    );
  }

  home() {
    const axis = this.spec.x[this.column];
    const values = this.shown().flatMap((l) => l.points.map((p) => p[this.column]));
    const all = values.length
      ? values
      : this.spec.lines.flatMap((l) => l.points.map((p) => p[this.column]));
    const x = axis.categories ? [-0.5, axis.categories.length - 0.5] : padded(span(all), axis.log);
    return { x, y: [...this.spec.view] };
  }

  zoom(factor, at = [0.7, 0.2]) {
    // where curves end
    const { x, y } = this.scales;
    const around = (s, share, from, to) => [
      s.inverse(from + (to - from) * share * (1 - factor)),
      s.inverse(to - (to - from) * (1 - share) * (1 - factor)),
    ];
    this.view = { x: around(x, at[0], ...this.area.x), y: around(y, at[1], ...this.area.y) };
  }

  draw() {
    const width = this.figure.clientWidth,
      height = Math.round(Math.min(460, Math.max(280, width * 0.5)));
    if (!width) return;
    const view = this.view ?? this.home(),
      axis = this.spec.x[this.column];
    if (this.log && view.y[0] <= 0) view.y[0] = view.y[1] / 1e3;
    this.area = { x: [PAD.left, width - PAD.right], y: [height - PAD.bottom, PAD.top] };
    const [x, y] = [
      scale(view.x, ...this.area.x, axis.log),
      scale(view.y, ...this.area.y, this.log),
    ];
    this.scales = { x, y };
    this.points = [];
    set(this.svg, { viewBox: `0 0 ${width} ${height}` }).replaceChildren();
    this.axes(view, x, y, width, height);
    // An SVG within: it clips what is outside of its rectangle.
    const [left, top] = [PAD.left, PAD.top - 6];
    const frame = {
      x: left,
      y: top,
      width: width - left - PAD.right,
      height: height - top - PAD.bottom,
    };
    const inside = shape("svg", { ...frame, viewBox: Object.values(frame).join(" ") });
    this.svg.append(inside);
    const { target, marks } = this.spec;
    if (target !== null) {
      inside.append(
        shape("path", { class: "target", d: `M${PAD.left} ${y(target)}H${width - PAD.right}` }),
      );
      inside.append(shape("text", { x: PAD.left + 5, y: y(target) - 5 }, `target ${long(target)}`));
    }
    const shown = this.shown();
    // Where a mean with its band is drawn, the lines of single seeds are faint.
    const banded = new Set(shown.filter((l) => l.kind === "band").map((l) => l.entry));
    for (const line of shown) this.line(line, x, y, inside, banded.has(line.entry));
    for (const { entry, point, label } of marks)
      if (!hidden.has(entry)) {
        inside.append(
          shape("circle", {
            class: "mark",
            cx: x(point[0]),
            cy: y(point[1]),
            r: 8,
            fill: "none",
            stroke: colour(entry),
            "stroke-width": 2,
          }),
        );
        this.points.push({ x: x(point[0]), y: y(point[1]), label, point });
      }
    this.hit = shape("circle", { class: "hit", r: 6, visibility: "hidden" });
    this.box = shape("rect", { class: "box", visibility: "hidden" });
    this.svg.append(this.hit, this.box);
    this.points = this.points.filter(
      (p) =>
        p.x >= PAD.left - 1 &&
        p.x <= width - PAD.right + 1 &&
        p.y >= PAD.top - 7 &&
        p.y <= height - PAD.bottom + 1,
    );
    this.describe(null);
    this.legend.replaceChildren(...this.keys());
  }

  axes(view, x, y, width, height) {
    const axis = this.spec.x[this.column],
      names = axis.categories,
      bottom = height - PAD.bottom;
    for (const v of ticks(view.y, 6, this.log)) {
      this.svg.append(
        shape("path", { class: "grid", d: `M${PAD.left} ${y(v)}H${width - PAD.right}` }),
      );
      this.svg.append(
        shape("text", { x: PAD.left - 8, y: y(v) + 4, "text-anchor": "end" }, short(v)),
      );
    }
    for (const v of names
      ? names.map((_, i) => i).filter((i) => i >= view.x[0] && i <= view.x[1])
      : ticks(view.x, Math.max(3, width / 130), axis.log)) {
      this.svg.append(shape("path", { class: "grid", d: `M${x(v)} ${PAD.top}V${bottom}` }));
      this.svg.append(
        shape(
          "text",
          { x: x(v), y: bottom + 17, "text-anchor": "middle" },
          names ? names[v] : short(v),
        ),
      );
    }
    this.svg.append(shape("text", { x: 4, y: 14 }, this.spec.y));
    this.svg.append(
      shape("text", { x: width - PAD.right, y: height - 6, "text-anchor": "end" }, axis.label),
    );
  }

  line(line, x, y, inside, faint) {
    const { entry, kind, bars } = line;
    const last = this.spec.x.length; // the loss's place in a point
    const places = line.points.map((p) => ({
      x: x(p[this.column]),
      y: p[last] === null ? null : y(p[last]),
      line,
      point: p,
    }));
    const path = (points) =>
      points.map((p, i) => `${i ? "L" : "M"}${p.x.toFixed(1)} ${p.y.toFixed(1)}`).join("");
    const finite = places.filter((p) => p.y !== null);
    if (kind === "band") {
      const edge = (k) => line.points.map((p, i) => ({ x: places[i].x, y: y(p.at(k)) }));
      inside.append(
        shape("path", {
          class: "band",
          d: `${path(edge(-1))}L${path(edge(-2).reverse()).slice(1)}Z`,
          fill: colour(entry),
        }),
      );
      inside.append(
        shape("path", {
          class: "mean",
          d: path(places),
          stroke: colour(entry),
          "stroke-dasharray": data.entries[entry].dash.join(" "),
        }),
      );
      return;
    }
    if (kind !== "dots")
      inside.append(
        shape("path", {
          class: faint ? "line faint" : "line",
          d: path(finite),
          stroke: colour(entry),
          "stroke-dasharray": faint ? "" : data.entries[entry].dash.join(" "),
        }),
      );
    const marked = kind === "line" ? finite.slice(-1) : finite; // of a line its end alone
    inside.append(
      ...marked.map((p) =>
        marker(entry, p.x, p.y, kind === "joined" ? 5 : 3.5, {
          opacity: kind === "dots" ? 0.6 : 1,
        }),
      ),
    );
    (bars ?? []).forEach((bar, i) => {
      if (!bar) return;
      const { x: centre } = places[i],
        [low, high] = bar.map(y);
      const d = `M${centre} ${low}V${high}M${centre - 4} ${low}h8M${centre - 4} ${high}h8`;
      inside.append(shape("path", { class: "bar", d, stroke: colour(entry), "stroke-width": 1.5 }));
    });
    for (const p of places.filter((p) => p.y === null)) {
      p.y = PAD.top;
      inside.append(
        shape("path", {
          class: "diverged",
          d: `M${p.x - 5} ${p.y - 5}l10 10m0 -10l-10 10`,
          stroke: colour(entry),
          "stroke-width": 2.5,
        }),
      );
    }
    for (const p of places) if (Number.isFinite(p.y)) this.points.push(p);
  }

  keys() {
    const present = [...new Set(this.spec.lines.map((l) => l.entry))].sort((a, b) => a - b);
    return present.map((entry) => {
      const swatch = shape("svg", { width: 34, height: 12, "aria-hidden": "true" });
      swatch.append(
        shape("path", {
          d: "M0 6H34",
          stroke: colour(entry),
          "stroke-width": 2,
          "stroke-dasharray": data.entries[entry].dash.join(" "),
        }),
        marker(entry, 17, 6, 4),
      );
      const toggle = () => {
        hidden.has(entry) ? hidden.delete(entry) : hidden.add(entry);
        for (const chart of drawn) chart.draw();
        this.legend.children[present.indexOf(entry)].focus(); // it was drawn anew
      };
      return node(
        "button",
        { type: "button", "aria-pressed": !hidden.has(entry), onclick: toggle },
        swatch,
        data.entries[entry].name,
      );
    });
  }

  // Shows what one of the points is; null: none.
  describe(place) {
    this.at = place;
    set(
      this.hit,
      place ? { cx: place.x, cy: place.y, visibility: "visible" } : { visibility: "hidden" },
    );
    this.tip.textContent = "";
    if (!place) return;
    const { x } = this.spec,
      y = place.point[x.length];
    const where = x
      .map((a, i) =>
        a.categories ? a.categories[place.point[i]] : `${a.name} ${long(place.point[i])}`,
      )
      .join(" · ");
    const bar = place.line?.bars?.[place.line.points.indexOf(place.point)];
    const loss = y === null ? "diverged" : `loss ${y.toFixed(4)}`;
    const interval = bar ? ` [${bar[0].toFixed(4)}, ${bar[1].toFixed(4)}]` : "";
    this.tip.textContent = `${place.label ?? place.line.label}\n${where}\n${loss}${interval}`;
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
      const wide = Math.abs(px - from[0]) > 8,
        tall = Math.abs(py - from[1]) > 14;
      const sides = (k, area) =>
        [within(from[k], area), within([px, py][k], area)].sort((a, b) => a - b);
      return wide || tall
        ? {
            x: wide ? sides(0, this.area.x) : this.area.x,
            y: tall ? sides(1, this.area.y) : [...this.area.y].reverse(),
          }
        : null;
    };
    const end = () => ((from = null), set(this.box, { visibility: "hidden" }));
    svg.addEventListener(
      "pointerdown",
      (event) =>
        event.button === 0 && ((from = place(event)), svg.setPointerCapture(event.pointerId)),
    );
    svg.addEventListener("pointermove", (event) => {
      const [px, py] = place(event);
      const box = from && chosen([px, py]);
      if (box)
        set(this.box, {
          x: box.x[0],
          y: box.y[0],
          width: box.x[1] - box.x[0],
          height: box.y[1] - box.y[0],
          visibility: "visible",
        });
      const far = (p) => Math.hypot(p.x - px, p.y - py),
        nearest = this.points.reduce((best, p) => (best && far(best) <= far(p) ? best : p), null);
      this.describe(!box && nearest && far(nearest) < REACH ? nearest : null);
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
    svg.addEventListener("pointerleave", () => from || this.describe(null));
    svg.addEventListener("dblclick", () => ((this.view = null), this.draw()));
    svg.addEventListener(
      "wheel",
      (event) => {
        if (!event.ctrlKey && !event.metaKey) return; // the page's
        event.preventDefault();
        const [px, py] = place(event);
        const share = (v, [a, b]) => within((v - a) / (b - a), [0, 1]);
        this.zoom(event.deltaY < 0 ? 0.8 : 1.25, [share(px, this.area.x), share(py, this.area.y)]);
        this.draw();
      },
      { passive: false },
    );
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key],
        turn = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") return this.describe(null);
      if (!(step || turn) || !this.points.length) return;
      event.preventDefault();
      const lines = [...new Set(this.points.map((p) => p.line))];
      const line = lines.at(
        (lines.indexOf(this.at?.line ?? lines[0]) + (turn ?? 0)) % lines.length,
      );
      const of = this.points.filter((p) => p.line === line);
      this.describe(this.at && step ? of.at((of.indexOf(this.at) + step) % of.length) : of[0]);
    });
  }
}

for (const figure of document.querySelectorAll("figure[data-chart]")) drawn.push(new Chart(figure));
for (const hint of document.querySelectorAll(".script")) hint.hidden = false;
