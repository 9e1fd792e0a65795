"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const names = heads.map((head) => [...head.childNodes].map((node) => node.textContent).join(" ").replace(/\s+/g, " ").trim());
  const value = (row, column) => {
    const cell = row.cells[column];
    const text = "sort" in cell.dataset ? cell.dataset.sort : cell.textContent.trim();
    return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
  };
  const compare = (a, b, sign) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    if (typeof a === "number" && typeof b === "number") return sign * (a - b);
    return sign * String(a).localeCompare(String(b));
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const next = now ? (now === "ascending" ? "descending" : "ascending") : head.dataset.first || "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      body.append(...[...rows].sort((a, b) => compare(value(a, column), value(b, column), sign)));
    });
  });
  if (heads.length >= 6) {
    const columns = document.createElement("details");
    const summary = document.createElement("summary");
    const list = document.createElement("div");
    columns.className = "columns";
    summary.append("Columns");
    columns.append(summary, list);
    heads.forEach((head, column) => {
      if (rows.some((row) => row.cells[column].scope === "row")) return;
      const box = document.createElement("input");
      const label = document.createElement("label");
      box.type = "checkbox";
      box.checked = true;
      label.append(box, " ", names[column]);
      list.append(label);
      box.addEventListener("change", () => {
        for (const row of [table.tHead.rows[0], ...rows]) row.cells[column].hidden = !box.checked;
      });
    });
    table.closest(".scroll").before(columns);
  }
  if (rows.length <= 8) continue;
  const bar = document.createElement("p");
  const field = document.createElement("input");
  const found = document.createElement("span");
  const kind = document.createElement("select");
  const labelled = (text, input) => {
    const label = document.createElement("label");
    label.append(text, " ", input);
    return label;
  };
  bar.className = "search";
  field.type = "search";
  found.setAttribute("role", "status");
  for (const name of ["all", ...(table.dataset.kinds || "").split(",")]) if (name) kind.add(new Option(name));
  bar.append(labelled(table.dataset.search || "Find a model", field), " ");
  if (kind.length > 1) bar.append(labelled("Show", kind), " ");
  bar.append(found);
  table.closest(".scroll").before(bar);
  const choose = () => {
    const wanted = field.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const named = row.querySelector("th").textContent.toLowerCase().includes(wanted);
      row.hidden = !named || !(kind.selectedIndex < 1 || (row.dataset.kinds || "").split(",").includes(kind.value));
      shown += row.hidden ? 0 : 1;
    }
    found.textContent = shown < rows.length ? `${shown} of ${rows.length}` : "";
  };
  field.addEventListener("input", choose);
  kind.addEventListener("change", choose);
}
