// A click on a column's header sorts the table: numbers by value, texts by alphabet; a second click reverses the order.
const value = (row, column) => {
  const text = row.cells[column].textContent.trim() || (row.cells[column].querySelector("svg") || {}).ariaLabel || "";
  const number = parseFloat(text.replace(/,/g, ""));
  return Number.isNaN(number) ? text : number;
};
const order = (a, b) =>
  a === b ? 0 : a === "" ? 1 : b === "" ? -1 : typeof a === typeof b ? (a < b ? -1 : 1) : typeof a === "number" ? -1 : 1;
for (const head of document.querySelectorAll("th button")) {
  head.addEventListener("click", () => {
    const cell = head.parentElement, body = cell.closest("table").tBodies[0];
    const down = cell.ariaSort === "ascending";
    for (const other of cell.parentElement.cells) other.removeAttribute("aria-sort");
    cell.ariaSort = down ? "descending" : "ascending";
    const rows = [...body.rows].sort(
      (a, b) => (down ? -1 : 1) * order(value(a, cell.cellIndex), value(b, cell.cellIndex)));
    body.append(...rows);
  });
}
