"""Chat templates: the one for tokenizers without any, and what loading settles in the others.

A loaded tokenizer's template writes the BOS that its model was trained with, and prints a fixed date instead
of today's. Both are part of the template's text, so that plain transformers, TRL and inference servers render
a published tokenizer in the same way.
"""

import re
from datetime import datetime

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError

# For tokenizers without a chat template: the turns as they are; a separator ends each but the assistant's.
PLAIN_TEMPLATE = (
    "{{% for m in messages %}}{{{{ m.content }}}}"
    "{{% if m.role == 'assistant' %}}{{{{ eos_token }}}}"
    "{{% else %}}{{{{ {separator!r} }}}}{{% endif %}}{{% endfor %}}"
)
PLAIN_BEGINNING = PLAIN_TEMPLATE.format(separator="").partition("''")[0]

WRITE_BOS = "{{ bos_token }}"
CLOCK = "strftime_now"  # the function by which a template reads the clock
DATE_FORMAT = re.compile(CLOCK + r"\(\s*(['\"])(.{0,100}?)\1")
TEMPLATE_DATE = datetime(2026, 1, 1)  # what templates that print the date print
DATE_KEY = "template_date"  # in tokenizer_config.json


def settle_template(tokenizer: PreTrainedTokenizerBase, source: str, separator: str) -> None:
    """Give the tokenizer a chat template if it has none, fix the date in it, and let it write the BOS.

    `separator` ends the turns in a template that it gets. Raises `UserError` that names `source` if the
    tokenizer has several templates and none of them is the default.
    """
    if not tokenizer.chat_template:
        _set_template(tokenizer, PLAIN_TEMPLATE.format(separator=separator))
        _write_bos(tokenizer)
        return
    template = default_template(tokenizer)
    if template is None:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise UserError(
            f"{source}: its tokenizer has the chat templates {names}, and no default; choose one, and save "
            "the tokenizer: tokenizer.chat_template = tokenizer.chat_template['NAME']"
        )
    if is_plain(tokenizer):  # written by a run, as its model was trained
        return
    if CLOCK in template and not fixed_date(tokenizer):
        _set_template(tokenizer, _fix_date(template))
        tokenizer.init_kwargs[DATE_KEY] = TEMPLATE_DATE.date().isoformat()  # `save_pretrained` writes it
    _write_bos(tokenizer)


def default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template that renders a conversation; None if there are several and no default."""
    templates = tokenizer.chat_template
    return templates.get("default") if isinstance(templates, dict) else templates


def is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer has the template that `settle_template` gives, with any separator."""
    template = default_template(tokenizer) or ""
    return template.removeprefix(WRITE_BOS).startswith(PLAIN_BEGINNING)


def fixed_date(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the date that the template prints, as YYYY-MM-DD; None if it prints none."""
    return tokenizer.init_kwargs.get(DATE_KEY)


def _set_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    templates = tokenizer.chat_template
    tokenizer.chat_template = templates | {"default": template} if isinstance(templates, dict) else template


def _fix_date(template: str) -> str:
    """Return the template with a macro in place of the clock; a format that it does not spell out is ISO."""
    dates = {form: TEMPLATE_DATE.strftime(form) for _, form in DATE_FORMAT.findall(template)}
    iso = TEMPLATE_DATE.date().isoformat()
    # The empty expression keeps a line break at the beginning of the template from being trimmed.
    return (
        f"{{% macro {CLOCK}(format) -%}}{{{{ {dates!r}.get(format, {iso!r}) }}}}{{%- endmacro %}}"
        f"{{{{ '' }}}}{template}"
    )


def _write_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the template write the BOS if the tokenizer puts it before a text, and the template does not."""
    if tokenizer.bos_token is None or tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return
    template = default_template(tokenizer) or ""
    try:
        turn = [{"role": "user", "content": "a"}]
        has_bos = tokenizer.bos_token in str(tokenizer.apply_chat_template(turn, tokenize=False))
    except (TemplateError, TypeError, ValueError):  # refuses this turn
        has_bos = "bos_token" in template or tokenizer.bos_token in template
    if not has_bos:
        _set_template(tokenizer, WRITE_BOS + template)
