"""Fine-tuning of the networks of ``python -m experiments pretrain``, and the same networks from scratch.

A task has one of three methods. ``finetuned`` trains all parameters from the pretrained ones; ``lora`` trains
low-rank adapters of the pretrained matrices (E. J. Hu et al., "LoRA", 2022) and the parameters that are new;
``scratch`` trains the same network from random parameters. Data sets and networks are those of the tasks of
the same name without pretraining; the words are split as in pretraining.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import pretraining as weights
from experiments.data.interface import InterfaceStrings
from experiments.data.loading import load_split
from experiments.data.stdlib import ROLES, WINDOW, StdlibDefaults, StdlibDocstrings, StdlibTokens
from experiments.data.vocabulary import START, Vocabulary, find_words, split_words
from experiments.tasks import pretraining, question_answering, seq2seq
from experiments.tasks.adapters import RANK, SCALE, init_adapter
from experiments.tasks.base import CLASSIFICATION, LEARNING_RATES, Batch, Objective, Params, Task
from experiments.tasks.language import TransformerModel
from experiments.tasks.named import Arrays, Network, make_network, network_task
from experiments.tasks.pretraining import AT_POSITIONS, SIZES, Size, make_resnet, make_transformer
from experiments.tasks.question_answering import SpanFinder
from experiments.tasks.seq2seq import EncoderDecoder, encode_target
from experiments.tasks.tagging import Tagger
from experiments.tasks.transformer import Transformer

METHODS = ("finetuned", "lora", "scratch")
_MAX_TRAIN, _MAX_TEST = 4000, 200
_SUMMARY, _PHRASE, _PHRASE_WORDS = 16, 16, 800  # words of a summary, of a phrase, and of its vocabulary
# Adapters start at 0 and need a rate about ten times as high.
_ADAPTER_RATES = {name: tuple(10 * rate for rate in rates) for name, rates in LEARNING_RATES.items()}


class Goal(NamedTuple):
    """What a network is fine-tuned for.

    Attributes:
      module: from random number streams to the module.
      objective: its loss and metric.
      splits: training and held-out examples.
      start: the pretrained parameters by their names in the module.
      batch_size: examples in a step.
    """

    module: Callable[[nnx.Rngs], nnx.Module]
    objective: Objective
    splits: tuple[Batch, Batch]
    start: Arrays
    batch_size: int = 8


def make(name: str, kind: str, method: str, preset: str, data_dir: Path | None = None) -> Task:
    """A fine-tuning task.

    Args:
      name: of the task.
      kind: key of :data:`GOALS`.
      method: one of :data:`METHODS`.
      preset: of the pretrained network.
      data_dir: of prepared data sets; None: TFDS's default.

    Raises:
      UsageError: if the network has not been pretrained yet.
    """
    goal = GOALS[kind](preset, data_dir)
    network = make_network(goal.module)
    task = network_task(name, network, goal.objective, *goal.splits, goal.batch_size)
    if method == "scratch":
        return task
    check_start(network, goal.start)
    if method == "finetuned":
        return task._replace(init=lambda key: network.init(key) | goal.start)
    return _with_adapters(task, network, goal)


def check_start(network: Network, start: Arrays) -> None:
    """Raises ``ValueError`` for pretrained parameters that the network does not have in the same shape."""
    for name, array in start.items():
        if network.shapes.get(name) != array.shape:
            raise ValueError(
                f"pretrained parameter {name!r} must have the shape of the network's, "
                f"{network.shapes.get(name)}, got {array.shape}."
            )


def _with_adapters(task: Task, network: Network, goal: Goal) -> Task:
    """The task with adapters of all pretrained matrices, and the parameters that are new."""
    matrices = {name: array for name, array in goal.start.items() if name.endswith(".kernel")}

    def init(key: jax.Array) -> Params:
        new = {name: array for name, array in network.init(key).items() if name not in goal.start}
        keys = jax.random.split(jax.random.fold_in(key, 1), len(matrices))
        adapters = {
            name: init_adapter(own, *matrix_shape(name, array.shape), RANK)
            for own, (name, array) in zip(keys, matrices.items(), strict=True)
        }
        return {"new": new, "adapters": adapters}

    def merged(params: Params) -> Arrays:
        adapted = {
            name: goal.start[name] + SCALE * (adapter["A"] @ adapter["B"]).reshape(goal.start[name].shape)
            for name, adapter in params["adapters"].items()
        }
        return {**goal.start, **adapted, **params["new"]}

    return task._replace(
        init=init,
        loss=lambda params, batch: task.loss(merged(params), batch),
        metric=lambda params, batch: task.metric(merged(params), batch),
        learning_rates=_ADAPTER_RATES,
    )


def matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Inputs and outputs of a kernel as a matrix.

    Examples:
      >>> matrix_shape("query.kernel", (64, 2, 16)), matrix_shape("out.kernel", (2, 16, 64))
      ((64, 32), (32, 64))
    """
    split = 1 if name.split(".")[-2] in ("query", "key", "value") else len(shape) - 1
    return int(np.prod(shape[:split])), int(np.prod(shape[split:]))


def _renamed(arrays: Arrays, old: str, new: str) -> Arrays:
    """The arrays whose names start with ``old``, which ``new`` replaces."""
    return {new + name.removeprefix(old): array for name, array in arrays.items() if name.startswith(old)}


def _load_text(kind: str, preset: str) -> tuple[Arrays, Vocabulary]:
    found = weights.load(kind, preset)
    return found.arrays, Vocabulary.of(found.words)


def _rows(builder: type, split: str, data_dir: Path | None, config: str | None = None) -> Iterator[dict]:
    """The first examples of a split, one by one; texts are decoded."""
    rows = load_split(builder, split, data_dir, config)
    for index in range(min(_MAX_TRAIN if split == "train" else _MAX_TEST, len(next(iter(rows.values()))))):
        values = ((name, column[index]) for name, column in rows.items())
        yield {name: each.decode() if isinstance(each, bytes) else each for name, each in values}


def _stack(examples: Iterator[Batch]) -> Batch:
    listed = list(examples)
    return {name: np.stack([each[name] for each in listed]).astype(np.int32) for name in listed[0]}


def _padded(values: list[int], length: int) -> np.ndarray:
    return np.array(values + [0] * (length - len(values)), np.int32)


def tagging(preset: str, data_dir: Path | None) -> Goal:
    """Roles of Python tokens, at the first word of each, in windows of as many tokens as words allow."""
    size, (arrays, vocabulary) = SIZES[preset], _load_text("encoder", preset)

    def encode(split: str) -> Iterator[Batch]:
        for row in _rows(StdlibTokens, split, data_dir):
            example = tag_example(row["tokens"].split(" "), row["roles"], vocabulary, size.length)
            if example is not None:
                yield example

    return Goal(
        lambda rngs: Tagger(make_transformer(size, rngs), len(ROLES), rngs=rngs),
        AT_POSITIONS,
        (_stack(encode("train")), _stack(encode("test"))),
        _renamed(arrays, "encoder.", "encoder."),
    )


def tag_example(tokens: list[str], roles: np.ndarray, vocabulary: Vocabulary, length: int) -> Batch | None:
    """The first ``min(WINDOW, length // 2)`` tokens as words, the position of the first word of each, and its
    role; None if they do not fit into ``length`` words.
    """
    count = min(WINDOW, length // 2)
    words = [split_words(token) or [token] for token in tokens[:count]]
    starts = np.cumsum([0, *map(len, words)])
    if starts[-1] > length:
        return None
    indices = vocabulary.indices([word for token in words for word in token])
    return {"input": _padded(indices, length), "positions": starts[:-1], "label": roles[:count]}


def question_answering_goal(preset: str, data_dir: Path | None) -> Goal:
    """The default of a parameter, as a span of the signature."""
    size, (arrays, vocabulary) = SIZES[preset], _load_text("encoder", preset)

    def encode(split: str) -> Iterator[Batch]:
        for row in _rows(StdlibDefaults, split, data_dir):
            example = span_example(row, vocabulary, size.length)
            if example is not None:
                yield example

    return Goal(
        lambda rngs: SpanFinder(make_transformer(size, rngs), rngs=rngs),
        question_answering.OBJECTIVE,
        (_stack(encode("train")), _stack(encode("test"))),
        _renamed(arrays, "encoder.", "encoder."),
    )


def span_example(row: dict, vocabulary: Vocabulary, length: int) -> Batch | None:
    """Words of the parameter, START and words of the signature; positions of both ends of the answer.

    None if there are more than ``length`` words.
    """
    question, words = split_words(row["parameter"]), find_words(row["signature"])
    inside = [
        at for at, word in enumerate(words) if row["start"] <= word.start() and word.end() <= row["end"]
    ]
    first = len(question) + 1
    if first + len(words) > length or not inside:
        return None
    context = vocabulary.indices(word.group().lower() for word in words)
    tokens = [*vocabulary.indices(question), START, *context]
    return {"input": _padded(tokens, length), "span": np.array([first + inside[0], first + inside[-1]])}


def _encoder_decoder(size: Size, target_words: int) -> Callable[[nnx.Rngs], nnx.Module]:
    def module(rngs: nnx.Rngs) -> EncoderDecoder:
        encoder = make_transformer(size, rngs)
        decoder = Transformer(target_words, size.length, size.width, size.layers, cross=True, rngs=rngs)
        return EncoderDecoder(encoder, decoder, rngs=rngs)

    return module


def summarization(preset: str, data_dir: Path | None) -> Goal:
    """The first line of a function's docstring from its code, by the encoder and the decoder.

    The decoder's attention to the encoder is new.
    """
    size, (arrays, vocabulary) = SIZES[preset], _load_text("encoder", preset)
    decoder = _load_text("decoder", preset)[0]

    def encode(split: str) -> Iterator[Batch]:
        for row in _rows(StdlibDocstrings, split, data_dir):
            source = vocabulary.encode(split_words(row["code"]), size.length)
            yield {
                "source": source,
                "target": encode_target(vocabulary, split_words(row["summary"]), _SUMMARY),
            }

    return Goal(
        _encoder_decoder(size, size.words + 1),
        seq2seq.OBJECTIVE,
        (_stack(encode("train")), _stack(encode("test"))),
        {
            **_renamed(arrays, "encoder.", "encoder."),
            **_renamed(decoder, "transformer.", "decoder."),
            **_renamed(decoder, "logits.", "logits."),
        },
    )


def translation(preset: str, data_dir: Path | None) -> Goal:
    """Interface strings from English to French; the decoder's embeddings and logits are new, as is its
    attention to the encoder.
    """
    size, (arrays, vocabulary) = SIZES[preset], _load_text("encoder", preset)
    decoder = _load_text("decoder", preset)[0]
    texts = {
        split: [
            [split_words(row[name]) for name in ("english", "translation")]
            for row in _rows(InterfaceStrings, split, data_dir, "fr")
        ]
        for split in ("train", "test")
    }
    target = Vocabulary([pair[1] for pair in texts["train"]], _PHRASE_WORDS)

    def encode(split: str) -> Iterator[Batch]:
        for english, french in texts[split]:
            yield {
                "source": vocabulary.encode(english, _PHRASE),
                "target": encode_target(target, french, _PHRASE),
            }

    layers = _renamed(decoder, "transformer.", "decoder.")
    del layers["decoder.tokens.embedding"]
    return Goal(
        _encoder_decoder(size, len(target)),
        seq2seq.OBJECTIVE,
        (_stack(encode("train")), _stack(encode("test"))),
        {**_renamed(arrays, "encoder.", "encoder."), **layers},
        batch_size=16,
    )


def docstrings(preset: str, data_dir: Path | None) -> Goal:
    """The first line of a function's docstring, which follows its code, by the decoder alone."""
    size, (arrays, vocabulary) = SIZES[preset], _load_text("decoder", preset)

    def encode(split: str) -> Iterator[Batch]:
        for row in _rows(StdlibDocstrings, split, data_dir):
            code, summary = (split_words(row[name]) for name in ("code", "summary"))
            yield docstring_example(code, summary, vocabulary, size.length)

    return Goal(
        lambda rngs: TransformerModel(make_transformer(size, rngs), rngs=rngs),
        Objective(_position_loss, _position_accuracy, "token accuracy"),
        (_stack(encode("train")), _stack(encode("test"))),
        arrays,
    )


def docstring_example(code: list[str], summary: list[str], vocabulary: Vocabulary, length: int) -> Batch:
    """Code, START and summary as input; the summary's words and END as labels at the words before them."""
    target = encode_target(vocabulary, summary, _SUMMARY)
    shown = vocabulary.indices(code[: length - _SUMMARY])
    positions = np.minimum(len(shown) + np.arange(_SUMMARY), length - 1)
    return {
        "input": _padded([*shown, *target[:-1]], length),
        "positions": positions,
        "label": target[1:],
    }


def _position_loss(module: TransformerModel, batch: Batch) -> jax.Array:
    return seq2seq.word_loss(module(batch["input"], batch["positions"]), batch["label"])


def _position_accuracy(module: TransformerModel, batch: Batch) -> jax.Array:
    return seq2seq.word_accuracy(module(batch["input"], batch["positions"]), batch["label"])


def digits(preset: str, data_dir: Path | None) -> Goal:
    """The digits 5 to 9, by the residual network that was pretrained on 0 to 4; its last layer is new."""
    start = weights.load("image", preset).arrays
    train, test = (
        pretraining.load_digit_classes(split, pretraining.CLASSES, data_dir) for split in ("train", "test")
    )
    return Goal(
        lambda rngs: make_resnet(SIZES[preset], rngs),
        CLASSIFICATION,
        (train, test),
        {name: jnp.asarray(array) for name, array in start.items() if not name.startswith("logits.")},
        batch_size=32,
    )


GOALS: dict[str, Callable[[str, Path | None], Goal]] = {
    "tagging": tagging,
    "question-answering": question_answering_goal,
    "summarization": summarization,
    "translation-fr": translation,
    "docstrings": docstrings,
    "digits": digits,
}
