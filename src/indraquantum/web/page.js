// The page that `indra export --as page` writes: a prompt, the text token by token, and what the model thought of each.
// Texts of the prompt and the model are only ever set as text, never as HTML.
"use strict";
(() => {
  const { element, drawing, phaseColour, phasor, visible } = IndraState;
  const find = (id) => document.getElementById(id);
  const worker = new Worker("page_worker.js", { type: "module" });
  let model = null, run = 0, tokens = [], buttons = [], current = 0;

  const alpaca = (instruction) => `### Instruction:\n${instruction}\n\n### Response:\n`;
  const say = (text, isProblem = false) => {
    find("status").textContent = text;
    find("status").className = isProblem ? "problem" : "";
  };
  const uncertainty = (phase) => {
    const wrapped = phase <= -Math.PI / 2 ? phase + 2 * Math.PI : phase; // into (-pi/2, 3pi/2], as the package does
    return (wrapped / Math.PI) * Math.log(model.vocabulary);
  };

  function busy(is) {
    find("write").disabled = is;
    find("stop").disabled = !is;
    find("text").setAttribute("aria-busy", String(is));
  }

  function ready(about) {
    model = about;
    document.title = find("title").textContent = model.name;
    find("count").value = Math.min(model.sampling.max_new_tokens, model.context - 1);
    find("count").max = model.context - 1;
    find("temperature").value = model.sampling.temperature;
    find("loading").hidden = true;
    find("write").disabled = false;
    const missing = ["magnitude", "phase"].filter((name) => model.aligned && !model.aligned.includes(name));
    if (missing.length) {
      find("unaligned").hidden = false;
      find("unaligned").textContent = `No teacher aligned the ${missing.join(" and the ")} of this model. `
        + "So what they show here says nothing about how sure it is; the probabilities do.";
    }
    say("Ready.");
  }

  // ---- the text
  function described(token) {
    return `${JSON.stringify(token.isEnd ? "end of text" : token.text)}, probability ${percent(token.probability)}, `
      + `magnitude ${token.confidence.toFixed(2)}, phase ${token.phase.toFixed(2)}`;
  }

  function add(token) {
    const at = tokens.length, button = element("button", { type: "button", class: "token", "data-id": token.id,
      tabindex: at ? "-1" : "0", "aria-label": described(token) });
    if (token.isEnd) button.append(element("span", { class: "mark" }, " (end)"));
    else if (token.text === "") button.append(element("span", { class: "mark" }, visible("")));
    else button.append(visible(token.text).replaceAll("\n", ""));
    paint(button, token);
    button.addEventListener("focus", () => choose(at));
    button.addEventListener("mouseenter", () => show(token));
    button.addEventListener("mouseleave", () => { if (tokens[current]) show(tokens[current]); });
    button.addEventListener("click", () => button.focus());
    tokens.push(token);
    buttons.push(button);
    find("text").append(button, "\n".repeat(token.text.split("\n").length - 1)); // a button does not break a line
  }

  function paint(button, token) {
    button.style.backgroundColor = `rgba(var(--shade), ${(0.5 * Math.min(1, token.confidence)).toFixed(3)})`;
    button.style.borderBottomColor = phaseColour(token.phase);
  }

  function choose(at) {
    buttons[current]?.setAttribute("tabindex", "-1");
    current = at;
    buttons.forEach((button, other) => button.setAttribute("aria-pressed", String(other === at)));
    buttons[at].setAttribute("tabindex", "0");
    show(tokens[at]);
  }

  find("text").addEventListener("keydown", (event) => {
    const next = { ArrowRight: current + 1, ArrowDown: current + 1, ArrowLeft: current - 1, ArrowUp: current - 1,
      Home: 0, End: buttons.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    buttons[Math.max(0, Math.min(buttons.length - 1, next))]?.focus();
  });

  // ---- what is known about one token
  const percent = (part) => `${(100 * part).toFixed(part < 0.0995 ? 2 : 1)} %`;
  const spelled = (text) => (text === "" ? "∅" : text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣"));

  function bar(part) {
    const svg = drawing("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", class: "bar", "aria-hidden": "true" });
    svg.append(drawing("rect", { width: Math.max(0.5, 100 * part), height: 10 }));
    return svg;
  }

  function show(token) {
    const rows = token.alternatives.map((other) => element("tr", { class: other.id === token.id ? "taken" : "" },
      element("th", { scope: "row" }, spelled(other.text)), element("td", { class: "bar" }, bar(other.probability)),
      element("td", {}, percent(other.probability))));
    const pair = (name, value) => [element("dt", {}, name), element("dd", {}, value)];
    find("details").replaceChildren(
      element("div", { class: "head" }, phasor(token.confidence, token.phase, 56), element("h3", {}, token.isEnd ? "end of the text" : spelled(token.text))),
      element("dl", {}, ...pair("probability", percent(token.probability)), ...pair("magnitude (confidence)", token.confidence.toFixed(3)),
        ...pair("phase", `${token.phase.toFixed(3)} rad`), ...pair("uncertainty", `${uncertainty(token.phase).toFixed(2)} nats`)),
      element("table", {}, element("caption", {}, "What could have come here"), element("tbody", {}, ...rows)));
  }

  // ---- the legend
  function gradient(label, paintPart) {
    const svg = drawing("svg", { viewBox: "0 0 20 1", preserveAspectRatio: "none", role: "img", "aria-label": label });
    for (let at = 0; at < 20; at += 1) {
      const part = drawing("rect", { x: at, y: 0, width: 1, height: 1 });
      part.style.fill = paintPart(at / 19);
      svg.append(part);
    }
    return svg;
  }

  function drawLegend() {
    find("legend").replaceChildren(
      element("span", {}, "shade: magnitude, not confident", gradient("no shade is a magnitude of 0, the full shade is 1", (part) => `rgba(var(--shade), ${0.5 * part})`), "confident"),
      element("span", {}, "line below: phase, certain (0)", gradient("colours from a phase of 0 to pi", (part) => phaseColour(Math.PI * part)), "uncertain (π)"));
    buttons.forEach((button, at) => paint(button, tokens[at]));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawLegend);
  drawLegend();

  // ---- writing
  find("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!model || find("write").disabled) return;
    const text = find("prompt").value, isInstruction = find("form").elements.kind.value === "instruction";
    run += 1;
    tokens = []; buttons = []; current = 0;
    find("text").replaceChildren(element("span", { class: isInstruction ? "prompt asked" : "prompt" }, text));
    busy(true);
    say("Writing…");
    worker.postMessage({ kind: "write", run, prompt: isInstruction ? alpaca(text) : text, count: Number(find("count").value),
      temperature: Number(find("temperature").value), topK: model.sampling.top_k, topP: model.sampling.top_p });
  });
  find("stop").addEventListener("click", () => worker.postMessage({ kind: "stop" }));

  const REASONS = { stopped: "You stopped it.", end: "The model ended the text.", full: "The model's context is full.", count: "" };
  worker.onmessage = ({ data }) => {
    if (data.kind === "progress") find("loading").value = data.part;
    else if (data.kind === "ready") ready(data.model);
    else if (data.kind === "token" && data.run === run) add(data);
    else if (data.kind === "done" && data.run === run) {
      busy(false);
      say(`${data.written} tokens in ${data.seconds.toFixed(1)} s, ${(data.written / data.seconds).toFixed(0)} a second. ${REASONS[data.reason]}`);
    } else if (data.kind === "failed") {
      if (!data.loading) busy(false);
      find("loading").hidden = true;
      say(data.message, true);
    }
  };
  worker.onerror = (event) => { find("loading").hidden = true; say(`The model can't run here: ${event.message || "a file is missing"}`, true); };
})();
