// A target y of two humps, and a Gaussian p on the same bins, moved by hand or by steps of natural gradient.

const [GRID, LOG_TARGET] = [DATA.grid, logSoftmax(DATA.target)];
const TARGET = LOG_TARGET.map(Math.exp);
const gaussian = ({ mean, width }) => logSoftmax(GRID.map((at) => -((at - mean) ** 2) / (2 * width * width)));

// The chosen divergence and its gradient with respect to the mean and the logarithm of the width.
function atGaussian(state) {
  const result = divergence(state.kind, gaussian(state), TARGET, LOG_TARGET, state.beta);
  const slopes = GRID.map((at) => [(at - state.mean) / state.width ** 2, ((at - state.mean) / state.width) ** 2]);
  const gradient = [0, 1].map((k) => dot(result.gradient, slopes.map((slope) => slope[k])));
  return { ...result, slopes, gradient };
}

// The Fisher information of the two parameters is F = Gᵀ J G, and wF the curvature of D at p = y. The step is
// (wF)⁻¹ gradient, halved until the divergence falls.
function step(state) {
  const at = atGaussian(state);
  const means = [0, 1].map((k) => dot(at.p, at.slopes.map((slope) => slope[k])));
  const moment = (a, b) => dot(at.p, at.slopes.map((slope) => (slope[a] - means[a]) * (slope[b] - means[b])));
  const [f, g, h] = [moment(0, 0), moment(0, 1), moment(1, 1)];
  const [u, v] = at.gradient;
  const determinant = (f * h - g * g) * (state.kind === "js" ? state.beta * (1 - state.beta) : 1);
  let [du, dv] = [(h * u - g * v) / determinant, (f * v - g * u) / determinant];
  const scale = Math.min(1, 1 / Math.abs(du), 0.5 / Math.abs(dv));
  [du, dv] = [scale * du, scale * dv];
  for (let halvings = 0; halvings < 20; halvings += 1) {
    const next = { ...state, mean: state.mean - du, width: state.width * Math.exp(-dv) };
    if (atGaussian(next).value < at.value) return { mean: next.mean, width: next.width, steps: state.steps + 1 };
    [du, dv] = [du / 2, dv / 2];
  }
  return null; // at the minimum, as far as float64 tells
}

const modes = widget("modes", { mean: 0.5, width: 1, kind: "forward", beta: 0.5, steps: 0 }, (state, put, root) => {
  const at = atGaussian(state);
  const [logP, p] = [gaussian(state), at.p];
  visible(root.querySelector("[data-for=beta]"), state.kind === "js");
  const mean = dot(p, GRID);
  put("mean", mean);
  put("width", Math.sqrt(dot(p, GRID.map((bin) => (bin - mean) ** 2))));
  put("steps", state.steps);
  put("value", at.value);
  put("forward", divergence("forward", logP, TARGET, LOG_TARGET).value);
  put("reverse", divergence("reverse", logP, TARGET, LOG_TARGET).value);
  put("js", divergence("js", logP, TARGET, LOG_TARGET, state.beta).value);
  put("slope", at.gradient);
  put("left", sum(p.filter((_, k) => GRID[k] < 0)));
  const top = Math.max(...TARGET, ...p);
  const curve = (values) => values.map((value, k) => [(300 * k) / (GRID.length - 1), 120 - (112 * value) / top]);
  draw(root, "modes", polyline([[0, 120], ...curve(TARGET), [300, 120]], "area") + polyline(curve(p), "line") + ticks([-6, -3, 0, 3, 6], (x) => 25 * (x + 6)),
    `${state.mean.toFixed(2)}, ${state.width.toFixed(2)}`);
});

drag(modes.root.querySelector("[data-draw=modes]"), (x) => modes.set({ mean: clamp(x / 25 - 6, -6, 6), steps: 0 }));
button(modes.root, "step", () => { stop(); modes.set(step(modes.state) || {}); });
button(modes.root, "reset", () => { stop(); modes.set({ mean: 0.5, width: 1, steps: 0 }); });
button(modes.root, "run", run);

let timer = 0;
const stop = () => clearTimeout(timer);

// Sixty steps at most; a reader who asked for less motion sees the last one only.
function run() {
  stop();
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const go = (left) => {
    const next = left && step(modes.state);
    if (!next) return;
    if (still) Object.assign(modes.state, next); else modes.set(next);
    if (still) go(left - 1); else timer = setTimeout(go, 120, left - 1);
  };
  go(60);
  modes.refresh();
}
modes.step = step;
modes.refresh();
