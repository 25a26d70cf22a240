// Where answers part: the longest common subsequence of their tokens.

const MOST_CELLS = 1 << 24; // of a table, two bytes each; answers of about 4,000 tokens that differ throughout

/**
 * Which tokens each answer shares with another, in order; what is left is that answer's own.
 *
 * answers: lists of token texts, e.g. [["It", " lasts", " 12"], ["It", " lasts", " long"]].
 * Returns { shared: [[true, true, false], [true, true, false]], parts: 2 }; `parts` is the place of the first token on
 * which not all agree, or null where the answers are the same.
 */
export function compare(answers) {
  const shared = answers.map((tokens) => tokens.map(() => false));
  for (let a = 0; a < answers.length; a++) {
    for (let b = a + 1; b < answers.length; b++) {
      const [ofA, ofB] = matched(answers[a], answers[b]);
      ofA.forEach((is, at) => (shared[a][at] ||= is));
      ofB.forEach((is, at) => (shared[b][at] ||= is));
    }
  }
  const start = commonStart(answers);
  return { shared, parts: answers.every((tokens) => tokens.length === start) ? null : start };
}

function commonStart(answers) {
  const [first, ...others] = answers;
  const at = first.findIndex((token, place) => others.some((tokens) => tokens[place] !== token));
  return at < 0 ? first.length : at;
}

/** For two lists, which of their tokens a longest common subsequence holds. */
function matched(a, b) {
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let endA = a.length;
  let endB = b.length;
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) {
    endA--;
    endB--;
  }
  const ofA = a.map((_, at) => at < start || at >= endA);
  const ofB = b.map((_, at) => at < start || at >= endB);
  const [rows, columns] = [endA - start, endB - start];
  // Too long to align: all of the middle counts as different, which is true of tokens in their places.
  if ((rows + 1) * (columns + 1) > MOST_CELLS) return [ofA, ofB];
  const width = columns + 1;
  const longest = new Uint16Array((rows + 1) * width); // of a[start + row:] and b[start + column:]
  for (let row = rows - 1; row >= 0; row--) {
    for (let column = columns - 1; column >= 0; column--) {
      const at = row * width + column;
      longest[at] =
        a[start + row] === b[start + column]
          ? longest[at + width + 1] + 1
          : Math.max(longest[at + width], longest[at + 1]);
    }
  }
  for (let row = 0, column = 0; row < rows && column < columns; ) {
    const at = row * width + column;
    if (a[start + row] === b[start + column]) {
      ofA[start + row++] = true;
      ofB[start + column++] = true;
    } else if (longest[at + width] >= longest[at + 1]) row++;
    else column++;
  }
  return [ofA, ofB];
}
