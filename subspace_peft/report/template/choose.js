"use strict";

// -- tables in another order

for (const select of document.querySelectorAll("select[data-sorts]")) {
  const body = document.querySelector(`#${select.dataset.sorts} tbody`);
  const rows = [...body.rows];
  const column = { kept: "kept", left: "left out" };
  const value = (row, key) => Number(row.querySelector(`td[data-label="${column[key]}"]`).dataset.value);
  select.addEventListener("change", () => {
    const key = select.value;
    const sorted = key === "order" ? rows : [...rows].sort((one, other) => value(one, key) - value(other, key));
    body.append(...sorted);
  });
}

// -- another k

const percent = (share) => {
  if (share === null || Number.isNaN(share)) return "–";
  return share > 0 && share < 5e-4 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
};
const counted = (number) => Math.round(number).toLocaleString("en-US");

/** What the page's data says of any choice of k; `own` maps modules to a k of theirs. */
class Fleet {
  constructor(data) {
    Object.assign(this, data);
    this.measured = this.modules.filter((module) => module.kept);
  }

  /** Return the smallest k that keeps a share of a module's energy, as a build decides it. */
  smallest(module, share) {
    const place = module.held.findIndex((held) => held / this.scales.held >= share * (1 - 1e-9));
    return place < 0 ? module.held.length : place + 1;
  }

  /** Return module → k, of a global k or share and the modules' own. */
  chosen(by, value, own) {
    const shares = by === "share" ? this.measured.map((module) => this.smallest(module, value)) : [];
    const usual = shares.sort((one, other) => one - other)[Math.floor(shares.length / 2)] ?? 1;
    return new Map(this.modules.map((module) => {
      const fallback = by === "k" ? value : module.kept ? this.smallest(module, value) : usual;
      return [module.name, own.get(module.name) ?? fallback];
    }));
  }

  sizes(module, k) {
    return module.spans.map((span) => Math.min(k, span));
  }

  /** Return what is kept in one module: [of these adapters, of one left out, of noise]. */
  kept(module, k) {
    return module.kept.map((curve) => curve && curve[Math.min(k, curve.length) - 1] / this.scales.kept);
  }

  /** Return whether a module's shares at a k lie between sizes that were measured. */
  between(module, k) {
    return module.at !== undefined && k < Math.max(...module.spans) && !module.at.includes(k);
  }

  /** Return all sums over modules. */
  sums(ks) {
    const found = { seen: 0, left: 0, null: 0, random: 0, basis: 0, parameters: 0 };
    const parts = ["seen", "left", "null"];
    let known = false;
    for (const module of this.modules) {
      const k = ks.get(module.name);
      const [a, b] = this.sizes(module, k);
      const [out, inner] = module.shape;
      found.parameters += a * b;
      found.basis += this.entry * (out * a + inner * b) + this.direction * (a + b);
      found.basis += 4 * ((2 + module.directions) * a * b + module.spans[0] + module.spans[1]);
      if (!module.kept) continue;
      found.random += (module.weight * a * b) / (out * inner);
      parts.forEach((part, place) => {
        const curve = module.parts[place];
        if (curve) found[part] += curve[Math.min(k, curve.length) - 1] / this.scales.parts;
      });
      known ||= module.parts[1] !== null;
    }
    const task = 4 * found.parameters;
    const saved = this.loras / this.adapters - task;
    return {
      ...found,
      left: known ? found.left : null,
      stored: found.basis + this.adapters * task,
      even: saved > 0 ? Math.ceil(found.basis / saved) : null,
    };
  }

  /** Return the modules' own k as patterns: one for all modules that end alike and have the same. */
  patterns(own) {
    const ending = (name) => name.split(".").pop();
    const ends = new Map();
    for (const { name } of this.modules) ends.set(ending(name), [...(ends.get(ending(name)) ?? []), name]);
    const found = new Map();
    for (const [end, names] of ends) {
      const ks = new Set(names.map((name) => own.get(name)));
      const alike = ks.size === 1 && !ks.has(undefined) && names.length > 1 && /^\w+$/.test(end);
      if (alike) found.set(end, own.get(names[0]));
      else for (const name of names) if (own.has(name)) found.set(name, own.get(name));
    }
    return found;
  }

  command(by, value, own) {
    const patterns = [...this.patterns(own)];
    if (!this.begin) {
      const given = patterns.length ? `, k_pattern=${JSON.stringify(Object.fromEntries(patterns))}` : "";
      return `build_basis(sources, k=${value}${given}).save_pretrained("my-basis-k${value}")`;
    }
    const quoted = (word) => (/^[\w./:@%+=,-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);
    const given = patterns.map(([name, k]) => quoted(`${name}=${k}`));
    const more = given.length ? ` --k-pattern ${given.join(" ")}` : "";
    return `${this.begin} -k ${value}${more} --out ${this.out}-k${value}${given.length ? "-chosen" : ""}`;
  }
}

const panel = (fleet) => {
  const at = (id) => document.getElementById(id);
  const own = new Map();
  const rows = new Map([...document.querySelectorAll("#modules tr[data-module]")].map((row) => [row.dataset.module, row]));
  const by = () => document.querySelector('input[name="by"]:checked').value;
  const sliders = { k: at("k"), share: at("share") };
  const value = () => Number(sliders[by()].value);

  const said = (share, about) => (about && share !== null ? `≈ ${percent(share)}` : percent(share));

  const fill = (cell, share, about) => {
    if (!cell) return;
    cell.dataset.value = share ?? -1;
    cell.querySelector("span").textContent = said(share, about);
    cell.querySelector("rect:last-child").setAttribute("width", share > 0 ? `${Math.max(1.5, 100 * share)}%` : "0");
  };

  const cellsOf = (row) => ["kept", "left out", "noise"].map((label) => row.querySelector(`td[data-label="${label}"]`));
  // what the page came with: of the basis itself, which may have been built otherwise
  const first = new Map([...rows].map(([name, row]) => [name, cellsOf(row).map((cell) => Number(cell.dataset.value))]));

  const draw = (event) => {
    const asItIs = !event && !fleet.same;
    const ks = fleet.chosen(by(), value(), own);
    const near = fleet.measured.filter((module) => fleet.between(module, ks.get(module.name)));
    for (const module of fleet.measured) {
      const row = rows.get(module.name);
      const k = ks.get(module.name);
      const sizes = fleet.sizes(module, k);
      row.classList.toggle("chosen", own.has(module.name));
      row.querySelector("input").value = k;
      row.querySelector("output").textContent = sizes[0] === sizes[1] ? sizes[0] : sizes.join(", ");
      const cells = cellsOf(row);
      const shares = asItIs ? first.get(module.name).map((share) => (share < 0 ? null : share)) : fleet.kept(module, k);
      shares.forEach((share, place) => fill(cells[place], share, !asItIs && near.includes(module)));
    }
    const sums = fleet.sums(ks);
    for (const part of ["seen", "left", "null"]) at(`sum-${part}`).textContent = said(sums[part], near.length > 0);
    at("sum-random").textContent = percent(sums.random);
    at("near").textContent = near.length
      ? `≈ At this k the energies of ${counted(near.length)} of ${counted(fleet.measured.length)} modules lie between` +
        " sizes that were measured, and may be some tenths of a point off, with hundreds of modules some points: the" +
        " build says them exactly."
      : "";
    const about = fleet.exact ? "" : "about ";
    at("sum-stored").textContent = `${about}${counted(sums.stored)} bytes`;
    at("sum-stored").dataset.basis = sums.basis;
    at("sum-loras").textContent = `${counted(fleet.loras)} bytes`;
    at("sum-even").textContent = sums.even === null ? "never" : `from ${counted(sums.even)} ${sums.even === 1 ? "adapter" : "adapters"} on`;
    at("sum-parameters").textContent = about + counted(sums.parameters);
    at("k-said").textContent = sliders.k.value;
    at("share-said").textContent = percent(Number(sliders.share.value));
    at("command").textContent = fleet.command(by(), value(), own);
    at("overridden").textContent = own.size ? `${counted(own.size)} with a k of their own` : "";
  };

  const asBuilt = () => {
    own.clear();
    document.querySelector('input[name="by"][value="k"]').checked = true;
    sliders.k.value = fleet.k;
    for (const module of fleet.measured) {
      const sizes = fleet.sizes(module, fleet.k);
      if (sizes.some((size, side) => size !== module.size[side])) own.set(module.name, Math.max(...module.size));
    }
    show();
  };

  const show = (event) => {
    for (const [name, slider] of Object.entries(sliders)) slider.parentElement.hidden = name !== by();
    draw(event);
  };

  for (const slider of Object.values(sliders)) slider.addEventListener("input", draw);
  for (const radio of document.querySelectorAll('input[name="by"]')) radio.addEventListener("change", show);
  for (const [name, row] of rows) {
    row.querySelector("input").addEventListener("input", (event) => {
      own.set(name, Number(event.target.value));
      draw(event);
    });
    row.querySelector(".own button").addEventListener("click", (event) => {
      own.delete(name);
      row.querySelector("input").focus();
      draw(event);
    });
  }
  at("reset").addEventListener("click", (event) => {
    own.clear();
    draw(event);
  });
  at("as-built").addEventListener("click", () => asBuilt());
  at("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(at("command").textContent);
    } catch {
      // pages without a secure context have no clipboard
      getSelection().selectAllChildren(at("command"));
      document.execCommand("copy");
    }
    at("copy").textContent = "Copied";
    setTimeout(() => (at("copy").textContent = "Copy"), 1500);
  });
  asBuilt();
};

document.documentElement.classList.add("live");

// what is folded away is printed as well
const folded = document.querySelectorAll("details:not([open])");
addEventListener("beforeprint", () => folded.forEach((each) => (each.open = true)));
addEventListener("afterprint", () => folded.forEach((each) => (each.open = false)));

const source = document.getElementById("data");
if (source) panel(new Fleet(JSON.parse(source.textContent)));
