"""Words as integers, for tasks on text: a vocabulary of the most frequent words of the training split."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

PAD, START, END, UNKNOWN = range(4)
_SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")
# Splits camelCase into its parts, numbers into digits, and separates all other characters.
_WORD = re.compile(r"[^\W\d_]?[^\W\d_A-Z]+|[^\W\d_]+|\d|[^\w\s]|_")


def split_words(text: str) -> list[str]:
    """Splits a text into words in lower case.

    Examples:
      >>> split_words("Return max_value or getDefault(42)")
      ['return', 'max', '_', 'value', 'or', 'get', 'default', '(', '4', '2', ')']
    """
    return [word.lower() for word in _WORD.findall(text)]


class Vocabulary:
    """The most frequent words of a collection of texts."""

    def __init__(self, texts: Iterable[Sequence[str]], size: int):
        """Counts words.

        Args:
          texts: lists of words, from the training split only.
          size: maximum number of words, including the four special ones (:data:`PAD`, :data:`START`,
            :data:`END`, :data:`UNKNOWN`).
        """
        counts = Counter(word for words in texts for word in words)
        # Ties are broken alphabetically, so that the result does not depend on the order of the texts.
        frequent = sorted(counts, key=lambda word: (-counts[word], word))[: size - len(_SPECIAL)]
        self.words = [*_SPECIAL, *frequent]
        self._index = {word: index for index, word in enumerate(self.words)}

    def __len__(self) -> int:
        """Number of words."""
        return len(self.words)

    def encode(self, words: Sequence[str], length: int) -> np.ndarray:
        """Maps words to indices, truncated or padded to a length.

        Returns:
          Shape (length,), int32.

        Examples:
          >>> Vocabulary([["a", "b", "a"]], 5).encode(["a", "b"], 4)
          array([4, 3, 0, 0], dtype=int32)
        """
        row = np.full(length, PAD, np.int32)
        known = [self._index.get(word, UNKNOWN) for word in words[:length]]
        row[: len(known)] = known
        return row
