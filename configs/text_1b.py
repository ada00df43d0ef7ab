"""A hybrid of about a billion active parameters, for one host with GPUs.

python -m launch.prepare --output=data/mine --vocab_size=65536 --source=web=crawl.jsonl
python -m launch.pretrain --config=configs/text_1b.py --workdir=runs/text_1b --config.data.path=data/mine
"""

from mmx.config import (
    HYBRID_PERIOD,
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    Phase,
    Run,
    TrainConfig,
)


def get_config() -> Run:
    """16 layers, 14 lightning and 2 softmax, 8 experts of which a token takes 2; 32K tokens a step and device."""
    return Run(
        model=ModelConfig(
            vocab_size=65_536,
            hidden_size=2048,
            num_layers=16,
            layer_pattern=HYBRID_PERIOD * 2,
            num_heads=16,
            num_kv_heads=4,
            head_dim=128,
            rotary_dim=64,
            num_experts=8,
            experts_per_token=2,
            expert_hidden_size=3072,
            dtype="bfloat16",
            remat="full",
        ),
        mesh=MeshConfig(fsdp=-1),
        data=DataConfig(path="data/mine", sequence_length=8192, batch_size=32, heldout_sequences=64, read_threads=8),
        optimizer=OptimizerConfig(
            peak_lr=3e-4,
            schedule=(
                Phase("linear", 1.0, steps=500),
                Phase("constant", 1.0, tokens=20 * 10**9),
                Phase("exponential", 0.1, tokens=5 * 10**9),
                Phase("constant", 0.1),
            ),
        ),
        train=TrainConfig(steps=100_000, micro_batches=4, log_every=10, eval_every=1000),
        checkpoint=CheckpointConfig(every=500, keep=3),
    )
