"""Scores of generated text: BLEU of translations and summaries, F1 of answers.

Sources: K. Papineni et al., "BLEU", 2002, as implemented by sacrebleu (M. Post, "A Call for Clarity in
Reporting BLEU Scores", 2018); P. Rajpurkar et al., "SQuAD", 2016, for F1.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.vocabulary import END, PAD, START, Vocabulary
from experiments.errors import UsageError
from experiments.tasks.base import TextScore


def decode_greedily(module: Any, source: jax.Array, length: int) -> jax.Array:
    """The most probable next word at each position, until END.

    Args:
      module: source and previous words -> logits of the next words.
      source: shape (batch, source length).
      length: maximum number of words, END included.

    Returns:
      Shape (batch, length), int32; padding after END.
    """
    start = jnp.full((len(source), length + 1), PAD, jnp.int32).at[:, 0].set(START)

    def extend(position: jax.Array, words: jax.Array) -> jax.Array:
        best = jnp.argmax(module(source, words[:, :-1])[:, position], axis=-1)
        previous = words[:, position]
        is_over = (previous == END) | (previous == PAD)
        return words.at[:, position + 1].set(jnp.where(is_over, PAD, best))

    return jax.lax.fori_loop(0, length, extend, start)[:, 1:]


def bleu_score(vocabulary: Vocabulary, references: Sequence[Sequence[str]], length: int) -> TextScore:
    """BLEU of greedy decoding against the words of the references, on examples with ``source``.

    Args:
      vocabulary: of the target; its word for unknown words matches nothing.
      references: the words of each held-out example, not truncated.
      length: maximum number of generated words.
    """
    texts = [" ".join(words) for words in references]

    def score(predictions: np.ndarray) -> float:
        return bleu([_text(vocabulary, row) for row in predictions], texts)

    return TextScore("BLEU", lambda module, batch: decode_greedily(module, batch["source"], length), score)


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of a corpus in percent, on words separated by spaces.

    Raises:
      UsageError: if sacrebleu is not installed.
    """
    try:
        import sacrebleu  # noqa: PLC0415  (needed by no other part of the experiments)
    except ImportError as error:
        raise UsageError("BLEU requires sacrebleu; run: pip install sacrebleu") from error
    return sacrebleu.corpus_bleu(list(hypotheses), [list(references)], tokenize="none").score


def _text(vocabulary: Vocabulary, row: np.ndarray) -> str:
    """The words before END."""
    words = []
    for index in row:
        if index in (END, PAD):
            break
        words.append(vocabulary.words[index])
    return " ".join(words)


def answer_score(tokens: np.ndarray, spans: np.ndarray, predict: Any) -> TextScore:
    """Mean F1 of the predicted spans.

    Args:
      tokens: shape (n, length), of the held-out examples.
      spans: shape (n, 2), first and last position of each correct answer.
      predict: module and batch -> shape (n, 2), first and last position of each predicted answer.
    """

    def score(predictions: np.ndarray) -> float:
        rows = zip(tokens, spans, predictions, strict=True)
        return 100 * float(
            np.mean([answer_f1(row[p[0] : p[1] + 1], row[s[0] : s[1] + 1]) for row, s, p in rows])
        )

    return TextScore("F1", predict, score)


def answer_f1(predicted: Sequence[int], correct: Sequence[int]) -> float:
    """Harmonic mean of precision and recall of the words of an answer, which are counted without order.

    Examples:
      >>> answer_f1([5, 6, 7], [6, 7]), answer_f1([], [6])
      (0.8, 0.0)
    """
    common = sum((Counter(map(int, predicted)) & Counter(map(int, correct))).values())
    return 2 * common / (len(predicted) + len(correct)) if common else 0.0
