"""Ask-LLM: how probable is it that a language model calls a document worth training on?

Sachdeva et al., "How to Train Data-Efficient LLMs" (arXiv 2402.09668), section 3: the model is
shown the document and a question, and the score is the softmax probability of "yes" as the first
token of its answer.

Choices
- Stored are the log-probabilities of yes *and* of no, over the whole vocabulary: whether P(no)
  should enter the score the paper leaves open, and a selection can form either.
- An answer may have several spellings, whose probabilities are added; each must be a single token.
- How long a document may be the paper leaves open: `max_tokens` bounds prompt and document
  together, and the score set says how many tokens of each document were not shown.
- Encoder-decoder judges (T5, Flan-T5): the encoder reads packed rows of prompts; the decoder runs
  one position per document, the start token, which sees only its own document. Decoder-only judges:
  packed rows as well; the answer is what the last position of each prompt predicts.
- Only the answers' logits and the normaliser are computed for those positions, in chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pruning.scorers import Column, Documents, Prepared, ScoreError, Scores
from pruning.scorers.prompt import Prompt
from pruning.scoring.packing import Side, Windows

if TYPE_CHECKING:
    import jax

    from models.model import Model
    from pruning.vocabulary import Vocabulary

# The wording of the paper (section 3.1 and its figure 3).
PROMPT = """###
{document}
###

Does the previous paragraph demarcated within ### and ### contain informative signal for \
pre-training a large-language model? An informative datapoint should be well-formatted, contain \
some usable knowledge of the world, and strictly NOT have any harmful, racist, sexist, etc. content.

OPTIONS:
- yes
- no"""

TRUNCATED = Column(pa.int32(), "tokens at the document's end that the model was not shown")
COLUMNS = {
    "ask_llm_yes": Column(
        pa.float32(), "natural-log probability, over the whole vocabulary, that the answer is yes"
    ),
    "ask_llm_no": Column(pa.float32(), "the same for no"),
    "truncated_tokens": TRUNCATED,
}


@dataclasses.dataclass(frozen=True)
class AskLLM:
    """Settings of Ask-LLM.

    Attributes:
      prompt: the question, with `{document}` where the document goes.
      yes, no: the spellings of each answer.
      max_tokens: of the prompt, the document and an encoder's EOS together; 512 is what T5 was
        pretrained with.
    """

    prompt: str = PROMPT
    yes: tuple[str, ...] = ("yes",)
    no: tuple[str, ...] = ("no",)
    max_tokens: int = 512

    def prepare(self, model: Model, vocabulary: Vocabulary) -> Prepared:
        """Raises ScoreError or VocabularyError where prompt, answers or vocabulary are unfit."""
        config = model.config
        prompt = self.prompt_ids(vocabulary, config)
        if len(prompt) >= self.max_tokens:
            prompt.around(Documents.of([]), self.max_tokens)  # raises, and says why
        yes = tuple(vocabulary.token(answer) for answer in self.yes)
        no = tuple(vocabulary.token(answer) for answer in self.no)
        if overlap := set(yes) & set(no):
            raise ScoreError(f"{vocabulary.pieces(sorted(overlap))} is an answer of both sides.")

        def windows(documents: Documents) -> Windows:
            filled = np.flatnonzero(documents.lengths)
            shown, _ = prompt.around(documents.take(filled), self.max_tokens)
            one_each = np.arange(len(filled) + 1)
            if config.family == "t5":
                start = np.full(len(filled), config.decoder_start_id, np.int32)
                return Windows(
                    filled,
                    (
                        Side("encoder", shown.offsets, {"encoder_input_tokens": shown.tokens}),
                        Side("decoder", one_each, {"decoder_input_tokens": start}),
                    ),
                )
            return Windows(
                filled,
                (
                    Side("decoder", shown.offsets, {"decoder_input_tokens": shown.tokens}),
                    Side("answer", one_each, {}),
                ),
            )

        def step(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            return answer_log_probabilities(model, params, batch, (yes, no))

        def finish(documents: Documents, windows: Windows, answers: np.ndarray) -> Scores:
            cut = np.maximum(documents.lengths - (self.max_tokens - len(prompt)), 0)
            log_probabilities = np.full((len(documents), 2), np.nan, np.float32)
            log_probabilities[windows.document] = answers
            columns = {
                "ask_llm_yes": log_probabilities[:, 0],
                "ask_llm_no": log_probabilities[:, 1],
                "truncated_tokens": cut.astype(np.int32),
            }
            return Scores(columns)

        return Prepared(
            name="ask_llm",
            columns=COLUMNS,
            sides=("encoder", "decoder") if config.family == "t5" else ("decoder", "answer"),
            longest=(self.max_tokens, 1),
            answer_shape=(2,),
            windows=windows,
            step=step,
            finish=finish,
            summary={
                "prompt_tokens": len(prompt),
                "answers": {"yes": list(yes), "no": list(no)},
            },
        )

    def prompt_ids(self, vocabulary: Vocabulary, config: Any) -> Prompt:
        """The prompt's ids as this model (a `models.config` object) wants them."""
        if config.family == "t5":
            return Prompt.of(self.prompt, vocabulary, end=(config.eos_id,))
        begin = () if config.bos_id is None else (config.bos_id,)
        return Prompt.of(self.prompt, vocabulary, begin=begin)


def answer_log_probabilities(
    model: Model,
    params: Any,
    batch: Mapping[str, jax.Array],
    answers: tuple[tuple[int, ...], ...],
) -> jax.Array:
    """log P(one of the answer's tokens comes first), for every document of packed rows.

    Args:
      model, params: the judge.
      batch: int32; `encoder_input_tokens` and `encoder_segment_ids` [rows, length],
        `decoder_input_tokens` (the start id) and `decoder_segment_ids` [rows, documents]. For a
        decoder-only judge: `decoder_input_tokens` and `decoder_segment_ids` [rows, length],
        `answer_segment_ids` [rows, documents].
      answers: the token ids of each answer.

    Returns:
      Natural-log probabilities over the whole vocabulary, float32 [rows, documents, answers].
      Positions of segment 0 hold numbers without meaning.
    """
    import jax
    import jax.numpy as jnp

    from models.losses import token_log_likelihood

    module = model.bind(params)
    if model.config.family == "t5":
        segments = batch["encoder_segment_ids"]
        encoded = module.encode(batch["encoder_input_tokens"], segments)  # [rows, length, d_model]
        starts = batch["decoder_input_tokens"]
        hidden = module.decode(
            encoded,
            segments,
            starts,
            batch["decoder_segment_ids"],
            absorb=starts.shape[1] < model.config.d_kv,
        )  # [rows, documents, d_model]
    else:
        segments = batch["decoder_segment_ids"]
        everywhere = module.hidden(batch["decoder_input_tokens"], segments)
        last = _last_positions(segments, batch["answer_segment_ids"])
        hidden = jnp.take_along_axis(everywhere, last[..., None], axis=1)

    kernel, scale = module.output_embedding()
    tokens = jnp.asarray([token for answer in answers for token in answer], jnp.int32)
    candidates = jnp.broadcast_to(tokens, (*hidden.shape[:2], len(tokens)))
    log_likelihood = token_log_likelihood(
        hidden,
        kernel,
        candidates,
        scale=scale,
        softcap=getattr(model.config, "logit_softcap", None),
    )  # [rows, documents, tokens of all answers]
    ends = np.cumsum([len(answer) for answer in answers])
    return jnp.stack(
        [
            jax.nn.logsumexp(part, axis=-1)
            for part in jnp.split(log_likelihood, ends[:-1].tolist(), axis=-1)
        ],
        axis=-1,
    )


def _last_positions(segment_ids: jax.Array, wanted: jax.Array) -> jax.Array:
    """Where each wanted segment ends: [rows, length] and [rows, documents] -> [rows, documents]."""
    import jax.numpy as jnp

    belongs = segment_ids[:, None, :] == wanted[:, :, None]  # [rows, documents, length]
    return jnp.max(jnp.where(belongs, jnp.arange(segment_ids.shape[1]), 0), axis=-1)
