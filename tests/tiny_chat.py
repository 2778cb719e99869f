"""A tiny chat model in a folder: every byte is a token, and a template puts marks around messages."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from tiny import tiny_decoder
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from jaxcompress.checkpoints import save
from jaxcompress.generation import GenerationConfig

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 256 + len(SPECIAL)
END = VOCABULARY - 1


def chat_folder(folder: Path, template: str | None = TEMPLATE, *, rstrip: bool = False) -> Path:
    """Writes the model; its end token is </s>, which the template does not use. It never ends an answer by itself.

    Args:
      rstrip: whether special tokens take the white space after them along, as those of Phi-3 do.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(name, special=True, rstrip=rstrip) for name in SPECIAL])
    source = folder / "tokenizer"
    source.mkdir(parents=True)
    fast.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    if template is not None:
        (source / "chat_template.jinja").write_text(template)
    never = lambda path, x: x.at[:, -len(SPECIAL) :].set(0) if "head" in jax.tree_util.keystr(path) else x
    model = jax.tree_util.tree_map_with_path(never, tiny_decoder(VOCABULARY, max_position=2**20))
    return save(model, folder / "tiny", tokenizer_from=source)


class Letters(GenerationConfig):
    """Writes lower-case letters, and now and then the end of the answer."""

    def warp(self, logits, appeared=None):
        letters = jnp.arange(logits.shape[-1])
        first = sorted(pre_tokenizers.ByteLevel.alphabet()).index("a")
        allowed = (letters >= first) & (letters < first + 26) | (letters == END)
        flat = jnp.where(letters == END, 1.5, logits.astype(jnp.float32) / 50)
        return super().warp(jnp.where(allowed, flat, -jnp.inf), appeared)
