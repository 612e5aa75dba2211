"""Fine-tuning tasks: what the networks start from, and examples in the words of pretraining."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.data.stdlib import ROLES
from experiments.data.vocabulary import END, PAD, START, UNKNOWN, Vocabulary
from experiments.pretraining import START as NETWORKS
from experiments.tasks import FINE_TUNING_TASKS
from experiments.tasks.base import CLASSIFICATION
from experiments.tasks.finetuning import (
    GOALS,
    METHODS,
    Goal,
    _with_adapters,
    check_start,
    docstring_example,
    span_example,
    tag_example,
)
from experiments.tasks.named import make_network, network_task

WORDS = Vocabulary([["def", "max", "_", "value", "(", ")", "=", "1", "return"]], 20)


class Net(nnx.Module):
    """Two linear layers, of which the first is pretrained."""

    def __init__(self, *, rngs):
        self.body = nnx.Linear(4, 6, rngs=rngs)
        self.logits = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.logits(nnx.relu(self.body(x)))


@pytest.fixture(scope="module")
def adapted():
    rng = np.random.default_rng(0)
    examples = {
        "input": rng.standard_normal((8, 4)).astype(np.float32),
        "label": np.arange(8, dtype=np.int32) % 3,
    }
    start = {
        "body.kernel": rng.standard_normal((4, 6)).astype(np.float32),
        "body.bias": rng.standard_normal(6).astype(np.float32),
    }
    goal = Goal(lambda rngs: Net(rngs=rngs), CLASSIFICATION, (examples, examples), start)
    network = make_network(goal.module)
    task = network_task("net", network, CLASSIFICATION, examples, examples, 8)
    return task, _with_adapters(task, network, goal), start


def test_adapters_start_at_the_pretrained_network(adapted):
    full, lora, start = adapted
    params = lora.init(jax.random.key(0))
    assert set(params["new"]) == {"logits.kernel", "logits.bias"} and set(params["adapters"]) == {
        "body.kernel"
    }
    merged = full.init(jax.random.key(0)) | start
    np.testing.assert_array_equal(params["new"]["logits.kernel"], merged["logits.kernel"])
    np.testing.assert_allclose(lora.loss(params, lora.train), full.loss(merged, full.train), rtol=1e-6)
    assert lora.learning_rates["adamw"][1] == pytest.approx(10 * full.learning_rates["adamw"][1])


def test_adapters_add_a_product_of_rank_four_to_the_matrix(adapted):
    full, lora, start = adapted
    params = lora.init(jax.random.key(0))
    factors = params["adapters"]["body.kernel"]
    assert factors["A"].shape == (4, 4) and factors["B"].shape == (4, 6)
    factors["B"] = jnp.ones((4, 6))
    merged = full.init(jax.random.key(0)) | start
    merged["body.kernel"] = start["body.kernel"] + 2.0 * factors["A"] @ factors["B"]
    np.testing.assert_allclose(lora.loss(params, lora.train), full.loss(merged, full.train), rtol=1e-6)
    gradients = jax.grad(lora.loss)(params, lora.train)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_a_pretrained_parameter_of_another_shape_is_named():
    network = make_network(lambda rngs: Net(rngs=rngs))
    with pytest.raises(ValueError, match=r"'body\.kernel' must have the shape of the network's, \(4, 6\)"):
        check_start(network, {"body.kernel": np.zeros((4, 5))})
    with pytest.raises(ValueError, match=r"'other\.kernel'"):
        check_start(network, {"other.kernel": np.zeros(3)})


def test_a_token_is_tagged_at_its_first_word():
    roles = np.array(
        [ROLES.index(role) for role in ("other", "function", "other", "other", "other")], np.uint8
    )
    got = tag_example(["def", "max_value", "(", ")", "="], roles, WORDS, 10)
    words = [WORDS.words[index] for index in got["input"]]
    assert words == ["def", "max", "_", "value", "(", ")", "=", "<pad>", "<pad>", "<pad>"]
    np.testing.assert_array_equal(got["positions"], [0, 1, 4, 5, 6])
    np.testing.assert_array_equal(got["label"], roles)
    assert tag_example(["max_value"] * 5, roles, WORDS, 10) is None  # fifteen words


def test_an_answer_is_a_span_of_words_after_the_question():
    signature = "(max_value=Max1, value=1)"
    row = {"parameter": "max_value", "signature": signature, "start": 11, "end": 15}
    assert signature[11:15] == "Max1"
    got = span_example(row, WORDS, 24)
    words = [WORDS.words[index] for index in got["input"]]
    first, last = got["span"]
    assert words[:4] == ["max", "_", "value", "<start>"] and words[4] == "("
    assert words[first : last + 1] == ["max", "1"] and words[first - 1] == "="
    assert span_example(row, WORDS, 10) is None


def test_a_summary_is_predicted_word_by_word_after_its_code():
    got = docstring_example(["def", "value", "(", ")"], ["return", "one", "value"], WORDS, 24)
    at = len(["def", "value", "(", ")"])
    index = WORDS.indices
    np.testing.assert_array_equal(got["input"][:at], index(["def", "value", "(", ")"]))
    np.testing.assert_array_equal(
        got["input"][at : at + 4], [START, *index(["return"]), UNKNOWN, *index(["value"])]
    )
    # The label of each position is the word after it.
    np.testing.assert_array_equal(got["positions"][:4], at + np.arange(4))
    np.testing.assert_array_equal(got["label"][:4], [*index(["return"]), UNKNOWN, *index(["value"]), END])
    assert (got["label"][4:] == PAD).all() and got["input"].shape == (24,)
    long = docstring_example(["value"] * 50, ["return"] * 50, WORDS, 24)
    assert long["input"].shape == (24,) and long["label"][-1] == END and long["positions"][-1] == 23


def test_every_goal_has_a_task_for_each_method_and_preset():
    expected = {f"{kind}-{method}{size}" for kind in GOALS for method in METHODS for size in ("", "-full")}
    assert set(FINE_TUNING_TASKS) == expected
    assert set(NETWORKS) == set(GOALS)
