"use strict";
const [dark, isTouch] = ["prefers-color-scheme: dark", "pointer: coarse"].map((q) => matchMedia(`(${q})`).matches);
const ink = dark ? "#e4e7ec" : "#1b1f27", grid = dark ? "#363c47" : "#e3e7ec", paper = dark ? "#14171c" : "#ffffff";
const palette = ["#3b82c4", "#d9662b", "#2e9d6a", "#b8479b", "#a08a1f",
  "#7667d6", "#d14343", "#2ea3b7", "#808792", "#a5703f"];
const DASHES = ["solid", "dot", "dash", "dashdot", "longdash", "longdashdot"];
const MOST_CHARTS = 24, MOST_POINTS = 2000, PERIOD = 2000; // milliseconds
const $ = (selector) => document.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// ----------------------------------------------------------------------------------------- data
// A curve is a list of [step, value], or if thinned of [last step, mean, lowest, highest, count].
// The curves of system metrics have minutes for steps. Objects by names that files contain have no prototype, because
// of names such as "constructor".

const embedded = JSON.parse(document.body.dataset.curves), isLive = embedded === null;
let page = embedded ?? { runs: {}, groups: {}, metrics: [], important: [], curves: { __proto__: null } };
const details = { __proto__: null }; // by metric and run: the points where a chart is zoomed in
const checksums = {}; // of the sections that this page has

/** How many rows of the journal some points stand for. */
const rowsOf = (points) => points.reduce((sum, [, , , , count = 1]) => sum + count, 0);

async function ask(curves) {
  const body = JSON.stringify({ sections: checksums, curves });
  const response = await fetch(location.search || "?", { method: "POST", body });
  if (!response.ok) throw new Error(response.statusText);
  return response.text();
}

/** The metrics of the charts that are shown, and of their x-axis. */
function neededMetrics() {
  const axis = { epochs: ["epoch"], minutes: ["minutes"] }[state.x] ?? [];
  return [...axis, ...charts().flatMap(([, metrics]) => metrics)];
}

/** Get what is new: sections, runs, and points of the metrics that are needed. Returns whether anything is. */
async function update() {
  const needed = neededMetrics(), wanted = { __proto__: null };
  for (const metric of needed) {
    wanted[metric] = { __proto__: null };
    for (const [run, points] of Object.entries(page.curves[metric] ?? {}))
      // Of others, the server sends all, thinned anew.
      if (points.length && points.length <= MOST_POINTS) wanted[metric][run] = [rowsOf(points), null];
  }
  const answer = await ask(wanted);
  if (answer === latest) return false;
  latest = answer;
  const { sections, curves, ...news } = JSON.parse(answer), zoomedIn = Object.values(details);
  for (const [run, { journal }] of Object.entries(page.runs))
    if (news.runs[run]?.journal !== journal) // a resumed run has cut its journal
      for (const runs of [...Object.values(page.curves), ...Object.values(curves), ...zoomedIn]) delete runs[run];
  page = { ...page, ...news };
  for (const [metric, runs] of Object.entries(curves))
    for (const [run, points] of Object.entries(runs))
      (page.curves[metric] ??= { __proto__: null })[run] =
        run in wanted[metric] ? [...page.curves[metric][run], ...points] : points;
  for (const [name, [checksum, content]] of Object.entries(sections)) {
    checksums[name] = checksum;
    fill($("#" + name), content);
  }
  if (neededMetrics().some((metric) => !needed.includes(metric))) await update();
  return true;
}

let latest, refreshing = Promise.resolve(); // answer of the server, and the question under way
/** One after the other: two questions at once would bring the same points twice. */
const refresh = () => (refreshing = refreshing.then(async () => {
  try {
    if (await update()) show();
    $("#state").textContent = `Up to date at ${new Date().toLocaleTimeString()}.`;
  } catch (error) {
    $("#state").textContent = `No answer from report.py (${error.message}): the page shows what it had.`;
  }
}));

async function follow() {
  if (!$(".dragcover")) await refresh(); // not while somebody drags to zoom
  setTimeout(follow, PERIOD);
}

/** The points of a run; in full where its chart is zoomed in. */
function pointsOf(metric, run) {
  const points = page.curves[metric]?.[run] ?? [], inFull = details[metric]?.[run];
  if (!inFull) return points;
  const [first, last] = [inFull[0][0], inFull.at(-1)[0]];
  return [...points.filter(([step]) => step < first), ...inFull, ...points.filter(([step]) => step > last)];
}

// ----------------------------------------------------------------- state, in the page's address

const form = $("form");
const defaults = { charts: "", runs: "", x: "examples", smoothing: 0, logX: false, logY: false, together: true,
  each: Number(document.body.dataset.runs) <= 5, pin: "", hide: [] };
const state = { ...defaults };
for (const [name, value] of new URLSearchParams(location.hash.slice(1)))
  if (Object.hasOwn(defaults, name)) state[name] = { boolean: value === "true", number: Number(value) || 0,
    string: value, object: [...state.hide, value] }[typeof defaults[name]];

function setState(changes) {
  Object.assign(state, changes);
  const parameters = new URLSearchParams(state.hide.map((name) => ["hide", name]));
  for (const [name, value] of Object.entries(state))
    if (name !== "hide" && value !== defaults[name]) parameters.set(name, value);
  history.replaceState(null, "", `#${parameters}`);
  show();
  if (isLive && !neededMetrics().every((metric) => page.curves[metric])) refresh();
}

for (const control of [...form.elements].filter(({ name }) => name)) {
  const property = control.type === "checkbox" ? "checked" : control.type === "range" ? "valueAsNumber" : "value";
  control[property] = state[control.name];
  // It may have no such value.
  if (control[property] !== state[control.name]) control[property] = state[control.name] = defaults[control.name];
  control.addEventListener("input", () => setState({ [control.name]: control[property] }));
}
form.addEventListener("submit", (event) => event.preventDefault());
addEventListener("hashchange", () => location.reload());

function matches(pattern, name) {
  try {
    return new RegExp(pattern, "i").test(name);
  } catch {
    return name.includes(pattern); // it is being typed
  }
}

// -------------------------------------------------------------------------------------- numbers

/** y at x, between the rows [x, y] of a table; null outside. */
function interpolate(table, x) {
  let low = 0, high = table.length - 1;
  if (high < 1 || x < table[0][0] || x > table[high][0]) return null;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (table[middle][0] <= x) low = middle; else high = middle;
  }
  const [x0, y0] = table[low], [x1, y1] = table[high];
  return x1 === x0 ? y1 : y0 + ((y1 - y0) * (x - x0)) / (x1 - x0);
}

/** Where each epoch ended: rows [step, epochs]. One that may go on counts as long as the one before. */
function epochTable(run) {
  const rows = (page.curves.epoch?.[run] ?? []).map(([step, mean, , highest]) => [highest ?? mean, step]);
  const isFrom0 = rows.some(([epoch, step]) => !epoch && step > 0) && rows.every(([epoch]) => Number.isInteger(epoch));
  const ends = new Map([[0, 0], ...rows.map(([epoch, step]) => [epoch + isFrom0, step])]);
  const table = [...ends].map(([epoch, step]) => [step, epoch]);
  if (page.runs[run].finished) return table;
  if (table.length < 3) return []; // the length of the first epoch is not known yet
  const [[start], [middle], last] = table.slice(-3);
  last[0] = Math.max(last[0], 2 * middle - start);
  return table;
}

/** The function from a step to the x-axis; null where the run does not tell. */
function axisOf(metric, run) {
  if (metric.startsWith("system/") || state.x === "examples") return (step) => step;
  if (state.x === "batches") return (step) => [step / page.runs[run].batchSize].find(Number.isFinite) ?? null;
  const minutes = (page.curves.minutes?.[run] ?? []).map(([step, mean, , highest]) => [step, highest ?? mean]);
  const table = state.x === "epochs" ? epochTable(run) : minutes;
  return (step) => interpolate(table, step);
}

/** Exponential moving average without its bias towards 0; a thinned point counts as all that it stands for. */
function smoothed(points) {
  let sum = 0, weight = 0;
  return points.map(([, value, , , count = 1]) => {
    const kept = state.smoothing ** count;
    sum = kept * sum + (1 - kept) * value;
    weight = kept * weight + (1 - kept);
    return sum / weight;
  });
}

/** At each x of the longest curve: x, and mean, standard deviation and count of the curves there, if two or more.
 * The batches of two seeds or folds need not end at the same examples: a curve counts between its points, too, and
 * half a spacing beyond its ends. */
function band(curves) {
  const tables = curves.map(({ x, y }) => x.map((at, i) => [at, y[i]]).filter((point) => !point.includes(null)))
    .filter(({ length }) => length);
  if (!tables.length) return [];
  const longest = tables.reduce((a, b) => (b.at(-1)[0] > a.at(-1)[0] ? b : a));
  const reach = longest.at(-1)[0] / longest.length / 2;
  for (const table of tables)
    table.unshift([table[0][0] - reach, table[0][1]]), table.push([table.at(-1)[0] + reach, table.at(-1)[1]]);
  return longest.slice(1, -1).flatMap(([at]) => {
    const members = tables.map((table) => interpolate(table, at)).filter((value) => value !== null);
    const mean = members.reduce((a, b) => a + b, 0) / members.length;
    const squares = members.reduce((sum, value) => sum + (value - mean) ** 2, 0);
    return members.length > 1 ? [[at, mean, Math.sqrt(squares / (members.length - 1)), members.length]] : [];
  });
}

// --------------------------------------------------------------------------------------- charts

// plotly.js interprets HTML and templates in names. A long name is shortened in the middle.
const plain = (name) => (name.length > 48 ? `${name.slice(0, 24)}…${name.slice(-23)}` : name)
  .replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll("%{", "%&#123;");
const download = (format, icon) => ({ name: format, title: `Download as ${format.toUpperCase()}`, icon,
  click: ({ data, layout, clientWidth: width, clientHeight, dataset }) => {
    const filename = (dataset.name ?? "chart").replaceAll(/[^\w.-]+/g, "_");
    const below = { ...layout, showlegend: true, legend: { orientation: "h", y: -0.25 } };
    const height = clientHeight + 20 * data.filter(({ showlegend }) => showlegend).length;
    Plotly.downloadImage({ data, layout: below }, { format, filename, width, height, scale: 2 });
  } });
const options = { responsive: true, displaylogo: false, displayModeBar: true, // of plotly's own buttons, one uploads
  modeBarButtons: [[download("png", Plotly.Icons.camera), download("svg", Plotly.Icons.disk)]] };
const axis = { gridcolor: grid, linecolor: grid, zeroline: false, automargin: true, title: { standoff: 8 },
  exponentformat: "e" }; // 1e-5, not 10μ

function draw(chart, data, layout) {
  const base = { font: { color: ink, family: "system-ui, sans-serif", size: 12 }, colorway: palette,
    paper_bgcolor: paper, plot_bgcolor: paper, margin: { l: 60, r: 20, t: 44, b: 46 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: dark ? "#98a2b3" : "#808792", activecolor: ink }, hovermode: "closest",
    dragmode: !isTouch && "zoom", hoverlabel: { namelength: -1 }, ...layout, template: undefined, width: undefined };
  for (const name of Object.keys({ xaxis: 0, yaxis: 0, ...layout }).filter((name) => /^[xy]axis/.test(name)))
    base[name] = { ...axis, ...base[name], title: { ...axis.title, ...base[name]?.title } };
  return Plotly.react(chart, data, base, options);
}

const colors = { __proto__: null };
const colorOf = (name) => (colors[name] ??= palette[Object.keys(colors).length % palette.length]);
const isShown = (name) => !state.hide.includes(name);
/** All runs, by name: "trial 9", then "trial 10". */
const sortedRuns = () => Object.keys(page.runs).sort((a, b) =>
  page.runs[a].name.localeCompare(page.runs[b].name, undefined, { numeric: true }));
const shownRuns = () => sortedRuns().filter((run) => matches(state.runs, page.runs[run].name));

/** The name of the chart that a metric shares in training and validation. */
const baseName = (metric) => metric.replace(/^(train|valid)\/(.*?)(_step|_epoch)?$/, "$2");

/** The name of a run's group of seeds or folds. */
const groupOf = (run) => Object.keys(page.groups).find((name) => page.groups[name].includes(run));

/** The charts that are shown: names and metrics. */
function charts() {
  const hasImportant = page.metrics.some((metric) => page.important.includes(baseName(metric)));
  const byName = { __proto__: null }, rank = (metric) => metric.startsWith("system/") - metric.startsWith("valid/");
  for (const metric of page.metrics.toSorted((a, b) => rank(a) - rank(b))) {
    const base = baseName(metric);
    const isMean = metric.endsWith("_epoch") && page.metrics.includes(metric.replace(/_epoch$/, "_step"));
    if (state.together && isMean) continue; // of the batches, which are in the chart
    const isDefault = hasImportant ? page.important.includes(base) : !metric.startsWith("system/");
    if (state.charts ? matches(state.charts, metric) || matches(state.charts, base) : isDefault)
      (byName[state.together ? base : metric] ??= []).push(metric);
  }
  const order = ([name]) => page.important.indexOf(baseName(name)) >>> 0; // others last
  return Object.entries(byName).sort((a, b) => order(a) - order(b)).slice(0, MOST_CHARTS);
}

/** The curves of a metric in plotly's format: those of runs, faint ones behind them if smoothed, and bands. */
function traces(metric, dash, x) {
  const result = [], members = { __proto__: null }; // curves by group
  for (const run of shownRuns()) {
    const { name, processes } = page.runs[run], group = groupOf(run), points = pointsOf(metric, run);
    if (!points.length) continue;
    const curve = { x: points.map(([step]) => step).map(axisOf(metric, run)), y: smoothed(points) };
    if (group) (members[group] ??= []).push(curve);
    if (!isShown(name) || (group && !state.each && x !== "minutes")) continue;
    const raw = { x: [], y: [] }, line = { x: [], y: [] };
    let process;
    points.forEach(([, value, low = value, high = value], i) => {
      // Minutes are rounded. The run was dead between two processes.
      const at = curve.x[i], now = x === "minutes" ? processes.findLastIndex((first) => first * 0.99999 <= at) : 0;
      if (at === null) return;
      if (now !== (process ?? now)) [raw, line].forEach((part) => (part.x.push(null), part.y.push(null)));
      process = now;
      for (const y of low === high ? [value] : [low, high]) raw.x.push(at), raw.y.push(y);
      line.x.push(at);
      line.y.push(curve.y[i]);
    });
    const isPinned = state.pin === name, mode = points.length > 40 ? "lines" : "lines+markers";
    const style = { name: plain(name), meta: name, mode, hovertemplate: `%{x:,.6~g} ${x}<br>${plain(metric)} %{y:.4g}`,
      line: { color: isPinned ? ink : colorOf(name), dash, width: isPinned ? 3 : 1.6 } };
    const faint = { hovertemplate: null, hoverinfo: "skip", opacity: 0.25, showlegend: false };
    if (state.smoothing) result.push({ ...style, ...raw, ...faint });
    result.push({ ...style, ...(state.smoothing ? line : raw) });
  }
  Object.entries(members).forEach(([name, curves]) => {
    const points = isShown(name) && x !== "minutes" ? band(curves) : [];
    if (!points.length) return;
    const [at, mean, deviation, count] = points[0].map((_, column) => points.map((point) => point[column]));
    const edge = (sign) => mean.map((value, i) => value + sign * deviation[i]);
    result.push({ x: [...at, ...at.toReversed()], y: [...edge(1), ...edge(-1).reverse()], fill: "toself",
      fillcolor: colorOf(name) + "30", line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false });
    result.push({ x: at, y: mean, name: plain(name), customdata: deviation.map((sd, i) => [sd, count[i]]),
      line: { color: colorOf(name), dash, width: 2.2 }, mode: at.length > 40 ? "lines" : "lines+markers",
      hovertemplate: `%{x:,.6~g} ${x}<br>%{y:.4g} ± %{customdata[0]:.2g} (n = %{customdata[1]})` });
  });
  return result;
}

/** When a chart is zoomed in, get its range in full. */
async function zoomed(metrics, event) {
  const [from, to] = [event["xaxis.range[0]"], event["xaxis.range[1]"]].map((at) => (state.logX ? 10 ** at : at));
  if (event["xaxis.autorange"]) return metrics.forEach((metric) => delete details[metric]), show();
  if (!isLive || !(from < to)) return;
  const wanted = { __proto__: null };
  for (const metric of metrics)
    for (const run of shownRuns()) {
      const points = page.curves[metric]?.[run] ?? [], at = points.map(([step]) => step).map(axisOf(metric, run));
      const first = at.findIndex((x) => (x ?? NaN) >= from), last = at.findLastIndex((x) => (x ?? NaN) <= to) + 2;
      (wanted[metric] ??= {})[run] = [first, last].map((i) => rowsOf(points.slice(0, first < 0 ? 0 : Math.max(0, i))));
    }
  for (const [metric, runs] of Object.entries(JSON.parse(await ask(wanted)).curves)) details[metric] = runs;
  show();
}

function showChart(panel, name, metrics) {
  const isNew = !panel.data, data = [], parts = [], x = metrics[0].startsWith("system/") ? "minutes" : state.x;
  for (const metric of metrics) {
    const dash = DASHES[metrics.indexOf(metric) % DASHES.length];
    for (const trace of traces(metric, dash, x)) // in the legend of a download, a name stands once
      data.push({ showlegend: !data.some(({ name, showlegend }) => showlegend && name === trace.name), ...trace });
    if (metrics.length > 1) parts.push(`${plain(metric)} ${{ dot: "dotted", dash: "dashed" }[dash] ?? dash}`);
  }
  const y = data.flatMap((trace) => trace.y).filter(Number.isFinite), pad = Math.abs(y[0]) / 2 || 1;
  const range = !state.logY && y.length && y.every((at) => at === y[0]) ? [y[0] - pad, y[0] + pad] : undefined;
  panel.hidden = !data.length;
  draw(panel, data, { height: 320, showlegend: false, uirevision: `${x} ${state.logX} ${state.logY}`,
    title: { text: plain(name), font: { size: 14 }, subtitle: { text: parts.join(", "), font: { size: 11 } } },
    margin: { l: 50, r: 12, t: 56, b: 46 }, yaxis: { type: state.logY ? "log" : "linear", range },
    xaxis: { title: { text: x === "examples" ? "examples seen" : x }, type: state.logX ? "log" : "linear",
      exponentformat: "B" } });
  if (isNew) panel.on("plotly_relayout", (event) => zoomed(metrics, event));
  return data.filter(({ meta, x }) => meta && !x.length).map(({ meta }) => meta); // not on this axis
}

function legendEntry(name) {
  const [entry, label, box, pin] = ["li", "label", "input", "button"].map((tag) => document.createElement(tag));
  label.append(Object.assign(box, { type: "checkbox", checked: isShown(name) }), name);
  box.style.accentColor = state.pin === name ? ink : colorOf(name);
  box.addEventListener("change", () =>
    setState({ hide: box.checked ? state.hide.filter((hidden) => hidden !== name) : [...state.hide, name] }));
  pin.textContent = state.pin === name ? "unpin" : "pin";
  pin.addEventListener("click", () => setState({ pin: state.pin === name ? "" : name }));
  entry.append(label, ...(Object.hasOwn(page.groups, name) ? [] : [pin]));
  return entry;
}

function showLegend(names) {
  const legend = $("#legend"), key = JSON.stringify([names, state.hide, state.pin]);
  if (legend.dataset.key === key) return;
  const focused = all("input, button", legend).indexOf(document.activeElement);
  legend.dataset.key = key;
  legend.replaceChildren(...names.map(legendEntry));
  all("input, button", legend)[focused]?.focus();
}

function show() {
  const shown = charts(), panels = $("#panels"), groups = Object.keys(page.groups);
  $("#curves").hidden = !page.metrics.length;
  $("#each").hidden = !groups.length;
  $("output").value = state.smoothing || "";
  if ($("#names").options.length !== page.metrics.length)
    $("#names").replaceChildren(...page.metrics.map((name) => new Option(name)));
  const names = sortedRuns().map((run) => page.runs[run].name);
  document.title = $("h1").textContent = names.length === 1 ? names[0] : `${names.length} runs`;
  for (const name of [...groups, ...names]) colorOf(name); // the same whatever is shown
  const drawn = shownRuns().filter((run) => state.each || state.x === "minutes" || !groupOf(run));
  showLegend([...groups, ...drawn.map((run) => page.runs[run].name)]);
  for (const panel of [...panels.children])
    if (!shown.some(([name]) => name === panel.dataset.name)) Plotly.purge(panel), panel.remove();
  shown.forEach(([name], i) => {
    const panel = [...panels.children].find(({ dataset }) => dataset.name === name) ?? document.createElement("div");
    panel.dataset.name = name;
    if (panels.children[i] !== panel) panels.insertBefore(panel, panels.children[i] ?? null);
  });
  const missing = new Set(shown.flatMap(([name, metrics], i) => showChart(panels.children[i], name, metrics)));
  $("#remark").textContent = missing.size ? `${state.x} are not known of ${[...missing].join(", ")}.` : "";
  markPinned();
}

// --------------------------------------------------------------------------------------- tables

/** Behind each figure, its difference from that of the pinned run. */
function markPinned() {
  for (const note of all("#tables small")) note.remove();
  const [head, ...rows] = all("#tables table:first-of-type tr");
  const seconds = [...(head?.cells ?? [])].findIndex((cell) => cell.textContent === "seconds");
  const pinned = rows.find((row) => row.cells[0].textContent === state.pin);
  for (const row of rows) {
    row.classList.toggle("pinned", row === pinned);
    [...(pinned && row !== pinned ? row.cells : [])].forEach((cell, column) => {
      const difference = Number(cell.dataset.value) - Number(pinned.cells[column].dataset.value);
      if (column <= 2 || column >= seconds || Number.isNaN(difference)) return; // no figure
      const text = ` (${difference < 0 ? "−" : "+"}${Math.abs(difference).toPrecision(3)})`;
      cell.append(Object.assign(document.createElement("small"), { textContent: text }));
    });
  }
}

// Of the sorted tables, by their headings: the one they are sorted by, and the direction.
const order = { __proto__: null };

/** Sort by a column: numbers by size, text by alphabet, what is missing last. */
function sortTable(head, sign) {
  const body = head.closest("table").tBodies[0];
  const value = (row) => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent;
  for (const other of head.parentNode.cells) other.ariaSort = null;
  head.ariaSort = sign > 0 ? "ascending" : "descending";
  const missing = (text) => text === "–" || text === "nan";
  const compare = (a, b) => missing(a) - missing(b) || sign * a.localeCompare(b, undefined, { numeric: true });
  const byValue = (a, b) => sign * (parseFloat(a) - parseFloat(b)) || compare(a, b); // text has no number: NaN
  body.append(...[...body.rows].sort((a, b) => byValue(value(a), value(b))));
}

/** Make a section's tables sortable, sort them as they were, and draw its figures. */
function prepare(section) {
  for (const head of all("th", section)) {
    const table = head.parentNode.textContent, { heading, sign } = order[table] ?? {};
    if (heading === head.textContent) sortTable(head, sign);
    head.addEventListener("keydown", ({ key }) => key === "Enter" && head.click());
    head.addEventListener("click", () => {
      order[table] = { heading: head.textContent, sign: head.ariaSort === "ascending" ? -1 : 1 };
      sortTable(head, order[table].sign);
    });
  }
  for (const chart of all("[data-figure]", section)) {
    const figure = JSON.parse(chart.dataset.figure);
    draw(chart, figure.data, figure.layout);
  }
}

function fill(section, content) {
  const places = all(".scroll", section).map(({ scrollLeft, scrollTop }) => ({ scrollLeft, scrollTop }));
  section.innerHTML = content;
  prepare(section);
  all(".scroll", section).forEach((table, i) => Object.assign(table, places[i]));
}

for (const section of all("#tables, #seeds, #sweeps, #analysis")) prepare(section);
isLive ? follow() : show();
