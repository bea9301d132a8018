// Sorting of tables by their header buttons. What was not measured stays at the end in either order.
"use strict";
(() => {
  const said = document.getElementById("said");
  const key = (row, column) => row.cells[column].dataset.sort;

  function sort(table, column, order) {
    const body = table.tBodies[0];
    const rows = Array.from(body.rows);
    const keys = rows.map((row) => key(row, column)).filter((text) => text !== "");
    const numeric = keys.every((text) => text.trim() !== "" && Number.isFinite(Number(text)));
    const sign = order === "ascending" ? 1 : -1;
    rows.sort((left, right) => {
      const a = key(left, column);
      const b = key(right, column);
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
    });
    body.append(...rows);
  }

  for (const button of document.querySelectorAll("table.sortable th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const before = head.getAttribute("aria-sort");
      const turned = before === "ascending" ? "descending" : "ascending";
      const order = before ? turned : button.dataset.first;
      for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      sort(head.closest("table"), head.cellIndex, order);
      said.textContent = `Sorted by ${button.textContent}, ${order}`;
    });
  }
})();
