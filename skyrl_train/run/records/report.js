const tip = document.getElementById("tip");

function words(target) {
  const chart = target.closest("[data-tip]");
  if (chart) return chart.dataset.tip;
  const token = target.closest("[data-d]");
  if (!token) return "";
  const text = JSON.stringify(token.textContent) + "\nid " + token.dataset.d;
  if (!token.dataset.p) return text + "\ngiven to the policy";
  const sure = token.dataset.p.split(" ").map((p) => (100 * Math.exp(p)).toFixed(1) + "%").join(" ");
  return text + "\nlogprob " + token.dataset.p + " (" + sure + ")";
}

document.addEventListener("mousemove", (event) => {
  const text = event.target.closest ? words(event.target) : "";
  tip.style.display = text ? "block" : "none";
  if (!text) return;
  tip.textContent = text;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18) + "px";
});

document.addEventListener("change", (event) => {
  if (!event.target.matches(".pick input")) return;
  const wanted = event.target.value;
  const cards = event.target.closest(".pick").nextElementSibling.querySelectorAll(".episode");
  for (const card of cards) card.hidden = wanted !== "all" && !card.dataset.labels.split("|").includes(wanted);
});
