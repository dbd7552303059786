"""Chats as the text that a model was trained on, by the template that it came with.

Notable: templates are Jinja text from strangers, run in Jinja's sandbox with the names that Hugging Face gives
them. What people write may not spell a token with which the template marks turns: it could end its own and speak as
someone else. (Templates that mark turns with ordinary words protect nobody.) Left out: tools, documents, images,
and templates by name.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from fastlm.data.tokenizers import Tokenizer
from fastlm.data.tokenizers.base import check_text
from fastlm.errors import UserError

Message = Mapping[str, str]
# Hugging Face's own tag, which marks what the assistant said, for training.
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def encode(
    template: str | None, tokenizer: Tokenizer, messages: Sequence[Message], names: Mapping[str, str]
) -> np.ndarray:
    """Returns the ids of a chat up to where the assistant speaks next, int32 [tokens].

    Args:
      template: the Jinja text that the model came with; None if it came without.
      messages: {"role": "system" | "user" | "assistant", "content": ...} in order.
      names: "bos_token" and "eos_token", as the template may call what marks a text.

    Raises:
      UserError: no template, a broken one or one that refuses these messages; a message that spells a marker.
    """
    if not template:
        raise UserError("this model came without a chat template; leave out --chat to continue a text")
    markers = [marker for marker in tokenizer.markers() if marker in template or marker in names.values()]
    for message in messages:
        check_text(message["content"], "a message")
        spelled = next((marker for marker in markers if marker in message["content"]), None)
        if spelled is not None:
            raise UserError(f"a message spells {spelled!r}, with which the template marks turns; write it otherwise")
    return tokenizer.encode_marked(render(template, messages, names))


def render(template: str, messages: Sequence[Message], names: Mapping[str, str]) -> str:
    """Returns the text of a chat up to where the assistant speaks next.

    Raises:
      UserError: the template is broken, or refuses these messages.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    template = _GENERATION.sub("", template)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes for HTML
    values: dict[str, Any] = {"bos_token": "", "eos_token": "", "tools": None, "documents": None, **names}
    values["messages"] = list(map(dict, messages))
    try:
        return environment.from_string(template).render(values | {"add_generation_prompt": True})
    except _Refused as refused:
        raise UserError(f"the chat template refuses these messages: {refused}") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the model's chat template is broken at line {error.lineno}: {error.message}") from None
    except Exception as error:  # whatever a stranger's program may raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the model's chat template fails on these messages ({what[:200]})") from None


class _Refused(Exception):
    """A template called `raise_exception`."""


def _refuse(message: str) -> None:
    raise _Refused(message)
