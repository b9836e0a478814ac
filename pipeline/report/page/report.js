"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { classes, prompts, heat, images, exhibits } = data;
  const NORMAL = 0, ANOMALOUS = 1, ERROR = 2;
  const OUTCOMES = ["normal", "anomalous", "error"];
  const CARDS = 24, ROWS = 100, CANVAS = 240;
  const MODES = ["photo", "heat", "mask"];
  const $ = (id) => document.getElementById(id);
  const state = { view: "gallery", mode: "heat", page: 0, current: 0, away: false, shown: [] };

  // Data enters the page as text nodes and properties, never as markup.
  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }
  const score = (value) => (value === null ? "–" : value.toFixed(3));
  const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;
  const count = (value) => value.toLocaleString("en");

  // Heat: an anomaly map on its patch grid -> pixels, bilinear about patch centres, as the pipeline's own masks are made.
  const RAMP = [[0, 20, 11, 53], [0.25, 101, 21, 110], [0.5, 187, 55, 84], [0.75, 243, 120, 25], [1, 252, 240, 150]];
  function colour(t) {
    let i = 0;
    while (i < RAMP.length - 2 && t > RAMP[i + 1][0]) i++;
    const [from, to] = [RAMP[i], RAMP[i + 1]], f = (t - from[0]) / (to[0] - from[0]);
    return [1, 2, 3].map((channel) => from[channel] + f * (to[channel] - from[channel]));
  }
  const COLOURS = Array.from({ length: 256 }, (_, i) => colour(i / 255));

  function upsample(exhibit) {
    const bytes = atob(exhibit.grid), gw = exhibit.grid_width, gh = bytes.length / 2 / gw;
    const at = (y, x) => {
      const i = 2 * (Math.min(Math.max(y, 0), gh - 1) * gw + Math.min(Math.max(x, 0), gw - 1));
      return (bytes.charCodeAt(i) + 256 * bytes.charCodeAt(i + 1)) / 65535 * exhibit.grid_scale;
    };
    const scale = CANVAS / Math.max(exhibit.width, exhibit.height);
    const width = Math.max(1, Math.round(exhibit.width * scale)), height = Math.max(1, Math.round(exhibit.height * scale));
    const values = new Float32Array(width * height);
    for (let y = 0; y < height; y++) {
      const v = ((y + 0.5) * gh) / height - 0.5, row = Math.floor(v), fy = v - row;
      for (let x = 0; x < width; x++) {
        const u = ((x + 0.5) * gw) / width - 0.5, column = Math.floor(u), fx = u - column;
        values[y * width + x] =
          (1 - fy) * ((1 - fx) * at(row, column) + fx * at(row, column + 1)) +
          fy * ((1 - fx) * at(row + 1, column) + fx * at(row + 1, column + 1));
      }
    }
    return { width, height, values };
  }

  function layer(kind, map, paint) {
    const canvas = make("canvas", { class: kind, width: map.width, height: map.height, "aria-hidden": "true" });
    const context = canvas.getContext("2d"), pixels = context.createImageData(map.width, map.height);
    for (let i = 0; i < map.values.length; i++) pixels.data.set(paint(i), 4 * i);
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  function layers(exhibit, classNumber) {
    if (!exhibit.grid) return [];
    const map = upsample(exhibit), [low, high] = heat[classNumber];
    const marked = (i) => map.values[i] >= exhibit.mask_threshold;
    return [
      layer("heat", map, (i) => {
        const t = Math.min(1, Math.max(0, (map.values[i] - low) / (high - low || 1)));
        return [...COLOURS[Math.round(255 * t)], 215 * Math.pow(t, 0.8)];
      }),
      layer("mask", map, (i) => {
        if (!marked(i)) return [8, 8, 8, 190];
        const x = i % map.width;
        const edge = [x > 0 && i - 1, x < map.width - 1 && i + 1, i - map.width, i + map.width];
        const inside = edge.every((j) => j === false || j < 0 || j >= map.values.length || marked(j));
        return inside ? [0, 0, 0, 0] : [255, 143, 102, 255];
      }),
    ];
  }

  function photo(exhibit, text) {
    if (!exhibit.photo) return make("span", { class: "missing" }, exhibit.photo_fault);
    return make("img", { src: `data:image/jpeg;base64,${exhibit.photo}`, alt: text, decoding: "async", loading: "lazy" });
  }

  // Filters and order.
  const collator = new Intl.Collator("en", { numeric: true });
  const ORDERS = {
    rank: (a, b) => a - b,
    score: (a, b) => (images.score[a] ?? 2) - (images.score[b] ?? 2) || a - b,
    "-score": (a, b) => (images.score[b] ?? -1) - (images.score[a] ?? -1) || a - b,
    class: (a, b) => collator.compare(classes[images.class[a]], classes[images.class[b]]) || a - b,
    key: (a, b) => collator.compare(images.key[a], images.key[b]) || a - b,
  };
  const haystack = images.key.map((key, i) => `${key} ${images.note[i] || ""}`.toLowerCase());

  function select() {
    const byClass = $("by-class").value, byState = $("by-state").value, from = parseFloat($("by-score").value);
    const words = $("by-text").value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [];
    for (let i = 0; i < images.key.length; i++) {
      if (state.view === "gallery" && images.exhibit[i] === null) continue;
      if (byClass !== "" && images.class[i] !== Number(byClass)) continue;
      if (byState !== "" && images.state[i] !== Number(byState)) continue;
      if (!Number.isNaN(from) && !(images.score[i] >= from && images.score[i] !== null)) continue;
      if (!words.every((word) => haystack[i].includes(word))) continue;
      found.push(i);
    }
    return found.sort(ORDERS[$("order").value]);
  }

  function apply() {
    state.shown = select();
    state.page = 0;
    state.current = 0;
    draw();
  }

  const size = () => (state.view === "gallery" ? CARDS : ROWS);

  function draw() {
    const pages = Math.max(1, Math.ceil(state.shown.length / size()));
    const from = state.page * size(), part = state.shown.slice(from, from + size());
    const inGallery = state.view === "gallery";
    $("gallery").hidden = !inGallery;
    $("list").hidden = inGallery;
    $("nothing").hidden = state.shown.length > 0;
    if (inGallery) $("gallery").replaceChildren(...part.map((i, n) => card(i, from + n)));
    else $("rows").replaceChildren(...part.map((i, n) => row(i, from + n)));
    const total = inGallery ? exhibits.length : images.key.length;
    $("shown").textContent = `${count(state.shown.length)} of ${count(total)} ${inGallery ? "in the gallery" : "listed"}`;
    $("page").textContent = `${state.page + 1} / ${pages}`;
    $("previous").disabled = state.page === 0;
    $("next").disabled = state.page >= pages - 1;
    document.querySelector(".pager").hidden = pages === 1;
    const order = $("order").value;
    for (const head of document.querySelectorAll("th[data-order]")) {
      const sorted = order.replace("-", "") === head.dataset.order;
      head.setAttribute("aria-sort", sorted ? (order.startsWith("-") ? "descending" : "ascending") : "none");
    }
  }

  const nameOf = (i) => `${classes[images.class[i]]}, ${images.key[i]}, score ${score(images.score[i])}, ${OUTCOMES[images.state[i]]}`;

  function card(i, place) {
    const exhibit = exhibits[images.exhibit[i]], hot = images.state[i] === ANOMALOUS;
    const stage = make("span", { class: "stage" }, photo(exhibit, ""), ...layers(exhibit, images.class[i]));
    const caption = make("span", { class: "caption" },
      make("span", { class: "what" }, classes[images.class[i]],
        make("span", { class: "muted" }, ` · ${(hot && images.note[i]) || OUTCOMES[images.state[i]]}`)),
      make("span", { class: hot ? "score hot" : "score" }, score(images.score[i])),
      make("span", { class: "key" }, make("bdi", {}, images.key[i])));
    const button = make("button", { type: "button", class: "card", "aria-label": nameOf(i), "data-place": place,
      "data-score": images.score[i], "data-class": images.class[i], tabindex: place === state.current ? 0 : -1 }, stage, caption);
    return make("li", {}, button);
  }

  function row(i, place) {
    const opens = images.exhibit[i] !== null;
    const key = opens ? make("button", { type: "button", class: "link" }, images.key[i]) : images.key[i];
    return make("tr", { class: opens ? "opens" : null, "data-place": place, "data-score": images.score[i] },
      make("td", { class: images.state[i] === ANOMALOUS ? "n hot" : "n" }, score(images.score[i])),
      make("td", {}, classes[images.class[i]]),
      make("td", { class: "key" }, key),
      make("td", {}, OUTCOMES[images.state[i]]),
      make("td", {}, images.note[i] || ""));
  }

  function moveTo(place, focus = true) {
    if (place < 0 || place >= state.shown.length) return;
    state.current = place;
    const page = Math.floor(place / size());
    if (page !== state.page) { state.page = page; draw(); }
    for (const button of document.querySelectorAll(".card")) {
      button.tabIndex = Number(button.dataset.place) === place ? 0 : -1;
      if (focus && button.tabIndex === 0) button.focus();
    }
  }

  function setMode(mode) {
    state.mode = mode;
    for (const element of [$("gallery"), $("frame")]) element.dataset.mode = mode;
    for (const button of document.querySelectorAll("button[data-mode]")) {
      button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
    }
    $("wipe").disabled = mode === "photo";
  }

  function setView(view) {
    state.view = view;
    for (const button of document.querySelectorAll("button[data-view]")) {
      button.setAttribute("aria-pressed", String(button.dataset.view === view));
    }
    apply();
  }

  // The viewer.
  function open(place) {
    const i = state.shown[place];
    if (i === undefined || images.exhibit[i] === null) return;
    moveTo(place, false);
    const exhibit = exhibits[images.exhibit[i]];
    const frame = $("frame");
    frame.style.setProperty("--ratio", exhibit.width / exhibit.height);
    frame.replaceChildren(photo(exhibit, nameOf(i)), ...layers(exhibit, images.class[i]),
      ...exhibit.regions.map((region, n) => box(region, n, exhibit)));
    wipe();
    showBoxes();
    $("place").textContent = `${place + 1} of ${state.shown.length}`;
    $("back").disabled = place === 0;
    $("forth").disabled = place === state.shown.length - 1;
    $("viewer-title").textContent = images.key[i];
    $("said").replaceChildren(...say(i, exhibit));
    document.querySelector(".say").scrollTop = 0;
    if (!$("viewer").open) $("viewer").showModal();
  }

  function box(region, number, exhibit) {
    const [x, y, width, height, , , defect] = region;
    const element = make("div", { class: x > 0.6 * exhibit.width ? "box right" : "box" },
      make("span", {}, defect ? `${number + 1} ${defect}` : `${number + 1}`));
    for (const [name, part, whole] of [["left", x, "width"], ["top", y, "height"], ["width", width, "width"], ["height", height, "height"]]) {
      element.style[name] = `${(100 * part) / exhibit[whole]}%`;
    }
    return element;
  }

  function openExhibit(number) {
    const find = () => state.shown.findIndex((i) => images.exhibit[i] === number);
    if (find() < 0) reset();
    open(find());
    state.away = true;
  }

  const section = (title, ...content) => [make("h3", {}, title), ...content];
  const item = (text, value, ...more) => make("li", {}, make("span", {}, text), make("span", { class: "n" }, value), ...more);

  function say(i, exhibit) {
    const hot = images.state[i] === ANOMALOUS, used = prompts[images.class[i]] || [];
    const parts = [make("p", { class: hot ? "verdict hot" : "verdict" }, score(images.score[i]), " ",
      make("small", {}, `${hot ? "anomalous" : "normal"}, threshold ${score(exhibit.threshold)}`))];
    parts.push(make("p", { class: "muted" }, `${classes[images.class[i]]} · whole image ${score(exhibit.score_global)}, ` +
      `strongest patch ${score(exhibit.score_local)} · ${exhibit.width} × ${exhibit.height} px`));
    const regions = exhibit.regions.map(([x, y, w, h, area, peak, defect, peer], n) =>
      item(`${n + 1} ${defect || "no defect described"}`, `peak ${score(peak)}, ${count(area)} px`,
        ...(peer ? [make("small", { class: "key" }, `most alike tonight: ${peer}`)] : [])));
    const more = exhibit.region_count - regions.length;
    parts.push(...section(`Regions, ${percent(exhibit.mask_area)} of the image`,
      regions.length ? make("ul", {}, ...regions, more > 0 ? item(`and ${count(more)} weaker ones`, "") : null)
        : make("p", {}, "none above the mask's threshold")));
    const weights = exhibit.explanation.map(([, , weight, similarity]) => weight * similarity), most = Math.max(...weights, 1e-9);
    parts.push(...section("Prompts that decided", make("ul", {}, ...exhibit.explanation.map(([text, , , similarity], n) =>
      item(text, `cosine ${score(similarity)}`, make("meter", { min: 0, max: 1, value: Math.max(0, weights[n] / most), "aria-label": "share of the strongest prompt" }))))));
    parts.push(...dropped(exhibit, used));
    parts.push(...section("Files", make("p", { class: "key" }, exhibit.uri),
      exhibit.mask_link ? make("p", {}, make("a", { href: exhibit.mask_link, target: "_blank", rel: "noopener" }, "the mask at full size")) : null));
    return parts.filter(Boolean);
  }

  function dropped(exhibit, used) {
    if (!exhibit.kept || exhibit.kept.length !== used.length) {
      return section("Prompts dropped as ambiguous", make("p", {}, "not recorded by the version that scored this image"));
    }
    const gone = used.filter((_, n) => exhibit.kept[n] === "0");
    const sides = ["normal", "anomalous"].map((side, n) => [side, gone.filter((prompt) => prompt[1] === n)]);
    const lists = sides.filter(([, list]) => list.length).map(([side, list]) => make("details", {},
      make("summary", {}, `${list.length} ${side}`), make("ul", {}, ...list.map(([text, , defect]) => item(text, defect || "")))));
    return section(`Prompts dropped as ambiguous, ${gone.length} of ${used.length}`, ...(lists.length ? lists : [make("p", {}, "none")]));
  }

  function wipe() {
    for (const canvas of $("frame").querySelectorAll("canvas")) canvas.style.clipPath = `inset(0 0 0 ${$("wipe").value}%)`;
  }
  function showBoxes() {
    for (const element of $("frame").querySelectorAll(".box")) element.hidden = !$("boxes").checked;
  }

  // Events.
  for (const id of ["by-class", "by-state", "order"]) $(id).addEventListener("change", apply);
  for (const id of ["by-score", "by-text"]) $(id).addEventListener("input", apply);
  function reset() {
    for (const id of ["by-class", "by-state", "by-score", "by-text"]) $(id).value = "";
    apply();
  }
  $("reset").addEventListener("click", reset);
  $("reset-too").addEventListener("click", reset);
  const turn = (by) => { state.page += by; state.current = state.page * size(); draw(); $("images").scrollIntoView(); };
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("wipe").addEventListener("input", wipe);
  $("boxes").addEventListener("change", showBoxes);
  $("back").addEventListener("click", () => open(state.current - 1));
  $("forth").addEventListener("click", () => open(state.current + 1));
  $("close").addEventListener("click", () => $("viewer").close());
  $("viewer").addEventListener("close", () => {
    moveTo(state.current, !state.away); // else the browser has given the focus back to where it was
    state.away = false;
  });
  $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
  $("show-help").addEventListener("click", () => $("help").showModal());
  document.addEventListener("click", (event) => {
    const target = event.target.closest("button, tr.opens");
    if (!target) return;
    const { mode, view, place, exhibit } = target.dataset;
    if (mode) setMode(mode);
    else if (view) setView(view);
    else if (target.matches(".card, tr.opens")) open(Number(place));
    else if (exhibit) openExhibit(Number(exhibit));
    else if (target.closest("tr.opens")) open(Number(target.closest("tr.opens").dataset.place));
    else if (target.matches("[data-class]")) {
      $("by-class").value = target.dataset.class;
      apply();
      $("images").scrollIntoView();
    } else if (target.closest("th[data-order]")) {
      const name = target.closest("th").dataset.order, first = name === "score" ? "-score" : name;
      $("order").value = name === "score" && $("order").value === "-score" ? "score" : first;
      apply();
    } else if (target.closest(".sortable th")) sortTable(target.closest("th"));
  });

  // The table of classes is in the page already; its headings become buttons.
  for (const head of document.querySelectorAll(".sortable th[aria-sort]")) {
    head.replaceChildren(make("button", { type: "button" }, head.textContent));
  }
  function sortTable(head) {
    const down = head.getAttribute("aria-sort") !== "descending", sign = down ? -1 : 1, column = head.cellIndex;
    for (const other of head.parentElement.cells) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = head.closest("table").tBodies[0];
    const value = (line) => line.cells[column].dataset.value;
    body.append(...[...body.rows].sort((a, b) => sign * collator.compare(value(a), value(b))));
  }

  function columns() {
    const cards = [...document.querySelectorAll(".card")];
    return cards.filter((one) => one.offsetTop === cards[0].offsetTop).length || 1;
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target, typing = target.matches("input:not([type=checkbox]), select");
    if (event.key === "Escape" && typing && !$("viewer").open) {
      if (target.id.startsWith("by-")) { target.value = ""; apply(); }
      target.blur();
      return;
    }
    if (typing || $("help").open) return;
    const viewing = $("viewer").open, onCard = target.matches(".card");
    const steps = { j: 1, k: -1 };
    if (viewing || onCard) Object.assign(steps, { ArrowRight: 1, ArrowLeft: -1 });
    if (onCard && !viewing) Object.assign(steps, { ArrowDown: columns(), ArrowUp: -columns() });
    if (event.key in steps) {
      event.preventDefault();
      if (viewing) open(state.current + steps[event.key]);
      else if (state.view === "gallery") moveTo(onCard ? state.current + steps[event.key] : state.current);
    } else if (event.key === "m") {
      setMode(MODES[(MODES.indexOf(state.mode) + 1) % MODES.length]);
    } else if (event.key === "/" && !viewing) {
      event.preventDefault();
      $("by-text").focus();
    } else if (event.key === "?") {
      $("help").showModal();
    }
  });

  const ramp = $("ramp").getContext("2d");
  COLOURS.forEach(([r, g, b], i) => { ramp.fillStyle = `rgb(${r} ${g} ${b})`; ramp.fillRect((96 * i) / 256, 0, 1, 8); });
  setMode("heat");
  apply();
})();
