// The page works on what is in it: the table is HTML already, #data has the rest. Names reach the document as text
// only, never as HTML.
"use strict";
(() => {
  const { reports, specs, tradeoff, root } = JSON.parse(document.getElementById("data").textContent);
  const $ = (selector, from = document) => from.querySelector(selector);
  const $$ = (selector, from = document) => [...from.querySelectorAll(selector)];
  const label = (name) => name || root;
  const percent = (x) => (x == null ? "-" : (100 * x).toFixed(2) + " %");
  const decibel = (x) => (x == null ? "-" : x.toFixed(1) + " dB");
  const number = (x) => (typeof x === "number" && !Number.isInteger(x) ? Number(x.toPrecision(4)) : x);

  function size(bytes) {
    for (const unit of ["B", "KiB", "MiB"]) {
      if (bytes < 1024) return (unit === "B" ? bytes : bytes.toFixed(1)) + " " + unit;
      bytes /= 1024;
    }
    return bytes.toFixed(1) + " GiB";
  }

  function element(tag, text, ...children) {
    const made = document.createElement(tag);
    if (text != null) made.textContent = text;
    made.append(...children);
    return made;
  }

  // A line may end after each dot or underscore of a name.
  const breakable = (name) => name.split(/(?<=[._])/).flatMap((part) => [part, element("wbr")]).slice(0, -1);

  let shown = 0; // index of the report
  let other = null; // index of the one beside it
  let chosen = reports[0].rows.length ? reports[0].rows[0].name : null;

  // -- figures ---------------------------------------------------------------------------------------------------

  const views = {};
  // Vega stands below this script, so that the table need not wait for it.
  const loaded = new Promise((done) => addEventListener("DOMContentLoaded", done));

  const latest = {}; // by place: the drawing that was asked for last

  // One after another in each place; what is out of date by its turn is left out.
  function draw(id, spec, rows, onClick) {
    const place = document.getElementById(id);
    if (!place) return;
    const wish = { before: latest[id]?.done };
    latest[id] = wish;
    wish.done = (async () => {
      await loaded;
      await wish.before;
      if (latest[id] !== wish) return;
      views[id]?.finalize();
      delete views[id];
      place.replaceChildren();
      if (!rows?.length) return;
      views[id] = await vegaEmbed(place, withRows(spec, rows, place), { renderer: "svg", actions: false });
      if (onClick) views[id].view.addEventListener("click", (_, item) => item?.datum && onClick(item.datum));
    })();
    return wish.done;
  }

  function withRows(spec, rows, place) {
    const table = { name: "table", values: rows };
    if (Array.isArray(spec.data))
      return { ...spec, width: place.clientWidth, data: spec.data.map((d) => (d.name === "table" ? table : d)) };
    return { ...spec, width: "container", autosize: { type: "fit-x", contains: "padding" }, data: table };
  }

  const bins = (counts) =>
    ["before", "after"].flatMap((which) => {
      const found = counts[which] || [];
      const step = (counts.high - counts.low) / found.length;
      const total = Math.max(1, found.reduce((a, b) => a + b, 0));
      return found.map((count, i) => {
        const from = counts.low + i * step;
        return { from, to: from + step, share: (100 * count) / total, which };
      });
    });

  const singular = ({ values, rank }) =>
    values
      .map((value, i) => ({ index: i + 1, value, rank, kept: i < rank ? "in the branch" : "left for the codes" }))
      .filter(({ value }) => value > 0);

  // -- the table -------------------------------------------------------------------------------------------------

  const body = () => $(`#table tbody[data-report="${shown}"]`);

  function sortBy(header) {
    const column = [...header.parentNode.children].indexOf(header);
    const down = header.getAttribute("aria-sort") === "none" ? header.classList.contains("number")
      : header.getAttribute("aria-sort") === "ascending";
    for (const each of header.parentNode.children) each.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.children[column].dataset.v ?? "";
    const order = new Intl.Collator("en", { numeric: true });
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what is not known comes last either way
      const numbers = [Number(x), Number(y)];
      const way = numbers.some(Number.isNaN) ? order.compare(x, y) : numbers[0] - numbers[1];
      return down ? -way : way;
    };
    body().append(...[...body().rows].sort(compare));
    reachable();
  }

  function filter() {
    const wanted = $("#filter").value.trim().toLowerCase();
    const only = $("#only").checked;
    let count = 0;
    for (const row of body().rows) {
      const { name, scheme } = reports[shown].rows[row.dataset.i];
      const fits = label(name).toLowerCase().includes(wanted) || scheme.toLowerCase().includes(wanted);
      row.hidden = !fits || (only && !row.classList.contains("flagged"));
      count += !row.hidden;
    }
    $("#count").textContent = `${count} of ${body().rows.length} layers`;
    reachable();
  }

  const visible = () => [...body().rows].filter((row) => !row.hidden);

  // The tab key stops at one layer of the table, so that 500 are not in the way; arrow keys go on from there.
  function reachable(wanted) {
    const rows = visible();
    const row = wanted ?? rows.find((tr) => tr.classList.contains("chosen")) ?? rows[0];
    for (const button of $$('button.layer[tabindex="0"]', body())) button.tabIndex = -1;
    if (row) $("button.layer", row).tabIndex = 0;
  }

  function step(button, key) {
    const rows = visible();
    const at = rows.indexOf(button.closest("tr"));
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[key];
    const next = rows[to];
    if (!next) return;
    reachable(next);
    $("button.layer", next).focus();
  }

  // -- one layer -------------------------------------------------------------------------------------------------

  async function choose(name, go) {
    const row = reports[shown].rows.find((r) => r.name === name);
    if (!row) return;
    chosen = name;
    for (const tr of body().rows) {
      const is = reports[shown].rows[tr.dataset.i].name === name;
      tr.classList.toggle("chosen", is);
      if (is) tr.setAttribute("aria-current", "true");
      else tr.removeAttribute("aria-current");
    }
    reachable();
    $("#h-layer").replaceChildren("One layer: ", ...breakable(label(name)));
    $("#chosen").value = name;
    $("#advice").replaceChildren(...row.advice.map(advice));
    list($("#facts"), facts(row));
    list($("#gains dl"), Object.entries(row.extra.won ?? {}).map(([what, gain]) => [words(what), signed(gain)]));
    list($("#options dl"), flat(row.options));
    if (go) {
      $("#layer").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
      $("#h-layer").focus({ preventScroll: true });
    }
    await pictures(row);
  }

  function advice({ what, do: todo, rule }) {
    const made = element("div", null, element("p", `${what}. ${todo}`));
    if (rule) {
      const text = element("pre", rule);
      text.tabIndex = 0; // long lines scroll
      made.append(element("p", "As the first of the recipe's rules:"), text);
    }
    return made;
  }

  function facts(row) {
    const found = [
      ["scheme", row.scheme],
      ["shape", `${row.out_features} × ${row.in_features}`],
      ["weight error", percent(row.weight_error)],
      ["output SQNR", decibel(row.output_sqnr)],
      ["bytes", `${size(row.bytes_before)} → ${size(row.bytes_after)}`],
      ["bits a weight", ((8 * row.bytes_after) / (row.in_features * row.out_features)).toFixed(2)],
      ["calibration tokens", row.tokens.toLocaleString("en")],
      ["time to quantize", row.seconds.toFixed(2) + " s"],
    ];
    // The gains have a list of their own, and so have the options.
    const extra = Object.entries(row.extra).filter(([key, value]) => key !== "won" && value !== row.options?.[key]);
    return [...found, ...flat(Object.fromEntries(extra))];
  }

  const words = (key) => key.replaceAll("_", " ");
  const signed = (gain) => (gain == null ? "-" : (gain > 0 ? "+" : "") + gain.toFixed(2) + " dB");

  function list(place, pairs) {
    place.replaceChildren(...pairs.map(([k, v]) => element("div", null, element("dt", k), element("dd", v))));
    if (place.parentNode.hasAttribute("id")) place.parentNode.hidden = place.parentNode.id !== "layer" && !pairs.length;
  }

  function flat(values) {
    const found = [];
    for (const [key, value] of Object.entries(values ?? {})) flatten(key, value, found);
    return found.map(([key, value]) => [words(key), String(value)]);
  }

  function flatten(key, value, into) {
    if (value === null || value === undefined) return;
    if (typeof value !== "object") into.push([key, number(value)]);
    else for (const [inner, each] of Object.entries(value)) flatten(`${key} ${inner}`, each, into);
  }

  async function pictures(row) {
    const { weight, input, spectrum } = row.details || {};
    const none = "Not recorded. Quantize with --report (in Python: details=True)";
    const later = none + ", or give the float model with --against.";
    $("#c-weights").textContent = weight ? "The axis of shares is logarithmic, so that outliers are seen." : later;
    $("#c-activations").textContent = input ? aboutInput(input) : !row.details ? none + " and calibration data." : row.tokens ? "No sample of the inputs was kept for this layer." : "Not recorded: there was no calibration data for this layer.";
    $("#c-spectrum").textContent = spectrum ? aboutSpectrum(spectrum) : row.details ? "Not a linear layer." : later;
    await draw("weights", specs.weights, weight && bins(weight));
    await draw("activations", specs.activations, input && bins(input));
    await draw("spectrum", specs.spectrum, spectrum && singular(spectrum));
  }

  function aboutInput(input) {
    let text = `A sample of ${input.tokens} tokens; the largest value of a token is ${input.peak.toFixed(1)} times its root mean square`;
    if (input.peak_rounded == null) return text + ". The layer does not round them, or how is not known.";
    if (input.peak_rounded !== input.peak) text += `, and ${input.peak_rounded.toFixed(1)} times where it is rounded, after smoothing and rotation`;
    return text + ". “After” is what the layer sees of them.";
  }

  function aboutSpectrum({ values, energy, rank }) {
    if (!energy) return "All weights are zero, and so are their singular values.";
    const share = (n) => (100 * values.slice(0, n).reduce((sum, v) => sum + v * v, 0)) / energy;
    const first = `The ${values.length} largest hold ${share(values.length).toFixed(1)} % of the weight's energy (squares)`;
    if (!rank) return first + ".";
    return `${first}; the ${rank} of the branch ${share(rank).toFixed(1)} %. Where they fall steeply, rank pays.`;
  }

  // -- bytes -----------------------------------------------------------------------------------------------------

  const CHILDREN = 400; // of which a list can be chosen from; one more where a click leads to it
  let at = root; // the module that is looked into
  async function modules() {
    const { tree, spec } = reports[shown];
    const inner = tree.filter((node) => node.after === undefined).slice(0, CHILDREN);
    $("#root").replaceChildren(...inner.map(({ id }) => new Option(id, id)));
    await draw("tree", spec, tree, into);
    await enter(reports[shown].top);
  }

  async function enter(id) {
    at = id;
    $("#root").value = id;
    if ($("#root").value !== id) $("#root").add(new Option(id, id, true, true));
    const measure = $("input[name=measure]:checked").value;
    inside(id, measure);
    if (views.tree) await views.tree.view.signal("root", id).signal("measure", measure).runAsync();
  }

  const LARGEST = 8; // modules in the list under the tree
  function inside(id, measure) {
    const of = measure === "before" ? 0 : 1;
    const { tree } = reports[shown];
    const whole = tree.find((node) => node.id === id)?.total[of] || 1;
    const found = tree.filter((node) => node.parent === id && node.total[of]).sort((a, b) => b.total[of] - a.total[of]);
    const cell = (text) => Object.assign(element("td", text), { className: "number" });
    $("#inside caption span").textContent = id;
    $("#inside tbody").replaceChildren(...found.slice(0, LARGEST).map((node) => {
      const name = Object.assign(element("th"), { scope: "row" });
      const button = element("button", null, ...breakable(node.label));
      button.className = "module";
      button.dataset.module = node.id;
      name.append(node.after === undefined || reports[shown].rows.some((row) => label(row.name) === node.id) ? button : node.label);
      if (node.after !== undefined) name.append(" ", element("small", node.scheme));
      return element("tr", null, name, cell(size(node.total[0])), cell(size(node.total[1])), cell(((100 * node.total[of]) / whole).toFixed(1) + " %"));
    }));
    if (found.length > LARGEST) {
      const rest = found.slice(LARGEST).reduce((sum, { total }) => [sum[0] + total[0], sum[1] + total[1]], [0, 0]);
      const name = Object.assign(element("th", `${found.length - LARGEST} more`), { scope: "row" });
      $("#inside tbody").append(element("tr", null, name, cell(size(rest[0])), cell(size(rest[1])), cell(((100 * rest[of]) / whole).toFixed(1) + " %")));
    }
  }

  // From the list: into a module, or to a layer.
  function open(id) {
    const node = reports[shown].tree.find((n) => n.id === id);
    if (node.after === undefined) {
      enter(id);
      $("#root").focus();
    } else choose(id === root ? "" : id, true);
  }

  function into({ id }) {
    const nodes = reports[shown].tree;
    let node = nodes.find((n) => n.id === id);
    if (reports[shown].rows.some((row) => row.name === id)) choose(id, false);
    while (node && node.parent !== at) node = nodes.find((n) => n.id === node.parent);
    if (node && node.after === undefined) enter(node.id);
  }

  // -- reports ---------------------------------------------------------------------------------------------------

  async function show(index) {
    shown = index;
    const report = reports[shown];
    for (const part of $$(".of-report, #table tbody")) part.hidden = Number(part.dataset.report) !== shown;
    $("#chosen").replaceChildren(...report.rows.map(({ name }) => {
      const option = element("option", label(name));
      option.value = name;
      return option;
    }));
    for (const header of $$("#table thead th")) header.setAttribute("aria-sort", "none");
    filter();
    $("#f-sqnr").hidden = !report.sqnr.length;
    $("#diamonds").hidden = !report.flagged;
    const pick = ({ name }) => choose(name === root ? "" : name, true);
    await Promise.all([
      beside(other),
      draw("error", specs.error, report.error, pick),
      draw("sqnr", specs.sqnr, report.sqnr, pick),
      choose(report.rows.some(({ name }) => name === chosen) ? chosen : report.rows[0]?.name, false),
      modules(),
    ]);
  }

  async function beside(index) {
    other = index;
    const there = new Map(index == null ? [] : reports[index].rows.map((row) => [row.name, row]));
    for (const cell of $$("#table .compared")) cell.hidden = index == null;
    const part = $("#comparison");
    if (!part) return;
    part.hidden = index == null;
    if (index == null) return;
    const pairs = [];
    for (const tr of body().rows) {
      const row = reports[shown].rows[tr.dataset.i];
      const twin = there.get(row.name);
      const [error, sqnr] = $$(".compared", tr);
      fill(error, twin?.weight_error, percent);
      fill(sqnr, twin?.output_sqnr, decibel);
      if (twin) pairs.push([row, twin]);
    }
    // The error of outputs if there is any: between 4 and 8 bits for activations, weights see no difference.
    const measure = pairs.some(([a, b]) => a.output_sqnr && b.output_sqnr) ? "output_sqnr" : "weight_error";
    const scale = measure === "weight_error" ? 100 : 1;
    const [here, beyond] = [reports[shown], reports[index]];
    const known = pairs.filter(([a, b]) => a[measure] && b[measure]);
    const better = known.filter(([a, b]) => (measure === "weight_error" ? b[measure] < a[measure] : b[measure] > a[measure])).length;
    const order = new Map(here.rows.map(({ name }, i) => [name, i + 1]));
    const found = known.sort((a, b) => order.get(a[0].name) - order.get(b[0].name)).flatMap((pair) =>
      pair.map((row, i) => ({ index: order.get(row.name), name: label(row.name), report: [here, beyond][i].name, value: scale * row[measure] })));
    $("#other-name").textContent = beyond.name;
    $("#compared").textContent = `${pairs.length} layers are in both; ${better} of them are better in ${beyond.name} `
      + `(${measure === "weight_error" ? "weight error" : "output SQNR"}), which is ${size(beyond.after)} beside ${size(here.after)}.`;
    $("#c-compare").textContent = `${measure === "weight_error" ? "Lower" : "Higher"} is better. A line joins the two of a layer; click a point to see it. The table of layers has both.`;
    await draw("compare", specs.compare[measure], found, ({ name }) => choose(name === root ? "" : name, true));
  }

  function fill(cell, value, words) {
    cell.textContent = words(value);
    cell.dataset.v = value ?? "";
  }

  // -- wiring ----------------------------------------------------------------------------------------------------

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.classList.contains("layer")) choose(button.dataset.layer, true);
    else if (button.classList.contains("module")) open(button.dataset.module);
    else if (button.closest("#table thead")) sortBy(button.closest("th"));
  });
  $("#table").addEventListener("keydown", (event) => {
    if (!["ArrowDown", "ArrowUp", "Home", "End"].includes(event.key) || !event.target.matches("tbody button")) return;
    event.preventDefault();
    step(event.target, event.key);
  });
  $("#filter").addEventListener("input", filter);
  $("#only").addEventListener("change", filter);
  $("#chosen").addEventListener("change", (event) => choose(event.target.value, false));
  $("#root").addEventListener("change", (event) => enter(event.target.value));
  for (const radio of $$("input[name=measure]")) radio.addEventListener("change", () => enter(at));
  $("#shown")?.addEventListener("change", (event) => show(Number(event.target.value)));
  $("#other")?.addEventListener("change", (event) => beside(event.target.value === "" ? null : Number(event.target.value)));
  addEventListener("resize", () => views.tree?.view.width($("#tree").clientWidth).runAsync());

  // For whoever measures: milliseconds until the table works, and until all is drawn.
  const drawn = Promise.all([show(0), draw("tradeoff", specs.tradeoff, tradeoff)]);
  document.documentElement.dataset.interactive = Math.round(performance.now());
  drawn.then(() => { document.documentElement.dataset.ready = Math.round(performance.now()); });
})();
