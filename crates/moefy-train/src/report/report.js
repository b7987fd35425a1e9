(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const dial = document.getElementById("dial");
  document.documentElement.classList.add("scripted");

  // One read-out for the whole page. Lines go in as text, never as markup.
  let marked = null, told = 0;
  const leave = () => {
    tip.hidden = true;
    if (marked) marked.classList.remove("here", "on");
    marked = null;
  };
  const tell = (box, element, name, lines, layers) => {
    leave();
    told = performance.now();
    marked = element;
    element.classList.add(element.tagName === "circle" ? "on" : "here");
    const add = (tag, text) => {
      const child = document.createElement(tag);
      child.textContent = text;
      tip.append(child);
      return child;
    };
    tip.replaceChildren();
    add("b", name);
    for (const line of lines) add("span", line);
    if (layers && layers.length) {
      const bars = add("div", "");
      bars.className = "bars";
      for (const width of layers) {
        const bar = document.createElement("i");
        bar.style.height = `${width || 0}%`;
        bars.append(bar);
      }
    }
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), innerWidth - width - 8);
    const above = box.top - height - 10;
    const top = Math.min(above < 8 ? box.bottom + 10 : above, innerHeight - height - 8);
    tip.style.transform = `translate(${Math.round(Math.max(8, left))}px, ${Math.round(top)}px)`;
  };
  // Arrow keys step through `count` items; `show` takes an index.
  const steps = (element, count, show) => {
    let at = -1;
    element.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") leave();
      if (!by) return;
      event.preventDefault();
      at = Math.min(Math.max(at + by, 0), count() - 1);
      show(at);
    });
    element.addEventListener("blur", leave);
    return (index) => { at = index; };
  };
  // Stepping to a token may itself scroll.
  addEventListener("scroll", () => { if (performance.now() - told > 150) leave(); }, { passive: true });
  addEventListener("pointerdown", (event) => { if (!event.target.closest(".chart, .tokens, .heat")) leave(); });

  for (const chart of document.querySelectorAll(".chart")) {
    const points = data.charts[chart.dataset.chart] || [];
    const [left, top, right, bottom] = chart.dataset.frame.split(" ").map(Number);
    const cursor = chart.querySelector(".cursor");
    const place = ([x, y]) => [left + x * (right - left), bottom - y * (bottom - top)];
    const show = (i) => {
      const [x, y] = place(points[i]);
      cursor.setAttribute("cx", x);
      cursor.setAttribute("cy", y);
      const at = new DOMPoint(x, y).matrixTransform(chart.getScreenCTM());
      tell({ left: at.x - 8, width: 16, top: at.y - 8, bottom: at.y + 8 }, cursor, points[i][3], points[i][4]);
    };
    const order = points.map((_, i) => i);
    const moved = steps(chart, () => order.length, show);
    const point = (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
      let best = -1, least = 60;
      for (const i of order) {
        const [x, y] = place(points[i]);
        const far = Math.hypot(x - at.x, y - at.y);
        if (far < least) [best, least] = [i, far];
      }
      if (best < 0) return leave();
      moved(best);
      show(best);
    };
    // The native title would cover the read-out.
    for (const title of chart.querySelectorAll("title")) title.remove();
    chart.addEventListener("pointermove", point);
    chart.addEventListener("pointerdown", point);
    chart.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
  }

  const table = document.querySelector("[data-heat]");
  if (table) {
    const show = (event) => {
      const cell = event.target.closest("td");
      if (!cell) return leave();
      const head = cell.parentNode.querySelector("th");
      const layer = `Layer ${cell.cellIndex - 1}`;
      tell(cell.getBoundingClientRect(), cell, layer, [`width ${cell.textContent}%`, `sensitivity ${head.dataset.dial}`]);
    };
    table.addEventListener("pointerover", show);
    table.addEventListener("pointerdown", show);
    table.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
  }

  const texts = [...document.querySelectorAll("[data-text]")].map((element) => {
    const text = data.samples[element.dataset.text];
    const tokens = [...element.querySelectorAll("span")];
    const kinds = tokens.map((token) => token.className.replace(/^w\S+/, ""));
    const summary = document.getElementById(`summary-${element.dataset.text}`);
    let shown = null;
    const turn = (stop) => {
      shown = text.variants[text.at[stop]];
      tokens.forEach((token, i) => { token.className = `w${shown.levels[i]}${kinds[i]}`; });
      summary.textContent = shown.summary;
    };
    const show = (i) => {
      const token = tokens[i];
      const name = token.textContent.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +$/, (s) => "␣".repeat(s.length));
      const lines = [];
      if (shown.widths[i] !== null) lines.push(`mean width ${shown.widths[i]}%`);
      lines.push(shown.losses[i] === null ? "first token: nothing predicted it" : `loss ${shown.losses[i]} nats`);
      if (shown.layers[i].length) lines.push(`width of layers 0 to ${shown.layers[i].length - 1}:`);
      tell(token.getClientRects()[0], token, name, lines, shown.layers[i]);
    };
    const moved = steps(element, () => tokens.length, (i) => {
      if (element.classList.contains("long")) tokens[i].scrollIntoView({ block: "nearest" });
      show(i);
    });
    const point = (event) => {
      const i = tokens.indexOf(event.target);
      if (i < 0) return leave();
      moved(i);
      show(i);
    };
    element.addEventListener("pointerover", point);
    element.addEventListener("pointerdown", point);
    element.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
    return turn;
  });

  const stops = dial ? dial.dataset.stops.split("|") : [];
  const turn = () => {
    const stop = dial ? Number(dial.value) : 0;
    leave();
    for (const text of texts) text(stop);
    if (!dial) return;
    dial.setAttribute("aria-valuetext", stops[stop]);
    document.getElementById("dial-value").textContent = stops[stop];
    document.querySelectorAll(".stops span").forEach((s, i) => s.classList.toggle("on", i === stop));
    document.querySelectorAll("[data-dial]").forEach((row) => {
      row.parentNode.classList.toggle("current", row.dataset.dial === stops[stop]);
    });
  };
  if (dial) dial.addEventListener("input", turn);
  turn();
})();
