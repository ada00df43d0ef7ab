"""Context extension to 512K (report section 4.5, Table 6): 32B tokens, 16.8M a step; the report prints no batch.

python -m launch.plan --config=configs/plans/extend_512k.py --topology=v5p:8x8x16
"""

from configs import minimax_text_01
from mmx.config import MeshConfig, Run

TOPOLOGY = "v5p:8x8x16"


def get_config() -> Run:
    """32 rows of 524,288 tokens a step."""
    run = minimax_text_01.get_config()
    run.model.rope_base = 10_000_000.0
    run.mesh = MeshConfig(expert=32, context=32)
    run.data.sequence_length, run.data.batch_size = 524_288, 32
    run.train.steps, run.train.tokens, run.train.batch_marks = 1_907, 0, ()
    return run
