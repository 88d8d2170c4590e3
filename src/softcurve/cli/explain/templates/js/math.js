// The mathematics of the page in float64, by the closed forms of the page itself. Vectors are arrays of numbers.

const sum = (v) => v.reduce((total, value) => total + value, 0);
const dot = (u, v) => u.reduce((total, value, i) => total + value * v[i], 0);
const norm = (v) => Math.sqrt(dot(v, v));
const range = (n) => Array.from({ length: n }, (_, i) => i);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// The greatest logit is taken out, as everywhere: a common offset changes nothing.
function logSoftmax(z) {
  const top = Math.max(...z);
  const lse = top + Math.log(sum(z.map((value) => Math.exp(value - top))));
  return z.map((value) => value - lse);
}

const softmax = (z) => logSoftmax(z).map(Math.exp);
const entropy = (p) => -sum(p.map((value) => (value === 0 ? 0 : value * Math.log(value))));
const crossEntropy = (y, logP) => -sum(y.map((value, k) => (value === 0 ? 0 : value * logP[k])));

// A divergence Σ φ(p_k, y_k) by its terms: φ, s = p φ' and c = p φ' + p² φ''. See "Second order" on the page.
const FAMILY = {
  forward: (p, logP, y, logY) => [y === 0 ? 0 : y * (logY - logP), -y, 0],
  reverse: (p, logP, y, logY) => {
    if (y === 0) return [p === 0 ? 0 : Infinity, NaN, NaN];
    const r = logP - logY;
    return p === 0 ? [0, 0, 0] : [p * r, p * (r + 1), p * (r + 2)];
  },
  js: (p, logP, y, logY, beta) => {
    const m = (1 - beta) * p + beta * y;
    const ofP = p === 0 ? 0 : (1 - beta) * p * Math.log(p / m);
    const ofY = y === 0 ? 0 : beta * y * Math.log(y / m);
    return [ofY + ofP, ofP, ofP + (m === 0 ? 0 : ((1 - beta) * beta * p * y) / m)];
  },
};

// Its value, its gradient s − p Σ s with respect to the logits of p, and what the Hessian needs.
function divergence(kind, logP, y, logY, beta) {
  const p = logP.map(Math.exp);
  const terms = p.map((value, k) => FAMILY[kind](value, logP[k], y[k], logY[k], beta));
  const value = sum(terms.map((term) => term[0]));
  const score = terms.map((term) => term[1]);
  const total = sum(score);
  return { p, value, score, curve: terms.map((term) => term[2]), gradient: score.map((s, k) => s - p[k] * total) };
}

// H e_j = c ⊙ u − p (c·u) − p ⊙ u S with u = e_j − p_j, for every j.
function hessian({ p, score, curve }) {
  const [S, C] = [sum(score), sum(curve)];
  return p.map((pi, i) => p.map((pj, j) => {
    const diagonal = i === j ? curve[i] - S * pi : 0;
    return diagonal - curve[i] * pj - pi * curve[j] + pi * pj * (C + S);
  }));
}

const jacobian = (p) => p.map((pi, i) => p.map((pj, j) => pi * ((i === j ? 1 : 0) - pj)));

// The eigenvalues of a symmetric matrix in ascending order, by Jacobi's rotations.
function eigenvalues(matrix) {
  const a = matrix.map((row) => row.slice());
  const n = a.length;
  for (let sweep = 0; sweep < 30; sweep += 1) {
    for (let i = 0; i < n; i += 1) for (let j = i + 1; j < n; j += 1) rotate(a, i, j);
  }
  return a.map((row, i) => row[i]).sort((x, y) => x - y);
}

function rotate(a, i, j) {
  if (!a[i][j]) return;
  const theta = (a[j][j] - a[i][i]) / (2 * a[i][j]);
  const t = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.sqrt(theta * theta + 1));
  const c = 1 / Math.sqrt(t * t + 1);
  const s = t * c;
  for (let k = 0; k < a.length; k += 1) [a[k][i], a[k][j]] = [c * a[k][i] - s * a[k][j], s * a[k][i] + c * a[k][j]];
  for (let k = 0; k < a.length; k += 1) [a[i][k], a[j][k]] = [c * a[i][k] - s * a[j][k], s * a[i][k] + c * a[j][k]];
}

// KL(N(m, s²) ‖ N(n, t²)) and its derivatives with respect to m, log s, n and log t.
function gaussianKL(m, s, n, t) {
  const [ratio, shift] = [(s * s) / (t * t), (m - n) / t];
  return {
    value: (shift * shift + ratio - 1 - Math.log(ratio)) / 2,
    gradient: [shift / t, ratio - 1, -shift / t, 1 - ratio - shift * shift],
  };
}
