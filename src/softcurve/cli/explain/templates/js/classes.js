// Logits and a target of a few classes: p, J, the gradients, the divergences, the Hessian and its eigenvalues.

const MOST = 10;

const classes = widget("classes", {
  count: 3, temperature: 1, kind: "forward", beta: 0.5, i: 1, j: 2,
  z: [2, 1, 0.1, 0, -1, 0.5, -0.5, 1.5, -1.5, 0], weight: [0.7, 0.2, 0.1, 0, 0, 0, 0, 0, 0, 0],
}, (state, put, root) => {
  const [n, T] = [state.count, state.temperature];
  for (const row of root.querySelectorAll("[data-class]")) visible(row, row.dataset.class < n);
  for (const cell of root.querySelectorAll("[data-column]")) visible(cell, cell.dataset.column < n);
  for (const row of document.querySelectorAll("#bits [data-class]")) visible(row, row.dataset.class < n);
  visible(root.querySelector("[data-for=beta]"), state.kind === "js");
  for (const name of ["i", "j"]) {
    const control = root.querySelector(`[data-control=${name}]`);
    control.max = n;
    control.value = state[name] = Math.min(state[name], n);
  }
  const weights = state.weight.slice(0, n);
  const total = sum(weights);
  const y = weights.map((weight) => (total ? weight / total : 1 / n)); // no weight at all: the same for each class
  const logY = y.map(Math.log);
  const logP = logSoftmax(state.z.slice(0, n).map((value) => value / T));
  const result = divergence(state.kind, logP, y, logY, state.beta);
  const J = jacobian(result.p).map((row) => row.map((entry) => entry / T));
  const H = hessian(result).map((row) => row.map((entry) => entry / T / T));
  put("p", result.p);
  put("y", y);
  put("residual", result.p.map((value, k) => value - y[k]));
  put("gradient", result.gradient.map((value) => value / T));
  put("Hp", entropy(result.p));
  put("Hy", entropy(y));
  put("ce", crossEntropy(y, logP));
  put("forward", divergence("forward", logP, y, logY).value);
  put("reverse", divergence("reverse", logP, y, logY).value);
  put("js", divergence("js", logP, y, logY, state.beta).value);
  put("J", J);
  put("H", H);
  put("eigenJ", eigenvalues(J));
  put("eigenH", H.flat().some(Number.isNaN) ? y.map(() => NaN) : eigenvalues(H));
  put("entry", J[state.i - 1][state.j - 1]);
  showInformation(put, y, logY, logP);
  paintMatrix(root, "J", J);
  paintMatrix(root, "H", H);
  drawBars(root, result.p, y);
});

// The information of each outcome under either distribution, in bits.
function showInformation(put, y, logY, logP) {
  const bits = (log) => 0 - log / Math.LN2;
  const terms = y.map((value, k) => (value === 0 ? 0 : value * (bits(logP[k]) - bits(logY[k]))));
  put("fy", logY.map(bits));
  put("fp", logP.map(bits));
  put("gap", y.map((value, k) => bits(logP[k]) - bits(logY[k])));
  put("share", terms);
  put("bits", sum(terms));
}

function paintMatrix(root, name, matrix) {
  const top = Math.max(...matrix.flat().map(Math.abs)) || 1;
  matrix.forEach((row, i) => row.forEach((entry, j) => {
    const [cell] = NUMBERS[`classes.${name}.${i}.${j}`];
    shade(cell, Number.isNaN(entry) ? 0 : entry / top);
    if (name === "J") cell.classList.toggle("chosen", i === classes.state.i - 1 && j === classes.state.j - 1);
  }));
}

function drawBars(root, p, y) {
  const width = 300 / p.length;
  const bars = p.map((value, k) => {
    const [x, top] = [k * width, 105 - 100 * value];
    const target = 105 - 100 * y[k];
    return `<rect class="bar" x="${x + 0.15 * width}" y="${top}" width="${0.7 * width}" height="${105 - top}"/>`
      + `<line class="target" x1="${x + 0.06 * width}" x2="${x + 0.94 * width}" y1="${target}" y2="${target}"/>`
      + `<text x="${x + width / 2}" y="118">${k + 1}</text>`;
  });
  draw(root, "bars", `<line class="axis" x1="0" x2="300" y1="105" y2="105"/>${bars.join("")}`,
    p.map((value, k) => `${k + 1}: p ${value.toFixed(2)}, y ${y[k].toFixed(2)}`).join("; "));
}

// Dragging in a bar's column moves its target; the other weights stay.
drag(classes.root.querySelector("[data-draw=bars]"), (x, y) => {
  const k = clamp(Math.floor((x / 300) * classes.state.count), 0, classes.state.count - 1);
  const weight = classes.state.weight.slice();
  weight[k] = clamp(Math.round(105 - y) / 100, 0, 1);
  classes.set({ weight });
});

for (const [i, j] of range(MOST * MOST).map((at) => [Math.floor(at / MOST), at % MOST])) {
  NUMBERS[`classes.J.${i}.${j}`][0].addEventListener("click", () => classes.set({ i: i + 1, j: j + 1 }));
}
button(classes.root, "reset", () => classes.set(classes.first));
classes.first = structuredClone(classes.state);
classes.refresh();
