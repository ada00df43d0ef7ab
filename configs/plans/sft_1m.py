"""Supervised fine-tuning at 1,032,192 tokens (report Table 7), 80 rows a step; 1,000 steps, as no number is printed.

python -m launch.plan --config=configs/plans/sft_1m.py --topology=v5p:8x8x16
"""

from configs import minimax_text_01
from mmx.config import MeshConfig, Phase, Run

TOPOLOGY = "v5p:8x8x16"


def get_config() -> Run:
    """80 rows of 1,032,192 tokens a step."""
    run = minimax_text_01.get_config()
    run.model.rope_base = 10_000_000.0
    run.mesh = MeshConfig(expert=16, context=64)
    run.data.sequence_length, run.data.batch_size = 1_032_192, 80
    run.train.steps, run.train.tokens, run.train.batch_marks = 1_000, 0, ()
    run.train.micro_batches = 5
    run.optimizer.peak_lr = 3e-6
    run.optimizer.schedule = (Phase("constant", 1.0),)
    return run
