"""Words as integers, for tasks on text: a vocabulary of the most frequent words of the training split."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

PAD, START, END, UNKNOWN = range(4)
_SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")
# Splits camelCase into its parts, numbers into digits, and separates all other characters.
_WORD = re.compile(r"[^\W\d_]?[^\W\d_A-Z]+|[^\W\d_]+|\d|[^\w\s]|_")


def find_words(text: str) -> list[re.Match[str]]:
    """The words of a text with their positions.

    Examples:
      >>> [match.span() for match in find_words("max_value")]
      [(0, 3), (3, 4), (4, 9)]
    """
    return list(_WORD.finditer(text))


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
        self._set(frequent)

    def _set(self, words: Sequence[str]) -> None:
        self.words = [*_SPECIAL, *words]
        self._index = {word: index for index, word in enumerate(self.words)}

    @classmethod
    def of(cls, words: Sequence[str]) -> "Vocabulary":
        """The vocabulary with the given ``words``, of which the first four are the special ones.

        Examples:
          >>> Vocabulary.of(Vocabulary([["a", "b", "a"]], 6).words).words
          ['<pad>', '<start>', '<end>', '<unknown>', 'a', 'b']
        """
        vocabulary = cls((), len(_SPECIAL))
        vocabulary._set(words[len(_SPECIAL) :])
        return vocabulary

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
        known = self.indices(words[:length])
        row[: len(known)] = known
        return row

    def indices(self, words: Iterable[str]) -> list[int]:
        """The index of each word, :data:`UNKNOWN` for words that are not in the vocabulary."""
        return [self._index.get(word, UNKNOWN) for word in words]
