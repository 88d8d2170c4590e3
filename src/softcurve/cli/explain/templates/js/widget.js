// The binding of controls and numbers to the page. A widget has a state; its controls name the entries that they set
// (data-control), and the elements that show a number name it (data-show). Every widget is at window.softcurve.

const DATA = JSON.parse(document.getElementById("data").textContent);
const NUMBERS = Object.fromEntries([...document.querySelectorAll("[data-show]")].map((node) => [node.dataset.show, []]));
for (const node of document.querySelectorAll("[data-show]")) NUMBERS[node.dataset.show].push(node);

// Four decimals, or a power of ten; data-form="cell" is for the cells of a matrix, data-form="count" for counts.
function format(value, form) {
  if (value === null || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "+∞" : "−∞";
  const size = Math.abs(value);
  if (form === "count") return String(value);
  if (form === "cell") return signed(value.toFixed(3));
  if (size < 1e-10) return "0";
  return signed(size >= 1e5 || size < 1e-3 ? value.toExponential(2) : value.toFixed(4));
}

// A true minus sign, and none before a zero.
const signed = (text) => (Number(text) === 0 ? text.replace("-", "") : text.replaceAll("-", "−"));

function show(key, value) {
  for (const node of NUMBERS[key] || []) {
    const text = format(value, node.dataset.form);
    if (node.textContent !== text) node.textContent = text;
    node.number = value;
  }
}

function widget(name, state, update) {
  const root = document.getElementById(`play-${name}`);
  const controls = [...root.querySelectorAll("[data-control]")];
  const place = (control) => {
    const path = control.dataset.control.split(".");
    return [path.slice(0, -1).reduce((at, key) => at[key], state), path.at(-1)];
  };
  const values = {};
  const put = (key, value) => {
    values[key] = value;
    if (Array.isArray(value)) value.forEach((entry, k) => (Array.isArray(entry)
      ? entry.forEach((inner, j) => show(`${name}.${key}.${k}.${j}`, inner)) : show(`${name}.${key}.${k}`, entry)));
    else show(`${name}.${key}`, value);
  };
  const refresh = () => {
    for (const control of controls) {
      const [at, key] = place(control);
      if (control.type === "checkbox") control.checked = at[key];
      else if (document.activeElement !== control || Number(control.value) !== at[key]) control.value = at[key];
      const output = control.parentElement.querySelector(".now");
      if (output) output.textContent = signed(Number(at[key]).toFixed((control.step.split(".")[1] || "").length));
    }
    update(state, put, root);
  };
  const set = (patch) => { Object.assign(state, structuredClone(patch)); refresh(); };
  root.addEventListener("input", ({ target }) => {
    if (!target.dataset.control) return;
    const [at, key] = place(target);
    if (target.type === "number" && !target.validity.valid) return;
    at[key] = target.type === "checkbox" ? target.checked : target.tagName === "SELECT" ? target.value : Number(target.value);
    refresh();
  });
  const self = { root, state, values, set, refresh };
  window.softcurve[name] = self;
  return self;
}

// Everything that is to be seen as a number, with what lies beneath it.
function shown() {
  const nodes = [...document.querySelectorAll("[data-show]")].filter((node) => !node.closest("[hidden]"));
  return nodes.map((node) => [node.dataset.show, node.textContent, String(node.number), node.dataset.form || ""]);
}

window.softcurve = { shown };

const button = (root, action, run) => root.querySelector(`[data-action="${action}"]`).addEventListener("click", run);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const visible = (node, yes) => { node.hidden = !yes; };

// Shade a cell by its sign and its share of the largest one; the ink stays readable on it.
function shade(node, share) {
  const percent = Math.round(45 * Math.min(1, Math.abs(share)));
  node.style.background = `color-mix(in srgb, var(${share < 0 ? "--second" : "--accent"}) ${percent || 0}%, var(--surface))`;
}

// A drawing's shapes, written as markup; what an SVG shows is said by its label.
function draw(root, name, markup, label) {
  const svg = root.querySelector(`[data-draw="${name}"]`);
  svg.innerHTML = markup;
  if (label) svg.setAttribute("aria-label", `${svg.dataset.label} ${label}`);
}

const polyline = (points, css) => `<polyline class="${css}" points="${points.map((at) => at.map((c) => c.toFixed(2)).join()).join(" ")}"/>`;

const ticks = (values, place) => values.map((x) => `<text x="${place(x)}" y="132">${signed(String(x))}</text>`).join("");

// Follow a pointer that is pressed on a drawing: its place in the drawing's own coordinates.
function drag(svg, move) {
  const go = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    move(at.x, at.y);
  };
  svg.addEventListener("pointerdown", (event) => { svg.setPointerCapture(event.pointerId); go(event); });
  svg.addEventListener("pointermove", (event) => { if (svg.hasPointerCapture(event.pointerId)) go(event); });
}

// Pixels of a matrix; zero has the colour of the page, the largest entry that of its sign.
function paint(canvas, values, columns, ink) {
  const [none, plus, minus] = ["--surface", ink ? "--ink" : "--accent", "--second"].map(colour).map(channels);
  const top = ink ? 1 : Math.max(...values.map(Math.abs)) || 1;
  canvas.width = columns;
  canvas.height = values.length / columns;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  values.forEach((value, i) => {
    const [end, share] = [value < 0 ? minus : plus, Math.abs(value) / top];
    none.forEach((start, c) => { image.data[4 * i + c] = start + share * (end[c] - start); });
    image.data[4 * i + 3] = 255;
  });
  context.putImageData(image, 0, 0);
}

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

for (const copy of document.querySelectorAll(".code button")) {
  copy.addEventListener("click", async () => {
    await copyText(copy.closest(".code").querySelector("code"));
    copy.textContent = copy.dataset.done;
    setTimeout(() => { copy.textContent = copy.dataset.label; }, 1500);
  });
}

// A page opened from a file may not use the clipboard interface; the older command copies a selection.
async function copyText(node) {
  try {
    await navigator.clipboard.writeText(node.textContent);
  } catch {
    getSelection().selectAllChildren(node);
    document.execCommand("copy");
    getSelection().removeAllRanges();
  }
}
