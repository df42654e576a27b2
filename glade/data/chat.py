"""Chat templates: Jinja in a sandbox, as Hugging Face tokenizers carry them. Nothing here knows about tokens."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glade.errors import DataError


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    """Compiling takes a hundred times as long as rendering, and a file of rows renders one template for each."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = _refuse
    # Jinja's own filter escapes < and > for web pages; a prompt is not one
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(template)


def render(
    template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, *, bos_token: str, eos_token: str
) -> str:
    """The text a chat template makes of some messages.

    Args:
        template: Jinja source; it sees `messages`, `add_generation_prompt`, `bos_token`, `eos_token` and can call
            `raise_exception`.
        messages: mappings with "role" and "content".
    Raises:
        DataError: the template is not Jinja, uses something undefined, or refuses the messages.
    """
    try:
        return _compiled(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise DataError(f"the chat template cannot render these {len(messages)} messages: {error}") from error
