"use strict";
// What pages do beyond what they do without a script: charts, live parts, copying, and the dry run as one types.
(() => {
  const EVERY = 2500, TYPED = 500, HEIGHT = 240;
  const plots = new Map();
  document.documentElement.classList.add("scripted");

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const short = (value) => value == null ? "–" : Number(value.toPrecision(4)).toString();

  function draw(figure) {
    if (!window.uPlot) return;
    const told = JSON.parse(figure.dataset.chart), box = figure.querySelector(".plot");
    const colours = ["--one", "--two", "--three", "--four", "--bad", "--careful", "--good", "--soft"].map(colour);
    const ink = colour("--soft"), rule = colour("--rule");
    const values = told.series.flatMap((one) => one.values.filter((value) => value != null));
    const wide = values.length > 0 && Math.min(...values) > 0 && Math.max(...values) > 20 * Math.min(...values);
    const power = (mark) => Math.abs(Math.log10(mark) - Math.round(Math.log10(mark))) < 1e-9;
    const tens = (_, marks) => marks.map((mark) => (wide && !power(mark) ? null : mark));
    const axis = (label) => ({ label, stroke: ink, labelSize: 22, grid: { stroke: rule, width: 1 }, ticks: { stroke: rule, width: 1 } });
    const series = told.series.map((one, n) => ({
      label: one.name, stroke: colours[n % colours.length], width: 2, spanGaps: true, dash: n === 1 && told.joined ? [6, 4] : undefined,
      points: { show: told.joined ? one.values.length < 60 : n > 0, size: told.joined ? 5 : 11, fill: colours[n % colours.length] },
      value: (_, value) => short(value),
    }));
    const options = {
      width: Math.max(240, box.clientWidth), height: HEIGHT, series: [{ label: told.x_title, value: (_, value) => short(value) }, ...series],
      scales: { x: { time: false, range: padded }, y: wide ? { distr: 3 } : { range: padded } },
      axes: [{ ...axis(told.x_title), size: 30 }, { ...axis(wide ? `${told.y_title}, logarithmic` : told.y_title), size: 58, grid: { stroke: rule, width: 1, filter: tens }, values: (_, marks) => marks.map((mark) => mark == null ? "" : short(mark)) }],
      cursor: { drag: { x: false, y: false } },
    };
    plots.get(box)?.destroy();
    for (const old of [...plots.keys()]) if (!old.isConnected) { plots.get(old).destroy(); plots.delete(old); }
    plots.set(box, new uPlot(options, [told.x, ...told.series.map((one) => one.values)], box));
  }

  function padded(_, low, high) {
    const margin = (high - low) * 0.06 || Math.abs(low) * 0.1 || 1;
    return [low - margin, high + margin];
  }

  function copying(pre) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      try { await navigator.clipboard.writeText(pre.querySelector("code").textContent); button.textContent = "Copied"; }
      catch { getSelection().selectAllChildren(pre.querySelector("code")); button.textContent = "Selected"; }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    pre.append(button);
  }

  function dress(part) {
    for (const figure of part.querySelectorAll("[data-chart]")) draw(figure);
    if (navigator.clipboard || getSelection) for (const pre of part.querySelectorAll("pre[data-copy]")) copying(pre);
  }

  const parsed = async (answer) => new DOMParser().parseFromString(await answer.text(), "text/html");

  // A part that lives is taken anew from the same page; not while somebody is in it, or has opened or ticked something.
  function touched(part) {
    const active = document.activeElement;
    if (active && active !== document.body && part.contains(active)) return true;
    return [...part.querySelectorAll("input[type=checkbox]")].some((box) => box.checked);
  }

  async function live() {
    const parts = [...document.querySelectorAll("[data-live]")];
    if (parts.length === 0) return;
    if (!document.hidden) {
      try {
        const answer = await fetch(location.href, { headers: { Accept: "text/html" }, credentials: "same-origin" });
        if (answer.redirected) { location.reload(); return; }
        if (answer.ok) renew(parts, await parsed(answer));
      } catch { /* the service is away for a moment */ }
    }
    setTimeout(live, EVERY);
  }

  const seen = new Map();

  function renew(parts, fresh) {
    const said = document.querySelector("[data-say]"), says = fresh.querySelector("[data-say]");
    if (said && says && said.textContent !== says.textContent) said.textContent = says.textContent;
    if (fresh.title) document.title = fresh.title;
    for (const part of parts) {
      const other = fresh.getElementById(part.id);
      if (!other || seen.get(part.id) === other.innerHTML || (touched(part) && other.dataset.live)) continue;
      seen.set(part.id, other.innerHTML);
      const opened = new Set([...part.querySelectorAll("details[open] > summary")].map((one) => one.textContent));
      for (const one of other.querySelectorAll("details > summary")) if (opened.has(one.textContent)) one.parentElement.open = true;
      part.replaceWith(document.adoptNode(other));
      dress(other);
    }
  }

  // The submit form: the dry run's answer as one types, and other fields for another method.
  function submitting(form) {
    let waiting = null, turn = 0;
    async function ask(action) {
      const mine = ++turn, body = new URLSearchParams(new FormData(form));
      body.set("action", action);
      const answer = await fetch(form.getAttribute("action"), { method: "POST", body, credentials: "same-origin" });
      if (mine !== turn) return null;
      if (answer.redirected) { location.reload(); return null; }
      return parsed(answer);
    }
    async function check(action) {
      const fresh = await ask(action).catch(() => null), outcome = fresh?.getElementById("outcome");
      if (!outcome) return;
      document.getElementById("outcome").innerHTML = outcome.innerHTML;
      for (const pre of document.querySelectorAll("#outcome pre[data-copy]")) copying(pre);
      for (const old of form.querySelectorAll(".fields .wrong")) old.remove();
      for (const input of form.querySelectorAll(".fields [id]")) {
        const now = fresh.getElementById(input.id);
        if (!now || !input.name) continue;
        for (const name of ["aria-invalid", "aria-describedby"]) now.hasAttribute(name) ? input.setAttribute(name, now.getAttribute(name)) : input.removeAttribute(name);
        const wrong = fresh.getElementById(`wrong-${input.id}`);
        if (wrong) input.closest(".field").append(document.adoptNode(wrong));
      }
      const formats = fresh.getElementById("wrong-formats");
      if (formats) form.querySelector("fieldset").append(document.adoptNode(formats));
    }
    async function fields() {
      const fresh = await ask("fields").catch(() => null), other = fresh?.getElementById("fields");
      if (!other) return;
      const active = document.activeElement?.id;
      document.getElementById("fields").replaceWith(document.adoptNode(other));
      if (active) document.getElementById(active)?.focus();
      soon();
    }
    const soon = () => { clearTimeout(waiting); waiting = setTimeout(() => check("typed"), TYPED); };
    form.addEventListener("input", (event) => { if (!event.target.matches("[data-fields]")) soon(); });
    form.addEventListener("change", (event) => { if (event.target.matches("[data-fields]")) { clearTimeout(waiting); fields(); } });
    form.addEventListener("submit", (event) => { if (event.submitter?.matches("[data-check]")) { event.preventDefault(); check("check"); } });
    if (form.elements.model?.value) soon();
  }

  document.addEventListener("DOMContentLoaded", () => {
    dress(document);
    for (const form of document.querySelectorAll("form[data-submit]")) submitting(form);
    const redraw = () => { for (const figure of document.querySelectorAll("[data-chart]")) draw(figure); };
    let later = null;
    addEventListener("resize", () => { clearTimeout(later); later = setTimeout(redraw, 200); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    setTimeout(live, EVERY);
  });
})();
