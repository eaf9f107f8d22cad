for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, i) => {
    const button = document.createElement("button"), numeric = head.className === "number";
    button.append(...head.childNodes);
    button.title = "Sort by this column";
    head.append(button);
    button.onclick = () => {
      const sorted = head.getAttribute("aria-sort");
      const sign = sorted ? (sorted === "descending" ? 1 : -1) : numeric ? -1 : 1;  // numbers start with the highest
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const value = row => numeric ? parseFloat(row.cells[i].dataset.sort) : row.cells[i].textContent;
      const compare = (a, b) => numeric ? isNaN(a) - isNaN(b) || sign * (a - b) || 0 : sign * a.localeCompare(b);  // unknown values come last
      body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b))));
    };
  });
}
