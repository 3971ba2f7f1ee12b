"use strict";
const at = id => document.getElementById(id), video = at("video"), note = at("note").textContent;
let latest = 0;

async function classify(image, name) {
  const turn = ++latest;
  at("message").textContent = `${name}: being classified`;
  let answer = {error: at("drop").dataset.tooLarge};
  if (image.size <= Number(at("drop").dataset.maxBytes)) {
    try {
      answer = await (await fetch("/classify", {method: "POST", body: image})).json();
    } catch {
      answer = {error: "no answer; is tlcli demo running, and does its terminal show an error?"};
    }
  }
  if (turn !== latest) return;  // another image was chosen in the meantime
  at("message").textContent = answer.error ? `${name}: ${answer.error}` : name;
  at("message").classList.toggle("bad", "error" in answer);
  at("answer").hidden = "error" in answer;
  if (answer.error) return;
  at("class").textContent = answer.top[0][0];
  at("picture").src = answer.picture;
  at("note").textContent = answer.map_error || note;
  at("score").textContent = `Unknown score ${answer.unknown_score.toFixed(2)}` + (answer.unknown === null ? "" :
    answer.unknown ? ": higher than that of 95\u00a0% of the images held out. This looks like none of the classes." :
    ": as low as that of images of the classes.");
  at("score").classList.toggle("bad", answer.unknown === true);
  at("map").hidden = !answer.map;
  if (answer.map) at("map").src = answer.map;
  at("top").replaceChildren(...answer.top.map(([label, p]) => {
    const row = document.createElement("tr"), bar = document.createElement("progress");
    row.append(document.createElement("th"), document.createElement("td"), document.createElement("td"));
    row.cells[0].scope = "row";
    row.cells[0].textContent = label;
    row.cells[1].className = "bar";
    bar.value = p;
    bar.ariaHidden = "true";
    row.cells[1].append(bar);
    row.cells[2].textContent = `${(100 * p).toFixed(1)}\u00a0%`;
    return row;
  }));
}

function choose(files) {
  if (files.length) classify(files[0], files[0].name);
  else at("message").textContent = "That was not a file";
}

function stop() {
  for (const track of video.srcObject.getTracks()) track.stop();
  video.srcObject = null;
  video.hidden = at("stop").hidden = true;
  at("camera").textContent = "Use the camera";
}

at("file").onchange = event => { choose(event.target.files); event.target.value = ""; };
document.ondragover = event => { event.preventDefault(); at("drop").classList.add("over"); };
document.ondragleave = event => { if (!event.relatedTarget) at("drop").classList.remove("over"); };
document.ondrop = event => {
  event.preventDefault();
  at("drop").classList.remove("over");
  choose(event.dataTransfer.files);
};
at("stop").onclick = stop;
at("camera").onclick = async () => {
  if (video.srcObject && !video.videoWidth) return;  // it has no picture yet
  if (video.srcObject) {
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob(image => { stop(); classify(image, "camera"); }, "image/jpeg", 0.95);
    return;
  }
  at("camera").disabled = true;  // a second click would open the camera again
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment"}});
    video.hidden = at("stop").hidden = false;
    at("camera").textContent = "Take the picture";
  } catch (error) {
    at("message").textContent = `camera: ${error.message}`;
  } finally {
    at("camera").disabled = false;
  }
};
