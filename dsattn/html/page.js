"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  // ---- theme: automatic, light or dark -------------------------------------------------------------------------
  const theme = $("theme"), themes = ["auto", "light", "dark"];
  const keep = (name) => { try { localStorage.setItem("dsattn-theme", name); } catch { /* a page from disk may have no storage */ } };
  const kept = () => { try { return localStorage.getItem("dsattn-theme"); } catch { return null; } };
  const setTheme = (name) => {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    theme.textContent = `Theme: ${name}`;
    theme.dataset.now = name;
  };
  setTheme(themes.includes(kept()) ? kept() : "auto");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const next = themes[(themes.indexOf(theme.dataset.now) + 1) % themes.length];
    setTheme(next);
    keep(next);
  });

  // ---- the command ---------------------------------------------------------------------------------------------
  if (navigator.clipboard) {
    $("copy").hidden = false;
    $("copy").addEventListener("click", async () => {
      try { await navigator.clipboard.writeText($("command").textContent); $("copy").textContent = "Copied"; }
      catch { $("copy").textContent = "Not allowed"; }
      setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
    });
  }

  const choice = (id, changed) => {
    for (const input of $(id).querySelectorAll("input")) input.addEventListener("change", () => changed(input.value));
  };

  // ---- videos --------------------------------------------------------------------------------------------------
  const dense = $("dense"), sparse = $("sparse");
  if (dense && sparse) {
    const canvas = $("difference"), context = canvas.getContext("2d");
    const frame = $("frame"), play = $("play"), clip = $("clip");
    let playing = false, current = 0, last = data.frames - 1;

    const draw = () => {
      if (dense.readyState < 2 || sparse.readyState < 2) return;
      if (canvas.width !== dense.videoWidth || canvas.height !== dense.videoHeight) {
        canvas.width = dense.videoWidth;
        canvas.height = dense.videoHeight;
      }
      context.globalCompositeOperation = "copy";
      context.drawImage(dense, 0, 0);
      context.globalCompositeOperation = "difference";
      context.drawImage(sparse, 0, 0);
      // Adding the picture to itself doubles it.
      context.globalCompositeOperation = "lighter";
      for (let gain = Number($("gain").value); gain > 1; gain /= 2) context.drawImage(canvas, 0, 0);
    };
    const describe = () => {
      frame.value = current;
      $("frame-text").textContent = `${current + 1} of ${last + 1}`;
      frame.setAttribute("aria-valuetext", `frame ${current + 1} of ${last + 1}`);
      if (clip) return;
      const psnr = data.psnr[current], ssim = data.ssim[current];
      const words = psnr === null ? "equal to dense" : psnr === undefined ? "" : `PSNR ${psnr.toFixed(1)} dB`;
      $("frame-note").textContent = `Frame ${current + 1}: ${words}${typeof ssim === "number" ? `, SSIM ${ssim.toFixed(3)}` : ""}`;
      const plot = $("psnr");
      if (plot) {
        const low = Number(plot.dataset.low), high = Number(plot.dataset.high), cursor = plot.querySelector(".cursor");
        cursor.hidden = false;
        cursor.style.left = `${100 * (current + 1 - low) / (high - low)}%`;
      }
    };
    const seek = (index) => {
      current = clamp(index, 0, last);
      // The middle of a frame: at its edge, rounding would show the one before.
      for (const video of [dense, sparse]) video.currentTime = (current + 0.5) / data.fps;
      describe();
    };
    const stop = () => {
      playing = false;
      play.textContent = "Play";
      dense.pause();
      sparse.pause();
    };
    const follow = () => {
      if (!playing) return;
      if (dense.ended || sparse.ended) {
        for (const video of [dense, sparse]) { video.currentTime = 0; video.play().catch(stop); }
      } else if (Math.abs(dense.currentTime - sparse.currentTime) > 0.75 / data.fps) {
        sparse.currentTime = dense.currentTime;
      }
      current = clamp(Math.floor(dense.currentTime * data.fps), 0, last);
      describe();
      draw();
      requestAnimationFrame(follow);
    };
    play.addEventListener("click", async () => {
      if (playing) { stop(); seek(current); return; }
      playing = true;
      play.textContent = "Pause";
      if (current >= last) for (const video of [dense, sparse]) video.currentTime = 0;
      try { await Promise.all([dense.play(), sparse.play()]); } catch { stop(); return; }
      requestAnimationFrame(follow);
    });
    frame.addEventListener("input", () => { if (playing) stop(); seek(Number(frame.value)); });
    for (const video of [dense, sparse]) {
      video.removeAttribute("controls");
      video.addEventListener("error", () => { $("frame-note").textContent = "This browser cannot play these videos (H.264 in mp4)."; });
      video.addEventListener("seeked", draw);
      video.addEventListener("loadeddata", draw);
      video.addEventListener("click", () => play.click());
    }
    $("rate").addEventListener("change", () => { for (const video of [dense, sparse]) video.playbackRate = video.defaultPlaybackRate = Number($("rate").value); });
    $("gain").addEventListener("change", () => { $("gain-text").textContent = $("gain").value; draw(); });
    $("wipe").addEventListener("input", () => $("viewer").style.setProperty("--wipe", `${$("wipe").value}%`));
    choice("view", (value) => { $("viewer").dataset.view = value; draw(); });
    $("controls").hidden = false;
    if (clip) {
      // A suite has many pairs; their lengths are known once they are loaded.
      const load = (index) => {
        const pair = data.pairs[index];
        stop();
        clip.value = index;
        dense.src = data.media[pair.dense];
        sparse.src = data.media[pair.sparse];
        $("sparse-name").textContent = pair.arm;
        $("frame-note").textContent = pair.words;
      };
      dense.addEventListener("loadedmetadata", () => {
        last = Math.max(0, Math.round(dense.duration * data.fps) - 1);
        frame.max = last;
        seek(0);
      });
      clip.addEventListener("change", () => load(Number(clip.value)));
      for (const button of document.querySelectorAll("[data-pair]")) {
        button.hidden = false;
        button.addEventListener("click", () => { load(Number(button.dataset.pair)); $("video").scrollIntoView(); play.focus({ preventScroll: true }); });
      }
      load(0);
    } else {
      seek(0);
    }
  }

  // ---- heads, layers and steps ---------------------------------------------------------------------------------
  if (!data.panels.length) return;
  const grid = $("grid"), kinds = { D: "dense, by schedule", R: "refresh", U: "reuse", F: "fallback to dense", ".": "no call" };
  const state = { panel: 0, what: "density", axes: "head", step: 0, row: 0, column: 0 };
  const panel = () => data.panels[state.panel];
  const names = [...new Set(data.panels.flatMap((p) => p.methods.flat()))];
  // Two letters each; where two names begin alike, a number tells them apart.
  const shorts = {};
  for (const name of names) {
    const parts = name.split(/[_ /]+/).filter(Boolean);
    let short = parts.length > 1 ? parts.map((part) => part[0]).join("").slice(0, 2) : name.slice(0, 2);
    if (Object.values(shorts).includes(short)) short = `${short[0]}${Object.keys(shorts).length}`;
    shorts[name] = short;
  }
  const percent = (value) => value === null ? "none" : `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const kindAt = (p, row, step) => p.kinds[row][step];
  const densityAt = (p, row, step, head) => {
    const kind = kindAt(p, row, step);
    if (kind === ".") return null;
    const values = p.density[row][step];
    if (!values) return 1;
    return head === null ? mean(values) : values[head] ?? values[0];
  };
  const errorAt = (p, row, step, head) => {
    if (head === null) return p.layer_error[row][step];
    const values = p.error[row][step];
    return values ? values[head] ?? values[0] : null;
  };
  const place = (row, column) => state.axes === "head" ? { row, step: state.step, head: column } : { row, step: column, head: null };
  const methodAt = (p, at) => {
    if (at.head !== null) return p.methods[at.row][at.head];
    const found = [...new Set(p.methods[at.row])];
    return found.length === 1 ? found[0] : "several";
  };
  let top = 0;
  const look = (row, column) => {
    const p = panel(), at = place(row, column);
    if (state.what === "density") {
      const value = densityAt(p, at.row, at.step, at.head);
      return value === null ? null : { text: (100 * value).toFixed(value < 0.0995 ? 1 : 0), share: Math.sqrt(value), words: `density ${percent(value)}` };
    }
    if (state.what === "error") {
      const value = errorAt(p, at.row, at.step, at.head);
      return value === null || value === undefined ? null : { text: (100 * value).toFixed(value < 0.0995 ? 1 : 0), share: top ? value / top : 0, words: `estimated error ${percent(value)}` };
    }
    if (state.what === "method") {
      const name = methodAt(p, at);
      return { text: shorts[name] ?? "…", category: name === "dense" ? "kD" : `m${names.indexOf(name) % 6}`, words: `method ${name}` };
    }
    const kind = kindAt(p, at.row, at.step);
    return kind === "." ? null : { text: kind, category: `k${kind}`, words: kinds[kind] };
  };

  const columns = () => state.axes === "head" ? panel().heads : panel().steps.length;
  const columnName = (column) => state.axes === "head" ? `head ${column}` : `step ${panel().steps[column]}`;
  const cell = (row, column) => grid.rows[row + 1]?.cells[column + 1];
  const methodColours = ["--s0", "--s1", "--s2", "--s3", "--s4", "--s5"];

  const paint = (element, seen) => {
    element.className = seen ? "" : "none";
    element.textContent = seen ? seen.text : "–";
    let background = "", ink = "";
    if (seen && seen.share !== undefined) {
      element.classList.add("heat");
      element.style.setProperty("--share", clamp(seen.share, 0, 1).toFixed(3));
    } else if (seen && seen.category.startsWith("m")) {
      background = `color-mix(in oklab, var(${methodColours[seen.category.slice(1)]}) 38%, var(--panel))`;
      ink = "var(--ink)";
    } else if (seen) {
      background = `var(--${seen.category})`;
      ink = "var(--k-ink)";
    }
    element.style.background = background;
    element.style.color = ink;
  };

  const build = () => {
    const p = panel(), count = columns();
    grid.replaceChildren();
    grid.style.setProperty("--columns", count);
    grid.classList.toggle("many", count > 16);
    const head = grid.createTHead().insertRow();
    head.setAttribute("role", "row");
    const add = (row, tag, role, text, name) => {
      const element = document.createElement(tag);
      element.setAttribute("role", role);
      element.textContent = text;
      if (name) element.className = name;
      row.append(element);
      return element;
    };
    add(head, "th", "columnheader", state.axes === "head" ? "layer ╲ head" : "layer ╲ step", "corner");
    for (let c = 0; c < count; c++) add(head, "th", "columnheader", state.axes === "head" ? c : p.steps[c]);
    const body = grid.createTBody();
    p.layers.forEach((layer, r) => {
      const row = body.insertRow();
      row.setAttribute("role", "row");
      add(row, "th", "rowheader", layer);
      for (let c = 0; c < count; c++) add(row, "td", "gridcell", "").tabIndex = -1;
    });
    state.row = clamp(state.row, 0, p.layers.length - 1);
    state.column = clamp(state.column, 0, count - 1);
    refresh();
  };

  const refresh = () => {
    const p = panel();
    const errors = state.axes === "head" ? p.error.flat(2) : p.layer_error.flat();
    top = Math.max(0, ...errors.filter((value) => typeof value === "number"));
    for (let r = 0; r < p.layers.length; r++) {
      for (let c = 0; c < columns(); c++) {
        const element = cell(r, c), seen = look(r, c);
        paint(element, seen);
        element.setAttribute("aria-label", `layer ${p.layers[r]}, ${columnName(c)}: ${seen ? seen.words : "nothing recorded"}`);
      }
    }
    $("step").max = p.steps.length - 1;
    $("step").value = state.step;
    const letters = [...new Set(p.kinds.map((row) => row[state.step]))].filter((kind) => kind !== ".");
    $("step-text").textContent = `${p.steps[state.step]} (${letters.map((kind) => kinds[kind].split(",")[0]).join(", ")})`;
    $("step").setAttribute("aria-valuetext", $("step-text").textContent);
    $("step-box").hidden = $("step-text").hidden = state.axes !== "head" || state.what === "method";
    note();
    legend();
    select(state.row, state.column, false);
  };

  const note = () => {
    const p = panel();
    let text = "";
    if (state.what === "density") text = "Share of the keys that queries read exactly, in %. Dense calls read all.";
    if (state.what === "method") text = "Method of the last plan. Heads that read everything count as dense.";
    if (state.what === "kind") text = "What the engine did in every call.";
    if (state.what === "error") {
      const known = p.steps.filter((_, s) => p.layer_error.some((row) => row[s] !== null));
      text = "Relative L2 error of the attention output in %, estimated on sampled rows. ";
      text += known.length ? `Steps with an estimate: ${known.join(", ")}.` : "No error was estimated in this run.";
    }
    $("map-note").textContent = text;
  };

  const legend = () => {
    const list = $("map-legend");
    list.replaceChildren();
    const item = (...children) => { const li = document.createElement("li"); li.append(...children); list.append(li); };
    const badge = (text, seen) => { const span = document.createElement("span"); span.textContent = text; paint(span, seen); span.className = "badge"; return span; };
    if (state.what === "density" || state.what === "error") {
      const ramp = document.createElement("span");
      ramp.className = "ramp";
      item("0 %", ramp, state.what === "density" ? "100 % (square-root scale)" : percent(top));
      if (state.what === "error") item("– not estimated");
    } else if (state.what === "method") {
      for (const name of names) item(badge(shorts[name], { text: shorts[name], category: name === "dense" ? "kD" : `m${names.indexOf(name) % 6}` }), name);
    } else {
      for (const kind of "DRUF") item(badge(kind, { text: kind, category: `k${kind}` }), kinds[kind]);
    }
  };

  const show = (row, column) => {
    const p = panel(), at = place(row, column);
    const seen = look(row, column);
    $("cell-title").textContent = `Layer ${p.layers[row]}, ${columnName(column)}`;
    const lines = [seen ? seen.words : "nothing recorded"];
    const more = { density: `density ${percent(densityAt(p, at.row, at.step, at.head))}`, method: `method ${methodAt(p, at)}`, kind: kinds[kindAt(p, at.row, at.step)] };
    for (const [name, words] of Object.entries(more)) if (name !== state.what) lines.push(words);
    $("cell-text").textContent = `${lines.join("; ")}.`;
    mask(p, at);
    spark(p, at);
  };

  const mask = (p, at) => {
    const atlas = $("atlas");
    if (!atlas || !atlas.complete || !atlas.naturalWidth) return;
    const bins = data.bins, canvas = $("mask"), context = canvas.getContext("2d");
    const before = data.panels.slice(0, state.panel).reduce((sum, other) => sum + other.layers.length, 0);
    const head = at.head ?? 0;
    context.drawImage(atlas, head * bins, (before + at.row) * bins, bins, bins, 0, 0, bins, bins);
    const words = `Mask of layer ${p.layers[at.row]}, head ${head}`;
    canvas.setAttribute("aria-label", `${words}: ${methodAt(p, { ...at, head })}`);
    $("mask-text").textContent = `${words}, last plan: keys across, queries down, in token order; bright is read.`;
  };

  const spark = (p, at) => {
    const space = "http://www.w3.org/2000/svg", box = $("spark");
    box.replaceChildren();
    if (p.steps.length < 2) return;
    const what = state.what === "error" ? errorAt : densityAt;
    const values = p.steps.map((_, s) => what(p, at.row, s, at.head));
    const high = Math.max(...values.filter((value) => typeof value === "number"), 1e-9);
    const svg = document.createElementNS(space, "svg");
    svg.setAttribute("class", "spark");
    svg.setAttribute("viewBox", "0 0 100 100");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    const word = state.what === "error" ? "Estimated error" : "Density";
    svg.setAttribute("aria-label", `${word} over steps: ${values.map((value, s) => `${p.steps[s]}: ${percent(value ?? null)}`).join(", ")}`);
    const add = (name, attributes) => {
      const element = document.createElementNS(space, name);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      svg.append(element);
    };
    const x = (s) => 100 * s / (p.steps.length - 1), y = (value) => 96 - 90 * value / high;
    add("line", { class: "grid", x1: 0, x2: 100, y1: 96, y2: 96 });
    let path = "", open = false;
    values.forEach((value, s) => {
      if (typeof value !== "number") { open = open && state.what === "error"; return; }
      path += `${open ? "L" : "M"}${x(s)} ${y(value)}${open ? "" : "h0"}`;
      open = true;
    });
    add("path", { class: "curve s0", d: path });
    add("line", { class: "now", x1: x(at.step), x2: x(at.step), y1: 0, y2: 100 });
    const caption = document.createElement("figcaption");
    caption.textContent = `${word} over steps, up to ${percent(high)}`;
    box.append(svg, caption);
  };

  const select = (row, column, focus) => {
    for (const old of grid.querySelectorAll("[aria-selected=true]")) { old.setAttribute("aria-selected", "false"); old.tabIndex = -1; }
    state.row = row;
    state.column = column;
    const element = cell(row, column);
    element.setAttribute("aria-selected", "true");
    element.tabIndex = 0;
    if (focus) element.focus();
    show(row, column);
  };
  const where = (target) => {
    const element = target.closest?.("td");
    return element ? [element.parentNode.rowIndex - 1, element.cellIndex - 1] : null;
  };
  grid.addEventListener("mouseover", (event) => { const at = where(event.target); if (at) show(...at); });
  grid.addEventListener("mouseleave", () => show(state.row, state.column));
  grid.addEventListener("click", (event) => { const at = where(event.target); if (at) choose(at); });
  const choose = (at) => {
    if (state.axes === "step") state.step = at[1];
    select(at[0], at[1], true);
  };
  grid.addEventListener("keydown", (event) => {
    const at = where(event.target), rows = panel().layers.length, wide = columns();
    if (!at) return;
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -wide], End: [0, wide], PageUp: [-rows, 0], PageDown: [rows, 0] };
    const move = moves[event.key];
    if (move) select(clamp(at[0] + move[0], 0, rows - 1), clamp(at[1] + move[1], 0, wide - 1), true);
    else if (event.key === "Enter" || event.key === " ") choose(at);
    else return;
    event.preventDefault();
  });
  $("panel")?.addEventListener("change", () => { state.panel = Number($("panel").value); state.step = clamp(state.step, 0, panel().steps.length - 1); build(); });
  choice("what", (value) => { state.what = value; refresh(); });
  choice("axes", (value) => { state.axes = value; if (value === "step") state.column = state.step; build(); });
  $("step").addEventListener("input", () => { state.step = Number($("step").value); refresh(); });
  $("atlas")?.addEventListener("load", () => show(state.row, state.column));
  // The first step that is sparse says more than the first one.
  const first = panel().steps.findIndex((_, s) => panel().kinds.some((row) => "RU".includes(row[s])));
  state.step = Math.max(0, first);
  $("explorer").hidden = false;
  build();
})();
