"use strict";
// Marks the words of two outputs that the other does not have, when a comparison is opened: a longest common subsequence.
const LIMIT = 4e6; // cells of its table; longer outputs stay unmarked
const marked = (element, words, kept) => {
  const parts = words.map((word, i) => {
    if (kept[i] || !word.trim()) return word;
    const mark = document.createElement("mark");
    mark.textContent = word;
    return mark;
  });
  element.replaceChildren(...parts);
};
const common = (a, b) => {
  const width = b.length + 1;
  const table = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      table[i * width + j] =
        a[i] === b[j]
          ? table[(i + 1) * width + j + 1] + 1
          : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    }
  }
  const kept = [a.map(() => false), b.map(() => false)];
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) kept[0][i++] = kept[1][j++] = true;
    else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i++;
    else j++;
  }
  return kept;
};
for (const example of document.querySelectorAll("details.example")) {
  const mark = () => {
    const reference = example.querySelector(".answer.reference .words");
    const outputs = example.querySelectorAll(".answer.output .words:not(.said)");
    if (!reference || example.dataset.marked) return;
    example.dataset.marked = "yes";
    const own = reference.textContent.split(/(\s+)/);
    for (const output of outputs) {
      const words = output.textContent.split(/(\s+)/);
      if (own.length * words.length > LIMIT) continue;
      const kept = common(own, words);
      marked(output, words, kept[1]);
      if (outputs.length === 1) marked(reference, own, kept[0]);
    }
  };
  example.addEventListener("toggle", () => example.open && mark());
  if (example.open) mark();
}
