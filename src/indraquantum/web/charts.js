// The charts of the monitor: what each one shows, and how uPlot draws it. Needs state.js and uPlot.
"use strict";
const IndraCharts = (() => {
  const { element } = IndraState;
  const COLOURS = {
    light: ["#1f5fcc", "#c2410c", "#1b7a3d", "#8a2be2", "#b3261e", "#0e7490", "#a16207", "#be185d", "#4d7c0f", "#475569"],
    dark: ["#7fb0ff", "#ff9e5e", "#6fd08f", "#c79bff", "#ff8f85", "#5fd4e8", "#e3c252", "#f48fb8", "#b0d95a", "#a8b3c4"],
  };
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3]];
  // smooth: the exponential mean is drawn over the raw curve. band: mean and spread. threshold: see the guard.
  const CHARTS = [
    { id: "loss", title: "Total loss", unit: "nats per token", smooth: ["loss"], heldOut: true,
      names: { loss: "total loss" } },
    { id: "terms", title: "Cross-entropy against distillation", unit: "nats per token", smooth: ["ce", "kd", "kd_estimate"],
      names: { ce: "CE (text)", kd: "KD (against the signals)", kd_estimate: "KD (unbiased estimate)" } },
    { id: "weights", title: "Weights of the terms", unit: "weight", plain: ["kd_weight", "phase_weight", "magnitude_weight"],
      names: { kd_weight: "KD", phase_weight: "phase", magnitude_weight: "magnitude" } },
    { id: "alignment", title: "Alignment with the teacher", unit: "distance", smooth: ["phase", "magnitude"],
      names: { phase: "phase term (circular distance)", magnitude: "magnitude term (squared error)" } },
    { id: "magnitude", title: "Magnitude of the state", unit: "mean and one standard deviation", band: "magnitude",
      names: { magnitude_mean: "mean |c|" } },
    { id: "phase", title: "Phase of the state", unit: "radians; mean and one standard deviation", band: "phase",
      names: { phase_mean: "mean arg c" } },
    { id: "circular", title: "Circular variance of the phase", unit: "0: all equal, 1: all directions",
      plain: ["phase_circular_variance"], names: { phase_circular_variance: "circular variance" } },
    { id: "context", title: "Collapse: use of the context", unit: "nats", threshold: "context_divergence",
      names: { context_divergence: "divergence of the predictions" } },
    { id: "phase-rise", title: "Collapse: use of the phases", unit: "nats per token", threshold: "phase_rise",
      names: { phase_rise: "rise of the loss without phases" } },
    { id: "magnitude-rise", title: "Collapse: use of the magnitudes", unit: "nats per token", threshold: "magnitude_rise",
      names: { magnitude_rise: "rise of the loss without magnitudes" } },
    { id: "rank", title: "Collapse: rank of the states", unit: "effective rank", threshold: "effective_rank",
      names: { effective_rank: "effective rank" } },
    { id: "rate", title: "Learning rate", unit: "", plain: ["learning_rate"], names: { learning_rate: "learning rate" } },
    { id: "norm", title: "Norm of the gradients", unit: "before clipping, logarithmic", smooth: ["grad_norm"], log: true,
      names: { grad_norm: "gradient norm" } },
    { id: "speed", title: "Throughput", unit: "tokens per second", smooth: ["tokens_per_second"],
      names: { tokens_per_second: "tokens per second" } },
  ];

  // The series that the charts need from the server.
  function seriesOf(decay) {
    const found = [];
    for (const chart of CHARTS) {
      found.push(...(chart.plain || []), ...(chart.smooth || []));
      if (decay) found.push(...(chart.smooth || []).map((name) => `${name}@${decay}`));
      if (chart.band) found.push(`${chart.band}_mean`, `${chart.band}_std`);
      if (chart.threshold) found.push(chart.threshold, `${chart.threshold}_threshold`);
    }
    return found;
  }

  const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;
  const colour = (at) => COLOURS[dark() ? "dark" : "light"][at % 10];
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function shown(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 0.001 || size >= 1e7)) return value.toExponential(2);
    return size >= 1000 ? Math.round(value).toLocaleString("en") : value.toFixed(size >= 100 ? 1 : 4);
  }

  // Each curve of a chart: {label, steps, values, colour, dash, width, points, key}; bands name two curves to fill between.
  function curvesOf(chart, runs, decay) {
    const curves = [], bands = [], several = runs.length > 1;
    runs.forEach((run, number) => {
      const data = run.data, has = (name) => data && data.series[name];
      let place = 0;
      const add = (name, label, options = {}) => {
        const at = several ? number : place, dash = several ? DASHES[place % 4] : [];
        curves.push({ label: several ? `${run.name}: ${label}` : label, steps: options.steps || data.steps,
          values: options.values || data.series[name], colour: colour(options.colour ?? at), dash, width: 1.6,
          key: name, run, ...options.more });
      };
      for (const name of chart.smooth || []) {
        if (!has(name)) { place += 1; continue; }
        const label = chart.names[name];
        if (decay && has(`${name}@${decay}`)) {
          if (!several) add(name, `${label}, raw`, { more: { faint: true, width: 1 } });
          add(`${name}@${decay}`, several ? label : `${label}, smoothed`, { more: { main: true } });
        } else add(name, label, { more: { main: true } });
        place += 1;
      }
      for (const name of chart.plain || []) {
        if (has(name)) add(name, chart.names[name], { more: { main: true } });
        place += 1;
      }
      if (chart.threshold && has(chart.threshold)) {
        add(chart.threshold, chart.names[chart.threshold], { more: { main: true, points: data.steps.length < 200 } });
        const limit = `${chart.threshold}_threshold`;
        if (has(limit)) add(limit, "collapse below", { colour: several ? number : 4, more: { dash: [4, 4], width: 1.2 } });
      }
      if (chart.band && has(`${chart.band}_mean`)) {
        const mean = data.series[`${chart.band}_mean`], spread = data.series[`${chart.band}_std`];
        add(`${chart.band}_mean`, chart.names[`${chart.band}_mean`], { more: { main: true } });
        if (!several && spread) {
          const side = (sign) => mean.map((value, at) => (value === null || spread[at] === null ? null : value + sign * spread[at]));
          add("upper", "one deviation above", { values: side(1), more: { faint: true, width: 1 } });
          add("lower", "one deviation below", { values: side(-1), more: { faint: true, width: 1 } });
          bands.push([curves.length - 2, curves.length - 1]);
        }
      }
      if (chart.heldOut && data) {
        const sources = Object.entries(data.held_out.sources).filter(([name]) => !several || name === "all");
        sources.forEach(([name, values], at) => add(`held-out ${name}`, `held-out CE, ${name}`, { values, steps: data.held_out.steps,
          colour: several ? number : at + 1, more: { points: true, main: true, dash: several ? [6, 4] : [3, 3] } }));
      }
    });
    return { curves, bands };
  }

  // One figure of the page. `options`: synchronised cursor, range of steps, what to call when the range is dragged.
  class Chart {
    constructor(chart, options) {
      this.chart = chart;
      this.options = options;
      this.summary = element("p", { class: "summary" });
      this.place = element("div", { class: "place" });
      this.table = element("div");
      this.details = element("details", { ontoggle: () => this.fillTable() }, element("summary", {}, "As a table"), this.table);
      this.figure = element("figure", { id: `chart-${chart.id}`, tabindex: "0", role: "group", "aria-label": chart.title,
        onkeydown: (event) => this.move(event) },
        element("figcaption", {}, element("h3", {}, chart.title), element("span", { class: "quiet" }, chart.unit)),
        this.summary, this.place, this.details);
      this.shape = "";
    }

    draw(runs, decay, range) {
      const { curves, bands } = curvesOf(this.chart, runs, decay);
      this.curves = curves;
      this.figure.setAttribute("aria-label", `${this.chart.title}. ${this.describe()}`);
      if (!curves.length) {
        this.plot?.destroy();
        this.plot = null;
        this.shape = "";
        this.place.replaceChildren(element("div", { class: "none" }, "No figures yet, or this run does not measure them."));
        this.table.replaceChildren();
        return;
      }
      const data = this.aligned(curves);
      const shape = JSON.stringify([curves.map((curve) => [curve.label, curve.colour, curve.points]), bands]);
      if (shape !== this.shape || !this.plot) {
        this.plot?.destroy();
        this.place.replaceChildren();
        this.plot = new uPlot(this.uplotOptions(curves, bands), data, this.place);
        this.shape = shape;
      } else this.plot.setData(data, false);
      this.setRange(range);
      if (this.details.open) this.fillTable();
    }

    aligned(curves) {
      const same = curves.every((curve) => curve.steps === curves[0].steps);
      if (same) return [curves[0].steps, ...curves.map((curve) => curve.values)];
      return uPlot.join(curves.map((curve) => [curve.steps, curve.values]));
    }

    setRange(range) {
      const steps = this.plot.data[0], from = range[0] ?? steps[0], to = range[1] ?? steps[steps.length - 1];
      const places = from < to ? { min: from, max: to } : { min: from - 1, max: from + 1 };
      this.plot.batch(() => { this.plot.setScale("x", places); });
    }

    uplotOptions(curves, bands) {
      const quiet = variable("--quiet"), grid = { stroke: variable("--grid"), width: 1 };
      const axis = { stroke: quiet, grid, ticks: grid, font: "11px system-ui, sans-serif" };
      const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
      const short = (values) => values.map((value) => (value === null ? "" : Math.abs(value) >= 1e4 ? compact.format(value) : String(+value.toPrecision(5))));
      return {
        width: Math.max(240, this.place.clientWidth || 380), height: 210, padding: [8, 10, 0, 0],
        cursor: { sync: { key: "steps", setSeries: false }, drag: { x: true, y: false, setScale: false }, focus: { prox: -1 } },
        scales: { x: { time: false }, y: { distr: this.chart.log ? 3 : 1 } },
        legend: { live: true },
        axes: [{ ...axis, values: (_, values) => values.map((value) => value.toLocaleString("en")) },
          { ...axis, size: 52, values: (_, values) => short(values) }],
        series: [{ label: "step" }, ...curves.map((curve) => ({
          label: curve.label, stroke: curve.faint ? `${curve.colour}66` : curve.colour, width: curve.width, dash: curve.dash,
          spanGaps: true, points: { show: Boolean(curve.points), size: 5, fill: curve.colour },
          value: (_, value) => shown(value),
        }))],
        bands: bands.map(([upper, lower]) => ({ series: [upper + 1, lower + 1], fill: `${curves[upper].colour}22` })),
        hooks: { setSelect: [(plot) => this.dragged(plot)] },
      };
    }

    dragged(plot) {
      if (plot.select.width < 4) return;
      const from = plot.posToVal(plot.select.left, "x"), to = plot.posToVal(plot.select.left + plot.select.width, "x");
      plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
      this.options.onRange(Math.max(0, Math.round(from)), Math.round(to));
    }

    describe() {
      const parts = this.curves.filter((curve) => curve.main).slice(0, 8).map((curve) => {
        let at = curve.values.length - 1;
        while (at >= 0 && curve.values[at] === null) at -= 1;
        return at < 0 ? null : `${curve.label} ${shown(curve.values[at])} at step ${curve.steps[at].toLocaleString("en")}`;
      });
      const text = parts.filter(Boolean).join("; ");
      this.summary.textContent = text;
      return text;
    }

    // With the arrow keys, read the values at a step aloud; Home and End go to the first and the last one.
    move(event) {
      const moves = { ArrowRight: 1, ArrowLeft: -1, PageDown: 20, PageUp: -20, Home: -Infinity, End: Infinity };
      if (!(event.key in moves) || event.target !== this.figure || !this.plot) return;
      event.preventDefault();
      const steps = this.plot.data[0], last = steps.length - 1, before = this.plot.cursor.idx ?? last;
      const at = Math.min(last, Math.max(0, before + moves[event.key]));
      const min = this.plot.valToPos(steps[at], "x");
      this.plot.setCursor({ left: min, top: 20 });
      const values = this.curves.map((curve, place) => [curve, this.plot.data[place + 1][at]]).filter(([curve, value]) => value != null && !curve.faint);
      this.options.onRead(`${this.chart.title}, step ${steps[at]}: ${values.map(([curve, value]) => `${curve.label} ${shown(value)}`).join(", ") || "no figures"}`);
    }

    fillTable() {
      if (!this.details.open || !this.plot) return;
      const [steps, ...columns] = this.plot.data, count = Math.min(24, steps.length);
      const rows = [...new Set(Array.from({ length: count }, (_, at) => Math.round((at * (steps.length - 1)) / Math.max(1, count - 1))))];
      const cell = (text) => element("td", {}, text);
      this.table.replaceChildren(element("table", {}, element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "step"),
        ...this.curves.map((curve) => element("th", { scope: "col" }, curve.label)))),
        element("tbody", {}, ...rows.map((at) => element("tr", {}, cell(steps[at].toLocaleString("en")), ...columns.map((column) => cell(shown(column[at]))))))));
    }

    resize() {
      if (this.plot && this.place.clientWidth) this.plot.setSize({ width: this.place.clientWidth, height: 210 });
    }

    destroy() { this.plot?.destroy(); }
  }

  return { CHARTS, Chart, seriesOf, colour, shown };
})();
