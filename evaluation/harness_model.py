"""Winnow's models as a language model of lm-evaluation-harness.

Importing this module imports lm-evaluation-harness; evaluation/harness.py does when it runs.

Choices
- Context and continuation are tokenized by the harness (`TemplateLM`): for a decoder-only model
  the whole minus the context, for an encoder-decoder each by itself. Rolling likelihoods of
  decoder-only models use the harness's windows too. So scores compare with those of its "hf" model.
- The rolling likelihood of a T5 is an estimator of `Likelihood`, span by default. The harness's
  own scores a text in the decoder with an empty encoder, which no T5 was trained for.
- Stop strings are cut off after generating. Generation ends at the end of text or at the largest
  number of tokens.
- One process handles all requests, on all of its devices.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from evaluation.errors import EvaluationError
from evaluation.inference import Inference, Pair
from models.decoding import Beam, Greedy, Sample
from pruning.corpus.tokenizers import JsonTokenizer
from pruning.scores.model.likelihood import Likelihood, start_id

_MAX_NEW_TOKENS = 256  # where a task says nothing; as the harness's "hf" model


class WinnowLM(TemplateLM):
    """An `Inference` for the harness.

    Args:
      inference: the model.
      rolling: estimator of a T5's rolling likelihood.
      special_tokens: whether texts get the tokens that a Hugging Face tokenizer adds by itself,
        such as Llama's BOS.
      seed: of sampling.
    """

    def __init__(
        self,
        inference: Inference,
        rolling: Likelihood | None = None,
        special_tokens: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        self.inference = inference
        self.backend = "seq2seq" if inference.has_encoder else "causal"
        self._rolling = rolling or Likelihood("span")
        tokenizer = inference.tokenizer
        special = special_tokens and not inference.has_encoder
        self._encode = tokenizer.encode
        if special and isinstance(tokenizer, JsonTokenizer):
            self._encode = tokenizer.encode_framed
        self._seed = seed

    @property
    def eot_token_id(self) -> int:
        return self.inference.model.config.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id that stands before a text that has nothing before it."""
        return start_id(self.inference.model.config, self.inference.tokenizer)

    @property
    def max_length(self) -> int:
        return self.inference.max_length

    @property
    def tokenizer_name(self) -> str:
        return self.inference.tokenizer.digest

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        if add_special_tokens is False:
            return self.inference.tokenizer.encode(string)
        return self._encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Pair(context, continuation) for _, context, continuation in requests]
        sums, greedy = self.inference.log_likelihoods(pairs)
        answers = list(zip(sums.tolist(), greedy.tolist(), strict=True))
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        texts = [request.args[0] for request in requests]
        rolling = self._rolling_t5 if self.inference.has_encoder else self._rolling_decoder
        found = rolling(texts)
        for text, value in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return found

    def _rolling_t5(self, texts: list[str]) -> list[float]:
        documents = [self.tok_encode(text) for text in texts]
        return self.inference.document_log_likelihoods(documents, self._rolling).tolist()

    def _rolling_decoder(self, texts: list[str]) -> list[float]:
        pairs, owner = [], []
        for i, text in enumerate(texts):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, windows):
                pairs.append(Pair(*window))
                owner.append(i)
        sums, _ = self.inference.log_likelihoods(pairs)
        totals = [0.0] * len(texts)
        for i, value in zip(owner, sums.tolist(), strict=True):
            totals[i] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        alike: dict[Any, list[Any]] = defaultdict(list)  # how to generate -> requests
        for i, request in enumerate(requests):
            given = normalize_gen_kwargs(request.args[1], _MAX_NEW_TOKENS)
            alike[given["max_gen_toks"], _how(given)].append((i, given["until"]))
        texts = [""] * len(requests)
        for (most, how), members in alike.items():
            prompts = [self._prompt(requests[i].args[0]) for i, _ in members]
            found = self.inference.generate(prompts, most, how, self._seed)
            for (i, until), tokens in zip(members, found, strict=True):
                texts[i] = cut(self.inference.decode(tokens), until)
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def _prompt(self, text: str) -> list[int]:
        return self.tok_encode(text) or [self.prefix_token_id]


def _how(given: dict[str, Any]) -> Greedy | Sample | Beam:
    """Return the decoding method for the harness's generation arguments.

    Raises ValueError on a word that we have nothing for.
    """
    rest = {
        name: value
        for name, value in given.items()
        if name not in ("until", "max_gen_toks", "do_sample", "temperature") and value is not None
    }
    beams = int(rest.pop("num_beams", 1))
    if beams > 1 and not rest and not given.get("do_sample"):
        return Beam(beams=beams)
    if not given.get("do_sample") or not given.get("temperature"):
        for name in ("top_p", "top_k"):  # without sampling they say nothing
            rest.pop(name, None)
        how: Greedy | Sample = Greedy()
    else:
        how = Sample(float(given["temperature"]))
        known = {name: rest.pop(name) for name in ("top_p", "top_k") if name in rest}
        how = dataclasses.replace(how, **known)
    if rest:
        raise EvaluationError(f"generation_kwargs that are not known here: {rest}.")
    return how


def cut(text: str, until: list[str] | str) -> str:
    """Return the text before the first stop string."""
    stops = [until] if isinstance(until, str) else until
    ends = [text.find(stop) for stop in stops if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]
