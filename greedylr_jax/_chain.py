"""``chain``: a drop-in for ``optax.chain`` in which a rule acts on the learning rate wherever it stands."""

import optax

from greedylr_jax import _placement, _rule


class _Chain(optax.GradientTransformationExtraArgs):
    """The result of :func:`chain`, with its links, so that an outer chain can reorder them."""

    links: tuple[optax.GradientTransformation, ...]


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Like ``optax.chain``, but a learning-rate rule controls the step size wherever it stands.

    In a plain ``optax.chain(greedy_lr(), optax.adamw(1e-3))`` the rule would multiply the *gradients*,
    and Adam divides a constant factor out again. Here the rules are applied last, in the order given,
    so ``chain(greedy_lr(), optax.adamw(1e-3))`` equals ``optax.chain(optax.adamw(1e-3), greedy_lr())``,
    including its state. Chains made by this function may be nested. A rule inside another wrapper
    (``optax.masked``, a plain ``optax.chain``, ...) is not moved; check such transformations with
    :func:`greedylr_jax.assert_controls_learning_rate`.

    The updates of some optimizers must not be scaled, since they move the parameters to a certain point:
    ``optax.contrib.schedule_free`` and others with iterates of their own, and wrappers that restore
    parameters, such as :func:`greedylr_jax.with_rollback`. Put the rule inside of these.

    Args:
      *transforms: gradient transformations, with learning-rate rules at any position.

    Returns:
      A ``GradientTransformationExtraArgs``; its state is the tuple of the states in the order of
      application.

    Raises:
      TypeError: if an argument is not a gradient transformation. Its ``init`` raises ``ValueError`` if a rule
        would scale the updates of an optimizer that must not be scaled.

    Examples:
      >>> import jax.numpy as jnp, optax, greedylr_jax
      >>> params = jnp.ones(3)
      >>> tx = greedylr_jax.chain(greedylr_jax.greedy_lr(), optax.adamw(1e-3))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params, value=2.0)
      >>> greedylr_jax.assert_controls_learning_rate(tx, params)
    """
    links: list[optax.GradientTransformation] = []
    for position, transform in enumerate(transforms):
        if not isinstance(transform, optax.GradientTransformation):
            raise TypeError(
                f"argument {position} of chain must be an optax.GradientTransformation, got "
                f"{transform!r}. A schedule goes into the optimizer, as its learning_rate."
            )
        links.extend(transform.links if isinstance(transform, _Chain) else (transform,))
    links.sort(key=lambda link: isinstance(link, _rule.ScaleByRule))  # stable: rules last
    chained = optax.chain(*links) if links else optax.with_extra_args_support(optax.identity())

    def init_fn(params: optax.Params) -> optax.OptState:
        state = chained.init(params)
        if links and isinstance(links[-1], _rule.ScaleByRule):
            _check_may_be_scaled(state)
        return state

    result = _Chain(init_fn, chained.update)
    result.links = tuple(links)
    return result


def _check_may_be_scaled(opt_state: optax.OptState) -> None:
    name = _placement.find_wrapper(opt_state)
    if name is not None:
        raise ValueError(
            f"greedylr_jax.chain applies its rules last, where they would scale the updates of an optimizer "
            f"with a {name}, which must not be scaled. {_placement.ADVICE_INSIDE}"
        )
