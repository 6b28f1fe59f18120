"use strict";
// Sorting: the value of a cell is its data-v, else its text; cells without one stay at the end either way.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
    const column = Number(head.dataset.column);
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => {
      const cell = row.cells[column], text = cell.dataset.v ?? cell.textContent.trim();
      return text === "" ? null : isNaN(text) ? text : Number(text);
    };
    const order = (a, b) => {
      if (a === null || b === null) return (a === null) - (b === null);
      const less = typeof a === "number" && typeof b === "number" ? a - b
        : typeof a === typeof b ? a.localeCompare(b, "en", { numeric: true }) : typeof a === "number" ? -1 : 1;
      return down ? -less : less;
    };
    const rows = [...body.rows].map((row) => [value(row), row]);
    rows.sort((a, b) => order(a[0], b[0]));
    body.append(...rows.map(([, row]) => row));
  });
}
// What a frame hides is said below it.
const measure = () => document.querySelectorAll(".scroll").forEach((frame) => {
  const hides = frame.scrollWidth > frame.clientWidth + 1 || frame.scrollHeight > frame.clientHeight + 1;
  frame.nextElementSibling.hidden = !hides;
});
addEventListener("resize", measure);
measure();
addEventListener("keydown", (e) => {
  if (e.key === "Escape") document.querySelectorAll(".zoom input").forEach((box) => { box.checked = false; });
});
// A legend lights up the curves of one cell: while pointed at, and for good once clicked.
for (const legend of document.querySelectorAll(".legend")) {
  const section = legend.closest("section");
  const light = (buttons) => {
    const names = buttons.map((button) => button.dataset.c);
    section.classList.toggle("lit", names.length > 0);
    for (const mark of section.querySelectorAll(".line, .bar")) {
      mark.classList.toggle("on", names.some((name) => mark.classList.contains(name)));
    }
  };
  const pressed = () => [...legend.querySelectorAll('[aria-pressed="true"]')];
  for (const button of legend.querySelectorAll("button")) {
    button.addEventListener("pointerenter", (e) => { if (e.pointerType === "mouse") light([...pressed(), button]); });
    button.addEventListener("pointerleave", () => light(pressed()));
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
      light(pressed());
    });
  }
}
