"""MiniMax-Text-01: the released shapes with the report's pre-training recipe (arXiv 2501.08313, sections 2 and 4).

456,089,655,296 parameters. What the report does not print, and this recipe therefore chooses: AdamW's eps and clipping
(mmx.config.OptimizerConfig), the capacity factor, and that the plateaus follow each other (7.2T tokens at the peak,
then 3.2T at 1.3e-4, then 1T of decay). The batch starts at 16M tokens and goes to 32M, 64M and 128M at the report's
losses, which hold for its data and tokenizer: fit your own (launch.report --critical_batch).

  python -m launch.pretrain --config=configs/minimax_text_01.py --workdir=/shared/runs/text_01
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

T = 10**12


def get_config() -> Run:
    """80 layers, 7 lightning and 1 softmax in turn, 32 experts of which a token takes 2."""
    return Run(
        model=ModelConfig(
            vocab_size=200_064,
            hidden_size=6144,
            num_layers=80,
            layer_pattern=HYBRID_PERIOD * 10,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            rotary_dim=64,
            rope_base=10_000.0,  # Of the first stage; the release, after context extension, has 10,000,000.
            num_experts=32,
            experts_per_token=2,
            expert_hidden_size=9216,
            capacity_factor=1.25,
            # Four groups let the exchange of one overlap the experts of another (BUILD_NOTES.md). The report's global
            # router (model.global_router=True) drops less, but its buffers must hold the worst case.
            exchange_groups=4,
            dtype="bfloat16",
            remat="full",
        ),
        # With an expert a device, a layer gathers 340 MB of experts instead of all 11 GB.
        mesh=MeshConfig(fsdp=-1, expert=32),
        data=DataConfig(path="data/pretraining", sequence_length=8192, batch_size=2048, heldout_sequences=2048),
        optimizer=OptimizerConfig(
            peak_lr=2e-4,
            schedule=(
                Phase("linear", 1.0, steps=500),
                Phase("constant", 1.0, tokens=72 * T // 10),
                Phase("constant", 0.65, tokens=32 * T // 10),
                Phase("exponential", 0.15, tokens=T),
                Phase("constant", 0.15),
            ),
        ),
        train=TrainConfig(
            steps=0,
            tokens=114 * T // 10,
            batch_marks=(1.98, 1.77, 1.58),
            batch_smoothing=200,
            batch_patience=50,
            log_every=10,
            eval_every=1000,
        ),
        checkpoint=CheckpointConfig(every=500, keep=3),
    )
