// Turns the heads of sortable tables into buttons. The value of a cell is in its data-value; "" is always last.
// Without this script the page is complete; its tables keep their order.
for (const head of document.querySelectorAll('table.sortable th')) {
  const button = document.createElement('button');
  button.type = 'button';
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener('click', () => {
    const up = head.getAttribute('aria-sort') !== 'ascending';
    for (const other of head.parentNode.children) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    const column = head.cellIndex, body = head.closest('table').tBodies[0];
    const value = (row) => row.cells[column].dataset.value;
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === '' || y === '') return (x === '') - (y === '');
      const numbers = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? numbers : -numbers;
    };
    body.append(...[...body.rows].sort(order));
  });
}
