// The page of `indra monitor`: the list of runs and the views of the chosen ones. It asks its own server every second.
"use strict";
(() => {
  const { element } = IndraState;
  const { CHARTS, Chart, seriesOf, colour, shown } = IndraCharts;
  const find = (id) => document.getElementById(id);
  const SECOND = 1000, MOST_CHOSEN = 12;
  const GONE = "The monitor does not answer. Is `indra monitor` still running?";
  const VIEWS = { curves: "Curves", comparison: "Comparison", files: "Checkpoints and samples", state: "State explorer" };
  const page = { runs: [], chosen: [], view: "curves", decay: "0.9", range: [null, null], data: new Map(), charts: [], list: "" };

  async function ask(path, parameters = {}, body = null) {
    const query = new URLSearchParams(parameters).toString();
    const options = body === null ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    const answer = await fetch(query ? `${path}?${query}` : path, options).catch(() => { throw new Error(GONE); });
    const content = await answer.json().catch(() => { throw new Error(answer.ok ? GONE : `error ${answer.status}`); });
    if (!answer.ok) throw new Error(content.error || `error ${answer.status}`);
    return content;
  }

  // ---- what is chosen is in the address, so that a reload, a bookmark and the back button keep it
  function readAddress() {
    const parts = new URLSearchParams(location.hash.slice(1));
    page.chosen = (parts.get("runs") || "").split(",").filter((id) => /^[0-9a-f]{16}$/.test(id)).slice(0, MOST_CHOSEN);
    page.view = parts.get("view") in views ? parts.get("view") : "curves";
  }

  function writeAddress() {
    const hash = `#view=${page.view}&runs=${page.chosen.join(",")}`;
    if (location.hash !== hash) history.replaceState(null, "", hash);
  }

  // ---- the list of runs
  function duration(seconds) {
    if (seconds === null || seconds === undefined) return "–";
    const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
    if (days >= 2) return `${days} days`;
    return hours ? `${hours} h ${minutes % 60} min` : minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds)} s`;
  }

  function stateOf(run) {
    const parts = [element("span", { class: `state ${run.state}` }, run.state)];
    if (run.collapse.length && run.state !== "collapsed") parts.push(element("span", { class: "notice" }, ` suspected collapse: ${run.collapse.join(", ")}`));
    if (run.problem) parts.push(element("span", { class: "problem" }, ` ${run.problem}`));
    return parts;
  }

  function drawList() {
    const wanted = find("find").value.toLowerCase(), runs = page.runs.filter((run) => run.name.toLowerCase().includes(wanted));
    find("counted").textContent = page.runs.length ? `${runs.length} of ${page.runs.length} shown, ${page.chosen.length} chosen` : "";
    if (!page.runs.length) {
      find("runs").replaceChildren(element("p", { class: "none" }, "There is no run below this folder yet. This page shows it as soon as `indra train` writes one."));
      return;
    }
    const text = JSON.stringify([runs.map((run) => [run.id, run.name]), page.chosen]);
    if (text !== page.list) { page.list = text; buildList(runs); }
    for (const run of runs) fillRow(run);
  }

  function buildList(runs) {
    const focused = document.activeElement?.dataset?.run;
    const heads = ["run", "state", "steps", "loss", "held-out", "tokens/s", "time left", "last line"];
    const rows = runs.map((run) => {
      const place = page.chosen.indexOf(run.id), box = element("input", { type: "checkbox", "data-run": run.id, onchange: () => choose(run.id) });
      box.checked = place >= 0;
      const swatch = element("span", { class: "swatch" });
      if (place >= 0 && page.chosen.length > 1) swatch.style.background = colour(place);
      return element("tr", { id: `run-${run.id}`, "aria-selected": String(place >= 0) },
        element("td", {}, element("label", {}, box, " ", page.chosen.length > 1 && place >= 0 ? swatch : null, run.name)),
        ...heads.slice(1).map((name) => element("td", { class: name === "state" ? "left" : ["tokens/s", "last line", "held-out"].includes(name) ? "wide-only" : "" })));
    });
    const head = element("tr", {}, ...heads.map((name) => element("th", { scope: "col", class: name === "state" ? "left" : ["tokens/s", "last line", "held-out"].includes(name) ? "wide-only" : "" }, name)));
    find("runs").replaceChildren(element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
    if (focused) find("runs").querySelector(`[data-run="${focused}"]`)?.focus();
  }

  function fillRow(run) {
    const cells = find(`run-${run.id}`)?.cells;
    if (!cells) return;
    const total = run.total_steps === null ? "" : ` / ${run.total_steps.toLocaleString("en")}`;
    const texts = [`${run.steps.toLocaleString("en")}${total}`, shown(run.loss), shown(run.held_out.all), shown(run.tokens_per_second),
      run.seconds_left === null ? "–" : duration(run.seconds_left), `${duration(run.seconds_since)} ago`];
    const state = JSON.stringify([run.state, run.collapse, run.problem]);
    if (cells[1].dataset.state !== state) { cells[1].dataset.state = state; cells[1].replaceChildren(...stateOf(run)); }
    texts.forEach((text, at) => { if (cells[at + 2].textContent !== text) cells[at + 2].textContent = text; });
  }

  function choose(id) {
    const chosen = page.chosen.includes(id) ? page.chosen.filter((other) => other !== id) : [...page.chosen, id];
    if (chosen.length > MOST_CHOSEN) say(`At most ${MOST_CHOSEN} runs are drawn together.`);
    else page.chosen = chosen;
    page.list = "";
    writeAddress();
    drawList();
    show();
  }

  const say = (text) => { find("reading").textContent = text; };
  const chosenRuns = () => page.chosen.map((id) => page.runs.find((run) => run.id === id)).filter(Boolean)
    .map((run) => ({ ...run, data: page.data.get(run.id) }));

  // ---- curves: only points that are new are asked for
  function merged(before, answer) {
    const keep = before && answer.first ? answer.first * (answer.every === 1 ? 1 : 2) : 0, added = answer.steps.length;
    const series = {}, names = new Set([...Object.keys(answer.series), ...(keep ? Object.keys(before.series) : [])]);
    for (const name of names) {
      const old = keep ? before.series[name]?.slice(0, keep) || Array(keep).fill(null) : [];
      series[name] = old.concat(answer.series[name] || Array(added).fill(null));
    }
    return { ...answer, steps: (keep ? before.steps.slice(0, keep) : []).concat(answer.steps), series };
  }

  async function updateCurves() {
    let more = false;
    const decay = page.decay;
    await Promise.all(chosenRuns().map(async ({ id }) => {
      const before = page.data.get(id);
      let answer;
      try {
        answer = await ask("/api/curves", { run: id, key: before?.key || "", first: before?.complete || 0, series: seriesOf(decay).join(",") });
      } catch (error) {
        if (error.message === GONE) throw error;
        page.data.set(id, { ...(before || { steps: [], series: {}, held_out: { steps: [], sources: {} }, collapse: [], every: 1 }), problem: error.message, changed: before?.problem !== error.message });
        return;
      }
      if (decay !== page.decay) { more = true; return; }
      const data = merged(before, answer);
      data.changed = !before || before.problem || before.key !== data.key || before.steps.length !== data.steps.length
        || before.steps.at(-1) !== data.steps.at(-1) || before.fraction !== data.fraction || before.held_out.steps.length !== data.held_out.steps.length;
      page.data.set(id, data);
      more = more || data.fraction < 1;
    }));
    return more;
  }

  function curvesView() {
    const smoothing = element("select", { onchange: (event) => { page.decay = event.target.value; page.data.clear(); wake(); } },
      ...[["", "none"], ["0.9", "some (0.9)"], ["0.99", "strong (0.99)"]].map(([value, text]) => element("option", { value, selected: value === page.decay }, text)));
    const number = (label, at) => {
      const input = element("input", { type: "number", min: "0", step: "1", "aria-label": label, onchange: () => {
        page.range[at] = input.value === "" ? null : Math.max(0, Number(input.value));
        drawCharts(true);
      } });
      if (page.range[at] !== null) input.value = page.range[at];
      return input;
    };
    const inputs = [number("first step", 0), number("last step", 1)];
    const onRange = (from, to) => { page.range = [from, to]; inputs[0].value = from; inputs[1].value = to; drawCharts(true); };
    page.charts = CHARTS.map((chart) => new Chart(chart, { onRange, onRead: say }));
    const whole = element("button", { type: "button", onclick: () => { page.range = [null, null]; inputs.forEach((input) => { input.value = ""; }); drawCharts(true); } }, "All steps");
    find("panel").replaceChildren(
      element("div", { class: "bar" }, element("label", {}, "Smoothing ", smoothing),
        element("span", {}, "Steps ", inputs[0], " to ", inputs[1]), whole,
        element("span", { class: "quiet" }, "Drag over a chart to enlarge a range. Arrow keys read a chart.")),
      element("div", { id: "notes" }), element("div", { class: "grid" }, ...page.charts.map((chart) => chart.figure)));
    drawCharts(true);
  }

  function drawCharts(always) {
    const runs = chosenRuns();
    if (page.view !== "curves" || !page.charts.length) return;
    if (!always && !runs.some((run) => run.data?.changed)) return;
    for (const run of runs) if (run.data) run.data.changed = false;
    drawNotes(runs);
    for (const chart of page.charts) chart.draw(runs, page.decay, page.range);
  }

  function drawNotes(runs) {
    const notes = [];
    if (!runs.length) notes.push(element("p", { class: "none" }, "Choose a run in the list above."));
    for (const run of runs) {
      const data = run.data, name = runs.length > 1 ? `${run.name}: ` : "";
      if (!data) { notes.push(element("p", { class: "quiet" }, `${name}reading …`)); continue; }
      if (data.problem) notes.push(element("p", { class: "problem" }, `${name}${data.problem}`));
      if (data.fraction < 1) notes.push(element("p", { class: "quiet" }, `${name}${Math.floor(100 * data.fraction)} % of the metrics are read`));
      if (data.damaged) notes.push(element("p", { class: "problem" }, `${name}${data.damaged} damaged line${data.damaged > 1 ? "s are" : " is"} left out; the first one ${data.damage}`));
      if (data.every > 1) notes.push(element("p", { class: "quiet" }, `${name}each stretch of ${data.every.toLocaleString("en")} steps is drawn as its lowest and its highest value`));
      for (const [step, kinds] of data.collapse.slice(-5)) {
        notes.push(element("p", { class: kinds.length ? "notice" : "quiet" }, `${name}step ${step.toLocaleString("en")}: ${kinds.length ? `suspected collapse: ${kinds.join(", ")}` : "no collapse is suspected any more"}`));
      }
    }
    find("notes")?.replaceChildren(...notes);
  }

  // ---- comparison: figures and differing settings side by side
  let shownComparison = "";
  async function comparisonView(always = true) {
    const panel = find("panel"), runs = chosenRuns();
    if (always) shownComparison = "";
    const tell = (kind, text) => {
      if (page.view === "comparison" && text !== shownComparison) panel.replaceChildren(element("p", { class: kind }, text));
      shownComparison = text;
    };
    if (runs.length < 2) { tell("none", "Choose two or more runs in the list above to compare them."); return; }
    let rows = [];
    try {
      rows = (await ask(`/api/differences?${runs.map((run) => `run=${run.id}`).join("&")}`)).rows;
    } catch (error) { tell("problem", error.message); return; }
    const sources = [...new Set(runs.flatMap((run) => Object.keys(run.held_out)))];
    const figures = [["state", ...runs.map((run) => run.state)], ["steps", ...runs.map((run) => run.steps.toLocaleString("en"))],
      ["tokens", ...runs.map((run) => run.tokens.toLocaleString("en"))], ["loss", ...runs.map((run) => shown(run.loss))],
      ...sources.map((source) => [`held-out CE, ${source}`, ...runs.map((run) => shown(run.held_out[source]))])];
    // Only what changed is drawn again, so that a screen reader keeps its place.
    const found = JSON.stringify([runs.map((run) => run.name), figures, rows]);
    if (found === shownComparison) return;
    shownComparison = found;
    const table = (title, lines) => element("div", { class: "card wide" }, element("h3", {}, title), element("table", {},
      element("thead", {}, element("tr", {}, element("th", { scope: "col" }, ""), ...runs.map((run) => element("th", { scope: "col" }, run.name)))),
      element("tbody", {}, ...lines.map(([name, ...cells]) => element("tr", {}, element("th", { scope: "row" }, name), ...cells.map((text) => element("td", {}, text)))))));
    if (page.view === "comparison") {
      panel.replaceChildren(table("Last figures", figures), rows.length ? table("Settings that differ", rows)
        : element("p", { class: "quiet" }, "These runs have the same settings, or no run.json."));
    }
  }

  // ---- checkpoints and samples
  function samplesOf(samples) {
    if (!samples.length) return [element("p", { class: "quiet" }, "There are no samples. `indra train --sample-every 200` writes some every 200 steps.")];
    const rows = samples.map((sample) => element("tr", {}, element("td", {}, sample.step.toLocaleString("en")),
      element("td", { class: "left" }, element("pre", {}, element("span", { class: "quiet" }, sample.prompt), sample.text))));
    return [element("h3", {}, "Samples, the newest first"), element("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": "samples" }, element("table", { class: "samples" }, element("tbody", {}, ...rows)))];
  }

  function filesOf(run, details) {
    if (details.problem) return element("p", { class: "problem" }, `${run.name}: ${details.problem}`);
    const when = (seconds) => new Date(1000 * seconds).toLocaleString();
    const rows = details.checkpoints.map((found) => element("tr", {}, element("td", {}, found.name), element("td", {}, found.step === null ? "–" : found.step.toLocaleString("en")),
      element("td", {}, `${(found.bytes / 1e6).toFixed(1)} MB`), element("td", {}, when(found.written))));
    const heads = ["checkpoint", "step", "size", "written"].map((name) => element("th", { scope: "col" }, name));
    const settings = Object.entries(details.settings).map(([name, value]) => element("tr", {}, element("td", {}, name), element("td", { class: "left" }, value)));
    return element("div", { class: "card" }, element("h3", {}, run.name), element("p", { class: "quiet" }, details.folder ? `in ${details.folder}` : "There is no run.json, so the checkpoints are not known."),
      rows.length ? element("div", { class: "wide" }, element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows))) : element("p", {}, "There is no checkpoint yet."),
      ...samplesOf(details.samples),
      element("details", {}, element("summary", {}, "All settings"), element("div", {}, element("table", {}, element("tbody", {}, ...settings)))));
  }

  // New checkpoints and samples appear by themselves, but only when something changed, so that an open list stays open.
  let shownFiles = "";
  async function filesView(always = true) {
    const runs = chosenRuns();
    const details = await Promise.all(runs.map((run) => ask("/api/details", { run: run.id }).catch((error) => ({ problem: error.message }))));
    const found = JSON.stringify(details);
    if (page.view !== "files" || (!always && found === shownFiles)) return;
    shownFiles = found;
    find("panel").replaceChildren(...(runs.length ? runs.map((run, at) => filesOf(run, details[at])) : [element("p", { class: "none" }, "Choose a run in the list above.")]));
  }

  function stateView() {
    const runs = chosenRuns();
    return IndraExplorer.open(find("panel"), ask, runs, () => page.view === "state" && chosenRuns()[0]?.id === runs[0].id);
  }
  const views = { curves: curvesView, comparison: comparisonView, files: filesView, state: stateView };

  function buildTabs() {
    const names = Object.keys(VIEWS);
    find("tabs").replaceChildren(...names.map((name, at) => element("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel",
      "aria-selected": String(name === page.view), tabindex: name === page.view ? "0" : "-1", onclick: () => open(name), onkeydown: (event) => {
        const step = { ArrowRight: 1, ArrowLeft: names.length - 1 }[event.key];
        if (step) { const next = names[(at + step) % names.length]; open(next); find(`tab-${next}`).focus(); event.preventDefault(); }
      } }, VIEWS[name])));
    find("panel").setAttribute("aria-labelledby", `tab-${page.view}`);
  }

  function open(name) { page.view = name; writeAddress(); show(); }

  function show() {
    for (const chart of page.charts) chart.destroy();
    page.charts = [];
    buildTabs();
    views[page.view]();
    wake();
  }

  // ---- the clock
  let timer = null, busy = false;
  function wake() { clearTimeout(timer); timer = setTimeout(tick, 0); }

  async function tick() {
    clearTimeout(timer);
    if (busy) { timer = setTimeout(tick, 50); return; }
    busy = true;
    let wait = SECOND;
    try {
      if (!document.hidden) {
        const answer = await ask("/api/runs"), first = !page.runs.length;
        page.runs = answer.runs;
        find("where").textContent = answer.logs;
        const there = page.chosen.filter((id) => page.runs.some((run) => run.id === id));
        // An empty list drops nothing: the folder may only be away for a moment, and the address may be a bookmark.
        const gone = there.length < page.chosen.length, appeared = first && page.runs.length > 0;
        if (gone && page.runs.length) { page.chosen = there; writeAddress(); }
        if (gone && (page.runs.length || !first)) drawCharts(true);
        if (appeared && !page.chosen.length) {
          page.chosen = [page.runs.reduce((newest, run) => (run.seconds_since < newest.seconds_since ? run : newest)).id];
        }
        if (appeared && page.view !== "curves") setTimeout(show, 0);
        drawList();
        if (page.view === "curves") {
          if (await updateCurves()) wait = Math.min(wait, 50 * page.chosen.length);
          drawCharts(appeared);
        } else if (page.view === "comparison") await comparisonView(false);
        else if (page.view === "files") await filesView(false);
      }
      find("connection").textContent = "";
    } catch (error) {
      find("connection").textContent = error.message;
    }
    busy = false;
    timer = setTimeout(tick, wait);
  }

  readAddress();
  find("find").addEventListener("input", drawList);
  addEventListener("hashchange", () => { readAddress(); page.list = ""; drawList(); show(); });
  addEventListener("resize", () => page.charts.forEach((chart) => chart.resize()));
  document.addEventListener("visibilitychange", wake);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { page.list = ""; drawList(); show(); });
  show();
})();
