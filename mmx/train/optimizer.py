"""AdamW with the report's betas, as an optax transformation without the learning rate, which the step applies."""

import jax
import optax

from mmx.config import OptimizerConfig


def build_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, Adam's moments (fp32, as the parameters), decoupled weight decay on everything but norms."""

    return optax.chain(
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def decay_mask(params: dict) -> dict:
    """True for every parameter but the scales of norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)
