// The Gaussian q = N(μ, σ²) of a variational autoencoder and its prior: fixed at N(0, 1), or learned.

const density = (m, s) => (at) => Math.exp(-(((at - m) / s) ** 2) / 2) / (s * Math.sqrt(2 * Math.PI));

const vae = widget("vae", { mean: 1.5, width: 0.5, learned: false, r: [0, 1] }, (state, put, root) => {
  const at = gaussianKL(state.mean, state.width, ...state.r);
  put("mean", state.mean);
  put("width", state.width);
  put("value", at.value);
  put("slope", at.gradient.slice(0, 2));
  put("prior", at.gradient.slice(2).map((value) => (state.learned ? value : 0)));
  put("r", state.r);
  const places = range(121).map((k) => -4 + k / 15);
  const [q, r] = [density(state.mean, state.width), density(...state.r)];
  const top = Math.max(...places.map(q), ...places.map(r));
  const curve = (f) => places.map((x) => [37.5 * (x + 4), 120 - (112 * f(x)) / top]);
  draw(root, "vae", polyline([[0, 120], ...curve(r), [300, 120]], "area") + polyline(curve(q), "line") + ticks([-4, -2, 0, 2, 4], (x) => 37.5 * (x + 4)),
    `${state.mean.toFixed(2)}, ${state.width.toFixed(2)}`);
});

// A step of gradient descent on μ and log σ, and on the prior's where it is learned.
button(vae.root, "step", () => {
  const { mean, width, learned, r } = vae.state;
  const g = gaussianKL(mean, width, ...r).gradient;
  const prior = learned ? [r[0] - 0.2 * g[2], r[1] * Math.exp(-0.2 * g[3])] : r;
  vae.set({ mean: mean - 0.2 * g[0], width: width * Math.exp(-0.2 * g[1]), r: prior });
});
button(vae.root, "reset", () => vae.set({ mean: 1.5, width: 0.5, r: [0, 1], learned: false }));
drag(vae.root.querySelector("[data-draw=vae]"), (x) => vae.set({ mean: clamp(x / 37.5 - 4, -3, 3) }));
vae.refresh();
