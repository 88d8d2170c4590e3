// A point p on the simplex of three classes: the level sets of a divergence from y, and the direction of descent.

const CORNERS = [[20, 180], [220, 180], [120, 6.8]];
const FINE = 48; // the triangles along a side, between whose corners the level sets are interpolated
const LEVELS = [0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.1, 1.6];
const place = (p) => [0, 1].map((c) => dot(p, CORNERS.map((corner) => corner[c])));
const shares = ([a, b]) => [a, (1 - a) * b, (1 - a) * (1 - b)];

function pull(state, p) {
  const y = shares(state.y);
  return divergence(state.kind, p.map(Math.log), y, y.map(Math.log), state.beta);
}

// ṗ = −J ∂D/∂z: where p moves when its logits follow the negative gradient.
function motion(p, gradient) {
  const mean = dot(p, gradient);
  return p.map((value, k) => -value * (gradient[k] - mean));
}

const drawn = {};
const simplex = widget("simplex", { p: [0.15, 0.25], y: [0.5, 0.6], kind: "forward", beta: 0.5 }, (state, put, root) => {
  const p = shares(state.p);
  const at = pull(state, p);
  const go = motion(p, at.gradient);
  visible(root.querySelector("[data-for=beta]"), state.kind === "js");
  put("p", p);
  put("y", shares(state.y));
  put("value", at.value);
  put("gradient", at.gradient);
  put("motion", go);
  const key = JSON.stringify([state.y, state.kind, state.beta]);
  if (drawn.key !== key) Object.assign(drawn, { key, field: levelSets(state) + arrows(state) });
  const [x, y] = place(shares(state.y));
  const [px, py] = place(p);
  draw(root, "simplex", `<polygon class="axis" points="${CORNERS.join(" ")}"/>${drawn.field}`
    + `<text x="10" y="192">1</text><text x="230" y="192">2</text><text x="136" y="12">3</text>`
    + arrow(p, go, 24 / Math.max(1e-9, length(go)), "step")
    + `<path class="target" d="M${x - 5} ${y}h10M${x} ${y - 5}v10"/><circle class="point" cx="${px}" cy="${py}" r="5"/>`,
  `p = ${p.map((value) => value.toFixed(2)).join(", ")}`);
});

const length = (go) => Math.hypot(...[0, 1].map((c) => dot(go, CORNERS.map((corner) => corner[c]))));

function arrow(p, go, scale, css) {
  const [x, y] = place(p);
  const [dx, dy] = [0, 1].map((c) => scale * dot(go, CORNERS.map((corner) => corner[c])));
  const wing = (angle) => {
    const [cos, sin] = [Math.cos(angle) * 0.35, Math.sin(angle) * 0.35];
    return `L${(x + dx - cos * dx + sin * dy).toFixed(1)} ${(y + dy - sin * dx - cos * dy).toFixed(1)}`;
  };
  const tip = `${(x + dx).toFixed(1)} ${(y + dy).toFixed(1)}`;
  return `<path class="arrow ${css}" d="M${x.toFixed(1)} ${y.toFixed(1)}L${tip}${wing(0.5)}M${tip}${wing(-0.5)}"/>`;
}

// Arrows of one length, for their directions, in every small triangle's corner inside the simplex.
function arrows(state) {
  const parts = [];
  for (let i = 1; i < 9; i += 1) for (let j = 1; i + j < 9; j += 1) {
    const p = [i / 9, j / 9, (9 - i - j) / 9];
    const go = motion(p, pull(state, p).gradient);
    parts.push(arrow(p, go, 9 / Math.max(1e-9, length(go)), "field"));
  }
  return parts.join("");
}

// Level sets by linear interpolation in small triangles; the logarithms keep a little from the edges.
function levelSets(state) {
  const at = range(FINE + 1).map((i) => range(FINE + 1 - i).map((j) => {
    const p = [i, j, FINE - i - j].map((part) => (part + 1e-3) / (FINE + 3e-3));
    return [...place(p), pull(state, p).value];
  }));
  const segments = LEVELS.map(() => []);
  const cut = (corners) => LEVELS.forEach((level, l) => {
    const ends = [[0, 1], [1, 2], [2, 0]].flatMap(([a, b]) => {
      const [u, v] = [corners[a], corners[b]];
      if (u[2] < level === v[2] < level) return [];
      const t = (level - u[2]) / (v[2] - u[2]);
      return [`${(u[0] + t * (v[0] - u[0])).toFixed(1)} ${(u[1] + t * (v[1] - u[1])).toFixed(1)}`];
    });
    if (ends.length === 2) segments[l].push(`M${ends[0]}L${ends[1]}`);
  });
  for (let i = 0; i < FINE; i += 1) for (let j = 0; i + j < FINE; j += 1) {
    cut([at[i][j], at[i + 1][j], at[i][j + 1]]);
    if (i + j < FINE - 1) cut([at[i + 1][j], at[i + 1][j + 1], at[i][j + 1]]);
  }
  return segments.map((parts) => `<path class="level" d="${parts.join("")}"/>`).join("");
}

drag(simplex.root.querySelector("[data-draw=simplex]"), (x, y) => {
  const third = clamp((180 - y) / 173.2, 0.01, 0.98);
  const second = clamp((x - 20 - 100 * third) / 200, 0.01, 0.99 - third);
  const first = Math.max(0.01, 1 - third - second);
  simplex.set({ p: [first, second / (1 - first)].map((share) => clamp(share, 0.01, 0.99)) });
});
simplex.refresh();
