"""Talks with a model in a state of fixed size: the thousandth message takes as much memory as the first.

python examples/chat.py
python examples/chat.py --model smollm2 --slots 512 --max-new-tokens 200 --messages "What is a cache?"

The second line needs a chat model: a folder, a name on the Hugging Face hub, a GGUF file, or smollm2, which
`python experiments/real_model.py --fetch` fetches.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import tyro

import jaxcompress as jc

# The embedded model was not made for talking and has no chat template. What it has learnt is to note pairs of words and
# to recall them later; it goes on after a note with whatever comes to it.
MESSAGES = ("note: current module -> default path", "note: return value -> empty string", "recall: current module ->")
TEMPLATE = "{% for m in messages %}{{ '\n# ' if m.role == 'user' else '' }}{{ m.content }}{% endfor %}"


def embedded_model(folder: Path) -> jc.Loaded:
    """The embedded model with a chat template beside it."""
    shutil.copytree(jc.embedded.decoder_folder(), folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return jc.load(folder, dtype="float32")


def main(
    messages: tuple[str, ...] = MESSAGES,
    model: str | None = None,
    slots: int = 32,
    max_new_tokens: int = 4,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        loaded = jc.load(model) if model else embedded_model(Path(folder))
        policy = loaded.policy or jc.get_policy("tova")  # the model's own, if it was saved with one
        chat = jc.Chat(loaded, policy, slots, max_new_tokens=max_new_tokens)
        for message in messages:
            print(f"> {message}")
            for piece in chat.stream(message):
                print(piece, end="", flush=True)
            print(f"\n  [{len(chat.tokens)} tokens so far, {chat.held} held, {chat.nbytes // 1024} KiB]")


if __name__ == "__main__":
    tyro.cli(main)
