"""Chat templates for tokenizers that have none. `glade.data.chat` renders them; they travel with the tokenizer."""

from pathlib import Path

from glade.data.tokenizer import Tokenizer
from glade.errors import DataError

# Each ends the assistant's turn with the EOS, on which generation stops, and opens it with a line end, which no merge
# of a vocabulary joins to the first word of an answer.
_REFUSE = "{{ raise_exception('unknown role ' ~ message['role'] ~ '; roles are system, user, assistant') }}"

PLAIN = (
    """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}{{ 'User:\\n' + message['content'] + '\\n' }}
{%- elif message['role'] == 'assistant' %}{{ 'Assistant:\\n' + message['content'] + eos_token + '\\n' }}
{%- else %}"""
    + _REFUSE
    + """{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"""
)

ALPACA = (
    """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}
{%- else %}"""
    + _REFUSE
    + """{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""
)

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TEMPLATES = {"plain": PLAIN, "alpaca": ALPACA, "chatml": CHATML}


def chat_template(tokenizer: Tokenizer, spec: str) -> str:
    """The Jinja source that a spec names.

    Args:
        spec: "auto" (the tokenizer's own; where it has none, "chatml" if the vocabulary has its marks, else "plain"),
            "plain" ("User:" and "Assistant:", each on a line), "alpaca" ("### Instruction:"), "chatml"
            (<|im_start|>, and <|im_end|> as the EOS), or the path of a file with Jinja source.
    Raises:
        DataError: an unknown spec, marks that the vocabulary lacks, or a template that this tokenizer cannot use.
    """
    if spec == "auto":
        if tokenizer.chat_template is not None:
            return tokenizer.chat_template
        spec = "chatml" if _has_chatml(tokenizer) else "plain"
    if spec == "chatml" and not _has_chatml(tokenizer):
        raise DataError(
            f"chat template 'chatml' needs the special tokens <|im_start|> and <|im_end|>, the latter as the EOS (here "
            f"{tokenizer.eos!r}); take 'plain', which needs none"
        )
    if spec in TEMPLATES:
        return TEMPLATES[spec]
    path = Path(spec)
    if not path.is_file():
        raise DataError(f"chat template {spec!r}: no such file; give auto, {', '.join(TEMPLATES)}, or a file of Jinja")
    return path.read_text(encoding="utf-8")


def _has_chatml(tokenizer: Tokenizer) -> bool:
    return tokenizer.eos == "<|im_end|>" and tokenizer.model.token_to_id("<|im_start|>") is not None
