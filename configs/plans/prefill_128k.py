"""Serving at 128K: eight prompts side by side, bf16 weights; for --work=prefill and --work=decode.

python -m launch.plan --config=configs/plans/prefill_128k.py --topology=v5p:4x4x4 --work=prefill
"""

from configs import minimax_text_01
from mmx.config import MeshConfig, Run

TOPOLOGY = "v5p:4x4x4"


def get_config() -> Run:
    """8 prompts of 131,072 tokens."""
    run = minimax_text_01.get_config()
    run.model.rope_base = 10_000_000.0
    run.model.param_dtype = "bfloat16"
    run.mesh = MeshConfig(expert=8, tensor=8)
    run.data.sequence_length, run.data.batch_size = 131_072, 8
    return run
