"""A hybrid that learns Python from the standard library's source on a laptop CPU, in minutes.

python -m launch.prepare --output=data/standard_library
python -m launch.pretrain --config=configs/quickstart.py --workdir=runs/quickstart
"""

from mmx.config import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, Phase, Run, TrainConfig


def get_config() -> Run:
    """7 lightning layers and 1 softmax layer, 4 experts of which a token takes 2, dropless."""
    return Run(
        model=ModelConfig(
            vocab_size=2048,
            hidden_size=128,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            rotary_dim=16,
            expert_hidden_size=256,
        ),
        data=DataConfig(path="data/standard_library", sequence_length=256, batch_size=8, heldout_sequences=128),
        optimizer=OptimizerConfig(
            peak_lr=8e-3,
            schedule=(Phase("linear", 1.0, steps=20), Phase("exponential", 0.1, steps=380), Phase("constant", 0.1)),
        ),
        train=TrainConfig(steps=400, log_every=10, eval_every=100),
        checkpoint=CheckpointConfig(every=100),
    )
