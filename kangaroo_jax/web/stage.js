// A frame of a strip leads to its second of the film, and a film to the frame that the model saw last.
const filmOf = (node) => node.closest('.k-card').querySelector('video');

element.addEventListener('click', (event) => {
  const frame = event.target.closest('figure[data-time]');
  if (frame) filmOf(frame).currentTime = Number(frame.dataset.time) + 0.01;
});
element.addEventListener('timeupdate', (event) => {
  const now = event.target.currentTime;
  let last = null;
  for (const frame of event.target.closest('.k-card').querySelectorAll('figure')) {
    frame.classList.remove('k-now');
    if (Number(frame.dataset.time) <= now) last = frame;
  }
  if (last) last.classList.add('k-now');
}, true);
element.addEventListener('error', (event) => {
  const card = event.target.closest('.k-card');
  if (card && event.target.tagName === 'VIDEO') card.classList.add('k-silent');
}, true);
