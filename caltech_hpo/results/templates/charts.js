// Charts are drawn when they come near the view, so that a page of many studies opens at once.
const near = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    near.unobserve(target);
    const { data, layout } = JSON.parse(target.querySelector("script").textContent);
    const plot = target.appendChild(document.createElement("div"));
    Plotly.newPlot(plot, data, { ...layout, autosize: true }, { responsive: true, displayModeBar: false });
  }
}, { rootMargin: "600px" });
document.querySelectorAll(".chart").forEach((box) => near.observe(box));
