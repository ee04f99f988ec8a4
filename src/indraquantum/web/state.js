// How a state looks on every page: a token shaded by its probability and underlined by its phase, and a phasor.
// A token is {text, probability, confidence, phase}; confidence is |c| and phase is arg c in radians, or null where
// training did not align them. Text is only ever set as text, never as HTML.
"use strict";
const IndraState = (() => {
  const SVG = "http://www.w3.org/2000/svg";

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  function drawing(name, attributes) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  // Blue is a phase of 0, where the teacher is certain, and orange is pi, where it knows nothing. A phase outside of
  // this half circle has the colour of the place opposite it, so the circle has no seam.
  function phaseColour(phase) {
    const part = (1 - Math.cos(phase)) / 2;
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const from = dark ? [110, 170, 255] : [24, 92, 210], to = dark ? [255, 160, 80] : [200, 80, 10];
    const mixed = from.map((value, at) => Math.round(value + (to[at] - value) * part));
    return `rgb(${mixed.join(", ")})`;
  }

  function phasor(magnitude, phase, size = 28) {
    const svg = drawing("svg", { viewBox: "-15 -15 30 30", width: size, height: size, class: "phasor", role: "img",
      "aria-label": `phasor of length ${magnitude.toFixed(3)} at ${phase.toFixed(2)} radians` });
    svg.append(drawing("circle", { r: 13 }), drawing("line", { class: "axis", x1: -13, x2: 13, y1: 0, y2: 0 }));
    const length = 13 * Math.min(1, magnitude), hand = drawing("line", { class: "hand", x1: 0, y1: 0,
      x2: length * Math.cos(phase), y2: -length * Math.sin(phase) });
    hand.style.stroke = phaseColour(phase);
    svg.append(hand);
    return svg;
  }

  // What a token looks like where it has no visible text.
  function visible(text) {
    return text === "" ? "∅" : text.replace(/\n/g, "↵\n").replace(/\t/g, "⇥");
  }

  function described(token) {
    const parts = [`token ${JSON.stringify(token.text)}`, `probability ${token.probability.toFixed(3)}`];
    if (token.confidence !== null) parts.push(`confidence ${token.confidence.toFixed(3)}`);
    if (token.phase !== null) parts.push(`phase ${token.phase.toFixed(2)} radians`);
    return parts.join(", ");
  }

  // Show tokens as buttons: shade is the probability, the line below is the phase, and its strength the confidence.
  function showTokens(place, tokens, choose) {
    const buttons = tokens.map((token, at) => {
      const button = element("button", { type: "button", class: "token", "aria-pressed": "false",
        "aria-label": described(token), title: described(token) });
      if (token.text === "") button.append(element("span", { class: "mark" }, visible("")));
      else button.append(visible(token.text));
      button.style.backgroundColor = `rgba(var(--shade), ${(0.45 * token.probability).toFixed(3)})`;
      if (token.phase !== null) {
        button.style.borderBottomColor = phaseColour(token.phase);
        button.style.borderBottomWidth = `${1 + 4 * Math.min(1, token.confidence ?? 0.5)}px`;
      }
      button.addEventListener("click", () => select(at));
      button.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (step && buttons[at + step]) { buttons[at + step].focus(); select(at + step); event.preventDefault(); }
      });
      return button;
    });
    function select(at) {
      buttons.forEach((button, other) => button.setAttribute("aria-pressed", String(other === at)));
      choose(tokens[at], at);
    }
    place.classList.add("tokens");
    place.replaceChildren(...buttons);
    return select;
  }

  // What the colours mean.
  function key() {
    const svg = drawing("svg", { viewBox: "0 0 20 1", preserveAspectRatio: "none", role: "img",
      "aria-label": "colours from a phase of 0 to pi" });
    for (let at = 0; at < 20; at += 1) {
      const part = drawing("rect", { x: at, y: 0, width: 1.02, height: 1 });
      part.style.fill = phaseColour((Math.PI * at) / 19);
      svg.append(part);
    }
    return element("p", { class: "phase-key" }, "shade: probability · line below: phase, from certain (0)", svg,
      "to uncertain (π) · thicker: more confident");
  }

  return { element, drawing, phaseColour, phasor, showTokens, visible, key };
})();
