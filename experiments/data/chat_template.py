"""Chat templates as data: jinja programs of a tokenizer_config.json, run in a sandbox."""
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2.sandbox import ImmutableSandboxedEnvironment

from experiments.errors import UsageError


class _RefusedError(Exception):
    """Raised by a template itself."""


def render_chat_template(template: str, messages: Sequence[Mapping[str, str]], **values: Any) -> bytes:
    """Renders messages, and the opening of the answer, in UTF-8.

    Args:
      values: what the template may name besides, such as bos_token.
    Raises:
      UsageError: the template is broken, does what the sandbox forbids, or refuses these messages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = _refuse
    try:
        rendered = environment.from_string(template).render(
            messages=[dict(message) for message in messages], add_generation_prompt=True, **values)
    except _RefusedError as error:
        raise UsageError(f"chat_template refuses these messages: {error}") from error
    except Exception as error:  # a template is a program, and may raise anything
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"chat_template cannot be rendered: {type(error).__name__}: {reason}") from error
    return rendered.encode("utf-8", "surrogateescape")


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)
