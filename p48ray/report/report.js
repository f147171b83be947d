"use strict";
// Says what a cell of a heat map stands for, to a pointer, a finger or the arrow keys. The page is whole without it.
const data = JSON.parse(document.getElementById("data").textContent);

function describe(key, row, column) {
  const value = key === "tokens" ? null : data.error[key][row][column];
  const tokens = data.tokens[row][column];
  const seen = tokens === null ? "no record" : tokens.toLocaleString("en") + " tokens" + (tokens < data.few ? " (under-calibrated)" : "");
  const error = key === "tokens" ? "" : value === null ? ": no finite error, " : ": relative output error " + value + ", ";
  return "layer " + data.layers[row] + ", expert " + column + (key === "tokens" ? ": " : ", " + key + error) + seen;
}

for (const cells of document.querySelectorAll("[data-heat]")) {
  const key = cells.dataset.heat, rows = data.layers.length, columns = data.experts;
  const cursor = cells.querySelector(".cursor");
  const readout = cells.closest("figure").querySelector("output");
  let row = 0, column = 0;

  function show(newRow, newColumn) {
    row = Math.max(0, Math.min(rows - 1, newRow));
    column = Math.max(0, Math.min(columns - 1, newColumn));
    cursor.style.cssText = "display:block;left:" + 100 * column / columns + "%;top:" + 100 * row / rows + "%;width:" + 100 / columns +
      "%;height:" + 100 / rows + "%";
    readout.textContent = describe(key, row, column);
  }

  function point(event) {
    const box = cells.getBoundingClientRect();
    show(Math.floor((event.clientY - box.top) / box.height * rows), Math.floor((event.clientX - box.left) / box.width * columns));
  }

  cells.addEventListener("pointermove", point);
  cells.addEventListener("pointerdown", point);
  cells.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (step) {
      event.preventDefault();
      show(row + step[0], column + step[1]);
    }
  });
}
