"""Context extension to 128K (report section 4.5, Table 6): 300B tokens, 16.8M a step; the report prints no batch.

python -m launch.plan --config=configs/plans/extend_128k.py --topology=v5p:8x8x16
"""

from configs import minimax_text_01
from mmx.config import MeshConfig, Run

TOPOLOGY = "v5p:8x8x16"


def get_config() -> Run:
    """128 rows of 131,072 tokens a step."""
    run = minimax_text_01.get_config()
    run.model.rope_base = 5_000_000.0
    run.mesh = MeshConfig(fsdp=4, expert=32, tensor=8)
    run.data.sequence_length, run.data.batch_size = 131_072, 128
    run.train.steps, run.train.tokens, run.train.batch_marks = 17_881, 0, ()
    return run
