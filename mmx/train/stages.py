"""Where a run stands among its stages."""

import dataclasses

from mmx.config import ConfigError, Run
from mmx.train.checkpoint import Progress


def stage_is_over(run: Run, progress: Progress) -> bool:
    """Whether the stage of the last step has its steps or its tokens."""
    length = run.of_stage(progress.stage).train
    steps, tokens = progress.step - progress.step_before_stage, progress.tokens - progress.tokens_before_stage
    return bool((length.steps and steps >= length.steps) or (length.tokens and tokens >= length.tokens))


def run_is_over(run: Run, progress: Progress) -> bool:
    """Whether no step is left: the last stage is over, or ``train.steps`` is reached."""
    capped = bool(run.train.steps and progress.step >= run.train.steps)
    return capped or (progress.stage + 1 >= len(run.stages) and stage_is_over(run, progress))


def before_next_step(run: Run, progress: Progress) -> Progress:
    """The same place, as the start of the next stage if a stage is over and another one follows.

    Raises:
      ConfigError: if the place is in a stage that the run does not have.
    """
    if progress.stage >= max(1, len(run.stages)):
        raise ConfigError(
            f"the checkpoint of step {progress.step} is in stage {progress.stage + 1} and this run has "
            f"{max(1, len(run.stages))}: use another workdir, or the stages it was trained with"
        )
    if progress.stage + 1 < len(run.stages) and stage_is_over(run, progress):
        return dataclasses.replace(
            progress,
            data={},
            stage=progress.stage + 1,
            step_before_stage=progress.step,
            tokens_before_stage=progress.tokens,
            growth={},
        )
    return progress


def last_step(run: Run, progress: Progress) -> int | None:
    """The step with which the present stage, or the whole run, will end; None where a growing batch decides."""
    stage = run.of_stage(progress.stage)
    length, first = stage.train, progress.step_before_stage
    ends = [run.train.steps] if run.train.steps else []
    if length.steps:
        ends.append(first + length.steps)
    if length.tokens and not length.batch_marks:
        ends.append(first + -(-length.tokens // (stage.data.batch_size * stage.data.sequence_length)))
    return None if not ends or (length.tokens and length.batch_marks) else min(ends)
