"""Ask-LLM: probability that a language model calls a document useful for training.

Sachdeva et al., "How to Train Data-Efficient LLMs" (arXiv 2402.09668), section 3: the model is
shown the document and a question, and the score is the softmax probability of "yes" as the first
token of its answer.

Choices
- The log-probabilities of both yes and no are stored, over the whole vocabulary. The paper does not
  say whether P(no) enters the score, and a selection can form either.
- An answer may have several spellings, whose probabilities are added. Each must be a single token,
  and spellings with the same token count once. For answers of several tokens see `Rubric`
  (rubric.py).
- The paper does not give a maximum document length. `max_tokens` limits prompt and document
  together, and the score set has the number of tokens of each document that were not shown. With
  `windows`, parts of a long document are judged separately.
- Encoder-decoder judges (T5, Flan-T5): the encoder reads packed rows of prompts. The decoder runs
  one position per document, the start token, which attends only to its own document. Decoder-only
  judges read packed rows as well; the answer is predicted at the last position of each prompt.
- Only the answers' logits and the normalizer are computed for those positions, in chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from models.packing import Windows
from pruning.corpus.tokenizers import Tokenizer
from pruning.scores.model.document_windows import (
    TRUNCATED,
    Aggregate,
    judged,
    require_windows,
    with_windows,
)
from pruning.scores.model.inquiry import ONE_POINT, Inquiry, Wording
from pruning.scores.model.prompt import Prompt
from pruning.scores.model.scorer import Documents, Prepared, ScoreError, Scores, require_predictions
from pruning.scores.model.text_prompt import TextPrompt
from pruning.scores.score_set import Column
from pruning.store.manifest import added_setting

if TYPE_CHECKING:
    import jax

    from models.model import Model

# Prompt of the paper (section 3.1 and its figure 3).
PROMPT = """###
{document}
###

Does the previous paragraph demarcated within ### and ### contain informative signal for \
pre-training a large-language model? An informative datapoint should be well-formatted, contain \
some usable knowledge of the world, and strictly NOT have any harmful, racist, sexist, etc. content.

OPTIONS:
- yes
- no"""

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
      prompt: the question, with `{document}` in place of the document.
      yes, no: the spellings of each answer.
      max_tokens: largest number of tokens of the prompt, the document and an encoder's EOS
        together; T5 was pretrained with 512.
      chat: put the question into the model's chat template, as a user's message.
      system: the system prompt of the template, or None for none.
      thinking: let a thinking model think before its answer; False shows it an empty thought.
      windows: largest number of windows of a document that are judged, each in the whole prompt;
        None for as many as cover the document.
      aggregate: how the windows' values give the document's value: the mean of the probabilities,
        weighted by the tokens of each, or the minimum or maximum.
      keep_windows: store the values of each window as well.
    """

    prompt: str = PROMPT
    yes: tuple[str, ...] = ("yes",)
    no: tuple[str, ...] = ("no",)
    max_tokens: int = 512
    chat: bool = added_setting(False)
    system: str | None = added_setting(None)
    thinking: bool = added_setting(False)
    windows: int | None = added_setting(1)
    aggregate: Aggregate = added_setting("mean")  # noqa: RUF009
    keep_windows: bool = added_setting(False)

    def __post_init__(self) -> None:
        for side, answers in (("yes", self.yes), ("no", self.no)):
            if not answers:
                raise ScoreError(
                    f"AskLLM.{side} is empty: give at least one spelling of the answer."
                )
        if self.max_tokens < 2:
            raise ScoreError(f"AskLLM.max_tokens={self.max_tokens} leaves no room for a document.")
        require_windows(self.windows, "AskLLM")

    def prepare(self, model: Model, tokenizer: Tokenizer) -> Prepared:
        """Raise ScoreError or VocabularyError if prompt, answers or tokenizer are unsuitable."""
        require_predictions(model.config, "AskLLM")
        config = model.config
        prompt = self.prompt_ids(tokenizer, config)
        yes = _answer_ids(self.yes, tokenizer)
        no = _answer_ids(self.no, tokenizer)
        if overlap := set(yes) & set(no):
            raise ScoreError(f"{tokenizer.pieces(sorted(overlap))} is an answer of both sides.")
        asked = Inquiry(
            config, [prompt], [ONE_POINT], self.max_tokens, self.windows, self.keep_windows, False
        )

        def step(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            return answer_log_probabilities(model, params, batch, (yes, no))

        def finish(documents: Documents, windows: Windows, answers: np.ndarray) -> Scores:
            values = {"ask_llm_yes": answers[:, 0], "ask_llm_no": answers[:, 1]}
            return judged(asked.spans(documents), values, values, self.aggregate, self.keep_windows)

        return Prepared(
            name="ask_llm",
            columns=with_windows(COLUMNS, self.keep_windows),
            sides=asked.sides,
            longest=asked.longest,
            answer_shape=(2,),
            windows=asked.windows,
            step=step,
            finish=finish,
            summary={
                "prompt_tokens": len(prompt),
                "answers": {"yes": list(yes), "no": list(no)},
            },
            absorbs=config.has_encoder,
            read=asked.read,
            pretend=asked.pretend,
        )

    def prompt_ids(self, tokenizer: Tokenizer, config: Any) -> Prompt | TextPrompt:
        """Return the prompt for a model with this configuration."""
        wording = Wording(self.max_tokens, self.chat, self.system, self.thinking)
        return wording.prompt(self.prompt, tokenizer, config)


def _answer_ids(spellings: Sequence[str], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the distinct token ids of an answer's spellings."""
    return tuple(dict.fromkeys(tokenizer.token(spelling) for spelling in spellings))


def answer_log_probabilities(
    model: Model,
    params: Any,
    batch: Mapping[str, jax.Array],
    answers: tuple[tuple[int, ...], ...],
) -> jax.Array:
    """Return log P(one of the answer's tokens comes first) for documents of packed rows.

    Args:
      model, params: the judge.
      batch: int32; `encoder_input_tokens` and `encoder_segment_ids` [rows, length],
        `decoder_input_tokens` (the start id) and `decoder_segment_ids` [rows, documents]. For a
        decoder-only judge: `decoder_input_tokens` and `decoder_segment_ids` [rows, length],
        `answer_segment_ids` [rows, documents].
      answers: the token ids of each answer.

    Returns:
      Natural-log probabilities over the whole vocabulary, float32 [rows, documents, answers].
      Positions of segment 0 are undefined.
    """
    import jax
    import jax.numpy as jnp

    from models.losses import token_log_likelihood

    module = model.bind(params)
    hidden = module.answer_states(batch)  # [rows, documents, d_model]
    tokens = jnp.asarray([token for answer in answers for token in answer], jnp.int32)
    candidates = jnp.broadcast_to(tokens, (*hidden.shape[:2], len(tokens)))
    log_likelihood = token_log_likelihood(
        hidden, module.output_head(), candidates
    )  # [rows, documents, tokens of all answers]
    ends = np.cumsum([len(answer) for answer in answers])
    return jnp.stack(
        [
            jax.nn.logsumexp(part, axis=-1)
            for part in jnp.split(log_likelihood, ends[:-1].tolist(), axis=-1)
        ],
        axis=-1,
    )
