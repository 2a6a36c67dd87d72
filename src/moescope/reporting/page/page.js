"use strict";
(() => {
  const folded = [];
  addEventListener("beforeprint", () => {
    folded.push(...document.querySelectorAll("main details:not([open])"));
    for (const details of folded) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of folded.splice(0)) details.open = false;
  });

  const data = JSON.parse(document.getElementById("routing").textContent);
  const viewer = document.getElementById("viewer");
  if (!data.documents.length) return;

  const byId = (id) => document.getElementById(id);
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const paint = (element, colours) => {
    element.style.setProperty("--light", colours[0]);
    element.style.setProperty("--dark", colours[1]);
  };
  const bytes = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

  const layers = new Map(data.layers.map((layer) => [layer.layer, layer]));
  const state = { document: data.documents[0], columns: data.shown.slice(), rank: 0, lit: [], hits: [], at: -1, token: -1 };

  const palette = (layer) => data.palettes[layer.num_experts];
  const colours = (layer, expert) => (expert >= 0 && expert < layer.num_experts ? palette(layer)[expert] : data.no_expert);
  const name = (layer, expert) =>
    expert < 0 ? "dropped" : expert < layer.num_experts ? `expert ${expert}` : `null expert ${expert}`;

  function choices(layer) {
    const cache = (state.document.cache ??= new Map());
    if (!cache.has(layer.layer)) {
      const packed = bytes(state.document.experts[layer.layer]);
      const ids = layer.wide ? new Uint16Array(packed.buffer) : packed;
      const none = layer.wide ? 65535 : 255;
      const stored = state.document.weights?.[layer.layer];
      const weights = stored ? Array.from(bytes(stored[1]), (value) => (value / 255) * stored[0]) : null;
      cache.set(layer.layer, { ids: Array.from(ids, (id) => (id === none ? -1 : id)), weights });
    }
    return cache.get(layer.layer);
  }
  const expertOf = (layer, token, rank) => choices(layer).ids[token * layer.top_k + rank] ?? -1;
  const texts = () => state.document.tokens.map((index) => data.texts[index]);

  /* ------------------------------------------------------------------------------------------ the coloured text */

  function draw() {
    const words = texts();
    const columns = byId("columns");
    columns.replaceChildren(...state.columns.map((number, column) => drawColumn(layers.get(number), column, words)));
    const { number, domain, shown, total } = state.document;
    const cut = shown < total ? `the first ${shown.toLocaleString("en")} of ${total.toLocaleString("en")}` : total.toLocaleString("en");
    byId("status").textContent = `Document ${number} of ${domain}: ${cut} tokens. ` +
      "Colours are experts within a layer; expert numbers of different layers have nothing in common.";
    light();
    search();
  }

  function drawColumn(layer, column, words) {
    const box = make("div", "column");
    const head = make("div", "head");
    const pick = make("select");
    pick.setAttribute("aria-label", `Layer of column ${column + 1}`);
    for (const other of data.layers) {
      const option = make("option", "", `Layer ${other.layer}`);
      option.value = other.layer;
      option.selected = other.layer === layer.layer;
      pick.append(option);
    }
    pick.addEventListener("change", () => {
      state.columns[column] = Number(pick.value);
      state.lit[column] = undefined;
      draw();
    });
    head.append(pick, drawLegend(layer, column, words.length));
    const text = make("div", "text");
    text.tabIndex = 0;
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", `Text coloured by layer ${layer.layer}; arrow keys move from token to token`);
    text.dataset.column = column;
    const rank = Math.min(state.rank, layer.top_k - 1);
    words.forEach((word, token) => {
      const span = make("span", "token", word);
      span.dataset.token = token;
      span.dataset.expert = expertOf(layer, token, rank);
      paint(span, colours(layer, Number(span.dataset.expert)));
      text.append(span);
    });
    box.append(head, text);
    return box;
  }

  function drawLegend(layer, column, numTokens) {
    const legend = make("div", "legend");
    legend.setAttribute("role", "group");
    legend.setAttribute("aria-label", `Highlight an expert of layer ${layer.layer}`);
    let experts = Array.from({ length: layer.num_experts }, (_, expert) => expert);
    if (layer.num_experts > 32) {
      const rank = Math.min(state.rank, layer.top_k - 1);
      const present = new Set(Array.from({ length: numTokens }, (_, token) => expertOf(layer, token, rank)));
      experts = experts.filter((expert) => present.has(expert));
    }
    for (const expert of experts) {
      const button = make("button", "", String(expert));
      button.type = "button";
      button.title = `Highlight expert ${expert}`;
      button.dataset.expert = expert;
      button.setAttribute("aria-pressed", "false");
      paint(button, palette(layer)[expert]);
      button.addEventListener("click", () => {
        state.lit[column] = state.lit[column] === expert ? undefined : expert;
        light();
      });
      legend.append(button);
    }
    return legend;
  }

  function light() {
    viewer.querySelectorAll(".column").forEach((column, index) => {
      const expert = state.lit[index];
      column.querySelector(".text").classList.toggle("lit", expert !== undefined);
      for (const button of column.querySelectorAll(".legend button"))
        button.setAttribute("aria-pressed", String(Number(button.dataset.expert) === expert));
      for (const span of column.querySelectorAll(".token"))
        span.classList.toggle("chosen", Number(span.dataset.expert) === expert);
    });
  }

  /* ------------------------------------------------------------------------------------------------- one token */

  const tip = byId("tip");

  function point(token, near) {
    state.token = token;
    for (const span of viewer.querySelectorAll(".token.here")) span.classList.remove("here");
    if (token < 0) {
      tip.hidden = true;
      return;
    }
    for (const span of viewer.querySelectorAll(`.token[data-token="${token}"]`)) span.classList.add("here");
    describe(token);
    tip.hidden = false;
    const box = near.getClientRects()[0] ?? near.getBoundingClientRect();
    const left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8));
    const below = box.bottom + 8;
    const top = below + tip.offsetHeight > innerHeight - 8 ? box.top - tip.offsetHeight - 8 : below;
    tip.style.setProperty("left", `${left}px`);
    tip.style.setProperty("top", `${Math.max(8, top)}px`);
  }

  function describe(token) {
    const { document: doc } = state;
    const word = data.texts[doc.tokens[token]];
    const first = make("div");
    first.append(make("code", "", word), ` token ${token}, id ${doc.ids[token]}`);
    const table = make("table");
    const spoken = [];
    for (const number of [...new Set(state.columns)]) {
      const layer = layers.get(number);
      const { weights } = choices(layer);
      const row = make("tr");
      row.append(make("th", "", `layer ${number}`));
      const said = [];
      for (let rank = 0; rank < layer.top_k; rank++) {
        const expert = expertOf(layer, token, rank);
        const swatch = make("span", "swatch");
        paint(swatch, colours(layer, expert));
        const weight = weights ? ` ${weights[token * layer.top_k + rank].toFixed(2)}` : "";
        const cell = make("td");
        cell.append(swatch, `${expert < 0 ? "dropped" : expert}${weight}`);
        row.append(cell);
        said.push(name(layer, expert) + (weight && ` weight${weight}`));
      }
      table.append(row);
      spoken.push(`layer ${number}: ${said.join(", ")}`);
    }
    const note = make("div", "note", data.weights ? "experts by rank, with gate weight" : "experts by rank");
    tip.replaceChildren(first, table, note);
    return `${word}; ${spoken.join("; ")}`;
  }

  viewer.addEventListener("pointerover", (event) => {
    const span = event.target.closest(".token");
    if (span) point(Number(span.dataset.token), span);
  });
  viewer.addEventListener("pointerleave", () => point(-1));
  byId("columns").addEventListener("scroll", () => (tip.hidden = true), { passive: true });
  addEventListener("scroll", () => (tip.hidden = true), { passive: true });
  viewer.addEventListener("focusout", () => point(-1));
  viewer.addEventListener("keydown", (event) => {
    if (!event.target.classList.contains("text")) return;
    const last = state.document.tokens.length - 1;
    const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -last - 1, End: last + 1 };
    if (event.key === "Escape") point(-1);
    if (!(event.key in moves)) return;
    event.preventDefault();
    const token = Math.max(0, Math.min(last, state.token + moves[event.key]));
    const span = event.target.querySelector(`.token[data-token="${token}"]`);
    span.scrollIntoView({ block: "nearest" });
    point(token, span);
    byId("spoken").textContent = describe(token);
  });

  /* ---------------------------------------------------------------------------------------------------- search */

  function search() {
    const query = byId("query").value.toLowerCase();
    for (const span of viewer.querySelectorAll(".hit, .found")) span.classList.remove("hit", "found");
    state.hits = [];
    state.at = -1;
    if (query) {
      const starts = [];
      let text = "";
      for (const word of texts()) {
        starts.push(text.length);
        text += word.toLowerCase();
      }
      for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + query.length)) {
        const tokens = [];
        starts.forEach((start, token) => {
          const end = token + 1 < starts.length ? starts[token + 1] : text.length;
          if (start < at + query.length && end > at) tokens.push(token);
        });
        state.hits.push(tokens);
      }
      const hit = new Set(state.hits.flat());
      for (const span of viewer.querySelectorAll(".token"))
        if (hit.has(Number(span.dataset.token))) span.classList.add("hit");
    }
    found();
  }

  function found() {
    const { hits, at } = state;
    byId("found").textContent = !byId("query").value ? "" : !hits.length ? "not found" : at < 0 ? `${hits.length} found` : `${at + 1} of ${hits.length}`;
  }

  function step(by) {
    if (!state.hits.length) return;
    state.at = (state.at + by + state.hits.length) % state.hits.length;
    for (const span of viewer.querySelectorAll(".found")) span.classList.remove("found");
    for (const token of state.hits[state.at])
      for (const span of viewer.querySelectorAll(`.token[data-token="${token}"]`)) span.classList.add("found");
    viewer.querySelector(".found").scrollIntoView({ block: "nearest" });
    found();
  }

  byId("query").addEventListener("input", search);
  byId("query").addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault();
      step(event.shiftKey ? -1 : 1);
    }
  });

  /* -------------------------------------------------------------------------------------------------- controls */

  const documents = byId("document");
  for (const domain of [...new Set(data.documents.map((doc) => doc.domain))]) {
    const group = make("optgroup");
    group.label = domain;
    data.documents.forEach((doc, index) => {
      if (doc.domain !== domain) return;
      const start = doc.tokens.slice(0, 14).map((at) => data.texts[at]).join("").replace(/[\s↵⇥]+/g, " ").trim();
      const option = make("option", "", `${doc.number}: ${[...start].slice(0, 34).join("")}…`);
      option.value = index;
      group.append(option);
    });
    documents.append(group);
  }
  documents.addEventListener("change", () => {
    state.document = data.documents[Number(documents.value)];
    draw();
    byId("columns").scrollTop = 0;
  });
  const start = data.documents.findIndex((doc) => doc.number === data.start);
  documents.value = String(Math.max(0, start));
  state.document = data.documents[Number(documents.value)];

  const ranks = byId("rank");
  for (let rank = 0; rank < Math.max(...data.layers.map((layer) => layer.top_k)); rank++) {
    const option = make("option", "", data.choices[rank]);
    option.value = rank;
    ranks.append(option);
  }
  ranks.addEventListener("change", () => {
    state.rank = Number(ranks.value);
    state.lit = [];
    draw();
  });

  byId("toolbar").hidden = viewer.hidden = false;
  draw();
})();
