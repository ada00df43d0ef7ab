"""Context extension to 1M (report section 4.5, Table 6): 26B tokens, 16.8M a step; the report prints no batch.

python -m launch.plan --config=configs/plans/extend_1m.py --topology=v5p:8x8x16
"""

from configs import minimax_text_01
from mmx.config import MeshConfig, Run

TOPOLOGY = "v5p:8x8x16"


def get_config() -> Run:
    """16 rows of 1,048,576 tokens a step."""
    run = minimax_text_01.get_config()
    run.model.rope_base = 10_000_000.0
    run.mesh = MeshConfig(expert=16, context=64)
    run.data.sequence_length, run.data.batch_size = 1_048_576, 16
    run.train.steps, run.train.tokens, run.train.batch_marks = 1_550, 0, ()
    return run
