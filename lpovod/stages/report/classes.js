// Makes the tables of classes one list each that can be sorted and searched. Without a script the
// tables are complete, with their later rows folded away.
(() => {
  const section = document.getElementById("classes");
  const search = section.querySelector(".search");
  const input = search.querySelector("input");
  const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
  const plain = text => text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase().trim();
  const number = text => parseFloat(text.replace(/,/g, ""));

  function unfold(card) {
    const rest = card.querySelector("details");
    if (!rest) return;
    card.querySelector("tbody").append(...rest.querySelectorAll("tbody tr"));
    rest.remove();
    const scroller = card.querySelector(".scroll");
    scroller.classList.add("tall");
    scroller.tabIndex = 0; // so that the keyboard scrolls it
    scroller.setAttribute("role", "region");
    scroller.setAttribute("aria-label", card.querySelector("caption").textContent);
  }

  function compare(column, sign) {
    if (!column) return (a, b) => sign * collator.compare(a.name, b.name);
    return (a, b) => {
      const [x, y] = [number(a.cells[column].textContent), number(b.cells[column].textContent)];
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y); // what is not measured comes last
      return sign * (x - y) || collator.compare(a.name, b.name);
    };
  }

  function sort(list, head) {
    const first = head.cellIndex ? "descending" : "ascending";
    const other = head.cellIndex ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    list.table.querySelectorAll("[aria-sort]").forEach(th => th.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    list.rows.sort(compare(head.cellIndex, order === "ascending" ? 1 : -1));
    list.table.tBodies[0].append(...list.rows.map(row => row.row));
    list.card.querySelector(".scroll").scrollTop = 0;
  }

  function addButtons(list) {
    for (const head of list.table.querySelectorAll("thead th:not(.wide)")) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(list, head));
      head.append(button);
    }
  }

  const lists = [...section.querySelectorAll(".card")].map(card => {
    unfold(card);
    const table = card.querySelector("table");
    const rows = [...table.tBodies[0].rows].map(row => ({
      row,
      cells: row.cells,
      name: row.cells[0].querySelector("bdi").textContent,
      text: plain(row.cells[0].textContent),
    }));
    const list = { card, table, rows };
    addButtons(list);
    return list;
  });

  function filter() {
    const wanted = plain(input.value);
    let matches = 0, classes = 0;
    for (const { card, rows } of lists) {
      let shown = 0;
      for (const { row, text } of rows) shown += !(row.hidden = !text.includes(wanted));
      card.querySelector(".scroll").hidden = !shown;
      card.querySelector(".none").hidden = shown > 0;
      matches += shown;
      classes += rows.length;
    }
    const counted = n => n.toLocaleString("en");
    search.querySelector("output").textContent = !matches
      ? "no class matches"
      : `${wanted ? `${counted(matches)} of ` : ""}${counted(classes)} classes`;
  }

  search.hidden = false;
  input.addEventListener("input", filter);
  filter();
})();
