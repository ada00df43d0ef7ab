"""What XLA must be told so that communication overlaps computation."""

from pallas_kernels.platform import target_platform


def compiler_options() -> dict[str, str]:
    """Options of ``jax.stages.Lowered.compile`` for the platform of the mesh in scope.

    On TPU an all-to-all is synchronous unless asked otherwise; with it, and with the tokens cut into at least four
    groups (``model.exchange_groups``), the scheduler puts one group's exchange beside another's experts.
    """
    return {"xla_tpu_enable_async_all_to_all": "true"} if target_platform() == "tpu" else {}
