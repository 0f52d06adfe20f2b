// Filters the table of all claims. Without this script the page shows every claim and no form.
(() => {
  const form = document.getElementById("claims-filter");
  const rows = [...document.querySelectorAll("#claims tbody tr")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const apply = () => {
    const words = form.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, i) => {
      const fits = words.every((word) => texts[i].includes(word)) &&
        ["chapter", "kind", "verdict"].every((name) => !form[name].value || row.dataset[name] === form[name].value);
      row.hidden = !fits;
      shown += fits;
    });
    form.count.value = `${shown} of ${rows.length}`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
})();
