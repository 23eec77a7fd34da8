{
  const viewer = document.currentScript.closest(".vldnp-viewer");
  const frames = [...viewer.querySelectorAll(".vldnp-frame")];
  const controls = viewer.querySelector(".vldnp-controls");
  const slider = controls.querySelector("input"), place = controls.querySelector("output");
  const [play, back, forward] = controls.querySelectorAll("button");
  const show = () => {
    frames.forEach((f, k) => f.classList.toggle("vldnp-now", k == slider.value));
    place.textContent = slider.value === slider.max ? "final image" : "step " + slider.value;
  };
  const go = step => { slider.value = step; show(); };
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "▶"; };
  play.onclick = () => {
    if (timer) return stop();
    if (slider.value === slider.max) go(0);
    play.textContent = "❚❚";
    timer = setInterval(() => {
      go(+slider.value + 1);
      if (slider.value === slider.max) stop();
    }, 500);
  };
  back.onclick = () => go(+slider.value - 1);
  forward.onclick = () => go(+slider.value + 1);
  slider.oninput = show;
  controls.addEventListener("keydown", event => {  // after a click on a button too
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!move || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    go(+slider.value + move);
  });
  viewer.addEventListener("toggle", ({target}) => {  // one opened picture opens its whole column
    const column = target.closest(".vldnp-column");
    if (!column) return;
    const place = [...column.parentElement.children].indexOf(column);
    for (const frame of frames)
      for (const other of frame.children[place].querySelectorAll("details"))
        other.open = target.open;
  }, true);
  viewer.classList.add("vldnp-moved");
  viewer.querySelector(".vldnp-steps").open = true;
  controls.hidden = false;
  show();
}
