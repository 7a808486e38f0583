"use strict";
// The page of app.py: what is dropped, painted and shown. Reading and answering is the server's.

const COLORS = [[230, 60, 60], [60, 160, 240], [250, 200, 40], [70, 200, 110],
                [190, 100, 230], [250, 140, 50], [60, 210, 210], [240, 120, 180]];
const SLICES_KEPT = 48;  // of every scan, in the browser
const UNDOS = 40;
const WHOLE = /\.(nii|nii\.gz|mha|nrrd|png|jpe?g|tiff?|zip)$/i;  // one file is one scan

const $ = (selector, root = document) => root.querySelector(selector);
const color = value => COLORS[(value - 1) % COLORS.length];

// ---------------------------------------------------------------------------------------------
// The server

async function post(path, body) {
  const response = await fetch(path, {method: "POST", body});
  if (!response.ok) {
    throw new Error((await response.json()).error);
  }
  return response;
}

/** Ask for something in words; the choices of "What is assumed" go along. */
async function ask(what, more = {}) {
  const options = {};
  for (const choice of document.querySelectorAll(".options [name]")) {
    options[choice.name] = choice.value;
  }
  return (await post("do", JSON.stringify({do: what, options, ...more}))).json();
}

async function upload(number, role, files) {
  await ask("room", {bytes: files.reduce((sum, file) => sum + file.size, 0)});
  for (const file of files) {
    await post(`upload/${number}/${role}/${encodeURIComponent(file.name)}`, file);
  }
}

// ---------------------------------------------------------------------------------------------
// A scan, with the layer that lies over it: the example's answer, or the model's

let scansMade = Math.floor(Math.random() * 2 ** 40);  // another page has other numbers

class Scan {
  constructor(name) {
    this.number = ++scansMade;
    this.name = name;
    this.layer = null;        // "label", "answer" or "paint"
    this.segmentation = true;
    this.k = null;             // the slice that is shown
    this.forget();
  }

  /** Drop what was kept of the voxels. */
  forget() {
    this.slices = new Map();   // k -> Float32Array
    this.over = new Map();     // k -> Int32Array of classes, or Float32Array of an image
    this.sure = new Map();     // k -> Uint8Array, the winning class's score
    this.painted = new Set();
    this.undo = [];
    this.volumes = {};
  }

  async open() {
    Object.assign(this, await ask("open", {scan: this.number}));
    this.window = [...this.range];
    this.k = this.k !== null && this.k < this.shape[0] ? this.k : Math.floor(this.shape[0] / 2);
  }

  async openLabel() {
    const said = await ask("label", {scan: this.number});
    this.layer = "label";
    this.segmentation = said.segmentation;
    this.overRange = said.range;
    this.labelNotes = said.notes;
    nameClasses(said.classes);
  }

  async fetchSlice(layer, k) {
    const response = await fetch(`slice/${this.number}/${layer}/${k}`);
    if (!response.ok) {
      throw new Error((await response.json()).error);
    }
    return new Float32Array(await response.arrayBuffer());
  }

  async slice(k) {
    if (!this.slices.has(k)) {
      const values = await this.fetchSlice("scan", k);
      if (this.slices.size >= SLICES_KEPT) {
        this.slices.delete(this.slices.keys().next().value);
      }
      this.slices.set(k, values);
    }
    return this.slices.get(k);
  }

  /** The layer over slice k, or undefined where there is none (yet). */
  async layerOver(k) {
    if (!this.over.has(k) && this.layer === "label") {
      const values = await this.fetchSlice("label", k);
      this.over.set(k, this.segmentation ? Int32Array.from(values) : values);
    }
    return this.over.get(k);
  }

  /** The classes of slice k, to be painted on. */
  canvas(k) {
    if (!this.over.has(k)) {
      this.over.set(k, new Int32Array(this.shape[1] * this.shape[2]));
      this.layer = this.layer || "paint";
    }
    return this.over.get(k);
  }

  async sendPaint(k) {
    await post(`paint/${this.number}/${k}`, this.painted.has(k) ? this.over.get(k) : "");
  }
}

// ---------------------------------------------------------------------------------------------
// What the page holds

const state = {
  examples: [], inputs: [], classes: new Map(), active: 1, version: 0, answering: false,
};

function nameClass(value, name = `class ${value}`) {
  if (!state.classes.has(value)) {
    state.classes.set(value, name);
  }
}

/** The classes of a label that was dropped; nothing is left of an invented class 1. */
function nameClasses(values) {
  const painted = [...state.examples, ...state.inputs].some(scan => scan.painted.size);
  if (values.length && !painted && state.classes.size === 1) {
    state.classes.clear();
  }
  values.forEach(value => nameClass(value));
  if (values.length && !state.classes.has(state.active)) {
    state.active = values[0];
  }
}

function say(text, isError = false) {
  $("#status").textContent = text;
  $("#status").classList.toggle("error", isError);
}

/** Say what the page waits for. */
function sayNext() {
  const example = state.examples[0];
  if (!example) {
    say("Drop an example scan, or try the bundled one.");
  } else if (!state.examples.every(hasAnswer)) {
    say("Drop the example's answer, or choose the brush and paint a mask.");
  } else if (!state.inputs.length) {
    say("Drop one or several new scans.");
  } else if (!state.inputs.some(scan => scan.layer === "answer")) {
    say("Press Answer.");
  } else {
    say("Answered. Look, correct it with the brush, save it, or drop another scan.");
  }
}

const hasAnswer = scan => scan.layer === "label" || scan.painted.size > 0;
const ready = () => state.examples.length && state.inputs.length && state.examples.every(hasAnswer);

/** Run one step of the user's; what goes wrong is said in place. */
async function attempt(step) {
  try {
    await step();
  } catch (error) {
    say(error.message, true);
  }
  refresh();
}

// ---------------------------------------------------------------------------------------------
// A viewer: one of several scans, slice by slice, with window, brush and overlay

class Viewer {
  constructor(section, scans) {
    this.root = $(".viewer", section);
    this.root.append($("#viewer").content.cloneNode(true));
    this.id = section.id;
    this.scans = scans;
    this.current = 0;
    this.turn = 0;
    this.cursor = [0, 0];  // row, column
    this.canvas = $("canvas", this.root);
    this.canvas.setAttribute("aria-label", `${$("h2", section).textContent}: slice`);
    this.pixels = document.createElement("canvas");
    for (const radio of this.root.querySelectorAll("[type=radio]")) {
      radio.name = `tool-${section.id}`;
      radio.addEventListener("change", () => this.paint());
    }
    for (const name of ["overlay", "opacity", "confidence", "compare", "size"]) {
      this.part(name).addEventListener("input", () => this.paint());
    }
    this.part("slice").addEventListener("input", () => this.go(this.part("slice").value - 1));
    this.part("undo").addEventListener("click", () => attempt(() => this.undo()));
    this.listen();
    new ResizeObserver(() => this.paint()).observe(this.root);
  }

  part(name) { return $(`.${name}`, this.root); }
  get scan() { return this.scans[this.current]; }
  get tool() { return $("[name^=tool]:checked", this.root).value; }
  get painting() { return this.tool !== "window" && this.canPaint(); }
  get radius() {
    return Number(this.part("size").value) / 2 * Math.max(1, this.scan.shape[2] / 256);
  }

  canPaint() {
    const scan = this.scan;
    return scan && scan.segmentation && !state.answering &&
      (this.scans === state.examples || scan.layer === "answer");
  }

  listen() {
    const canvas = this.canvas;
    canvas.addEventListener("wheel", event => {
      if (this.scan) {
        event.preventDefault();
        this.go(this.scan.k + Math.sign(event.deltaY));
      }
    }, {passive: false});
    canvas.addEventListener("pointerdown", event => {
      if (!this.scan) return;
      canvas.setPointerCapture(event.pointerId);
      canvas.focus();
      this.drag = {x: event.clientX, y: event.clientY, window: [...this.scan.window]};
      if (this.painting) this.beginStroke(this.place(event));
    });
    canvas.addEventListener("pointermove", event => {
      if (!this.scan) return;
      if (this.drag && this.painting) {
        this.stroke(this.place(event));
      } else if (this.drag) {
        this.changeWindow(event);
      } else if (this.painting) {
        this.cursor = this.place(event);
        this.paint();
      }
    });
    const end = () => {
      const painted = this.drag && this.painting;
      this.drag = null;
      if (painted) attempt(() => this.endStroke());
    };
    canvas.addEventListener("pointerup", end);
    canvas.addEventListener("pointercancel", end);
    canvas.addEventListener("keydown", event => {
      if (this.scan && this.key(event)) event.preventDefault();
    });
  }

  /** True where the key meant something here. */
  key(event) {
    const k = this.scan.k, moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0],
                                    ArrowLeft: [0, -1], ArrowRight: [0, 1]};
    const move = moves[event.key], step = event.shiftKey ? 10 : 1;
    if (event.key === "PageUp" || event.key === "PageDown") {
      this.go(k + (event.key === "PageDown" ? 1 : -1));
    } else if (move && !this.painting) {
      this.go(k + move[0] + move[1]);
    } else if (move) {
      this.cursor = [0, 1].map(i => Math.min(this.scan.shape[i + 1] - 1,
        Math.max(0, Math.round(this.cursor[i] + step * move[i]))));
      this.paint();
    } else if (event.key === " " && this.painting) {
      this.beginStroke(this.cursor);
      attempt(() => this.endStroke());
    } else if (event.key === "[" || event.key === "]") {
      this.part("size").value = Number(this.part("size").value) + (event.key === "]" ? 1 : -1);
      this.paint();
    } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
      attempt(() => this.undo());
    } else {
      return false;
    }
    return true;
  }

  /** (row, column) of a pointer, in pixels of the slice. */
  place(event) {
    const box = this.canvas.getBoundingClientRect(), [, H, W] = this.scan.shape;
    return [(event.clientY - box.top) / box.height * H - 0.5,
            (event.clientX - box.left) / box.width * W - 0.5];
  }

  changeWindow(event) {
    const [low, high] = this.drag.window, span = this.scan.range[1] - this.scan.range[0];
    const wider = (event.clientX - this.drag.x) / 300 * span;
    const darker = (event.clientY - this.drag.y) / 300 * span;
    const middle = (low + high) / 2 + darker;
    const half = Math.max((high - low + wider) / 2, span / 500);
    this.scan.window = [middle - half, middle + half];
    this.paint();
  }

  // The brush

  beginStroke(at) {
    const scan = this.scan, before = scan.over.get(scan.k);
    scan.undo.push({k: scan.k, before: before && before.slice(), was: scan.painted.has(scan.k)});
    scan.undo.splice(0, scan.undo.length - UNDOS);
    this.last = at;
    this.shown = scan.canvas(scan.k);
    this.stroke(at);
  }

  stroke(at) {
    const length = Math.hypot(at[0] - this.last[0], at[1] - this.last[1]);
    const stamps = Math.max(1, Math.ceil(length / Math.max(this.radius / 2, 0.5)));
    for (let i = 1; i <= stamps; i++) {
      this.stamp([0, 1].map(j => this.last[j] + (at[j] - this.last[j]) * i / stamps));
    }
    this.last = this.cursor = at;
    this.paint();
  }

  /** Paint a disk, at least the pixel under the brush. */
  stamp([row, column]) {
    const scan = this.scan, [, H, W] = scan.shape, classes = scan.canvas(scan.k);
    const r = this.radius, value = this.tool === "eraser" ? 0 : state.active;
    for (let y = Math.max(0, Math.round(row - r)); y <= Math.min(H - 1, Math.round(row + r)); y++) {
      for (let x = Math.max(0, Math.round(column - r)); x <= Math.min(W - 1, column + r + 1); x++) {
        if (Math.hypot(y - row, x - column) <= Math.max(r, 0.71)) {
          classes[y * W + x] = value;
        }
      }
    }
  }

  async endStroke() {
    this.scan.painted.add(this.scan.k);
    await this.scan.sendPaint(this.scan.k);
    await changed(this.scan);
  }

  async undo() {
    const scan = this.scan, step = scan.undo.pop();
    if (!step) return;
    if (step.before) {
      scan.over.set(step.k, step.before);
    } else {
      scan.over.delete(step.k);
    }
    if (!step.was) scan.painted.delete(step.k);
    if (!step.was && scan.layer === "answer") scan.painted.add(step.k);  // as it was answered
    await scan.sendPaint(step.k);
    this.go(step.k);
    await changed(scan);
  }

  // Showing

  choose(index) {
    this.current = index;
    this.go(this.scan.k);
    refresh();
  }

  go(k) {
    const scan = this.scan;
    scan.k = Math.min(scan.shape[0] - 1, Math.max(0, Number(k)));
    attempt(() => this.draw());
  }

  /** Fetch and paint the current slice. A later call overtakes. */
  async draw() {
    const turn = ++this.turn, scan = this.scan, k = scan.k;
    const [gray, over] = [await scan.slice(k), await scan.layerOver(k)];
    if (turn === this.turn) {
      [this.gray, this.shown, this.shownScan] = [gray, over, scan];
      this.paint();
    }
  }

  paint() {
    const scan = this.scan;
    if (!scan || this.shownScan !== scan) return;
    const [K, H, W] = scan.shape, [, rowSize, columnSize] = scan.spacing;
    const aspect = H * rowSize / (W * columnSize);
    const width = Math.min(this.part("picture").clientWidth, 0.62 * innerHeight / aspect);
    const sharp = devicePixelRatio || 1;
    this.canvas.style.width = `${width}px`;
    this.canvas.width = Math.max(1, Math.round(width * sharp));
    this.canvas.height = Math.max(1, Math.round(width * aspect * sharp));
    this.pixels.width = W;
    this.pixels.height = H;
    this.pixels.getContext("2d").putImageData(this.compose(H, W), 0, 0);
    const context = this.canvas.getContext("2d");
    context.drawImage(this.pixels, 0, 0, this.canvas.width, this.canvas.height);
    if (this.painting) this.paintCursor(context, H, W);
    this.part("slice").max = K;
    this.part("slice").value = scan.k + 1;
    const [low, high] = scan.window.map(v => Number(v.toPrecision(3)));
    this.part("where").textContent = `${scan.k + 1} of ${K}, window ${low} to ${high}`;
  }

  /** The colors of a slice: ImageData (H, W). */
  compose(H, W) {
    const {gray, shown, scan} = this, image = new ImageData(W, H), data = image.data;
    const [low, high] = scan.window, scale = 255 / (high - low);
    const opacity = this.part("overlay").checked ? this.part("opacity").value / 100 : 0;
    const sure = this.part("confidence").checked ? scan.sure.get(scan.k) : null;
    const split = scan.segmentation ? W : W * this.part("compare").value / 100;
    const answerLow = (scan.overRange || scan.range)[0];
    const answerHigh = (scan.overRange || scan.range)[1];
    const stretch = (answerHigh - answerLow) / (scan.range[1] - scan.range[0]);
    for (let i = 0, j = 0; i < gray.length; i++, j += 4) {
      let value = (gray[i] - low) * scale;
      if (shown && i % W >= split) {
        value = ((shown[i] - answerLow) / stretch + scan.range[0] - low) * scale;
      }
      data[j] = data[j + 1] = data[j + 2] = value;
      data[j + 3] = 255;
      if (shown && scan.segmentation && shown[i] && opacity) {
        const weight = sure ? opacity * Math.max(0, sure[i] - 127) / 128 : opacity;
        const [r, g, b] = color(shown[i]);
        data[j] += weight * (r - data[j]);
        data[j + 1] += weight * (g - data[j + 1]);
        data[j + 2] += weight * (b - data[j + 2]);
      }
    }
    return image;
  }

  paintCursor(context, H, W) {
    const across = this.canvas.width / W, down = this.canvas.height / H;
    context.beginPath();
    context.ellipse((this.cursor[1] + 0.5) * across, (this.cursor[0] + 0.5) * down,
                    Math.max(this.radius, 0.5) * across, Math.max(this.radius, 0.5) * down,
                    0, 0, 7);
    context.strokeStyle = "#fff";
    context.lineWidth = 2;
    context.stroke();
  }

  /** Bring buttons, names and volumes up to date. */
  refresh() {
    const scan = this.scan, image = scan && !scan.segmentation;
    this.part("with-scan").hidden = !scan;
    this.part("empty").hidden = Boolean(scan);
    if (!scan) this.canvas.width = this.canvas.height = 300;  // which clears it
    this.part("scans").replaceChildren(...this.scans.map((one, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = one.name;
      button.setAttribute("aria-pressed", String(index === this.current));
      button.addEventListener("click", () => this.choose(index));
      return button;
    }));
    for (const part of this.root.querySelectorAll(".paints")) part.hidden = !this.canPaint();
    for (const part of this.root.querySelectorAll(".overlays")) part.hidden = Boolean(image);
    $(".remove", this.root.parentNode).hidden = !scan || state.answering;
    this.part("undo").disabled = !scan || !scan.undo.length;
    this.part("compares").hidden = !image || !scan.layer;
    this.part("has-confidence").hidden = !scan || !scan.sure.size;
    this.listClasses(scan && scan.segmentation && (scan.layer || this.canPaint()));
  }

  listClasses(wanted) {
    const list = this.part("classes");
    if (!wanted) {
      list.replaceChildren();
      return;
    }
    if (list.contains(document.activeElement) && document.activeElement.type === "text") return;
    const rows = [...state.classes].map(([value, name]) => this.classRow(value, name));
    const add = document.createElement("button");
    add.type = "button";
    add.textContent = "Add a class";
    add.addEventListener("click", () => {
      state.active = 1;
      while (state.classes.has(state.active)) state.active++;
      nameClass(state.active);
      refresh();
    });
    list.replaceChildren(...rows, ...(this.canPaint() ? [add] : []));
  }

  classRow(value, name) {
    const row = document.createElement("div"), text = document.createElement("input");
    const choice = document.createElement("input"), swatch = document.createElement("span");
    const volume = document.createElement("output");
    Object.assign(choice, {type: "radio", name: `class-${this.id}`,
                           checked: value === state.active, ariaLabel: `paint ${name}`});
    Object.assign(text, {type: "text", value: name, ariaLabel: `name of class ${value}`});
    swatch.className = "swatch";
    swatch.style.background = `rgb(${color(value)})`;
    choice.addEventListener("change", () => { state.active = value; refresh(); });
    text.addEventListener("input", () => {
      state.classes.set(value, text.value);
      for (const other of document.querySelectorAll(`[aria-label="name of class ${value}"]`)) {
        other.value = text.value;
      }
    });
    const known = this.scan.volumes[value];
    if (known) {
      volume.textContent = known.ml === undefined ? `${known.voxels} pixels` : `${Number(known.ml.toPrecision(3))} ml`;
    }
    row.append(choice, swatch, text, volume);
    return row;
  }
}

// ---------------------------------------------------------------------------------------------
// The steps

const viewers = {
  example: new Viewer($("#example"), state.examples),
  input: new Viewer($("#input"), state.inputs),
};

function refresh() {
  viewers.example.refresh();
  viewers.input.refresh();
  const example = viewers.example.scan, input = viewers.input.scan;
  $("#example .drop[data-role=label]").hidden = !example;
  $("#save-example").hidden = !example || !example.painted.size;
  $("#answer").disabled = !ready() || state.answering;
  $("#stop").hidden = $("#progress").hidden = !state.answering;
  const answered = input && input.layer === "answer" && !state.answering;
  $("#save-answer").hidden = !answered;
  $("#keep").hidden = !answered || !input.segmentation || !input.painted.size;
}

/** Files become scans: one each, or all of them one series. */
async function addScans(side, files) {
  const whole = files.every(file => WHOLE.test(file.name));
  for (const group of whole ? files.map(file => [file]) : [files]) {
    const scan = new Scan(group.length > 1 ? `${group.length} files` : group[0].name);
    say(`Reading ${scan.name} ...`);
    await upload(scan.number, "scan", group);
    await scan.open();
    viewers[side].scans.push(scan);
    viewers[side].choose(viewers[side].scans.length - 1);
  }
  state.version++;
  await prepare();
}

async function addLabel(files) {
  const scan = viewers.example.scan;
  say(`Reading ${files[0].name} ...`);
  try {
    await upload(scan.number, "next", files);
    await scan.openLabel();
  } catch (error) {  // what was there before stays
    await ask("forget", {scan: scan.number});
    throw error;
  }
  scan.over.clear();
  scan.painted.clear();
  scan.undo = [];
  viewers.example.go(await fullest(scan));
  state.version++;
  await prepare();
}

/** A slice of a layer that shows something, near the middle. */
async function fullest(scan) {
  const K = scan.shape[0], order = [...Array(K).keys()];
  order.sort((a, b) => Math.abs(a - K / 2) - Math.abs(b - K / 2));
  for (const k of order) {
    if ((await scan.layerOver(k) || []).some(Boolean)) return k;
  }
  return scan.k;
}

/** A stroke changed an example, or an answer. */
async function changed(scan) {
  if (state.examples.includes(scan)) {
    state.version++;
    await prepare();
  }
}

/** Read all for an answer to the scan that is shown, and list what is assumed. */
async function prepare(scan = viewers.input.scan) {
  const examples = state.examples.map(example => example.number), version = state.version;
  if (!ready() || scan.version === version) {
    sayNext();
    return;
  }
  say("Reading ...");
  const said = await ask("prepare", {scan: scan.number, examples});
  scan.version = version;
  scan.willSegment = said.segmentation;
  scan.answerRange = said.range;
  said.classes.forEach(value => nameClass(value));
  $("#notes").replaceChildren(...said.notes.map(text => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  }));
  sayNext();
}

async function answerAll() {
  state.stopped = false;
  for (const scan of state.inputs) {
    if (state.stopped) break;
    await prepare(scan);
    say(`Answering ${scan.name} ...`);
    state.answering = true;
    viewers.input.current = state.inputs.indexOf(scan);
    scan.over.clear();
    scan.sure.clear();
    scan.painted.clear();
    Object.assign(scan, {undo: [], volumes: {}, layer: "answer", segmentation: scan.willSegment,
                         overRange: scan.answerRange});
    refresh();
    await answerOne(scan);
    viewers.input.go(await fullest(scan));
    scan.volumes = await ask("save", {scan: scan.number});
  }
}

/** Take an answer as it comes: number (int32), values (float32), confidence (uint8) a slice. */
async function answerOne(scan) {
  const [K, H, W] = scan.shape, size = 4 + 5 * H * W;
  const reader = (await post(`answer/${scan.number}`)).body.getReader();
  let frame = new Uint8Array(size), filled = 0, slices = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    for (let at = 0; at < part.value.length;) {
      const piece = part.value.subarray(at, at + size - filled);
      frame.set(piece, filled);
      at += piece.length;
      filled += piece.length;
      if (filled === size) {
        const k = takeSlice(scan, frame, H * W);
        $("#progress").value = ++slices / K;
        say(`Slice ${slices} of ${K} of ${scan.name}`);
        viewers.input.go(k);
        [frame, filled] = [new Uint8Array(size), 0];
      }
    }
  }
  if (filled) {
    throw new Error(new TextDecoder().decode(frame.subarray(4, filled)));
  }
  state.stopped = slices < K;
}

function takeSlice(scan, frame, pixels) {
  const k = new Int32Array(frame.buffer, 0, 1)[0];
  const values = new Float32Array(frame.buffer, 4, pixels);
  scan.over.set(k, scan.segmentation ? Int32Array.from(values) : values.slice());
  if (scan.segmentation) scan.sure.set(k, frame.slice(4 + 4 * pixels));
  return k;
}

/** Read a scan anew. The painting on an example stays where its slices do. True: some was lost. */
async function reopenScan(scan) {
  const cut = () => [scan.axis, ...scan.shape].join();
  const before = cut(), painted = scan.painted, over = scan.over;
  const layer = scan.layer, example = state.examples.includes(scan);
  scan.forget();
  scan.layer = layer === "label" ? "label" : null;
  await scan.open();
  const same = cut() === before;
  if (!same) scan.k = Math.floor(scan.shape[0] / 2);
  if (scan.layer) await scan.openLabel();
  if (!example || !same) return painted.size > 0;
  for (const k of painted) {
    scan.over.set(k, over.get(k));
    scan.painted.add(k);
    scan.layer = scan.layer || "paint";
    await scan.sendPaint(k);
  }
  return false;
}

/** Read everything anew after a choice under "What is assumed". */
async function reopen() {
  let lost = false, failed = null;
  for (const scan of [...state.examples, ...state.inputs]) {
    try {
      lost = await reopenScan(scan) || lost;
    } catch (error) {
      failed = failed || error;
    }
  }
  state.version++;
  if (failed) throw failed;
  Object.values(viewers).filter(viewer => viewer.scan).forEach(viewer => viewer.go(viewer.scan.k));
  await prepare();
  if (lost) say("What was painted on the slices before is gone: paint on the new ones.");
}

async function removeScan(side) {
  const viewer = viewers[side], scan = viewer.scan;
  viewer.scans.splice(viewer.current, 1);
  viewer.current = Math.max(0, viewer.current - 1);
  state.version++;
  await ask("remove", {scan: scan.number});
  if (viewer.scan) viewer.go(viewer.scan.k);
  await prepare();
}

function save(path) {
  const link = document.createElement("a");
  link.href = path;
  link.download = "";
  link.click();
}

// ---------------------------------------------------------------------------------------------
// Buttons and drops

function take(zone, files) {
  const side = zone.closest("section").id;
  if (!files.length) return;
  attempt(() => zone.dataset.role === "label" ? addLabel(files) : addScans(side, files));
}

/** The files of a drop, those in folders included. */
async function droppedFiles(transfer) {
  const found = [];
  async function walk(entry) {
    if (entry.isFile) {
      found.push(await new Promise((done, fail) => entry.file(done, fail)));
      return;
    }
    const reader = entry.createReader();
    for (let some; !some || some.length;) {
      some = await new Promise((done, fail) => reader.readEntries(done, fail));
      for (const inside of some) await walk(inside);
    }
  }
  for (const entry of [...transfer.items].map(item => item.webkitGetAsEntry()).filter(Boolean)) {
    await walk(entry);
  }
  return found.length ? found : [...transfer.files];
}

for (const zone of document.querySelectorAll(".drop")) {
  const field = $("input", zone);
  field.setAttribute("aria-label", zone.textContent.trim().replace(/\s+/g, " "));
  field.addEventListener("change", () => { take(zone, [...field.files]); field.value = ""; });
  zone.addEventListener("dragover", event => { event.preventDefault(); zone.classList.add("over"); });
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", async event => {
    event.preventDefault();
    zone.classList.remove("over");
    take(zone, await droppedFiles(event.dataTransfer));
  });
}
document.addEventListener("dragover", event => event.preventDefault());
document.addEventListener("drop", event => event.preventDefault());

$("#try").addEventListener("click", () => attempt(async () => {
  say("Drawing two invented hearts ...");
  const files = {};
  for (const name of ["heart", "heart_gt", "new_heart"]) {
    const response = await fetch(`heart/${name}.nii.gz`);
    if (!response.ok) throw new Error((await response.json()).error);
    files[name] = new File([await response.blob()], `${name}.nii.gz`);
  }
  await addScans("example", [files.heart]);
  await addLabel([files.heart_gt]);
  await addScans("input", [files.new_heart]);
}));

$("#answer").addEventListener("click", () => attempt(async () => {
  try {
    await answerAll();
    sayNext();
    if (state.stopped) say("Stopped. What was answered before can be looked at and saved.");
  } finally {
    state.answering = false;
  }
}));
$("#stop").addEventListener("click", () => attempt(() => ask("stop")));
$("#save-example").addEventListener("click", () => attempt(async () => {
  const scan = viewers.example.scan;
  await ask("name", {scan: scan.number, names: Object.fromEntries(state.classes)});
  save(`file/${scan.number}/example`);
}));
$("#save-answer").addEventListener("click", () => attempt(async () => {
  const scan = viewers.input.scan;
  scan.volumes = await ask("save", {scan: scan.number});
  save(`file/${scan.number}/answer`);
}));
$("#keep").addEventListener("click", () => attempt(async () => {
  const source = viewers.input.scan, scan = new Scan(`${source.name}, corrected`);
  say("Reading ...");
  await ask("keep", {scan: scan.number, source: source.number});
  await scan.open();
  await scan.openLabel();
  state.examples.push(scan);
  viewers.example.choose(state.examples.length - 1);
  state.version++;
  await prepare();
}));
for (const button of document.querySelectorAll("button.remove")) {
  button.addEventListener("click", () => attempt(() => removeScan(button.closest("section").id)));
}
for (const choice of document.querySelectorAll(".options [name]")) {
  let before = choice.value;
  choice.addEventListener("change", () => {
    const corrected = state.inputs.some(scan => scan.painted.size);
    if (corrected && !confirm("The answers and your corrections of them will be gone.")) {
      choice.value = before;
      return;
    }
    before = choice.value;
    attempt(reopen);
  });
}

nameClass(1);
sayNext();
refresh();
