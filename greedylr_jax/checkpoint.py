"""Checks that a checkpoint fits the optimizer state into which it is restored.

Orbax saves and restores the state of every rule without a helper. If shapes differ, its error names neither
the array nor the cause; :func:`check_restorable` does.
"""

from typing import Any

import jax
import jax.numpy as jnp

_MAX_LISTED = 10


def check_restorable(saved: Any, target: Any) -> None:
    """Raises an error that names every field in which a checkpoint differs from its target.

    Args:
      saved: the content of the checkpoint: Orbax's metadata (``checkpointer.metadata(path).item_metadata`` or
        ``manager.item_metadata(step)``), or any pytree of arrays.
      target: the state to restore into, or its ``jax.eval_shape``, with the nesting of the saved state.

    Raises:
      ValueError: if a field is missing in the checkpoint or in the target, or differs in shape or dtype. A
        rule's ``history.values`` of another length was saved with another ``window``; a missing field
        indicates another version of the library, or another optimizer.

    Examples:
      >>> import jax.numpy as jnp
      >>> from greedylr_jax import greedy_lr
      >>> from greedylr_jax.checkpoint import check_restorable
      >>> saved = greedy_lr(window=50).init(None)
      >>> check_restorable(saved, greedy_lr(window=50).init(None))
      >>> check_restorable(saved, greedy_lr(window=20).init(None))
      Traceback (most recent call last):
      ...
      ValueError: the checkpoint does not fit: rule.history.values: float32[50] saved, ...
    """
    if saved is None:  # a manager's metadata if it was built without a handler
        raise ValueError(
            "saved must be the metadata of a checkpoint, got None: a CheckpointManager knows it only with "
            "item_handlers=orbax.checkpoint.StandardCheckpointHandler()."
        )
    there, here = _fields(getattr(saved, "tree", saved)), _fields(target)
    problems = []
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) == here.get(name):
            continue
        found, wanted = there.get(name, "nothing"), here.get(name, "nothing")
        problem = f"{name}: {found} saved, {wanted} expected"
        if name.endswith("rule.history.values") and name in there and name in here:
            problem += " (the window of the rule: build the rule with the saved window)"
        problems.append(problem)
    if problems:
        shown = problems[:_MAX_LISTED]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise ValueError(f"the checkpoint does not fit: {'; '.join(shown)}.")


def _fields(tree: Any) -> dict[str, str]:
    """Dtype and shape of every leaf by its path; dictionaries and named tuples give the same paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(map(_entry_name, path)): _describe(leaf) for path, leaf in leaves}


def _entry_name(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _describe(leaf: Any) -> str:
    if not hasattr(leaf, "shape"):
        leaf = jnp.asarray(leaf)
    return f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
