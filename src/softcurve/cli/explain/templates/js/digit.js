// A held-out digit through the trained network, forward and backward: x → e → z → p → L and every gradient.

const GREYS = "0123456789abcdefg";
const pixelsOf = (index) => [...DATA.digits[index]].map((letter) => GREYS.indexOf(letter));

function chain({ pixels, index, target, kind, label }) {
  const x = pixels.map((value) => value / 16);
  const e = DATA.V.map((row, k) => Math.tanh(dot(row, x) + DATA.a[k]));
  const z = DATA.W.map((row, k) => dot(row, e) + DATA.b[k]);
  const hot = target === "chosen" ? label : DATA.labels[index];
  const y = target === "soft" ? DATA.soft[index] : z.map((_, k) => (k === hot ? 1 : 0));
  const [logP, logY] = [logSoftmax(z), y.map(Math.log)];
  const result = divergence(kind === "ce" ? "forward" : kind, logP, y, logY);
  const g = result.gradient;
  const inE = e.map((_, j) => dot(g, DATA.W.map((row) => row[j])));
  const before = inE.map((value, j) => value * (1 - e[j] * e[j])); // with respect to what enters tanh
  return {
    x, e, z, y, p: result.p, loss: kind === "ce" ? crossEntropy(y, logP) : result.value,
    inP: result.p.map((p, k) => (kind === "reverse" ? logP[k] - logY[k] + 1 : y[k] === 0 ? 0 : -y[k] / p)),
    inZ: g, inE, inX: x.map((_, i) => dot(before, DATA.V.map((row) => row[i]))),
    inW: g.flatMap((gk) => e.map((ej) => gk * ej)), inB: g, inV: before.flatMap((bk) => x.map((xi) => bk * xi)),
    inA: before,
  };
}

const digit = widget("digit", {
  index: DATA.start, pixels: pixelsOf(DATA.start), target: "label", label: 3, kind: "ce", brush: 16, loaded: DATA.start,
}, (state, put, root) => {
  if (state.index !== state.loaded) Object.assign(state, { pixels: pixelsOf(state.index), loaded: state.index });
  visible(root.querySelector("[data-for=label]"), state.target === "chosen");
  const at = chain(state);
  Object.assign(digit.values, at);
  for (const name of ["z", "p", "y", "inP", "inZ"]) put(name, at[name]);
  put("loss", at.loss);
  put("label", DATA.labels[state.index]);
  put("predicted", at.z.indexOf(Math.max(...at.z)));
  for (const name of ["inE", "inX", "inW", "inB", "inV", "inA"]) put(`norm-${name}`, norm(at[name]));
  const finite = (values) => values.map((value) => (Number.isFinite(value) ? value : 0));
  for (const canvas of root.querySelectorAll("canvas")) {
    paint(canvas, finite(at[canvas.dataset.values]), Number(canvas.dataset.columns));
    canvas.setAttribute("aria-label", `${canvas.dataset.label} ${format(norm(at[canvas.dataset.values]))}`);
  }
  state.pixels.forEach((value, k) => {
    pixelNodes[k].style.background = `color-mix(in srgb, var(--ink) ${(100 * value) / 16}%, var(--surface))`;
    pixelNodes[k].setAttribute("aria-label", pixelNodes[k].dataset.label + value);
  });
  at.p.forEach((value, k) => shade(NUMBERS[`digit.p.${k}`][0], value));
});

const pixelNodes = [...digit.root.querySelectorAll("[data-pixel]")];
const colourPixel = (k) => {
  const pixels = digit.state.pixels.slice();
  pixels[k] = digit.state.brush;
  digit.set({ pixels });
};

// The arrow keys move among the pixels, of which one at a time can be reached by the tabulator.
pixelNodes.forEach((node, k) => {
  node.tabIndex = k ? -1 : 0;
  node.addEventListener("click", () => colourPixel(k));
  node.addEventListener("pointerenter", (event) => { if (event.buttons & 1) colourPixel(k); });
  node.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] || [0, 0];
    if (!down && !right) return;
    event.preventDefault();
    const next = pixelNodes[8 * clamp(Math.floor(k / 8) + down, 0, 7) + clamp((k % 8) + right, 0, 7)];
    node.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
});
button(digit.root, "restore", () => digit.set({ pixels: pixelsOf(digit.state.index) }));
button(digit.root, "clear", () => digit.set({ pixels: digit.state.pixels.map(() => 0) }));
button(digit.root, "next", () => digit.set({ index: (digit.state.index + 1) % DATA.digits.length }));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", digit.refresh);
digit.refresh();
