"""A check that a checkpoint fits the optimizer state it is to be restored into.

Orbax saves and restores every rule's state as it is; no helper is needed for that. But where the shapes
differ it names neither the array nor the cause, so ask here first.
"""

from typing import Any

import jax
import jax.numpy as jnp

_MAX_LISTED = 10


def check_restorable(saved: Any, target: Any) -> None:
    """Raises an error that names every field by which a checkpoint differs from its target.

    Args:
      saved: what the checkpoint holds: the metadata that Orbax gives
        (``checkpointer.metadata(path).item_metadata`` or ``manager.item_metadata(step)``), or any pytree
        of arrays.
      target: the state to restore into, or its ``jax.eval_shape``; of the same nesting as what was saved.

    Raises:
      ValueError: if a field is missing on one side, or differs in shape or dtype. A rule's ``history.values``
        that differs in length was saved with another ``window``; a missing field tells of another version
        of the library, or another optimizer.

    Examples:
      >>> import jax.numpy as jnp
      >>> from greedylr_jax import greedy_lr
      >>> from greedylr_jax.checkpoint import check_restorable
      >>> saved = greedy_lr(window=50).init(None)
      >>> check_restorable(saved, greedy_lr(window=50).init(None))
      >>> check_restorable(saved, greedy_lr(window=20).init(None))
      Traceback (most recent call last):
      ...
      ValueError: the checkpoint does not fit: rule.history.block_sums: float32[6] saved, ...
    """
    if saved is None:  # what a manager answers that was not told how its checkpoints are saved
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
            problem += " (the window of the rule: rebuild it with the one that was saved)"
        problems.append(problem)
    if problems:
        shown = problems[:_MAX_LISTED]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise ValueError(f"the checkpoint does not fit: {'; '.join(shown)}.")


def _fields(tree: Any) -> dict[str, str]:
    """Dtype and shape of every leaf under its path; dictionaries and named tuples read alike."""
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
