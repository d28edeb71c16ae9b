// A click on a head of a table sorts its rows by that column, a second click turns the order; empty cells stand last.
document.querySelectorAll("th[data-sort]").forEach(head => {
  const sort = () => {
    const table = head.closest("table"), body = table.tBodies[0], place = head.cellIndex;
    const down = head.getAttribute("aria-sort") !== "descending";
    table.querySelectorAll("th[aria-sort]").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => { const cell = row.cells[place];
      return cell.dataset.value === undefined ? cell.textContent.trim() : cell.dataset.value; };
    const compare = (one, two) => {
      const a = value(one), b = value(two);
      if (a === "" || b === "") return (a === "") - (b === "");
      const numbers = !isNaN(a) && !isNaN(b);
      return (down ? -1 : 1) * (numbers ? a - b : a.localeCompare(b));
    };
    [...body.rows].sort(compare).forEach(row => body.append(row));
  };
  head.tabIndex = 0;
  head.addEventListener("click", sort);
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
});
