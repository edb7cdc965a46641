// Moving one preference shares the rest among the others in their proportion.
const data = JSON.parse(document.getElementById('front').textContent);
const dials = [...document.querySelectorAll('input.dial')];
const shown = (t, what) => document.getElementById(what + '-' + t);
const point = document.getElementById('dial-point');
function expected(r) {
  let total = 0;
  const sum = {losses: r.map(() => 0), accuracies: r.map(() => 0)};
  for (const [i, ray] of data.rays.entries()) {
    const distance = ray.reduce((d, x, t) => d + (x - r[t]) ** 2, 0);
    const weight = 1 / (distance + 1e-9) ** 2;
    total += weight;
    for (const key in sum) data[key][i].forEach((x, t) => { sum[key][t] += weight * x; });
  }
  for (const key in sum) sum[key] = sum[key].map((x) => x / total);
  return sum;
}
function turn(moved) {
  const values = dials.map((dial) => Number(dial.value));
  if (moved !== undefined) {
    const rest = 1 - values[moved];
    const others = values.reduce((s, x, t) => t === moved ? s : s + x, 0);
    values.forEach((x, t) => {
      if (t !== moved) values[t] = others > 0 ? x * rest / others : rest / (values.length - 1);
    });
    dials.forEach((dial, t) => { dial.value = values[t]; });
  }
  const total = values.reduce((s, x) => s + x, 0);
  const r = values.map((x) => x / total);
  const now = expected(r);
  r.forEach((x, t) => {
    shown(t, 'preference').textContent = x.toFixed(2);
    shown(t, 'loss').textContent = now.losses[t].toFixed(4);
    shown(t, 'accuracy').textContent = now.accuracies[t].toFixed(4);
  });
  if (point) {
    point.setAttribute('cx', data.x[0] + data.x[1] * now.losses[0]);
    point.setAttribute('cy', data.y[0] + data.y[1] * now.losses[1]);
  }
}
dials.forEach((dial, t) => dial.addEventListener('input', () => turn(t)));
turn();
