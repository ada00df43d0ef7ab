"""Continues a prompt with a trained model.

python -m launch.generate --checkpoint=runs/quickstart --prompt='def main(' --max_new_tokens=64 --temperature=0.8
"""

import codecs

from absl import flags

from launch import program
from mmx.config import ConfigError

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Workdir of a run, one of its checkpoints, or a Hugging Face directory.", required=True
)
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; empty starts a new document.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Most tokens to add.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token each time.", lower_bound=0.0)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Mass of most likely tokens that is sampled from.", 0.0, 1.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")


def run() -> None:
    """Prints the prompt and its continuation, token by token."""
    import mmx
    from mmx.generate import generate

    model = mmx.load(_CHECKPOINT.value)
    if model.tokenizer is None:
        raise ConfigError(
            f"{_CHECKPOINT.value} has no tokenizer.json with marks of documents, as launch.prepare trains"
        )
    tokenizer = model.tokenizer
    # The prompt stands at the beginning of a document, as in training.
    prompt = [tokenizer.begin_of_document, *tokenizer.encode(_PROMPT.value)]
    print(_PROMPT.value, end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def show(token_B) -> None:
        print(decoder.decode(tokenizer.token_text(int(token_B[0]))), end="", flush=True)

    generate(
        model.config,
        model.params,
        [prompt],
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
        stop_ids=[tokenizer.end_of_document],
        on_tokens=show,
    )
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    program.main(run)
