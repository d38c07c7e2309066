"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
const ink = dark ? "#e4e7ec" : "#1b1f27", grid = dark ? "#363c47" : "#e3e7ec";
const palette = ["#3b82c4", "#d9662b", "#2e9d6a", "#b8479b", "#a08a1f",
  "#7667d6", "#d14343", "#2ea3b7", "#808792", "#a5703f"];
// plotly.js interprets HTML in names. A long name is shortened in the middle.
const plain = (name) => (name.length > 48 ? `${name.slice(0, 24)}…${name.slice(-23)}` : name)
  .replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const transposed = (points) => points[0].map((_, column) => points.map((point) => point[column]));
const axis = { gridcolor: grid, linecolor: grid, zeroline: false, automargin: true, title: { standoff: 8 } };
const options = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]] }; // one of the others uploads

function draw(chart, data, layout) {
  const base = { font: { color: ink, family: "system-ui, sans-serif", size: 12 }, colorway: palette,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 60, r: 20, t: 44, b: 46 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: dark ? "#667085" : "#c4cad3", activecolor: ink },
    hovermode: "closest", hoverlabel: { namelength: -1 }, ...layout };
  delete base.template;
  for (const name of Object.keys({ xaxis: 0, yaxis: 0, ...layout }))
    if (/^[xy]axis/.test(name))
      base[name] = { ...axis, ...base[name], title: { ...axis.title, ...base[name]?.title } };
  return Plotly.react(chart, data, base, options);
}

for (const chart of document.querySelectorAll("[data-figure]")) {
  const figure = JSON.parse(chart.dataset.figure);
  draw(chart, figure.data, figure.layout);
}

// The curves: a panel per metric, and one legend for all panels. What is hidden stays hidden when the choice changes.
const chart = document.getElementById("curves");
if (chart) {
  const curves = JSON.parse(chart.dataset.curves), choice = document.getElementById("metric");
  const each = document.getElementById("each"), log = document.getElementById("log"), hidden = new Set();
  each.checked = curves.runs.length <= 5;
  each.parentNode.hidden = !curves.groups.length;
  for (const name of ["Overview", ...Object.keys(curves.metrics)]) choice.add(new Option(name, name));

  function show() {
    const names = choice.value === "Overview" ? curves.overview : [choice.value];
    const columns = names.length > 1 ? 2 : 1, rows = Math.ceil(names.length / columns), data = [], named = new Set();
    const layout = { grid: { rows, columns, pattern: "independent", ygap: 0.24, xgap: 0.12 }, annotations: [],
      height: rows > 1 ? 660 : 460, legend: { tracegroupgap: 0, groupclick: "togglegroup" } };
    names.forEach((name, i) => {
      const n = i ? i + 1 : "", panel = { xaxis: "x" + n, yaxis: "y" + n }, metric = curves.metrics[name];
      const add = (key, label, trace) => {
        data.push({ ...panel, legendgroup: key, name: label, showlegend: !trace.fill && !named.has(key), ...trace,
          visible: hidden.has(key) ? "legendonly" : true });
        if (!trace.fill) named.add(key);
      };
      layout["xaxis" + n] = { title: { text: "examples seen" } };
      layout["yaxis" + n] = { title: { text: name }, type: log.checked ? "log" : "linear" };
      for (const { group, points } of metric.groups) {
        const key = "group" + group, color = palette[group % palette.length];
        const [x, y, sd, n] = transposed(points);
        const edge = (sign) => y.map((value, j) => value + sign * sd[j]);
        add(key, "", { x: [...x, ...x.toReversed()], y: [...edge(1), ...edge(-1).reverse()], fill: "toself",
          fillcolor: color + "30", line: { width: 0 }, mode: "lines", hoverinfo: "skip" });
        add(key, plain(curves.groups[group]), { x, y, customdata: sd.map((s, j) => [s, n[j]]), line: { color, width: 2.2 },
          mode: x.length > 40 ? "lines" : "lines+markers",
          hovertemplate: "%{x:,} examples<br>%{y:.4g} ± %{customdata[0]:.2g} (n = %{customdata[1]})" });
      }
      for (const { run, points } of metric.runs) {
        const { name: label, isGrouped } = curves.runs[run];
        if (isGrouped && !each.checked) continue;
        const color = palette[(run + curves.groups.length) % palette.length];
        const [x, y] = transposed(points);
        add("run" + run, plain(label), { x, y, line: { color, width: 1.6 }, mode: x.length > 40 ? "lines" : "lines+markers",
          hovertemplate: "%{x:,} examples<br>%{y:.4g}" });
      }
    });
    layout.showlegend = named.size > 1;
    draw(chart, data, layout);
  }

  show();
  for (const control of [choice, each, log]) control.addEventListener("change", show);
  chart.on("plotly_restyle", () => {
    for (const { legendgroup, visible } of chart.data)
      visible === "legendonly" ? hidden.add(legendgroup) : hidden.delete(legendgroup);
  });
}

// A click on a table's head sorts by that column: numbers by size, text by alphabet, what is missing last.
for (const head of document.querySelectorAll("th"))
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], sign = head.ariaSort === "ascending" ? -1 : 1;
    const value = (row) => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent;
    for (const other of head.parentNode.cells) other.ariaSort = null;
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const missing = (text) => text === "–" || text === "nan";
    const compare = (a, b) =>
      missing(a) - missing(b) || sign * a.localeCompare(b, undefined, { numeric: true });
    const order = (a, b) => sign * (parseFloat(a) - parseFloat(b)) || compare(a, b); // text has no number: NaN
    body.append(...[...body.rows].sort((a, b) => order(value(a), value(b))));
  });
