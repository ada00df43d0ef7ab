"""What XLA must be told so that communication overlaps computation, and so that it compiles at all."""

from pallas_kernels.platform import target_platform


def compiler_options(micro_batches: int = 1) -> dict[str, str]:
    """Options of ``jax.stages.Lowered.compile`` for the platform of the mesh in scope.

    On TPU an all-to-all is synchronous unless asked otherwise; with it, and with the tokens cut into at least four
    groups (``model.exchange_groups``), the scheduler puts one group's exchange beside another's experts.

    Where gradients are accumulated over micro-batches, a pass that would move their sums over devices out of the loop
    fails on its own check on large meshes (libtpu 0.0.42 and 1,024 devices): it is left out.
    """
    if target_platform() != "tpu":
        return {}
    options = {"xla_tpu_enable_async_all_to_all": "true"}
    if micro_batches > 1:
        options["xla_disable_hlo_passes"] = "while-loop-all-reduce-code-motion"
    return options
