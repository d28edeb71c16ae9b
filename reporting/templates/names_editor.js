// The form that edits names and colours of clusters, and writes the same file as `write` of inference/naming.py.
(() => {
  const content = JSON.parse(document.getElementById("names-content").textContent);
  const form = document.getElementById("names"), said = document.getElementById("said");
  const fields = [...form.querySelectorAll("label")].map(label => label.querySelectorAll("input"));
  const name = place => fields[place][1].value.trim();
  // Clusters of one name are one class, in the colour of the first of them.
  const first = place => fields.findIndex((_, other) => name(other) === name(place));
  const yaml = () => content.head + "probe: " + content.probe + "\ncentroids: \"" + content.centroids + "\"\nclusters:\n"
    + fields.map((_, place) => "  " + place + ": {name: " + JSON.stringify(name(place)) + ", colour: \""
      + fields[first(place)][0].value + "\"}\n").join("");
  const missing = () => {
    const place = fields.findIndex((_, place) => !name(place));
    said.textContent = place < 0 ? "" : "cluster " + place + " has no name yet";
    if (place >= 0) fields[place][1].focus();
    return place >= 0;
  };
  const show = () => fields.forEach((inputs, place) => {
    document.querySelectorAll("[data-cluster='" + place + "']").forEach(shown => {
      shown.querySelector(".swatch").style.background = fields[first(place)][0].value;
      shown.querySelector(".name").textContent = name(place) || "cluster " + place;
    });
  });
  form.addEventListener("input", show);
  form.addEventListener("submit", event => {
    event.preventDefault();
    if (missing()) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([yaml()], {type: "application/yaml"}));
    link.download = "names.yaml";
    link.click();
    said.textContent = "saved among the downloads of this browser";
  });
  document.getElementById("copy").addEventListener("click", () => {
    if (missing()) return;
    const area = document.createElement("textarea");
    area.value = yaml();
    form.append(area);
    area.select();
    said.textContent = document.execCommand("copy") ? "copied" : "the browser refused to copy; save it instead";
    area.remove();
  });
})();
