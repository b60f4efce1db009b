// The page of `lpovod serve`. The server sends all detections above a low threshold, with refined
// boxes and without; threshold, classes and boxes then change here, without asking it again.
"use strict";
(() => {
  const $ = id => document.getElementById(id);
  const PAGE = 48; // regions shown at once
  const SVG = "http://www.w3.org/2000/svg";
  const LABEL = 17; // height of a label in CSS pixels

  const state = {
    session: "new", classes: [], limits: null, perImage: 100, refusal: null, name: "",
    threshold: 0.3, refined: true, off: new Set(),
    images: new Map(), current: null, // by id: name, width, height, names, refined, proposed
    why: null, // name, regions, dropped (of the model), marked (by the user), shown
    pictures: [], busy: false, unsaved: false, news: "",
  };

  // --- talking to the server

  async function ask(path, { method = "GET", body, headers = {} } = {}) {
    let answer;
    try {
      answer = await fetch(path, { method, body, headers: { "x-session": state.session, ...headers } });
    } catch {
      throw new Error("the server does not answer. Is lpovod serve still running?");
    }
    if (answer.ok) return answer;
    let text = `the server answered with status ${answer.status}`;
    try { text = (await answer.json()).error || text; } catch { /* no json: keep the status */ }
    throw new Error(text);
  }

  const json = async (path, options) => (await ask(path, options)).json();
  const post = content => ({ method: "POST", body: JSON.stringify(content), headers: { "content-type": "application/json" } });

  // Reads lines of json: progress first, the result last.
  async function follow(path, content, report) {
    const answer = await ask(path, post(content));
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "", last = null;
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (text + value).split("\n");
      text = lines.pop();
      for (const line of lines) {
        last = JSON.parse(line);
        if (last.step) report(last);
      }
    }
    if (!last || last.step) throw new Error("the server stopped before it was done");
    if (last.error) throw new Error(last.error);
    return last;
  }

  function complain(error) {
    $("alert").firstElementChild.textContent = error.message || String(error);
    $("alert").hidden = false;
  }

  function progress(text, done = 0, total = null) {
    $("progress").hidden = text === null;
    if (text === null) return;
    $("progress").firstElementChild.textContent = text;
    const bar = $("progress").querySelector("progress");
    if (total) { bar.max = total; bar.value = done; } else bar.removeAttribute("value");
  }

  // Runs one action at a time: shows its progress, and its error in words.
  async function act(text, action) {
    if (state.busy) return;
    state.busy = true;
    state.news = "";
    $("alert").hidden = true;
    document.body.setAttribute("aria-busy", "true");
    progress(text);
    drawButtons();
    try { await action(); } catch (error) { complain(error); } finally {
      state.busy = false;
      document.body.removeAttribute("aria-busy");
      progress(null);
      drawButtons();
    }
  }

  // --- what is shown of the detections

  // The detections of `Model.detect` with this threshold, these classes and these boxes. Scores are
  // float32, so the threshold is rounded as the server would.
  function visible(image) {
    const rows = state.refined ? image.refined : image.proposed;
    const floor = Math.fround(state.threshold), found = [];
    for (let i = 0; i < rows.score.length && found.length < state.perImage; i++) {
      const name = image.names[rows.class[i]];
      if (rows.score[i] > floor && !state.off.has(name)) found.push({ name, score: rows.score[i], box: rows.box[i] });
    }
    return found;
  }

  const splitOf = name => (state.classes.find(c => c.name === name) || { split: "word" }).split;

  function element(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null) node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  function svg(tag, attributes, text) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function shared(a, b) {
    const width = Math.min(a.x + a.w, b.x + b.w) - Math.max(a.x, b.x);
    return Math.max(0, width) * Math.max(0, Math.min(a.y, b.y) + LABEL - Math.max(a.y, b.y));
  }

  // Places a label at its box, where it covers earlier labels least.
  function place([x1, y1, x2, y2], wide, taken, width, height) {
    let best = null, least = Infinity;
    for (const top of [y1 - LABEL, y1, y2, y2 - LABEL, (y1 + y2 - LABEL) / 2]) {
      for (const left of [x1 - 1, x2 + 1 - wide]) {
        const spot = { x: Math.max(0, Math.min(left, width - wide)), y: Math.max(0, Math.min(top, height - LABEL)), w: wide };
        const covered = taken.reduce((sum, other) => sum + shared(spot, other), 0);
        if (covered < least) { best = spot; least = covered; }
      }
    }
    taken.push(best);
    return best;
  }

  const ruler = document.createElement("canvas").getContext("2d");
  ruler.font = "600 12px system-ui, sans-serif";

  function drawBoxes() {
    const image = state.images.get(state.current), overlay = $("boxes");
    overlay.replaceChildren();
    if (!image) return;
    const found = visible(image), taken = [];
    const width = $("canvas").clientWidth, height = $("canvas").clientHeight;
    overlay.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const frames = [], labels = [];
    for (const { name, score, box } of found) {
      const scaled = box.map((side, i) => side * (i % 2 ? height / image.height : width / image.width));
      const [x1, y1, x2, y2] = scaled, kind = splitOf(name);
      const text = `${name} ${score.toFixed(2)}`, wide = ruler.measureText(text).width + 10;
      const label = place(scaled, wide, taken, width, height);
      const sides = { x: x1, y: y1, width: x2 - x1, height: y2 - y1 };
      const frame = svg("g", { class: "frame", "data-name": name, "data-score": score, "data-box": box.join(" ") });
      frame.append(svg("title", {}, text), svg("rect", { ...sides, class: "casing" }), svg("rect", { ...sides, class: kind }));
      const pill = svg("g", { "data-name": name });
      pill.append(
        svg("rect", { class: `pill ${kind}`, x: label.x, y: label.y, width: wide, height: LABEL, rx: 3 }),
        svg("text", { x: label.x + 5, y: label.y + 12.5 }, text));
      for (const group of [frame, pill]) group.addEventListener("click", () => explain(name));
      frames.push(frame);
      labels.push(pill);
    }
    overlay.append(...frames.reverse(), ...labels.reverse());
    const list = found.map(d => `${d.name} ${d.score.toFixed(2)}`).join(", ");
    overlay.setAttribute("aria-label", `Detections: ${list || "none"}`);
    const count = found.length
      ? `${found.length} ${found.length === 1 ? "detection" : "detections"}`
      : "nothing above the threshold";
    $("summary").textContent = [count, state.news].filter(Boolean).join(", ");
    drawCounts(found);
  }

  // The image fills the width and at most two thirds of the window; less beside the regions.
  function fit() {
    const image = state.images.get(state.current);
    if (!image) return drawBoxes();
    const room = $("figure").clientWidth, tall = Math.max(240, (state.why ? 0.44 : 0.68) * window.innerHeight);
    const scale = Math.min(room / image.width, tall / image.height);
    $("canvas").style.width = `${Math.round(scale * image.width)}px`;
    $("canvas").style.height = `${Math.round(scale * image.height)}px`;
    drawBoxes();
  }

  function drawCounts(found) {
    for (const row of $("classes").children) {
      const scores = found.filter(d => d.name === row.dataset.name).map(d => d.score);
      row.classList.toggle("none", !scores.length);
      row.querySelector(".count").textContent = scores.length
        ? `${scores.length > 1 ? `${scores.length} × ` : ""}${Math.max(...scores).toFixed(2)}` : "–";
    }
  }

  function highlight(name) {
    $("boxes").classList.toggle("focus", name !== null);
    for (const group of $("boxes").children) group.classList.toggle("chosen", group.dataset.name === name);
  }

  // --- classes

  function take(overview) {
    state.classes = overview.classes;
    state.perImage = overview.per_image;
    for (const [id, verb] of [["undo", "Undo"], ["redo", "Redo"]]) {
      $(id).dataset.change = overview[id] || "";
      $(id).title = overview[id] ? `${verb}: ${overview[id]}` : "";
    }
    state.unsaved = Boolean(overview.undo);
    const names = new Set(state.classes.map(c => c.name));
    state.off = new Set([...state.off].filter(name => names.has(name)));
    drawClasses();
    drawButtons();
  }

  function drawClasses() {
    const order = { novel: 0, word: 1, base: 2 };
    const sorted = [...state.classes].sort((a, b) => order[a.split] - order[b.split]);
    $("classes").replaceChildren(...sorted.map(c => {
      const box = element("input", { type: "checkbox", "aria-label": `Show ${c.name}`, onchange: event => toggle(c.name, event.target.checked) });
      box.checked = !state.off.has(c.name);
      const open = state.why && state.why.name === c.name;
      const name = element("button", { type: "button", class: `name ${c.split}`, "aria-expanded": String(Boolean(open)), title: `Why ${c.name}?`, onclick: () => explain(c.name) }, c.name);
      if (c.dropped) name.append(element("small", {}, ` −${c.dropped}`));
      const row = element("li", { "data-name": c.name, onmouseenter: () => highlight(c.name), onmouseleave: () => highlight(null), onfocusin: () => highlight(c.name), onfocusout: () => highlight(null) },
        box, element("i", { class: `swatch ${c.split}` }), name, element("span", { class: "count" }, "–"));
      if (c.split === "word") row.append(element("button", { type: "button", class: "quiet", "aria-label": `Remove ${c.name}`, onclick: () => setWords(words().filter(w => w !== c.name)) }, "×"));
      return row;
    }));
    drawOnly();
  }

  const words = () => state.classes.filter(c => c.split === "word").map(c => c.name);

  function toggle(name, on) {
    if (on) state.off.delete(name); else state.off.add(name);
    drawOnly();
    drawBoxes();
  }

  function drawOnly() {
    const on = state.classes.filter(c => !state.off.has(c.name)).map(c => c.name);
    $("only").value = state.off.size && on.length <= 12 ? on.join(", ") : "";
    $("all").hidden = !state.off.size;
  }

  function showAll() {
    state.off.clear();
    drawClasses();
    drawBoxes();
  }

  // Names that are no class are added as words.
  async function chooseOnly() {
    const wanted = [...new Set($("only").value.split(",").map(w => w.trim()).filter(Boolean))];
    const known = new Set(state.classes.map(c => c.name));
    const unknown = wanted.filter(w => !known.has(w));
    if (unknown.length && !(await setWords([...words(), ...unknown]))) return drawOnly();
    state.off = new Set(wanted.length ? state.classes.map(c => c.name).filter(n => !wanted.includes(n)) : []);
    drawClasses();
    drawBoxes();
  }

  async function setWords(list) {
    let done = false;
    await act("Reading the words …", async () => {
      take(await json("api/words", post({ words: list })));
      await refresh();
      done = true;
    });
    return done;
  }

  // --- images

  // Detections of the open images are asked for again when the model has changed.
  async function refresh() {
    for (const [id, image] of state.images) if (id !== state.current) image.stale = true;
    await update(state.current);
    if (state.why && !state.classes.some(c => c.name === state.why.name)) closeWhy();
  }

  async function update(id) {
    const image = state.images.get(id);
    if (!image) return drawBoxes();
    Object.assign(image, await json(`api/images/${id}`), { stale: false });
    drawBoxes();
  }

  function add(image) {
    state.images.set(image.image, image);
    while (state.images.size > state.limits.images) state.images.delete(state.images.keys().next().value);
    show(image.image);
  }

  function show(id) {
    const image = state.images.get(id);
    state.current = id;
    $("empty").hidden = Boolean(image);
    $("figure").hidden = !image;
    document.querySelector(".legend").hidden = !image;
    if (image) {
      $("photo").src = address(id);
      $("photo").alt = image.name;
      $("file").textContent = image.name;
    }
    drawOpen();
    fit();
    if (!image) drawCounts([]);
    if (image && image.stale) act("Detecting …", () => update(id));
  }

  const address = id => `api/images/${id}.jpg?session=${state.session}`;

  function drawOpen() {
    $("open").hidden = !state.images.size;
    const items = [...state.images.values()].map(image => element("div", { class: "item" },
      element("button", { type: "button", class: "thumb", title: image.name, "aria-label": `Show ${image.name}`, "aria-current": String(image.image === state.current), onclick: () => show(image.image) },
        element("img", { src: address(image.image), alt: "" })),
      element("button", { type: "button", class: "remove", "aria-label": `Close ${image.name}`, onclick: () => close(image.image) }, "×")));
    const more = element("button", { type: "button", class: "add", title: "Choose an image", "aria-label": "Choose an image", onclick: () => $("files").click() }, "+");
    $("open").replaceChildren(...items, more);
  }

  function close(id) {
    state.images.delete(id);
    ask(`api/images/${id}`, { method: "DELETE" }).catch(complain);
    show(state.current === id ? [...state.images.keys()].pop() ?? null : state.current);
  }

  const upload = (path, file) => json(path, { method: "POST", body: file, headers: { "x-name": encodeURIComponent(file.name || "image") } });

  function checkSize(file) {
    const most = state.limits.bytes;
    if (file.size > most) throw new Error(`${file.name} is larger than ${most >> 20} MB, the most that is read`);
  }

  async function openFiles(files) {
    await act("Detecting …", async () => {
      const errors = [];
      for (const file of files) {
        try { checkSize(file); add(await upload("api/images", file)); } catch (error) { errors.push(error.message); }
      }
      if (errors.length) throw new Error(errors.join(". "));
    });
  }

  const openExample = id => act("Detecting …", async () => add(await json(`api/examples/${id}`, { method: "POST" })));

  // --- why

  async function explain(name) {
    if (state.why && state.why.name === name) return closeWhy();
    await act(`Looking for the regions of ${name} …`, () => openWhy(name));
    if (!state.why) return;
    if (state.current === null) $("why").scrollIntoView(); else window.scrollTo(0, 0);
    $("why-title").focus({ preventScroll: true });
  }

  async function openWhy(name) {
    state.why = { name, regions: [], dropped: new Set(), marked: new Set(), shown: PAGE, note: null };
    try {
      state.why.regions = (await json(`api/regions?name=${encodeURIComponent(name)}`)).regions;
    } catch (error) {
      state.why.note = error.message;
    }
    const dropped = state.why.regions.filter(r => r.dropped).map(r => r.region);
    state.why.dropped = new Set(dropped);
    state.why.marked = new Set(dropped);
    drawWhy();
  }

  function closeWhy() {
    state.why = null;
    $("why").hidden = true;
    document.body.classList.remove("explaining");
    drawClasses();
    fit();
  }

  function drawWhy() {
    const { name, regions, note } = state.why;
    $("why").hidden = false;
    document.body.classList.add("explaining");
    $("why-title").textContent = `Why ${name}?`;
    $("why-text").textContent = note ? `${note.charAt(0).toUpperCase()}${note.slice(1)}.`.replace("..", ".")
      : `These ${regions.length} training regions are the most similar to the class, best first; its linear probe learned from those that are not crossed out. Click the ones that show something else, then press Learn.`;
    $("reset").hidden = $("marks").hidden = Boolean(note);
    $("regions").replaceChildren();
    drawRegions();
    drawClasses();
    fit();
    drawButtons();
  }

  function drawRegions() {
    const { regions, marked, shown } = state.why, grid = $("regions");
    for (const [place, r] of regions.slice(grid.children.length, shown).entries()) {
      const label = `Region ${grid.children.length + 1} of image ${r.image}, cosine ${r.cosine.toFixed(3)}, objectness ${r.objectness.toFixed(2)}: wrong`;
      grid.append(element("button", { type: "button", class: "region", "data-region": r.region, "aria-pressed": String(marked.has(r.region)), "aria-label": label, onclick: event => mark(event.currentTarget, r.region) },
        element("img", { src: `api/crops/${r.region}.jpg`, alt: "", loading: "lazy", width: 160, height: 160 }),
        element("span", { title: "cosine with the class, and objectness" }, `cos ${r.cosine.toFixed(3)}`, element("br"), `obj ${r.objectness.toFixed(2)}`)));
    }
    const left = regions.length - grid.children.length;
    $("more").hidden = left <= 0;
    $("more").textContent = `Show ${Math.min(PAGE, left)} more of ${left}`;
  }

  function mark(button, region) {
    const { marked } = state.why;
    if (!marked.delete(region)) marked.add(region);
    button.setAttribute("aria-pressed", String(marked.has(region)));
    drawButtons();
  }

  function resetMarks() {
    state.why.marked = new Set(state.why.dropped);
    for (const button of $("regions").children) button.setAttribute("aria-pressed", String(state.why.marked.has(button.dataset.region)));
    drawButtons();
  }

  const changed = () => state.why && (state.why.marked.size !== state.why.dropped.size || [...state.why.marked].some(r => !state.why.dropped.has(r)));

  function drawButtons() {
    for (const id of ["undo", "redo"]) $(id).disabled = state.busy || !$(id).dataset.change;
    $("new").querySelector(".primary").disabled = state.busy || Boolean(state.refusal);
    if (!state.why) return;
    const word = state.why.note && splitOf(state.why.name) === "word";
    const count = state.why.marked.size;
    $("correct").hidden = Boolean(state.why.note) && !word;
    $("correct").disabled = state.busy || Boolean(state.refusal) || !(word || changed());
    $("correct").textContent = word ? `Learn ${state.why.name}` : "Learn";
    $("reset").disabled = state.busy || !changed();
    $("marks").textContent = count ? `${count} of ${state.why.regions.length} marked as wrong` : "";
  }

  // --- learning

  const STEPS = { "linear probe": "Training the linear probe", "region features": "Reading new images", "retrieving regions": "Retrieving regions" };

  async function study(path, content) {
    const start = performance.now();
    const overview = await follow(path, content, ({ step, done, total }) => progress(`${STEPS[step] || step} …`, done, total));
    take(overview);
    await refresh();
    state.off.delete(content.name);
    state.news = `${content.name} learned in ${((performance.now() - start) / 1000).toFixed(1)} s`;
    drawBoxes();
  }

  const correct = () => act("Learning …", async () => {
    const { name, marked, note } = state.why;
    await (note ? study("api/learn", { name }) : study("api/correct", { name, drop: [...marked] }));
    if (note) await openWhy(name);
    else { state.why.dropped = new Set(marked); drawClasses(); drawBoxes(); }
  });

  const learn = () => act("Learning …", async () => {
    const name = $("name").value.trim(), pictures = state.pictures.map(p => p.key);
    await study("api/learn", { name, prompt: $("prompt").value, pictures, by_name: !pictures.length || $("by-name").checked });
    $("new").reset();
    state.pictures = [];
    drawPictures();
    await openWhy(name);
  });

  const move = step => act(step === "undo" ? "Undoing …" : "Redoing …", async () => {
    take(await json(`api/${step}`, { method: "POST" }));
    await refresh();
    if (state.why) await openWhy(state.why.name);
  });

  const addPictures = files => act("Reading the pictures …", async () => {
    for (const file of files) {
      checkSize(file);
      const { picture } = await upload("api/pictures", file);
      if (!state.pictures.some(p => p.key === picture)) state.pictures.push({ key: picture, name: file.name, url: URL.createObjectURL(file) });
      drawPictures();
    }
  });

  function drawPictures() {
    $("pictures").querySelector(".strip").replaceChildren(...state.pictures.map(p => element("div", { class: "item" },
      element("img", { src: p.url, alt: p.name }),
      element("button", { type: "button", class: "remove", "aria-label": `Remove ${p.name}`, onclick: () => { state.pictures = state.pictures.filter(q => q !== p); drawPictures(); } }, "×"))));
    $("by-name").closest("label").hidden = !state.pictures.length;
  }

  // --- saving

  const saveDetections = () => act("Saving …", async () => {
    const classes = state.off.size ? state.classes.map(c => c.name).filter(n => !state.off.has(n)) : null;
    const answer = await ask("api/save/detections", post({ threshold: state.threshold, refined: state.refined, classes }));
    const url = URL.createObjectURL(await answer.blob());
    element("a", { href: url, download: "detections.json" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
    $("save").open = false;
  });

  // --- start

  function setThreshold(value) {
    state.threshold = value;
    $("threshold-value").textContent = value.toFixed(2);
    drawBoxes();
  }

  const filesOf = data => [...data.files].filter(file => file.size || file.type);

  function listen() {
    $("threshold").addEventListener("input", event => setThreshold(Number(event.target.value)));
    $("refined").addEventListener("change", event => { state.refined = event.target.checked; drawBoxes(); });
    $("only").addEventListener("change", chooseOnly);
    $("only").addEventListener("keydown", event => { if (event.key === "Enter") event.target.blur(); });
    $("all").addEventListener("click", showAll);
    $("undo").addEventListener("click", () => move("undo"));
    $("redo").addEventListener("click", () => move("redo"));
    $("why-close").addEventListener("click", closeWhy);
    $("correct").addEventListener("click", correct);
    $("reset").addEventListener("click", resetMarks);
    $("more").addEventListener("click", () => { state.why.shown += PAGE; drawRegions(); });
    $("new").addEventListener("submit", event => { event.preventDefault(); learn(); });
    $("save-detections").addEventListener("click", saveDetections);
    for (const id of ["save-model", "save-overlay"]) $(id).addEventListener("click", () => { state.unsaved = false; $("save").open = false; });
    $("alert").querySelector("button").addEventListener("click", () => { $("alert").hidden = true; });
    for (const button of document.querySelectorAll(".choose")) button.addEventListener("click", () => $("files").click());
    $("choose-pictures").addEventListener("click", () => $("picture-files").click());
    for (const [id, open] of [["files", openFiles], ["picture-files", addPictures]]) {
      $(id).addEventListener("change", event => { const files = [...event.target.files]; event.target.value = ""; if (files.length) open(files); });
    }
    document.addEventListener("paste", event => { const files = filesOf(event.clipboardData); if (files.length) { event.preventDefault(); openFiles(files); } });
    document.addEventListener("dragover", event => { event.preventDefault(); document.body.classList.add("dragging"); });
    document.addEventListener("dragleave", event => { if (!event.relatedTarget) document.body.classList.remove("dragging"); });
    document.addEventListener("drop", event => {
      event.preventDefault();
      document.body.classList.remove("dragging");
      const files = filesOf(event.dataTransfer);
      if (files.length) (event.target.closest("#pictures") ? addPictures : openFiles)(files);
    });
    document.addEventListener("click", event => { if (!event.target.closest("#save")) $("save").open = false; });
    document.addEventListener("keydown", event => { if (event.key === "Escape") $("save").open = false; });
    window.addEventListener("beforeunload", event => { if (state.unsaved) event.preventDefault(); });
    new ResizeObserver(fit).observe($("stage"));
  }

  async function start() {
    listen();
    drawPictures();
    const answer = await json("api/sessions", { method: "POST" });
    state.session = answer.session;
    state.limits = answer.limits;
    state.refusal = answer.refusal;
    state.name = answer.name;
    document.title = `${answer.name}: LP-OVOD`;
    $("title").textContent = answer.title;
    $("refusal").hidden = !answer.refusal;
    $("refusal").textContent = answer.refusal || "";
    $("threshold").min = answer.floor;
    $("threshold").value = state.threshold;
    $("save-model").href = `api/save/model?session=${state.session}`;
    $("save-overlay").href = `api/save/overlay?session=${state.session}`;
    $("examples").hidden = !answer.examples.length;
    $("examples").querySelector(".strip").replaceChildren(...answer.examples.map((id, place) =>
      element("button", { type: "button", class: "thumb", "aria-label": `Example ${place + 1}`, onclick: () => openExample(id) },
        element("img", { src: `api/examples/${id}.jpg`, alt: "", loading: "lazy" }))));
    take(answer);
    setThreshold(state.threshold);
    document.body.dataset.ready = "true";
  }

  start().catch(complain);
})();
