"""Chat templates: the text around a question that an instruct model was trained with.

    frame = render(tokenizer.chat_template, tokenizer.special, system="You rate documents.")
    frame.before + question + frame.after

Choices
- A template is a program from an external source. It runs in Jinja's immutable sandbox, with the
  functions that transformers offers and nothing else, in a separate process with limits on time,
  memory and output.
- It runs once at the start, around a placeholder, never around a document. The template's changes
  to the text of a message (most strip it) are found by probing and repeated for every document.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pruning.scores.model.scorer import ScoreError

_PLACEHOLDER = "DOCUMENT7b1d9c52e0a44f4e"
_SANDBOX = Path(__file__).with_name("chat_sandbox.py")
_SECONDS = 20.0


class TemplateError(ScoreError):
    """Error for a chat template that cannot be used."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """Trusted text before and after the user's message.

    Attributes:
      before, after: rendered by the template; special tokens are recognized in it.
      strip_start, strip_end: True if the template strips white space at that end of the message.
    """

    before: str
    after: str
    strip_start: bool = False
    strip_end: bool = False

    def message(self, text: str) -> str:
        """Return the message as the template would render it."""
        text = text.lstrip() if self.strip_start else text
        return text.rstrip() if self.strip_end else text


def render(
    template: str,
    special: Mapping[str, str],
    system: str | None = None,
    thinking: bool = False,
) -> Frame:
    """Render a template around one message of the user, up to the model's reply.

    Args:
      template: Jinja source.
      special: role ("bos", "eos", ...) -> token.
      system: the system prompt, or None for none.
      thinking: value of `enable_thinking`; False makes templates of thinking models write an empty
        thought before the answer.

    Raises:
      TemplateError: the template fails, takes too long, writes too much, or does not show the
        message exactly once.
    """
    around = f"\n {_PLACEHOLDER} \n"
    plain, probed = _in_sandbox(template, special, system, thinking, (_PLACEHOLDER, around))
    if plain.count(_PLACEHOLDER) != 1 or probed.count(_PLACEHOLDER) != 1:
        raise TemplateError(
            f"the chat template shows the user's message {plain.count(_PLACEHOLDER)} times, not "
            "once: give the model's own template, or set chat=False."
        )
    before, after = plain.split(_PLACEHOLDER)
    probed_before, probed_after = probed.split(_PLACEHOLDER)
    starts = {before: True, f"{before}\n ": False}
    ends = {after: True, f" \n{after}": False}
    if probed_before not in starts or probed_after not in ends:
        raise TemplateError(
            "the chat template changes the message in a way that is not trimming: its ids cannot "
            "be had exactly. Set chat=False and write the turns into the prompt."
        )
    return Frame(before, after, starts[probed_before], ends[probed_after])


def _in_sandbox(
    template: str,
    special: Mapping[str, str],
    system: str | None,
    thinking: bool,
    messages: Sequence[str],
) -> list[str]:
    """Render in a process that is killed when it takes too long."""
    given = {
        "template": template,
        "special": dict(special),
        "system": system,
        "thinking": thinking,
        "messages": list(messages),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_SANDBOX)],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise TemplateError(
            f"the chat template did not end within {_SECONDS:.0f} seconds."
        ) from error
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:  # killed by the memory limit, or Jinja is not installed
        last = done.stderr.strip().rpartition("\n")[2][:300]
        raise TemplateError(f"the chat template cannot be rendered: {last}") from error
    if "error" in answer:
        raise TemplateError(f"the chat template fails: {answer['error']}")
    return answer["texts"]
