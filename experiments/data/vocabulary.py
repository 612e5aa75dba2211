"""Words to integers, for tasks on text: the most frequent words of the training split."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

PAD, START, END, UNKNOWN = range(4)
_SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")
# A word with its capital, digits one by one, and every other sign alone: camelCase falls into its parts.
_WORD = re.compile(r"[^\W\d_]?[^\W\d_A-Z]+|[^\W\d_]+|\d|[^\w\s]|_")


def split_words(text: str) -> list[str]:
    """The words of a text, in lower case.

    Examples:
      >>> split_words("Return max_value or getDefault(42)")
      ['return', 'max', '_', 'value', 'or', 'get', 'default', '(', '4', '2', ')']
    """
    return [word.lower() for word in _WORD.findall(text)]


class Vocabulary:
    """The most frequent words of some texts."""

    def __init__(self, texts: Iterable[Sequence[str]], size: int):
        """Counts words.

        Args:
          texts: each a list of words, of the training split only.
          size: words to keep, the four special ones (:data:`PAD`, :data:`START`, :data:`END`,
            :data:`UNKNOWN`) among them.
        """
        counts = Counter(word for words in texts for word in words)
        # Ties by the word itself: the order of counting must not matter.
        frequent = sorted(counts, key=lambda word: (-counts[word], word))[: size - len(_SPECIAL)]
        self.words = [*_SPECIAL, *frequent]
        self._index = {word: index for index, word in enumerate(self.words)}

    def __len__(self) -> int:
        """How many words there are."""
        return len(self.words)

    def encode(self, words: Sequence[str], length: int) -> np.ndarray:
        """The indices of words, cut or padded to a length.

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
