// Two figures to touch: a toy batch whose activations can be dragged, and one channel in the triangle of three classes.
// `numbers` is Equations 1 to 7 and their gradients on plain arrays; the tests compare it with the package.
// A page shows a figure where it has <div data-gini="toy-batch"> or <div data-gini="triangle">.
(function () {
"use strict"

// ---------------------------------------------------------------- numbers

const sum = values => values.reduce((total, value) => total + value, 0)
const FLOOR = 1e-10

// Eqs. 3 and 4: M (m, c) and labels (m,) to S (c, n), the mean of each channel over the images of each class
function classMeans(M, y, n) {
  const counts = Array(n).fill(0)
  for (const label of y) counts[label] += 1
  return M[0].map((_, channel) => {
    const row = Array(n).fill(0)
    M.forEach((image, k) => { row[y[k]] += Math.abs(image[channel]) / counts[y[k]] })
    return row
  })
}

// Eq. 2: each row of S as probabilities; a row of zeros, a dead channel, stays zeros
function classProbs(S) {
  return S.map(row => {
    const total = sum(row)
    return row.map(value => total > 0 ? value / total : 0)
  })
}

const isLive = row => row.some(value => value > 0)

// Inside Eq. 1: one number per channel
const impurities = P => P.map(row => 1 - sum(row.map(p => p * p)))

// Eq. 1: the mean over the live channels
function giniLoss(P) {
  const live = P.filter(isLive)
  return live.length ? sum(impurities(live)) / live.length : 0
}

// Eq. 6: the mean of the live rows
function featureHistogram(P) {
  const live = P.filter(isLive)
  return P[0].map((_, j) => live.length ? sum(live.map(row => row[j])) / live.length : 0)
}

// Eq. 7: the shares of the labels
function labelHistogram(y, n) {
  const counts = Array(n).fill(0)
  for (const label of y) counts[label] += 1
  return counts.map(count => count / y.length)
}

// A distribution of the training labels, restricted to the classes that the batch has
function restrict(prior, labels) {
  const kept = prior.map((share, j) => labels[j] > 0 ? share : 0)
  return kept.map(share => share / sum(kept))
}

// Eq. 5: KL(H^S || H^Y) as printed, or KL(H^Y || H^S) with H^S floored under the logarithm
function klLoss(HS, HY, reverse) {
  if (!sum(HS)) return 0
  return sum(HY.map((share, j) => {
    if (share <= 0) return 0
    if (reverse) return share * Math.log(share / Math.max(HS[j], FLOOR))
    return HS[j] > 0 ? HS[j] * Math.log(HS[j] / share) : 0
  }))
}

// The gradients of both terms at the class means S, for a batch whose classes are shared out as HY
function gradientsOfMeans(S, HY, reverse) {
  const P = classProbs(S), HS = featureHistogram(P)
  const live = P.filter(isLive).length
  const slope = HY.map((share, j) => {
    if (share <= 0 || HS[j] <= 0) return 0
    if (reverse) return HS[j] > FLOOR ? -share / HS[j] : 0
    return Math.log(HS[j] / share) + 1
  })
  const gini = [], kl = []
  S.forEach((row, i) => {
    const total = sum(row)
    const purity = sum(P[i].map(p => p * p))
    const mean = sum(P[i].map((p, j) => p * slope[j]))
    const scale = total > 0 ? 1 / (live * total) : 0
    gini.push(P[i].map((p, j) => HY[j] > 0 ? -2 * (p - purity) * scale : 0))
    kl.push(slope.map((value, j) => HY[j] > 0 ? (value - mean) * scale : 0))
  })
  return {gini, kl}
}

// All of it for one batch, and the gradients at each activation, (m, c)
function measure(M, y, n, options = {}) {
  const S = classMeans(M, y, n), P = classProbs(S)
  const labels = labelHistogram(y, n)
  const HY = options.prior ? restrict(options.prior, labels) : labels
  const HS = featureHistogram(P)
  const slopes = gradientsOfMeans(S, labels.map((share, j) => share > 0 ? HY[j] : 0), options.reverse)
  const atImages = slope => M.map((image, k) => image.map((_, i) => slope[i][y[k]] / (labels[y[k]] * y.length)))
  return {
    S, P, HS, HY,
    impurities: impurities(P),
    gini: giniLoss(P),
    kl: klLoss(HS, HY, options.reverse),
    gradGini: atImages(slopes.gini),
    gradKL: atImages(slopes.kl),
  }
}

// One step of descent for the first channel; the others stay where they are, and only relative activations count.
// `labels` says which classes the batch has, `HY` what the KL term compares with.
function channelPull(P, labels, HY, options) {
  const present = P.map(row => row.map((p, j) => labels[j] > 0 ? p : 0))
  const slopes = gradientsOfMeans(present, HY, options.reverse)
  const gini = slopes.gini[0].map(g => -options.lambda1 * g)
  const kl = slopes.kl[0].map(g => -options.lambda2 * g)
  return {gini, kl, both: gini.map((g, j) => g + kl[j])}
}

function channelStep(row, pull, rate) {
  const moved = row.map((p, j) => Math.max(p + rate * pull[j], 0))
  const total = sum(moved)
  return total > 0 ? moved.map(p => p / total) : row
}

// Uniform numbers in [0, 1) from a seed (mulberry32), so that a draw can be shown again
function randomNumbers(seed) {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6D2B79F5) >>> 0
    let t = Math.imul(state ^ (state >>> 15), 1 | state)
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296
  }
}

// The label shares of a batch of m images drawn from a distribution
function drawLabels(prior, m, random) {
  const counts = prior.map(() => 0)
  for (let k = 0; k < m; k++) {
    let left = random(), j = 0
    while (j < prior.length - 1 && left >= prior[j]) left -= prior[j++]
    counts[j] += 1
  }
  return counts.map(count => count / m)
}

const numbers = {
  classMeans, classProbs, impurities, giniLoss, featureHistogram, labelHistogram, restrict, klLoss,
  gradientsOfMeans, measure, channelPull, channelStep, randomNumbers, drawLabels,
}

// ---------------------------------------------------------------- drawing

const CLASS_COLORS = ["#8e5bb5", "#2a9d8f", "#c58a1a"]
const GINI = "#1f77b4", KL = "#e06c00", BOTH = "#2ca02c"        // as in all figures of the package

const STYLE = `
.gini-widget { margin: 1rem 0; padding: .75rem; border: 1px solid color-mix(in srgb, currentColor 25%, transparent);
  border-radius: 6px; font-size: 14px; line-height: 1.4; color: inherit; max-width: 860px; overflow-x: auto; }
.gini-widget sup, .gini-widget sub { line-height: 0; }
.gini-widget p { margin: 0 0 .6rem; }
.gini-widget .gw-columns { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; align-items: flex-start; }
.gini-widget .gw-columns > div { flex: 1 1 300px; min-width: 0; }
.gini-widget table { display: table; border-collapse: collapse; width: 100%; margin: 0 0 .6rem; border: 0; font-size: 14px; color: inherit; }
.gini-widget th, .gini-widget td { padding: 2px 3px; text-align: left; border: 0; font-weight: normal; background: none; color: inherit; }
.gini-widget caption { caption-side: top; text-align: left; padding: 0 0 .25rem; color: inherit; font-weight: 600; }
.gini-widget .gw-cell { position: relative; display: block; min-width: 64px; }
.gini-widget .gw-cell input { appearance: none; -webkit-appearance: none; display: block; width: 100%; height: 34px; margin: 0; padding: 0;
  border-radius: 4px; cursor: ew-resize; touch-action: pan-y; border: 1px solid color-mix(in srgb, currentColor 30%, transparent);
  background: linear-gradient(to right, var(--fill) var(--part), color-mix(in srgb, currentColor 8%, transparent) var(--part)); }
.gini-widget .gw-cell input::-webkit-slider-thumb { appearance: none; -webkit-appearance: none; width: 12px; height: 32px;
  background: color-mix(in srgb, currentColor 60%, transparent); border-radius: 3px; }
.gini-widget .gw-cell input::-moz-range-thumb { width: 12px; height: 32px; border: 0; border-radius: 3px;
  background: color-mix(in srgb, currentColor 60%, transparent); }
.gini-widget .gw-cell output { position: absolute; right: 6px; top: 7px; pointer-events: none; font-variant-numeric: tabular-nums; }
.gini-widget button, .gini-widget select { font: inherit; color: inherit; background: color-mix(in srgb, currentColor 8%, transparent);
  border: 1px solid color-mix(in srgb, currentColor 35%, transparent); border-radius: 4px; padding: 4px 8px; min-height: 32px; cursor: pointer; }
.gini-widget select option { color: #000; background: #fff; }
.gini-widget .gw-class { border-left: 6px solid var(--fill); white-space: nowrap; padding: 4px 6px; }
.gini-widget .gw-bar { display: flex; height: 18px; min-width: 34px; border-radius: 3px; overflow: hidden;
  background: color-mix(in srgb, currentColor 8%, transparent); }
.gini-widget .gw-bar i { display: block; height: 100%; }
.gini-widget .gw-number { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
.gini-widget .gw-loss { font-weight: 600; }
.gini-widget .gw-key { display: inline-block; width: 14px; height: 4px; vertical-align: middle; margin-right: 6px; border-radius: 2px; }
.gini-widget .gw-controls { display: grid; grid-template-columns: max-content 1fr; gap: 6px 10px; align-items: center; margin-bottom: .6rem; }
.gini-widget .gw-controls input[type=range] { width: 100%; min-width: 0; height: 28px; margin: 0; accent-color: #4a90c2; touch-action: pan-y; }
.gini-widget .gw-controls select { min-width: 0; width: 100%; }
.gini-widget .gw-buttons { display: flex; flex-wrap: wrap; gap: 6px; margin: .25rem 0 .6rem; }
.gini-widget svg { display: block; width: 100%; max-width: 400px; height: auto; overflow: visible; touch-action: none; }
.gini-widget svg text { fill: currentColor; font-size: 14px; }
.gini-widget .gw-point { cursor: grab; }
.gini-widget :focus-visible { outline: 3px solid #4a90c2; outline-offset: 2px; }
`

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "circle", "line", "polyline", "polygon", "text", "g"].includes(tag)
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") node.style.cssText = value
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value)
    else node.setAttribute(name, value)
  }
  node.append(...children)
  return node
}

const fixed = (value, digits = 2) => (Math.abs(value) < 0.5 * 10 ** -digits ? 0 : value).toFixed(digits).replace("-", "−")
const sub = (name, below) => { const node = make("span"); node.append(name, make("sub", {}, below)); return node }
const sup = (name, above) => { const node = make("span"); node.append(name, make("sup", {}, above)); return node }

function shares(values) {
  const bar = make("div", {class: "gw-bar", "aria-hidden": "true"})
  values.forEach((value, j) => {
    bar.append(make("i", {style: `width:${100 * value}%;background:${CLASS_COLORS[j]}`}))
  })
  return bar
}

function slider(label, value, min, max, step, changed) {
  const input = make("input", {type: "range", min, max, step, value, "aria-label": label})
  input.value = value
  input.addEventListener("input", () => changed(Number(input.value)))
  return input
}

// ---------------------------------------------------------------- (a) the toy batch

const TOY = {M: [[4, 0, 1], [2, 0, 1], [0, 3, 1], [0, 1, 1]], y: [0, 0, 1, 1]}
const BATCHES = {
  "The toy batch": TOY,
  "All for lobsters": {M: [[4, 3, 1], [2, 3, 2], [0, 0, 0], [0, 0, 0]], y: [0, 0, 1, 1]},
  "Nothing decided": {M: [[2, 1, 1], [2, 1, 1], [2, 1, 1], [2, 1, 1]], y: [0, 0, 1, 1]},
  "Three lobsters, one crab": {M: TOY.M, y: [0, 0, 0, 1]},
}

function toyBatch(root) {
  const names = ["lobster", "crab"], largest = 6
  let state = copy(TOY)

  function copy(batch) { return {M: batch.M.map(row => [...row]), y: [...batch.y]} }
  function show() {
    const result = numbers.measure(state.M, state.y, 2)
    const reversed = numbers.klLoss(result.HS, result.HY, true)
    state.M.forEach((row, k) => {
      const button = buttons[k]
      button.textContent = names[state.y[k]]
      button.style.setProperty("--fill", CLASS_COLORS[state.y[k]])
      button.setAttribute("aria-label", `image ${k} is a ${names[state.y[k]]}; press to change`)
      row.forEach((value, i) => {
        const {input, output} = cells[k][i]
        input.value = value
        input.style.setProperty("--part", `${100 * value / largest}%`)
        input.style.setProperty("--fill", `color-mix(in srgb, ${CLASS_COLORS[state.y[k]]} 55%, transparent)`)
        output.textContent = fixed(value, 1)
      })
    })
    channels.replaceChildren(...result.P.map((row, i) => make("tr", {},
      make("th", {scope: "row"}, i),
      make("td", {class: "gw-number"}, result.S[i].map(value => fixed(value)).join(", ")),
      make("td", {}, shares(row)),
      make("td", {class: "gw-number"}, isLive(row) ? row.map(value => fixed(value)).join(", ") : "dead"),
      make("td", {class: "gw-number"}, isLive(row) ? fixed(result.impurities[i]) : "–"))))
    histograms.replaceChildren(...[["S", result.HS, "channels"], ["Y", result.HY, "labels"]].map(([mark, values, of]) => make("tr", {},
      make("th", {scope: "row"}, sup("H", mark), ` ${of}`),
      make("td", {style: "width:40%"}, shares(values)),
      make("td", {class: "gw-number"}, values.map(value => fixed(value)).join(", ")))))
    const total = (result.gini + result.kl) / 2
    losses.replaceChildren(
      line(sub("L", "Gini"), fixed(result.gini, 4), "mean of the impurities"),
      line(sub("L", "KL"), fixed(result.kl, 4), `reversed: ${fixed(reversed, 4)}`),
      line("added to your loss", fixed(total, 4), "both λ = ½"))
    spoken.textContent = `Gini loss ${fixed(result.gini, 3)}, KL loss ${fixed(result.kl, 3)}`
    root.gini = {state, result, reversed, set(batch) { state = copy(batch); show() }}
  }
  function line(name, value, words) {
    return make("tr", {}, make("th", {scope: "row"}, name), make("td", {class: "gw-number gw-loss"}, value), make("td", {}, words))
  }

  const buttons = state.y.map((_, k) => make("button", {class: "gw-class", type: "button",
    onclick: () => { state.y[k] = 1 - state.y[k]; show() }}))
  const cells = state.M.map((row, k) => row.map((value, i) => {
    const input = slider(`image ${k}, channel ${i}`, value, 0, largest, 0.1, v => { state.M[k][i] = v; show() })
    const output = make("output", {"aria-hidden": "true"})
    return {input, output, node: make("span", {class: "gw-cell"}, input, output)}
  }))
  const channels = make("tbody"), histograms = make("tbody"), losses = make("tbody")
  const spoken = make("p", {"aria-live": "polite", style: "position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)"})
  const head = words => make("tr", {}, ...words.map(word => make("th", {scope: "col"}, word)))
  root.append(
    make("p", {}, "Drag an activation, or use the arrow keys. Press a label to change the class of an image."),
    make("div", {class: "gw-buttons"}, ...Object.entries(BATCHES).map(([name, batch]) =>
      make("button", {type: "button", onclick: () => { state = copy(batch); show() }}, name))),
    make("div", {class: "gw-columns"},
      make("div", {}, make("table", {}, make("caption", {}, "M: four images, three channels"),
        make("thead", {}, head(["label", "channel 0", "channel 1", "channel 2"])),
        make("tbody", {}, ...cells.map((row, k) => make("tr", {}, make("td", {}, buttons[k]),
          ...row.map(cell => make("td", {}, cell.node))))))),
      make("div", {},
        make("table", {}, make("caption", {}, "Class means S and probabilities S̄ (lobster, crab)"),
          make("thead", {}, head(["ch.", "S", "S̄", "", "impurity"])), channels),
        make("table", {}, make("caption", {}, "The two histograms"), histograms),
        make("table", {}, make("caption", {}, "The two losses"), losses))),
    spoken)
  show()
}

// ---------------------------------------------------------------- (b) one channel in the triangle

const CORNERS = [[30, 330], [370, 330], [200, 35.5]]
const toPlane = row => [0, 1].map(axis => sum(row.map((p, j) => p * CORNERS[j][axis])))
const PRIORS = {"equal: ⅓, ⅓, ⅓": [1 / 3, 1 / 3, 1 / 3], "unequal: .6, .3, .1": [.6, .3, .1]}

function fromPlane([x, y]) {
  const [[ax, ay], [bx, by], [cx, cy]] = CORNERS
  const whole = (by - cy) * (ax - cx) + (cx - bx) * (ay - cy)
  const first = ((by - cy) * (x - cx) + (cx - bx) * (y - cy)) / whole
  const second = ((cy - ay) * (x - cx) + (ax - cx) * (y - cy)) / whole
  const inside = [first, second, 1 - first - second].map(p => Math.max(p, 0))
  return inside.map(p => p / sum(inside))
}

function triangle(root) {
  const state = {
    row: [.4, .35, .25], others: [[.8, .1, .1], [.1, .8, .1]],
    lambda1: .5, lambda2: .5, reverse: false, batch: false, prior: "equal: ⅓, ⅓, ⅓", m: 12, seed: 1,
  }
  const steps = 400, rate = .25

  function labelsOf(random) {
    const prior = PRIORS[state.prior]
    return state.batch ? numbers.drawLabels(prior, state.m, random) : prior
  }
  function follow() {
    const random = numbers.randomNumbers(state.seed)
    const path = [state.row]
    for (let k = 0; k < steps; k++) {
      const labels = labelsOf(random), row = path[k]
      const pull = numbers.channelPull([row, ...state.others], labels, labels, state)
      path.push(numbers.channelStep(row, pull.both, rate))
    }
    return path
  }
  function arrow(node, tip, pull, color) {
    const from = toPlane(state.row)
    const drift = sum(pull)
    const change = pull.map((value, j) => value - state.row[j] * drift)              // what stays within the triangle
    const by = [0, 1].map(axis => sum(change.map((value, j) => value * CORNERS[j][axis])))
    const length = Math.hypot(...by), shown = Math.min(length, 130)
    const to = from.map((at, axis) => at + (length ? by[axis] / length * shown : 0))
    node.setAttribute("d", `M${from.map(v => v.toFixed(1))}L${to.map(v => v.toFixed(1))}`)
    node.setAttribute("stroke", color)
    const [ux, uy] = length ? [by[0] / length, by[1] / length] : [0, 0], size = length > 4 ? 9 : 0
    const corner = side => [to[0] - size * ux + side * size * .5 * uy, to[1] - size * uy - side * size * .5 * ux].map(v => v.toFixed(1))
    tip.setAttribute("points", [to.map(v => v.toFixed(1)), corner(1), corner(-1)].join(" "))
    tip.setAttribute("fill", color)
    return length
  }
  function show() {
    const labels = labelsOf(numbers.randomNumbers(state.seed))
    const P = [state.row, ...state.others]
    const seen = numbers.classProbs(P.map(row => row.map((p, j) => labels[j] > 0 ? p : 0)))
    const HS = numbers.featureHistogram(seen)
    const result = {labels, HS, gini: numbers.giniLoss(seen), kl: numbers.klLoss(HS, labels, state.reverse)}
    result.pull = numbers.channelPull(P, labels, labels, state)
    result.path = follow()
    const scaled = values => values.map(value => 2.5 * value)
    arrow(lines.gini, tips.gini, scaled(result.pull.gini), GINI)
    arrow(lines.kl, tips.kl, scaled(result.pull.kl), KL)
    arrow(lines.both, tips.both, scaled(result.pull.both), BOTH)
    trace.setAttribute("points", result.path.map(row => toPlane(row).map(v => v.toFixed(1))).join(" "))
    const end = toPlane(result.path[steps])
    goal.setAttribute("cx", end[0]); goal.setAttribute("cy", end[1])
    for (const [k, dot] of dots.entries()) {
      const row = k ? state.others[k - 1] : state.row, [x, y] = toPlane(row)
      dot.setAttribute("transform", `translate(${x} ${y})`)
      dot.setAttribute("aria-valuenow", Math.round(100 * row[0]))
      dot.setAttribute("aria-valuetext", row.map((p, j) => `class ${j}: ${Math.round(100 * p)} %`).join(", "))
    }
    const labelled = [`λ₁ ${fixed(state.lambda1)}`, `λ₂ ${fixed(state.lambda2)}`, `batch size ${state.m}`]
    captions.forEach((caption, k) => { caption.textContent = labelled[k] })
    const size = pull => Math.hypot(...pull)
    const tell = (color, name, value, pull) => make("tr", {},
      make("th", {scope: "row"}, make("span", {class: "gw-key", style: `background:${color}`}), name),
      make("td", {class: "gw-number"}, value), make("td", {class: "gw-number"}, fixed(size(pull), 3)))
    losses.replaceChildren(
      tell(GINI, sub("L", "Gini"), fixed(result.gini, 4), result.pull.gini),
      tell(KL, sub("L", "KL"), fixed(result.kl, 4), result.pull.kl),
      tell(BOTH, "both, weighted", fixed(state.lambda1 * result.gini + state.lambda2 * result.kl, 4), result.pull.both))
    histograms.replaceChildren(...[["S", HS, "channels"], ["Y", labels, state.batch ? "this batch" : "prior"]].map(([mark, values, of]) => make("tr", {},
      make("th", {scope: "row"}, sup("H", mark), ` ${of}`), make("td", {style: "width:40%"}, shares(values)),
      make("td", {class: "gw-number"}, values.map(value => fixed(value)).join(", ")))))
    sizeSlider.disabled = again.disabled = !state.batch
    root.gini = {state, result, set(values) { Object.assign(state, values); show() }}
  }

  const lines = {}, tips = {}
  for (const name of ["gini", "kl", "both"]) {
    lines[name] = make("path", {fill: "none", "stroke-width": name === "both" ? 5 : 3.5})
    tips[name] = make("polygon")
  }
  const trace = make("polyline", {fill: "none", stroke: "currentColor", "stroke-width": 1.5, "stroke-opacity": .65})
  const goal = make("circle", {r: 5, fill: "none", stroke: "currentColor", "stroke-width": 1.5})
  const dots = [state.row, ...state.others].map((_, k) => make("g", {class: "gw-point", tabindex: 0, role: "slider", "data-dot": k,
    "aria-label": k ? `another channel, ${k}: arrow keys move it` : "the channel: arrow keys move it", "aria-valuemin": 0, "aria-valuemax": 100},
    make("circle", {r: 22, fill: "transparent"}),
    make("circle", {r: k ? 6 : 9, fill: k ? "color-mix(in srgb, currentColor 45%, transparent)" : "currentColor"})))
  const svg = make("svg", {viewBox: "0 0 400 360", role: "group", "aria-label": "Triangle of three classes with a channel as a point"},
    make("polygon", {points: CORNERS.join(" "), fill: "color-mix(in srgb, currentColor 4%, transparent)", stroke: "currentColor", "stroke-opacity": .5}),
    ...CORNERS.map(([x, y], j) => make("text", {x, y: j === 2 ? y - 12 : y + 24, "text-anchor": j === 2 ? "middle" : j ? "end" : "start",
      style: `fill:${CLASS_COLORS[j]};font-weight:600`}, `class ${j}`)),
    trace, goal, lines.both, tips.both, lines.gini, tips.gini, lines.kl, tips.kl, ...dots.slice(1), dots[0])

  function move(k, row) {
    if (k) state.others[k - 1] = row
    else state.row = row
    show()
  }
  dots.forEach((dot, k) => {
    dot.addEventListener("pointerdown", event => { event.preventDefault(); dot.focus({preventScroll: true}); dot.setPointerCapture(event.pointerId) })
    dot.addEventListener("pointermove", event => {
      if (!dot.hasPointerCapture(event.pointerId)) return
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse())
      move(k, fromPlane([at.x, at.y]))
    })
    dot.addEventListener("keydown", event => {
      const by = {ArrowLeft: [-6, 0], ArrowRight: [6, 0], ArrowUp: [0, -6], ArrowDown: [0, 6]}[event.key]
      if (!by) return
      event.preventDefault()
      move(k, fromPlane(toPlane(k ? state.others[k - 1] : state.row).map((at, axis) => at + by[axis])))
    })
  })

  const captions = [make("span"), make("span"), make("span")]
  const choice = (label, options, changed) => {
    const select = make("select", {"aria-label": label}, ...options.map(text => make("option", {value: text}, text)))
    select.addEventListener("change", () => { changed(select.value); show() })
    return select
  }
  const change = name => value => { state[name] = value; show() }
  const sizeSlider = slider("images in a batch", state.m, 3, 60, 1, change("m"))
  const again = make("button", {type: "button", onclick: () => { state.seed += 1; show() }}, "Draw other batches")
  const directions = ["KL(Hˢ ‖ Hʸ), as printed", "KL(Hʸ ‖ Hˢ), reversed"]
  const sources = ["the training shares (prior)", "each batch's own labels"]
  const losses = make("tbody"), histograms = make("tbody")
  root.append(
    make("p", {}, "Drag the large point: one channel. The small ones are two other channels, which stay where you put them. " +
      "The thin line is the path that descent takes the channel, and the ring is where it is after 400 steps."),
    make("div", {class: "gw-columns"}, make("div", {}, svg), make("div", {},
      make("div", {class: "gw-controls"},
        captions[0], slider("lambda 1, weight of the Gini term", state.lambda1, 0, 2, .05, change("lambda1")),
        captions[1], slider("lambda 2, weight of the KL term", state.lambda2, 0, 2, .05, change("lambda2")),
        make("span", {}, "direction"), choice("direction of KL", directions, text => { state.reverse = text === directions[1] }),
        make("span", {}, sup("H", "Y"), " is"), choice("what the channels are compared with", sources, text => { state.batch = text === sources[1] }),
        make("span", {}, "classes"), choice("training shares", Object.keys(PRIORS), text => { state.prior = text }),
        captions[2], sizeSlider),
      make("div", {class: "gw-buttons"}, again),
      make("table", {}, make("thead", {}, make("tr", {}, ...["", "value", "pull"].map((word, k) =>
        make("th", {scope: "col", class: k ? "gw-number" : ""}, word)))), losses),
      make("table", {}, make("caption", {}, "The two histograms"), histograms))))
  show()
}

// ---------------------------------------------------------------- start

const FIGURES = {"toy-batch": toyBatch, triangle}

function start() {
  for (const root of document.querySelectorAll("[data-gini]")) {
    const draw = FIGURES[root.dataset.gini]
    if (root.gini || !draw) continue
    root.replaceChildren()
    root.classList.add("gini-widget")
    draw(root)
  }
}

if (!window.giniLoss) document.head.append(make("style", {}, STYLE))
window.giniLoss = {numbers, start}
start()
requestAnimationFrame(start)
document.addEventListener("DOMContentLoaded", start)
})()
