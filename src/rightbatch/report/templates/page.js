"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const fromHash = () => {
    const theme = location.hash.slice(1);
    if (theme === "dark" || theme === "light") root.dataset.theme = theme;
  };
  fromHash();
  addEventListener("hashchange", fromHash);
  const button = document.getElementById("theme");
  button.hidden = false;
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; });

  const figures = JSON.parse(document.getElementById("figures").textContent);
  const drawn = [];
  for (const place of document.querySelectorAll(".plot")) {
    const { data, layout } = figures[Number(place.dataset.chart)];
    const options = { displayModeBar: false, responsive: true, displaylogo: false };
    drawn.push(Plotly.newPlot(place, data, layout, options));
    // A printed page is narrower than the screen: a view box lets the style sheet scale what was drawn.
    place.on("plotly_afterplot", () => {
      for (const image of place.querySelectorAll(".main-svg")) {
        image.setAttribute("viewBox", `0 0 ${image.getAttribute("width")} ${image.getAttribute("height")}`);
      }
    });
  }
  Promise.all(drawn).then(() => { root.dataset.drawn = String(drawn.length); });
})();
