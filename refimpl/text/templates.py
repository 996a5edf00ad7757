"""Whether a folder has a chat template of its own. It is not applied: conversations get the official layout.

A template is a Jinja program of the folder's author, and may run for ever. So it is compared with the official one, and
never executed. Qwen2's official template gives what `refimpl.text.chat` gives. The official Baichuans have no template.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refimpl.config import Config
from refimpl.files import read_json, read_small

# chat_template in tokenizer_config.json of Qwen2-7B-Instruct.
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def template_remark(folder: Path, config: Config) -> str | None:
    """A remark on a chat template in the folder that is not the official one; else None.

    Raises InputError for a file that cannot be read.
    """
    family = config.family
    for where, template in _templates(folder):
        if family != "Qwen2-7B" or not isinstance(template, str) or _plain(template) != QWEN2:
            return (
                f"{where} has a chat template of its own, which is not applied: chat lays a conversation out as the "
                f"official {family} does. If yours is laid out otherwise, pass the ids that transformers' "
                "apply_chat_template gives"
            )
    return None


def _templates(folder: Path) -> Iterator[tuple[str, Any]]:
    """The files that may hold a template, and what they hold; transformers looks in each of them."""
    if (folder / "chat_template.jinja").exists():
        yield "chat_template.jinja", read_small(folder / "chat_template.jinja").decode(errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).exists() and (template := read_json(folder / name).get("chat_template")) is not None:
            yield name, template


def _plain(template: str) -> str:
    """The template with line breaks in its strings written in one way; to Jinja, both ways are the same."""
    return template.strip().replace("\\n", "\n")
