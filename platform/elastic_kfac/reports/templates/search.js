(() => {
  const one = (event, what) => event.target instanceof Element && event.target.closest(what);
  const value = (row, column) => {
    const cell = row.cells[column], given = cell.dataset.v;
    return given === undefined ? cell.textContent.trim() : given === '' ? null : Number(given);
  };
  const compare = (a, b) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return typeof a === 'number' ? a - b : a.localeCompare(b, undefined, {numeric: true});
  };
  document.addEventListener('click', event => {
    const button = one(event, 'th button');
    if (button) {
      const head = button.closest('th'), body = head.closest('table').tBodies[0];
      const down = head.getAttribute('aria-sort') === 'ascending';
      for (const other of head.parentNode.cells) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const rows = [...body.rows].sort((a, b) => {
        const left = value(a, head.cellIndex), right = value(b, head.cellIndex);
        const order = compare(left, right);
        return down && left !== null && right !== null ? -order : order;
      });
      body.append(...rows);
    }
    const copy = one(event, '[data-copy]');
    if (copy) {
      const text = document.getElementById(copy.dataset.copy).textContent;
      const said = done => { copy.textContent = done; };
      if (!navigator.clipboard) return said('select and copy by hand');
      navigator.clipboard.writeText(text).then(() => said('copied'), () => said('not allowed'));
    }
  });
  let marked = null;
  const mark = index => {
    if (index === marked) return;
    marked = index;
    document.body.classList.toggle('marking', index !== null);
    for (const part of document.querySelectorAll('[data-t]'))
      part.classList.toggle('lit', index !== null && part.dataset.t === index);
  };
  document.addEventListener('pointerover', event => {
    const part = one(event, '[data-t]');
    mark(part ? part.dataset.t : null);
  });
  const live = document.getElementById('live');
  if (live) {
    const written = document.getElementById('written');
    written.textContent = 'This page was written ' + document.lastModified + '.';
    live.checked = location.hash === '#live';
    let timer = 0;
    const follow = () => {
      clearInterval(timer);
      if (live.checked) timer = setInterval(() => location.reload(), 10000);
    };
    live.addEventListener('change', () => {
      history.replaceState(null, '', live.checked ? '#live' : location.pathname);
      follow();
    });
    follow();
  }
})();
