"""Pre-training at 8K tokens (report section 4): 11.4T tokens, 16.8M a step.

python -m launch.plan --config=configs/plans/pretrain_8k.py --topology=v5p:8x8x16
"""

from configs import minimax_text_01
from mmx.config import MeshConfig, Run

TOPOLOGY = "v5p:8x8x16"


def get_config() -> Run:
    """2048 rows of 8,192 tokens a step."""
    run = minimax_text_01.get_config()
    run.mesh = MeshConfig(fsdp=32, expert=32)
    run.data.sequence_length, run.data.batch_size = 8_192, 2048
    run.train.steps, run.train.tokens, run.train.batch_marks = 680_000, 0, ()
    return run
