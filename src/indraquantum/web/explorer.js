// The state explorer: what a checkpoint writes and what its state says at each token, held-out text beside the teacher,
// and the vocabulary as a map of magnitude and phase. Needs state.js.
"use strict";
const IndraExplorer = (() => {
  const { element, drawing, phaseColour, phasor, showTokens, key, visible } = IndraState;
  const kept = { prompt: "", tokens: "32", temperature: "0.8", seed: "0", row: "0", dimension: "" };
  let texts = { of: "", list: [] };

  const field = (label, input, wide) => element("label", { class: wide ? "all" : null }, label, input);
  const number = (name, more) => element("input", { type: "number", value: kept[name], onchange: (event) => { kept[name] = event.target.value; }, ...more });
  const figure = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));

  // `isWanted` says whether this run is still the one to show when an answer arrives.
  async function open(panel, ask, runs, isWanted) {
    if (!runs.length) { panel.replaceChildren(element("p", { class: "none" }, "Choose a run in the list above.")); return; }
    const run = runs[0];
    let details;
    try { details = await ask("/api/details", { run: run.id }); } catch (error) { details = { problem: error.message }; }
    if (!isWanted()) return;
    if (details.problem) { panel.replaceChildren(element("p", { class: "problem" }, details.problem)); return; }
    if (!details.checkpoints.length) { panel.replaceChildren(element("p", { class: "none" }, `${run.name} has no checkpoint yet.`)); return; }
    const checkpoint = element("select", {}, ...details.checkpoints.map((found) => element("option", { value: found.name }, found.name)));
    const prompt = element("textarea", { spellcheck: "false", oninput: (event) => { kept.prompt = event.target.value; } }, kept.prompt);
    const chosen = () => ({ run: run.id, checkpoint: checkpoint.value });
    const result = element("div"), status = element("p", { role: "status", class: "quiet" }), mapPlace = element("div");
    const buttons = [];

    async function work(action) {
      buttons.forEach((button) => { button.disabled = true; });
      status.className = "quiet";
      status.textContent = "Computing … the first time, this loads the model.";
      try { await action(); status.textContent = ""; } catch (error) { status.className = "problem"; status.textContent = error.message; }
      buttons.forEach((button) => { button.disabled = false; });
    }
    const write = () => work(async () => {
      const answer = await ask("/api/write", {}, { ...chosen(), prompt: prompt.value, max_new_tokens: Number(kept.tokens),
        temperature: Number(kept.temperature), seed: Number(kept.seed) });
      showResult(result, answer, element("span", { class: "quiet" }, visible(answer.prompt)));
    });
    const read = () => work(async () => {
      const answer = await ask("/api/row", {}, { ...chosen(), row: Number(kept.row) });
      showResult(result, answer, null, `Row ${kept.row} of ${answer.rows.toLocaleString("en")} held-out rows`);
    });
    const map = (dimension) => work(async () => {
      const of = JSON.stringify(chosen());
      kept.dimension = dimension;
      const answer = await ask("/api/vocabulary", { ...chosen(), dimension: kept.dimension, ...(texts.of === of ? {} : { texts: "1" }) });
      if (answer.texts) texts = { of, list: answer.texts };
      showMap(mapPlace, answer, texts.list, (next) => map(next));
    });
    const button = (label, action, main) => { const made = element("button", { type: "button", class: main ? "main" : null, onclick: action }, label); buttons.push(made); return made; };
    panel.replaceChildren(
      element("div", { class: "card" }, element("h3", {}, `Ask ${run.name}`),
        element("div", { class: "form" }, field("Checkpoint", checkpoint), field("New tokens", number("tokens", { min: "1", max: "256" })),
          field("Temperature", number("temperature", { min: "0", max: "100", step: "0.1" })), field("Seed", number("seed", { min: "0" })),
          field("Prompt", prompt, true), element("div", { class: "bar all" }, button("Continue the prompt", write, true))),
        element("div", { class: "bar" }, field("Held-out row", number("row", { min: "0" })), button("Read this row beside the teacher", read), button("Show the vocabulary", () => map("")))),
      status, result, mapPlace);
  }

  const unaligned = (answer) => ["magnitude", "phase"].filter((readout) => !answer.aligned.includes(readout));
  const notice = (text) => element("p", { class: "notice" }, text);

  // ---- tokens and what interfered
  function showResult(place, answer, before, title = "What it wrote") {
    const text = element("div"), about = element("div", { "aria-live": "polite" });
    const cards = [element("h3", {}, title), key()];
    if (before) cards.push(element("pre", { "aria-label": "the prompt" }, before));
    cards.push(text);
    for (const name of unaligned(answer)) cards.push(notice(`This run never aligned the ${name} readout with a teacher, so no ${name === "phase" ? "uncertainty" : "confidence"} is shown.`));
    place.replaceChildren(element("div", { class: "card" }, ...cards), about, element("div", { class: "card" }, tokenTable(answer)));
    const select = showTokens(text, answer.tokens, (token) => about.replaceChildren(aboutToken(token, answer)));
    if (answer.tokens.length) select(0);
  }

  function verdict(token) {
    if (token.teacher_entropy === null || token.teacher_entropy === undefined || token.uncertainty === null) return null;
    const difference = token.uncertainty - token.teacher_entropy;
    return Math.abs(difference) < 0.3 ? "as sure as the teacher" : difference < 0 ? "surer than the teacher" : "less sure than the teacher";
  }

  function tokenTable(answer) {
    const names = answer.tokens.length ? Object.keys(answer.tokens[0].shown) : [];
    const taught = answer.tokens.some((token) => token.teacher_entropy !== undefined && token.teacher_entropy !== null);
    const heads = ["token", ...names, "own entropy (nats)", ...(taught ? ["teacher's entropy", "teacher's confidence", "the model is"] : [])];
    const rows = answer.tokens.map((token) => element("tr", {}, element("td", {}, JSON.stringify(token.text)), ...names.map((name) => element("td", {}, token.shown[name])),
      element("td", {}, figure(token.entropy, 2)), ...(taught ? [figure(token.teacher_entropy, 2), figure(token.teacher_confidence), verdict(token) ?? "–"].map((cell) => element("td", {}, cell)) : [])));
    return element("details", { open: taught }, element("summary", {}, "The figures of all tokens, as `indra test --show-state` prints them"),
      element("div", {}, element("table", {}, element("thead", {}, element("tr", {}, ...heads.map((name) => element("th", { scope: "col" }, name)))), element("tbody", {}, ...rows))));
  }

  function aboutToken(token, answer) {
    const figures = Object.entries(token.shown).map(([name, value]) => `${name} ${value}`).join(" · ");
    const first = element("div", { class: "bar" });
    if (token.phase !== null) first.append(phasor(token.confidence ?? 1, token.phase, 72));
    const lines = [element("p", {}, figures), element("p", { class: "quiet" }, `entropy of its own prediction ${figure(token.entropy, 2)} nats`)];
    if (verdict(token)) lines.push(element("p", {}, `teacher's entropy ${figure(token.teacher_entropy, 2)} nats, confidence ${figure(token.teacher_confidence)}: the model is ${verdict(token)}`));
    first.append(element("div", {}, ...lines));
    const cards = token.alternatives.map((one) => alternative(one));
    return element("div", { class: "card" }, element("h3", {}, `The state at ${JSON.stringify(token.text)}`), first,
      element("h3", {}, "Which tokens interfered there"),
      element("p", { class: "quiet" }, answer.head === "interference" ? "A logit is the sum of its terms M |ψ| cos(P − arg ψ), here times the scale. The longest ones are shown: to the right they agree with the state, to the left they work against it."
        : "With Born's rule a logit is no sum over the dimensions."), element("div", { class: "two" }, ...cards));
  }

  function alternative(one) {
    const title = element("h3", {}, JSON.stringify(one.text), one.chosen ? " (chosen)" : "", element("span", { class: "quiet" }, ` probability ${figure(one.probability)}, logit ${figure(one.logit, 2)}`));
    if (!one.terms) return element("div", {}, title);
    const longest = Math.max(1e-9, ...one.terms.map((term) => Math.abs(term.term)), Math.abs(one.others), Math.abs(one.bias));
    const bar = (label, value, told, colour) => {
      const svg = drawing("svg", { viewBox: "-100 0 200 10", preserveAspectRatio: "none", role: "img", "aria-label": told });
      const length = (100 * Math.abs(value)) / longest, rect = drawing("rect", { x: value < 0 ? -length : 0, y: 1, width: length, height: 8 });
      rect.style.fill = colour;
      svg.append(rect, drawing("line", { x1: 0, x2: 0, y1: 0, y2: 10, stroke: "currentColor", "stroke-width": 0.6 }));
      return element("div", { class: "term", title: told }, element("span", { class: "quiet" }, label), svg, element("span", {}, figure(value)));
    };
    return element("div", {}, title, ...one.terms.map((term) => bar(`j = ${term.dimension}`, term.term,
      `dimension ${term.dimension}: M ${figure(term.magnitude)}, |psi| ${figure(term.amplitude)}, angle between them ${figure(term.angle, 2)} radians, term ${figure(term.term)}`, phaseColour(term.angle))),
    bar("others", one.others, `all other dimensions together ${figure(one.others)}`, "var(--quiet)"), bar("bias", one.bias, `bias ${figure(one.bias)}`, "var(--quiet)"));
  }

  // ---- the vocabulary
  function showMap(place, answer, names, redraw) {
    const canvas = element("canvas", { class: "map", role: "img", "aria-label": "each token by the phase and the magnitude of its state; search below for their figures" });
    const search = element("input", { type: "search", autocomplete: "off", spellcheck: "false" }), list = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "tokens found" });
    const dimension = element("input", { type: "number", min: "0", value: kept.dimension, placeholder: "readout", onchange: (event) => redraw(event.target.value) });
    const most = answer.magnitude.reduce((largest, one) => Math.max(largest, one), 1e-9); // too many to be arguments

    function found() {
      const wanted = search.value.toLowerCase();
      if (!wanted) return [];
      const places = [];
      for (let at = 0; at < names.length; at += 1) if (names[at].toLowerCase().includes(wanted)) places.push(at);
      return places.sort((a, b) => names[a].length - names[b].length || a - b);
    }

    function draw() {
      const ratio = devicePixelRatio || 1, width = canvas.clientWidth || 600, height = 360, paint = canvas.getContext("2d");
      canvas.width = width * ratio;
      canvas.height = height * ratio;
      paint.scale(ratio, ratio);
      const x = (phase) => 40 + ((phase + Math.PI / 2) / (2 * Math.PI)) * (width - 55), y = (magnitude) => height - 28 - (magnitude / most) * (height - 45);
      const style = getComputedStyle(document.documentElement), places = found();
      paint.font = "11px system-ui, sans-serif";
      paint.fillStyle = style.getPropertyValue("--quiet");
      for (const [phase, name] of [[-Math.PI / 2, "−π/2"], [0, "0"], [Math.PI / 2, "π/2"], [Math.PI, "π"], [1.5 * Math.PI, "3π/2"]]) paint.fillText(name, x(phase) - 8, height - 10);
      for (const part of [0, 0.5, 1]) paint.fillText((part * most).toPrecision(2), 4, y(part * most) + 4);
      paint.globalAlpha = places.length ? 0.35 : answer.phase.length > 5000 ? 0.35 : 0.7;
      for (let at = 0; at < answer.phase.length; at += 1) {
        paint.fillStyle = phaseColour(answer.phase[at]);
        paint.fillRect(x(answer.phase[at]) - 1, y(answer.magnitude[at]) - 1, 2.2, 2.2);
      }
      paint.globalAlpha = 1;
      paint.fillStyle = style.getPropertyValue("--text");
      for (const at of places.slice(0, 40)) {
        paint.fillRect(x(answer.phase[at]) - 2.5, y(answer.magnitude[at]) - 2.5, 5, 5);
        if (places.length <= 15) paint.fillText(JSON.stringify(names[at]), Math.min(x(answer.phase[at]) + 5, width - 60), y(answer.magnitude[at]));
      }
      const rows = places.slice(0, 40).map((at) => element("tr", {}, element("td", {}, JSON.stringify(names[at])), element("td", {}, String(at)), element("td", {}, answer.magnitude[at].toFixed(4)), element("td", {}, answer.phase[at].toFixed(3))));
      list.replaceChildren(search.value ? element("table", {}, element("thead", {}, element("tr", {}, ...["token", "id", "magnitude", "phase"].map((name) => element("th", { scope: "col" }, name)))), element("tbody", {}, ...rows))
        : element("p", { class: "none" }, "Search for a token to see where it is."));
    }
    search.addEventListener("input", draw);
    place.replaceChildren(element("div", { class: "card" }, element("h3", {}, "The vocabulary by phase (across) and magnitude (up)"),
      element("p", { class: "quiet" }, "The state of each token, read as the readout reads a state. With a dimension j: M and P of this dimension."),
      ...(kept.dimension ? [] : unaligned(answer).map((name) => notice(`This run never aligned the ${name} readout with a teacher, so the ${name} says nothing here.`))),
      element("div", { class: "bar" }, element("label", {}, "Dimension ", dimension), element("label", {}, "Search ", search), element("span", { class: "quiet" }, `${names.length.toLocaleString("en")} tokens`)),
      element("div", { class: "two" }, canvas, list)));
    draw();
  }

  return { open };
})();
