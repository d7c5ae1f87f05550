// Files that are dropped or chosen go to the address in the zone, one after another; then the page is told.
const zone = () => element.querySelector('.k-drop');

const put = (address, file, tell) => new Promise((resolve) => {
  const request = new XMLHttpRequest();
  request.open('PUT', `${address}?name=${encodeURIComponent(file.name)}`);
  request.upload.onprogress = (event) => event.lengthComputable && tell(event.loaded / event.total);
  request.onload = () => {
    let said = {};
    try { said = JSON.parse(request.responseText); } catch { /* not ours */ }
    resolve(request.status < 400 ? '' : said.error || said.detail || `HTTP ${request.status}`);
  };
  request.onerror = () => resolve(`${file.name}: ✕`);
  request.send(file);
});

const sendAll = async (files) => {
  const here = zone(), title = here.querySelector('b'), before = title.textContent, bar = here.querySelector('.k-bar > i');
  here.querySelectorAll('.k-alert').forEach((old) => old.remove());
  here.classList.add('k-busy');
  let arrived = 0;
  for (const file of files) {
    title.textContent = `${here.dataset.busy} ${file.name}`;
    bar.style.width = '0';
    const error = file.size > Number(here.dataset.limit)
      ? here.dataset.large.replace('{name}', file.name)
      : await put(here.dataset.upload, file, (share) => { bar.style.width = `${100 * share}%`; });
    if (error) {
      const line = document.createElement('p');
      line.className = 'k-alert';
      line.textContent = error;
      here.append(line);
    } else {
      arrived += 1;
    }
  }
  title.textContent = before;
  here.classList.remove('k-busy');
  if (arrived) trigger('upload');
};

let last = Promise.resolve();
const send = (files) => { if (files.length) last = last.then(() => sendAll(files)); };

element.addEventListener('change', (event) => {
  const files = [...event.target.files];
  event.target.value = '';
  send(files);
});
element.addEventListener('dragover', (event) => { event.preventDefault(); zone().classList.add('k-over'); });
element.addEventListener('dragleave', () => zone().classList.remove('k-over'));
element.addEventListener('drop', (event) => {
  event.preventDefault();
  zone().classList.remove('k-over');
  send([...event.dataTransfer.files]);
});
