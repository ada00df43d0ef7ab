"""Context extension: the report's three stages, to 128K, 512K and 1M tokens (section 4.3, Table 6), and a miniature.

python -m launch.prepare --output=data/long --source=corpus=crawl.jsonl --long_qa=corpus --long_qa_lengths=8192,1048576
python -m launch.pretrain --config=configs/long_context.py --workdir=/shared/runs/long \\
    --config.checkpoint.initial=/shared/runs/text_01

bash launch/long_context.sh    the miniature, from the quickstart's checkpoint, with its data: on a laptop

The report gives lengths, RoPE bases, tokens, shares of the length buckets, 10% of long question-answer samples in the
last fifth of each stage, and weights that move linearly at the transitions. Our choices, where it gives nothing:

- Rates: 3e-5, where pre-training ended, then half of it and down to a tenth. The follow-up report (MiniMax-M1) saw
  gradients explode at jumps in length, so each stage begins at a tenth of its rate and climbs over 100 steps. Clipping
  stays at a norm of 1.
- 32M tokens a step in each stage.
- Transitions take 2% of a stage, so that its shares over all stay within 1% of Table 6's; the first starts from short
  documents alone, which are what rows of 8K tokens mostly saw.
- Question-answer samples are short, medium and long as the stage's documents are.
- `:gentle` puts a stage of 32K tokens, where the follow-up report's four begin, before the first, with a tenth of its
  tokens.

`:miniature` is the same recipe with lengths divided by 64 (2K, 8K, 16K; buckets below 512 and above 2,048 tokens) and
tokens by 250,000 (1.2M, 128K, 104K). Its rate is a third of the quickstart's last: a standard library has few documents
of some lengths, which higher rates learn by heart (BUILD_NOTES.md).
"""

import dataclasses

from configs import minimax_text_01, quickstart
from mmx.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Phase,
    Run,
    Stage,
    TrainConfig,
)

K, B = 2**10, 10**9
# Table 6: shares of documents below 32K tokens, of 32K to 128K, and above.
TABLE_6 = {"128K": (30, 70, 0), "512K": (35, 35, 30), "1M": (30, 30, 40)}
TOKENS = {"128K": 300 * B, "512K": 32 * B, "1M": 26 * B}
VARIANTS = ("", "gentle", "miniature")


def get_config(variant: str = "") -> Run:
    """The stages of a variant: the report's, ``gentle`` or ``miniature``."""
    if variant not in VARIANTS:
        raise ConfigError(f"configs/long_context.py:{variant} is no variant: use :gentle, :miniature or none")
    return _miniature() if variant == "miniature" else _full(gentle=variant == "gentle")


def _full(gentle: bool) -> Run:
    """For 1,024 chips, an expert on each of 32; longer rows are split over more of ``context``."""
    stages = (
        _stage("128K", 128 * K, 256, 5e6, _rates(1.0), MeshConfig(fsdp=8, expert=32, context=4)),
        _stage("512K", 512 * K, 64, 10e6, _rates(0.5), MeshConfig(fsdp=2, expert=32, context=16)),
        _stage("1M", 1024 * K, 32, 10e6, _rates(0.5, decay_tokens=25 * B), MeshConfig(expert=32, context=32)),
    )
    if gentle:
        first = dataclasses.replace(stages[0], tokens=270 * B)
        before = dataclasses.replace(
            first,
            name="32K",
            tokens=30 * B,
            sequence_length=32 * K,
            batch_size=1024,
            rope_base=1e6,
            mesh=MeshConfig(fsdp=32, expert=32),
        )
        stages = (before, first, *stages[1:])
    return Run(
        # Documents of all lengths share the rows: eight slices of each a device, dealt by their work.
        model=dataclasses.replace(minimax_text_01.get_config().model, sequence_layout="balanced"),
        data=DataConfig(path="data/long", mixture=("*/short=100",), short_below=32 * K, long_above=128 * K),
        optimizer=OptimizerConfig(peak_lr=3e-5),
        train=TrainConfig(steps=0, log_every=10, eval_every=500, position_sequences=64),
        checkpoint=CheckpointConfig(every=200, keep=3),
        stages=stages,
    )


def _miniature() -> Run:
    quick = quickstart.get_config()
    batches = {"128K": 4, "512K": 1, "1M": 1}
    stages = tuple(
        dataclasses.replace(
            stage,
            tokens=stage.tokens // 250_000,
            sequence_length=stage.sequence_length // 64,
            batch_size=batches[stage.name],
            mesh=MeshConfig(),
            schedule=_rates(level, steps, decay),
            late_mixture=tuple(entry.replace("corpus_qa", "python_qa") for entry in stage.late_mixture),
            heldout_sequences=64 * 256 // (stage.sequence_length // 64),
        )
        for stage, level, steps, decay in zip(
            _full(gentle=False).stages, (1.0, 0.5, 0.5), (20, 4, 2), (0, 0, 80_000), strict=True
        )
    )
    return dataclasses.replace(
        quick,
        data=DataConfig(
            path="data/long_miniature", mixture=("*/short=100",), short_below=32 * K // 64, long_above=128 * K // 64
        ),
        optimizer=dataclasses.replace(quick.optimizer, peak_lr=3e-4),
        train=TrainConfig(steps=0, log_every=1, position_sequences=6),
        checkpoint=CheckpointConfig(every=20, keep=3, initial="runs/quickstart"),
        stages=stages,
    )


def _stage(
    name: str, sequence_length: int, batch_size: int, rope_base: float, schedule: tuple[Phase, ...], mesh: MeshConfig
) -> Stage:
    shares = dict(zip(("short", "medium", "long"), TABLE_6[name], strict=True))
    return Stage(
        name,
        tokens=TOKENS[name],
        sequence_length=sequence_length,
        batch_size=batch_size,
        mesh=mesh,
        rope_base=rope_base,
        schedule=schedule,
        mixture=tuple(f"*/{bucket}={share}" for bucket, share in shares.items() if share),
        transition=0.02,
        late_mixture=tuple(f"corpus_qa/{bucket}={share}" for bucket, share in shares.items() if share),
        late_rows=0.2,
        late_share=0.1,
        heldout_sequences=max(8, 2048 * 8 * K // sequence_length),
    )


def _rates(level: float, steps: int = 100, decay_tokens: int = 0) -> tuple[Phase, ...]:
    """A tenth of the rate at first: layers of different decay take different times to adapt to a new length."""
    rest = Phase("exponential", 0.1, tokens=decay_tokens) if decay_tokens else Phase("constant", level)
    return (Phase("constant", 0.1 * level, steps=1), Phase("linear", level, steps=steps), rest)
