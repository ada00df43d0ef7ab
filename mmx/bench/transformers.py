"""Transformers' ``MiniMaxForCausalLM`` in PyTorch as a contestant, set up as its documentation has it."""

import time

import torch
import transformers

from mmx.bench.workload import DECODE, DECODE_TOKENS, MODEL, TRAIN
from mmx.config import LIGHTNING


class Transformers:
    """See ``mmx.bench.workload.Contestant``."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self._model = transformers.MiniMaxForCausalLM(
            transformers.MiniMaxConfig(
                vocab_size=MODEL.vocab_size,
                hidden_size=MODEL.hidden_size,
                intermediate_size=MODEL.expert_hidden_size,
                num_hidden_layers=MODEL.num_layers,
                num_attention_heads=MODEL.num_heads,
                num_key_value_heads=MODEL.num_kv_heads,
                head_dim=MODEL.head_dim,
                num_local_experts=MODEL.num_experts,
                num_experts_per_tok=MODEL.experts_per_token,
                layer_types=[f"{'linear' if k == LIGHTNING else 'full'}_attention" for k in MODEL.layer_pattern],
                max_position_embeddings=65536,
            )
        )
        self._optimizer = None

    def describe(self) -> str:
        """Name and version."""
        return f"Transformers {transformers.__version__} (torch {torch.__version__})"

    def run(self, work: str, length: int) -> float:
        """Seconds of one piece of work."""
        tokens = torch.randint(0, MODEL.vocab_size, (1, length + 1))
        if work == TRAIN:
            return self._train(tokens)
        self._optimizer = None
        return self._generate(tokens[:, :length], DECODE_TOKENS if work == DECODE else 0)

    def _train(self, tokens: torch.Tensor) -> float:
        self._model.train()
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
        started = time.perf_counter()
        loss = self._model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    @torch.no_grad()
    def _generate(self, prompt: torch.Tensor, new_tokens: int) -> float:
        self._model.eval()
        started = time.perf_counter()
        output = self._model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        if not new_tokens:
            return time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(new_tokens):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = self._model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        return time.perf_counter() - started
