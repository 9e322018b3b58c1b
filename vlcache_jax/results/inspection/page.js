"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const slider = document.getElementById("layer");
  const LONGEST_SIDE = 1200; // of a heat map, in pixels of its canvas

  for (const outcome of data.outcomes) {
    outcome.counts = Uint8Array.from(atob(outcome.counts), (character) => character.charCodeAt(0));
    outcome.sums = new Uint32Array(data.tokens);
    outcome.counts.forEach((count, place) => { outcome.sums[place % data.tokens] += count; });
  }

  /** The chosen layer; null for all together. */
  const layer = () => (slider.value === "0" ? null : slider.value - 1);

  /** How many kv heads keep a token, and of how many. */
  function kept(outcome, token) {
    const chosen = layer();
    return chosen === null
      ? [outcome.sums[token], outcome.layers * outcome.heads]
      : [outcome.counts[chosen * data.tokens + token], outcome.heads];
  }

  function meanShare(outcome, tokens) {
    let sum = 0, all = 0;
    for (const token of tokens) {
      const [count, of] = kept(outcome, token);
      sum += count;
      all += of;
    }
    return all ? sum / all : 0;
  }

  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const inWords = (outcome, token) => {
    const [count, of] = kept(outcome, token);
    return `${percent(count / of)} (${count} of ${of} heads)`;
  };
  const outcomeOf = (element) => data.outcomes[element.closest("[data-outcome]").dataset.outcome];

  /** The colour of a share, from the same two ends as the style's. */
  function colours() {
    const style = getComputedStyle(document.documentElement);
    const [l0, l1, c0, c1, hue] = ["--l0", "--l1", "--c0", "--c1", "--hue"].map((name) =>
      Number(style.getPropertyValue(name)));
    return (share) => `oklch(${l0 + share * (l1 - l0)} ${c0 + share * (c1 - c0)} ${hue})`;
  }

  /** The patches that a canvas shows, as [token, rectangle]. */
  function patches(canvas) {
    const picture = data.pictures[canvas.dataset.picture];
    return picture.tokens
      .map((token, i) => [token, picture.rectangles[i], picture.part[i]])
      .filter(([, , part]) => part === canvas.dataset.part);
  }

  function drawHeat(canvas, colour) {
    const [width, height] = data.pictures[canvas.dataset.picture].size;
    const scale = LONGEST_SIDE / Math.max(width, height);
    canvas.width = Math.max(1, Math.round(width * scale));
    canvas.height = Math.max(1, Math.round(height * scale));
    const outcome = outcomeOf(canvas), context = canvas.getContext("2d"), drawn = patches(canvas);
    for (const [token, rectangle] of drawn) {
      // Whole pixels, so that neighbours neither overlap nor leave a seam.
      const [left, top, right, bottom] = rectangle.map((edge) => Math.round(edge * scale));
      const [count, of] = kept(outcome, token);
      context.fillStyle = colour(count / of);
      context.fillRect(left, top, right - left, bottom - top);
    }
    const share = `${percent(meanShare(outcome, drawn.map(([token]) => token)))} kept`;
    canvas.closest("figure").querySelector("output").textContent = share;
    canvas.setAttribute("aria-label", `Heat map, ${canvas.dataset.title}, ${layerName()}: ${share}`);
  }

  function layerName() {
    const chosen = layer(), count = slider.max;
    return chosen === null ? `all ${count} together` : `${chosen} (0 to ${count - 1})`;
  }

  /** Fill a <details> with the numbers behind the colours, for the chosen layer. */
  function fillTable(details) {
    details.querySelector(".scroll")?.remove();
    if (!details.open) return;
    const table = document.createElement("table");
    const addRow = (parent, tag, values) => {
      const row = parent.insertRow();
      for (const value of values) {
        const cell = document.createElement(tag);
        cell.textContent = value;
        row.append(cell);
      }
    };
    const labels = data.outcomes.map((outcome) => outcome.label);
    const shares = (token) => data.outcomes.map((outcome) => inWords(outcome, token));
    const head = table.createTHead(), body = table.createTBody();
    if (details.dataset.table === "prompt") {
      addRow(head, "th", ["place", "token", ...labels]);
      data.pieces.forEach((piece, token) => {
        if (piece !== null) addRow(body, "td", [token, JSON.stringify(piece), ...shares(token)]);
      });
    } else {
      const picture = data.pictures[details.dataset.picture];
      addRow(head, "th", ["place", "part", "left, top, right, bottom in pixels", ...labels]);
      picture.tokens.forEach((token, i) => {
        const where = picture.rectangles[i]?.join(", ") ?? "";
        addRow(body, "td", [token, picture.part[i], where, ...shares(token)]);
      });
    }
    const scroll = document.createElement("div");
    scroll.className = "scroll";
    scroll.tabIndex = 0;
    scroll.append(table);
    details.append(scroll);
  }

  function show() {
    const colour = colours();
    document.getElementById("layer-name").textContent = layerName();
    slider.setAttribute("aria-valuetext", layerName());
    document.querySelectorAll("canvas").forEach((canvas) => drawHeat(canvas, colour));
    for (const span of document.querySelectorAll("[data-tokens]")) {
      const [first, last = first] = span.dataset.tokens.split("-").map(Number);
      const tokens = Array.from({ length: last - first + 1 }, (_, i) => first + i);
      const share = meanShare(outcomeOf(span), tokens);
      span.style.setProperty("--share", share.toFixed(3));
      span.title = first === last ? `token ${first}: ${inWords(outcomeOf(span), first)} kept`
        : `tokens ${first} to ${last}: ${percent(share)} kept`;
    }
    for (const band of document.querySelectorAll(".chart .band")) {
      band.classList.toggle("chosen", Number(band.dataset.layer) === layer());
    }
    document.querySelectorAll("details[data-table]").forEach(fillTable);
  }

  /** Name the patch under the pointer. */
  function point(event) {
    const canvas = event.target, box = canvas.getBoundingClientRect();
    const [width, height] = data.pictures[canvas.dataset.picture].size;
    const x = ((event.clientX - box.left) / box.width) * width;
    const y = ((event.clientY - box.top) / box.height) * height;
    const found = patches(canvas).find(([, [left, top, right, bottom]]) =>
      left <= x && x < right && top <= y && y < bottom);
    canvas.title = found ? `token ${found[0]}: ${inWords(outcomeOf(canvas), found[0])} kept` : "";
  }

  /** One frame of a video at a time. */
  for (const time of document.querySelectorAll("[data-frames]")) {
    const frames = [...document.querySelectorAll(`[data-video="${time.dataset.frames}"]`)];
    const choose = () => {
      frames.forEach((frame, i) => { frame.hidden = i !== Number(time.value); });
      time.setAttribute("aria-valuetext", frames[time.value].querySelector("h3").textContent);
    };
    time.addEventListener("input", choose);
    time.closest("p").hidden = false;
    choose();
  }

  slider.addEventListener("input", show);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  document.querySelectorAll("canvas").forEach((canvas) => canvas.addEventListener("pointermove", point));
  document.querySelectorAll("details[data-table]").forEach((details) =>
    details.addEventListener("toggle", () => fillTable(details)));
  document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
  show();
})();
