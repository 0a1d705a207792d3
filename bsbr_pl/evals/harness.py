"""A trained model as a model of the lm-evaluation-harness. Needs the extra `[lm-eval]`."""

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from bsbr_pl.attention.parts import check_positive
from bsbr_pl.data.tokenizer import Tokenizer
from bsbr_pl.metrics import IGNORED, token_nats
from bsbr_pl.model import LanguageModel

NEW_TOKENS = 256  # of a generation whose task names no number, as in the harness's own models


class HarnessModel(TemplateLM):
    """Log-likelihoods and generations of a `LanguageModel`, in batches.

    A text follows the end-of-text id, as every document does in training. Log-likelihoods are in nats, summed in
    float64. `loglikelihood_rolling` cuts a text into the harness's windows: those of evaluate.py, but the last one
    has a full context.

    Args:
        model: on any device.
        tokenizer: of the text that it was trained on; as many ids as the model has.
        max_length: tokens of the longest context; of a longer one the end is read.
        batch_size: texts that are read at once.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, max_length: int, batch_size: int = 8) -> None:
        super().__init__()
        check_positive(max_length=max_length, batch_size=batch_size)
        model.check_length(max_length)
        if tokenizer.vocab_size != model.vocab_size:
            raise ValueError(f"tokenizer has {tokenizer.vocab_size:,} ids, but the model has {model.vocab_size:,}")
        self.model, self.text_tokenizer = model.eval(), tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.text_tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of each text, which may be longer than `max_length`."""
        texts = [request.args[0] for request in requests]
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
            found = [(None, *make_disjoint_window(window)) for window in cut]
            windows += found
            owners += [number] * len(found)
        sums = [0.0] * len(texts)
        for number, (nats, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[number] += nats
        for text, total in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return sums

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(key, context, continuation) -> ln p of each continuation, and whether each of its tokens is the likeliest.

        Raises:
            ValueError: a continuation is longer than `max_length`.
        """
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        found: dict[int, tuple[float, bool]] = {}
        for start in tqdm(range(0, len(order), self.batch_size), "log-likelihoods", disable=disable_tqdm or None):
            batch = order[start : start + self.batch_size]
            for i, answer in zip(batch, self._score([requests[i][1:] for i in batch]), strict=True):
                found[i] = answer
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return [found[i] for i in range(len(requests))]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """One batch: texts are padded at their end, where no counted token can see it."""
        texts = [(context + continuation)[-self.max_length - 1 :] for context, continuation in pairs]
        inputs = torch.full((len(pairs), max(map(len, texts)) - 1), self.eot_token_id)
        targets = torch.full_like(inputs, IGNORED)
        for row, (text, (_, continuation)) in enumerate(zip(texts, pairs, strict=True)):
            end, count = len(text) - 1, len(continuation)
            if count > self.max_length:
                limit = f"max_length={self.max_length}"
                raise ValueError(f"a continuation has {count} tokens, more than {limit}: set a larger max_length")
            inputs[row, :end] = torch.tensor(text[:-1])
            targets[row, end - count : end] = torch.tensor(continuation)
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        counted = targets != IGNORED
        logits = self.model.head(self.model.hidden(inputs)[counted])  # (counted tokens, vocab_size)
        nats, right = token_nats(logits, targets[counted]), logits.argmax(-1) == targets[counted]
        counts = counted.sum(1).tolist()
        rows = zip(nats.split(counts), right.split(counts), strict=True)
        return [(-float(row.sum()), bool(hit.all())) for row, hit in rows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each text, up to a stop string, the end of text or the number of tokens.

        Prompts of one length and with the same options are continued at once: a decode state has no padding.

        Raises:
            ValueError: an option of sampling besides `temperature` and `top_k`, or no room for a prompt.
        """
        prompts = [self.tok_encode(request.args[0]) or [self.eot_token_id] for request in requests]
        options = [_options(request.args[1]) for request in requests]
        for number, one in enumerate(options):
            room = self.max_length - one["max_gen_toks"]
            if room < 1:
                raise ValueError(
                    f"max_length={self.max_length} leaves no room for a prompt before {one['max_gen_toks']} new tokens "
                    "(max_gen_toks of the task): set a larger max_length"
                )
            prompts[number] = prompts[number][-room:]

        def kind(number: int) -> tuple[str, int]:
            return json.dumps(options[number], sort_keys=True), len(prompts[number])

        found: dict[int, str] = {}
        bar = tqdm(total=len(requests), desc="generations", disable=disable_tqdm or None)
        for _, group in groupby(sorted(range(len(requests)), key=kind), kind):
            numbers = list(group)
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                seed = len(found)  # repeated prompts are sampled anew
                texts = self._continue([prompts[i] for i in batch], seed=seed, **options[batch[0]])
                for i, text in zip(batch, texts, strict=True):
                    found[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                bar.update(len(batch))
        return [found[i] for i in range(len(requests))]

    def _continue(
        self, prompts: list[list[int]], until: list[str], max_gen_toks: int, seed: int, **sampling: Any
    ) -> list[str]:
        """The continuations of prompts of one length."""
        length = len(prompts[0])

        def cut(ids: Tensor) -> list[tuple[str, bool]]:
            return [self._cut(row, until) for row in ids[:, length:].tolist()]

        def ended(ids: Tensor) -> bool:
            return all(end for _, end in cut(ids))

        inputs = torch.tensor(prompts, device=self.device)
        generated = self.model.generate(inputs, max_gen_toks, seed=seed, until=ended, **sampling)
        return [text for text, _ in cut(generated)]

    def _cut(self, ids: list[int], stops: list[str]) -> tuple[str, bool]:
        """The text before the end of text and before every stop string, and whether it contains one of them."""
        ended = self.eot_token_id in ids
        text = self.text_tokenizer.decode(ids[: ids.index(self.eot_token_id)] if ended else ids)
        places = [text.find(stop) for stop in stops if stop and stop in text]
        return text[: min(places, default=len(text))], ended or bool(places)


def _options(asked: dict[str, Any]) -> dict[str, Any]:
    """A task's options of generation, as arguments of `_continue`."""
    options = dict(normalize_gen_kwargs(asked, NEW_TOKENS))
    wanted = {name: options[name] for name in ("until", "max_gen_toks")}
    if not options.pop("do_sample"):
        return {"temperature": 0.0, **wanted}
    sampling = {name: value for name, value in options.items() if name not in wanted}
    unknown = sampling.keys() - {"temperature", "top_k"}
    if unknown:
        raise ValueError(f"generations are sampled with temperature and top_k, but the task sets {min(unknown)}")
    return {**sampling, **wanted}
