"""BERT in NumPy, written from its paper and the names of a checkpoint, and tiny random checkpoints."""

import json
import math

import numpy as np
import safetensors.numpy

CONFIG = {
    "vocab_size": 30,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}


def random_arrays(seed=0, config=CONFIG):
    """The arrays of a checkpoint with the names and shapes of Hugging Face's BertModel."""
    rng = np.random.default_rng(seed)
    width, hidden = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= {f"{at}attention.{name}.weight": (width, width), f"{at}attention.{name}.bias": (width,)}
        shapes |= {
            f"{at}intermediate.dense.weight": (hidden, width),
            f"{at}intermediate.dense.bias": (hidden,),
        }
        shapes |= {f"{at}output.dense.weight": (width, hidden), f"{at}output.dense.bias": (width,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{at}{name}.weight": (width,), f"{at}{name}.bias": (width,)}
    arrays = {}
    for name, shape in shapes.items():
        scale = 1 / math.sqrt(shape[-1]) if len(shape) == 2 else 0.3
        offset = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        arrays[name] = (offset + scale * rng.standard_normal(shape)).astype(np.float32)
    return arrays


def write_checkpoint(folder, arrays, config=CONFIG):
    """Writes ``model.safetensors`` and ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors.numpy.save(arrays))


def _norm(x, arrays, name, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + epsilon) * arrays[name + ".weight"] + arrays[name + ".bias"]


def forward(arrays, tokens, config=CONFIG):
    """Features of the last layer in float64, shape (batch, length, width); token 0 is padding."""
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
    heads, epsilon = config["num_attention_heads"], config["layer_norm_eps"]
    linear = lambda x, name: x @ arrays[name + ".weight"].T + arrays[name + ".bias"]  # noqa: E731
    embedded = (
        arrays["embeddings.word_embeddings.weight"][tokens]
        + arrays["embeddings.position_embeddings.weight"][: tokens.shape[1]]
        + arrays["embeddings.token_type_embeddings.weight"][0]
    )
    hidden = _norm(embedded, arrays, "embeddings.LayerNorm", epsilon)
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}."
        query, key, value = (
            linear(hidden, f"{at}attention.self.{name}").reshape(*tokens.shape, heads, -1)
            for name in ("query", "key", "value")
        )
        scores = np.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
        scores = np.where((tokens != 0)[:, None, None, :], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("bhqk,bkhd->bqhd", weights, value).reshape(hidden.shape)
        attended = linear(attended, f"{at}attention.output.dense")
        hidden = _norm(hidden + attended, arrays, f"{at}attention.output.LayerNorm", epsilon)
        inner = linear(hidden, f"{at}intermediate.dense")
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        inner = linear(inner, f"{at}output.dense")
        hidden = _norm(hidden + inner, arrays, f"{at}output.LayerNorm", epsilon)
    return hidden
