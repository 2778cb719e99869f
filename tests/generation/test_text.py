"""Text in and out: against transformers, against whole-text decoding, and for input of any length."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

from jaxcompress.generation.text import StopStrings, TextStream, TextUntil, Tokenizer, encode_stream

CORPUS = [
    "Hello world, this is a small corpus. It's about 2024 words, or 12 of them!",
    "The user said: hello\n\nAnd then they said: good bye.\n",
    "Grüße aus Köln, naïve café; 你好世界 and 😀 too.",
] * 3
CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(pre_tokenizer=None) -> FastTokenizer:
    """GPT-2's kind, or Llama 3's with its own splitting."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=350, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return fast


def llama_3() -> FastTokenizer:
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    return byte_level(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]))


def sentencepiece() -> FastTokenizer:
    """Llama 2's kind: the space belongs to the word, bytes stand for characters that are not in the vocabulary."""
    fast = FastTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Words are split while training only, and the vocabulary is that of plain text.
    fast.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    ascii_only = ["".join(c for c in line if 32 <= ord(c) < 127) for line in CORPUS]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    fast.train_from_iterator(
        ascii_only, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL + bytes_, show_progress=False)
    )
    state = json.loads(fast.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    return FastTokenizer.from_str(json.dumps(state))


def metaspace() -> FastTokenizer:
    """The same with today's Metaspace in place of a normalizer."""
    state = json.loads(sentencepiece().to_str())
    state["normalizer"] = None
    state["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return FastTokenizer.from_str(json.dumps(state))


def save(folder, fast, tokenizer_config=None, **files):
    """A model folder; files by stem."""
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"} | (
        tokenizer_config or {}
    )
    for name, content in {"tokenizer_config": settings, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


MAKERS = {"gpt2": byte_level, "llama3": llama_3, "sentencepiece": sentencepiece, "metaspace": metaspace}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {name: Tokenizer(save(tmp_path_factory.mktemp(name), make())) for name, make in MAKERS.items()}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


class Has:
    """What has a tokenizer, as a loaded model does."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    @property
    def tokenizer(self):
        return self._tokenizer


def streamed(tokenizer, ids, **options):
    stream = TextStream(tokenizer, **options)
    return [stream.push(i) for i in ids] + [stream.finish()]


class TestTokenizer:
    def test_text_survives(self, tokenizer):
        for text in CORPUS + ["", "two  spaces  ", "a\tb\r\n\n", "𝔘𝔫𝔦 👩‍👩‍👧", "\x00"]:
            assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_ids(self, tmp_path):
        fast = byte_level()
        folder = save(tmp_path, fast, generation_config={"eos_token_id": [7, 9], "pad_token_id": 5})
        tokenizer = Tokenizer(folder)
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (1, (7, 9, 2), 5)
        assert tokenizer.vocab_size == fast.get_vocab_size()
        assert tokenizer.is_special(1)
        assert not tokenizer.is_special(50)

    def test_ids_of_config_json_and_of_added_tokens_as_objects(self, tmp_path):
        config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None}
        tokenizer = Tokenizer(save(tmp_path, byte_level(), config, config={"eos_token_id": 2, "bos_token_id": 0}))
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (1, (2,), 2)

    def test_a_bare_tokenizer_json_is_enough(self, tmp_path):
        byte_level().save(str(tmp_path / "tokenizer.json"))
        tokenizer = Tokenizer(tmp_path)
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (None, (), 0)
        assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"

    def test_what_fills_up_a_row_is_no_text(self, tmp_path):
        byte_level().save(str(tmp_path / "tokenizer.json"))
        tokenizer = Tokenizer(tmp_path)
        ids = tokenizer.encode("Hello")
        assert tokenizer.decode([*ids, -1, -1]) == tokenizer.decode(np.append(ids, -1)) == "Hello"
        assert tokenizer.decode([]) == tokenizer.decode([-1]) == tokenizer.decode(np.zeros(0, np.int32)) == ""
        for wrong in ([-2], [[5]], [1.0], ["5"], [2**31], [True]):
            with pytest.raises(ValueError, match="token ids are whole numbers from 0"):
                tokenizer.decode(wrong)

    @pytest.mark.parametrize("kind", MAKERS)
    @pytest.mark.parametrize("template", [True, False])
    def test_ids_and_text_are_those_of_transformers(self, tmp_path, kind, template):
        from transformers import AutoTokenizer

        fast = MAKERS[kind]()
        if template:
            fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        folder = save(tmp_path / kind, fast)
        ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        assert ours.adds_bos == template
        for text in CORPUS[:3] + ["", " leading"]:
            ids = ours.encode(text)
            assert ids.tolist() == theirs.encode(text)
            assert ours.encode(text, add_bos=False).tolist() == theirs.encode(text, add_special_tokens=False)
            assert ours.decode(ids) == theirs.decode(ids.tolist(), skip_special_tokens=True)

    @pytest.mark.usefixtures("as_users_call_it")
    def test_what_is_no_text(self, tokenizer):
        for read in (tokenizer.encode, tokenizer.encode_with_places, lambda text: tokenizer.encode_after("a", text)):
            for wrong in (["a", "b"], None, b"a"):
                with pytest.raises(ValueError, match=r"a text is a string, not .*give texts one by one"):
                    read(wrong)

    def test_a_token_at_the_border_that_takes_white_space_along(self, tmp_path):
        fast = byte_level()
        fast.add_special_tokens([AddedToken("<end>", rstrip=True, special=True)])
        tokenizer = Tokenizer(save(tmp_path, fast))
        for text in ("\nHello", " ", "Hello", "\n\n<end>\n a", ""):
            for context in ("Hello<end>", "a", "<end>"):
                whole = tokenizer.encode(context + text).tolist()
                both = [*tokenizer.encode(context), *tokenizer.encode_after(context, text)]
                assert both == whole, (context, text)
        assert tokenizer.encode("Hello").size < tokenizer.encode("Hel").size + tokenizer.encode("lo").size
        assert tokenizer.decode(tokenizer.encode_after("Hel", "lo")) == "lo"  # a token that joins both

    def test_a_saved_truncation_does_not_cut(self, tmp_path):
        fast = byte_level()
        fast.enable_truncation(3)
        fast.enable_padding(length=50)
        text = "Hello world " * 4
        assert Tokenizer(save(tmp_path, fast)).encode(text).tolist() == byte_level().encode(text).ids

    def test_neither_reading_nor_chatting_imports_transformers(self, tmp_path):
        folder = save(tmp_path, byte_level(), {"chat_template": CHAT})
        code = (
            "import sys; from jaxcompress.generation.text import Tokenizer; "
            f"Tokenizer({str(folder)!r}).apply_chat_template([dict(role='user', content='hi')]); "
            "print('transformers' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert (done.stdout.strip(), done.stderr) == ("False", "")

    def test_no_fast_tokenizer(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"has no tokenizer\. Open the tokenizer of another folder"):
            Tokenizer(tmp_path)
        (tmp_path / "spiece.model").touch()
        with pytest.raises(FileNotFoundError, match=r"it has spiece.model.*Only fast tokenizers.*AutoTokenizer"):
            Tokenizer(tmp_path)

    def test_files_that_are_broken(self, tmp_path):
        folder = save(tmp_path, byte_level(), {"bos_token": 3})
        with pytest.raises(ValueError, match=r"tokenizer_config.json holds what is no token: .* not 3"):
            Tokenizer(folder)
        (folder / "tokenizer_config.json").write_text("{")
        with pytest.raises(ValueError, match=r"tokenizer_config.json is not JSON"):
            Tokenizer(folder)
        (folder / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
            Tokenizer(folder)


class TestChat:
    MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "good bye"}]

    @pytest.mark.parametrize("in_config", [True, False])
    def test_equals_transformers(self, tmp_path, in_config):
        from transformers import AutoTokenizer

        folder = save(tmp_path, byte_level(), {"chat_template": CHAT} if in_config else None)
        if not in_config:
            (folder / "chat_template.jinja").write_text(CHAT)
        ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        for prompt in (True, False):
            text = ours.apply_chat_template(self.MESSAGES, add_generation_prompt=prompt)
            assert text == theirs.apply_chat_template(self.MESSAGES, tokenize=False, add_generation_prompt=prompt)
            assert text.endswith("<|assistant|>") == prompt
            ids = theirs.apply_chat_template(self.MESSAGES, add_generation_prompt=prompt, return_dict=False)
            assert ours.encode(text, add_bos=False).tolist() == ids

    def test_none(self, tokenizer):
        assert not tokenizer.has_chat_template
        with pytest.raises(ValueError, match="has no chat template"):
            tokenizer.apply_chat_template(self.MESSAGES)


class TestTextStream:
    def test_joined_pieces_are_the_text(self, tokenizer):
        for text in CORPUS[:3] + ["  two  spaces ", "\n\n\n", "𝔘𝔫𝔦 👩‍👩‍👧 你好你好你好"]:
            ids = tokenizer.encode(text)
            pieces = streamed(tokenizer, ids)
            assert "".join(pieces) == tokenizer.decode(ids)
            assert not any("\ufffd" in piece for piece in pieces)

    @pytest.mark.usefixtures("as_users_call_it")
    def test_what_is_no_row_of_tokens(self, tokenizer):
        for reads in (TextStream, TextUntil):
            with pytest.raises(ValueError, match=r"a Tokenizer is expected, not Has; give its \.tokenizer"):
                reads(Has(tokenizer))
            with pytest.raises(ValueError, match="a Tokenizer is expected, not 'gpt2'"):
                reads("gpt2")
            for wrong, says in (
                ("abc", "token ids are whole numbers, not 'abc'; encode a text"),
                (0.5, r"token ids are whole numbers, not 0\.5"),
                (None, "token ids are whole numbers, not None"),
                (np.array([[5, 6], [7, 8]]), r"one row are expected, not \[2, 2\]; push one row: tokens\[0\]"),
            ):
                with pytest.raises(ValueError, match=says):
                    reads(tokenizer).push(wrong)
            assert reads(tokenizer).push([]) == ""

    def test_a_character_waits_for_its_last_byte(self, tokenizer):
        ids = tokenizer.encode("🦜", add_bos=False)
        assert len(ids) >= 3
        pieces = streamed(tokenizer, ids)
        assert pieces[-2:] == ["🦜", ""]
        assert not any(pieces[:-2])

    def test_groups_give_the_text_of_single_tokens(self, tokenizer):
        ids = tokenizer.encode("naïve 🦜 corpus")
        single, grouped = TextStream(tokenizer), TextStream(tokenizer)
        padded = [*ids, -1, -1]
        pieces = [grouped.push(np.asarray(padded[at : at + 3], np.int32)) for at in range(0, len(padded), 3)]
        assert "".join(pieces) + grouped.finish() == "".join(map(single.push, ids)) + single.finish()

    def test_text_appears_with_its_token(self, tokenizers):
        tokenizer = tokenizers["gpt2"]
        ids = tokenizer.encode("Hello world, this is a corpus")
        assert streamed(tokenizer, ids)[:-1] == [tokenizer.decode(ids[i : i + 1]) for i in range(len(ids))]

    def test_after_a_prompt_the_leading_space_stays(self, tokenizer):
        prompt, text = "Hello", "Hello world, this"
        ids = tokenizer.encode(text, add_bos=False)
        first = len(tokenizer.encode(prompt, add_bos=False))
        assert tokenizer.decode(ids[:first]) == prompt
        assert "".join(streamed(tokenizer, ids[first:], after=ids[:first])) == " world, this"

    def test_special_tokens_between_words(self, tokenizer):
        ids = tokenizer.encode("Hello world").tolist()
        marked = [1, ids[0], 2, *ids[1:], 2]
        assert "".join(streamed(tokenizer, marked)) == "Hello world"
        assert "".join(streamed(tokenizer, [2], skip_special=False)) == "</s>"

    def test_an_unfinished_character_appears_at_the_end(self, tokenizer):
        ids = tokenizer.encode("a🦜")[:-1]
        assert "".join(streamed(tokenizer, ids)).rstrip("\ufffd") == "a"
        assert streamed(tokenizer, ids)[-1]

    @given(data=st.data())
    def test_any_tokens(self, tokenizers, data):
        tokenizer = tokenizers["gpt2"]
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=150))
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)

    @given(st.binary(max_size=150))
    def test_any_bytes(self, tokenizers, raw):
        names = pre_tokenizers.ByteLevel
        tokenizer = tokenizers["gpt2"]
        fast = FastTokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
        # The names of bytes, in order: a printable byte is its own, the others follow from 256 on.
        own = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = iter(range(256, 512))
        letter = {b: chr(b) if b in own else chr(next(others)) for b in range(256)}
        assert set(letter.values()) == set(names.alphabet())
        ids = [fast.token_to_id(letter[b]) for b in raw]
        assert "".join(streamed(tokenizer, ids)) == raw.decode("utf-8", errors="replace")

    @pytest.mark.parametrize("byte", [0xFF, 0x80, 0xF0])
    def test_endless_garbage_is_cheap(self, tokenizers, byte, monkeypatch):
        tokenizer = tokenizers["sentencepiece"]
        token = tokenizer._fast.token_to_id(f"<0x{byte:02X}>")
        decode, longest = tokenizer.decode, 0

        def watched(ids, skip_special=True):
            nonlocal longest
            longest = max(longest, len(ids))
            return decode(ids, skip_special)

        monkeypatch.setattr(tokenizer, "decode", watched)
        assert "".join(streamed(tokenizer, [token] * 500)) == "\ufffd" * 500
        assert longest < 60

    def test_sentencepiece_bytes_after_bytes(self, tokenizers):
        tokenizer = tokenizers["sentencepiece"]
        byte = lambda b: tokenizer._fast.token_to_id(f"<0x{b:02X}>")
        ids = [byte(b) for b in "😀🦜你é".encode() * 5]
        assert "".join(streamed(tokenizer, ids)) == "😀🦜你é" * 5


class TestStopStrings:
    def test_spanning_tokens_nothing_of_it_is_printed(self, tokenizer):
        ids = tokenizer.encode("good bye.\n\nUser: hello")
        stream, stop, printed, tokens = TextStream(tokenizer), StopStrings(["\n\nUser:", "###"]), "", 0
        for token in ids:
            printed += stop.push(stream.push(token))
            tokens += 1
            if stop.stopped:
                break
        assert (printed, stop.found) == ("good bye.", "\n\nUser:")
        assert tokens < len(ids)
        assert stop.push("more") + stop.finish() == ""

    def test_what_only_looked_like_one_is_printed(self):
        stop = StopStrings(["User:"])
        assert [stop.push(c) for c in "a User "] == ["a", " ", "", "", "", "", "User "]
        assert stop.push("Us") == ""
        assert stop.finish() == "Us"
        assert not stop.stopped

    def test_none(self):
        assert StopStrings().push("all of it") == "all of it"

    @given(
        st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
        st.lists(st.text("abc", max_size=6), max_size=12),
    )
    def test_the_cutting_makes_no_difference(self, strings, pieces):
        stop, letters = StopStrings(strings), StopStrings(strings)
        printed = "".join([stop.push(piece) for piece in pieces] + [stop.finish()])
        text = "".join(pieces)
        assert printed == "".join([letters.push(c) for c in text] + [letters.finish()])
        assert stop.found == letters.found
        assert stop.stopped == any(s in text for s in strings)
        assert text.startswith(printed if not stop.stopped else printed + stop.found)
        assert not any(s in printed for s in strings)

    @pytest.mark.parametrize("strings", ["User:", [""], ["a", ""], None, 3, [3]])
    @pytest.mark.usefixtures("as_users_call_it")
    def test_mistakes(self, tokenizer, strings):
        for reads in (StopStrings, lambda strings: TextUntil(tokenizer, strings)):
            with pytest.raises(ValueError, match="stop strings must be"):
                reads(strings)


class Endless:
    """A file that goes on for `size` bytes and is never whole in memory."""

    def __init__(self, line: bytes, size: int):
        self.line, self.left = line, size

    def read(self, size):
        block = (self.line * (size // len(self.line) + 1))[: min(size, self.left)]
        self.left -= len(block)
        return block


class TestEncodeStream:
    def pieces(self, tokenizer, text, chunk=64, **options):
        return list(encode_stream(io.BytesIO(text.encode()), tokenizer, chunk, **options))

    def test_tokens_are_those_of_the_whole_text(self, tokenizer):
        text = "\n".join(CORPUS * 3) + "\r\n\r\n  indented\n\n\nlast line, no break 12\n 3"
        pieces = self.pieces(tokenizer, text)
        assert len(pieces) > 10
        assert all(p.dtype == np.int32 and p.size for p in pieces)
        np.testing.assert_array_equal(np.concatenate(pieces), tokenizer.encode(text))

    @given(data=st.data(), kind=st.sampled_from(list(MAKERS)))
    def test_whatever_the_white_space(self, tokenizers, data, kind):
        words = st.sampled_from(["Hello", "world", "12", "é", "a."])
        spaces = st.sampled_from([" ", "\n", "\r\n", "\n\n", "  \n", "\n  ", " \n \n ", "\t"])
        pairs = data.draw(st.lists(st.tuples(words, spaces), min_size=1, max_size=60))
        # Each line ends in a word somewhere, so that no cut has to be made elsewhere.
        text = "".join(word + space + "so\n" for word, space in pairs)
        np.testing.assert_array_equal(
            np.concatenate(self.pieces(tokenizers[kind], text)), tokenizers[kind].encode(text)
        )

    @pytest.mark.parametrize("text", ["x" * 1000, "你好" * 300, "." * 500 + "\n" * 500, "a.\n" * 300, "word " * 300])
    def test_text_without_places_to_cut_survives(self, tokenizer, text):
        ids = np.concatenate(self.pieces(tokenizer, text))
        # Tokens around a cut may differ, and SentencePiece then writes a space there.
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
        assert len(ids) <= 1.2 * len(tokenizer.encode(text)) + 60

    def test_begins_once_with_bos(self, tmp_path):
        fast = byte_level()
        fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer = Tokenizer(save(tmp_path, fast))
        text = "\n".join(CORPUS)
        ids = np.concatenate(self.pieces(tokenizer, text))
        assert ids[0] == 1
        assert (ids == 1).sum() == 1
        np.testing.assert_array_equal(np.concatenate(self.pieces(tokenizer, text, add_bos=False)), ids[1:])

    def test_text_files_and_strings(self, tokenizers, tmp_path):
        tokenizer = tokenizers["gpt2"]
        text = "\n".join(CORPUS)
        (tmp_path / "text").write_text(text, encoding="utf-8")
        with open(tmp_path / "text", encoding="ascii") as file:  # the bytes are read, whatever the encoding
            np.testing.assert_array_equal(np.concatenate(list(encode_stream(file, tokenizer))), tokenizer.encode(text))
        np.testing.assert_array_equal(
            np.concatenate(list(encode_stream(io.StringIO(text), tokenizer, 50))), tokenizer.encode(text)
        )
        assert list(encode_stream(io.BytesIO(b""), tokenizer)) == []

    def test_memory_is_flat(self, tokenizers):
        peaks = []
        for size in (60_000, 240_000):
            tracemalloc.start()
            for _ in encode_stream(Endless(b"Hello world, this is a line\n", size), tokenizers["gpt2"], 2048):
                pass
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < 1.5 * peaks[0]

    @pytest.mark.parametrize("before", [0, 1, 63, 64, 65, 500])
    @pytest.mark.parametrize("wrong", [b"\xff", b"\xc3(", b"\xe4\xbd\x00"])
    def test_other_encodings_are_refused_with_the_place(self, tokenizers, before, wrong):
        source = io.BytesIO(b"a" * before + wrong + b" and more")
        with pytest.raises(ValueError, match=rf"not UTF-8: byte 0x{wrong[0]:02x} at offset {before} "):
            list(encode_stream(source, tokenizers["gpt2"], 64))

    def test_a_character_that_is_cut_off_at_the_end(self, tokenizers):
        with pytest.raises(ValueError, match=r"byte 0xe4 at offset 5 "):
            list(encode_stream(io.BytesIO(b"hello\xe4\xbd"), tokenizers["gpt2"], 4))

    @pytest.mark.usefixtures("as_users_call_it")
    def test_what_cannot_be_read(self, tokenizers, tmp_path):
        for wrong in ("abc", tmp_path / "text", b"abc", None):
            with pytest.raises(ValueError, match=r"from an open file, not from .*open it first: open\(path, 'rb'\)"):
                encode_stream(wrong, tokenizers["gpt2"])
        with pytest.raises(ValueError, match=r"a Tokenizer is expected, not Has; give its \.tokenizer"):
            encode_stream(io.BytesIO(b""), Has(tokenizers["gpt2"]))

    def test_chunk_size(self, tokenizers):
        with pytest.raises(ValueError, match="chunk_chars"):
            encode_stream(io.BytesIO(b""), tokenizers["gpt2"], 0)


class TestTextUntil:
    """Stops that no text shows."""

    @pytest.fixture(scope="class")
    def marked(self, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
        fast = FastTokenizer(
            models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
        )
        fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        fast.add_special_tokens(["<|eot|>", "<|im|>", "<|im|>x"])
        folder = tmp_path_factory.mktemp("marked")
        fast.save(str(folder / "tokenizer.json"))
        return Tokenizer(folder)

    @pytest.mark.parametrize(
        ("stop", "written", "shown", "stopped"),
        [
            (["<|eot|>"], "ab<|eot|>c", "ab", True),
            (["<|eot|>"], "ab<|im|>c", "abc", False),
            (["\n<|eot|>"], "a\n<|im|>b\n<|eot|>c", "a\nb", True),
            (["<|im|>\n"], "a<|im|>b<|im|>\nc", "ab", True),
            (["<|eot|><|im|>"], "a<|eot|>b<|eot|><|im|>c", "ab", True),
            (["x<|im|>xy"], "ax<|im|>xy", "a", True),
            (["eot", "|", ">"], "a<|eot|>b", "ab", False),
            (["c", "<|eot|>"], "abc<|eot|>", "ab", True),
            (["<|eot|>é"], "é<|eot|>é", "é", True),
            ([], "a<|eot|>b", "ab", False),
        ],
    )
    def test_special_tokens(self, marked: Tokenizer, stop: list[str], written: str, shown: str, stopped: bool) -> None:
        text = TextUntil(marked, stop)
        printed = "".join([text.push(token) for token in marked.encode(written)] + [text.finish()])
        assert (printed, text.stopped) == (shown, stopped)

    def test_ids(self, marked: Tokenizer) -> None:
        ids = marked.special_tokens()
        text = TextUntil(marked, ["<|eot|>", "a<|im|>"], [7])
        assert text.ids == (7, ids["<|eot|>"])
        assert TextUntil(marked, (), [int(marked.encode("b")[0])]).push(marked.encode("b")[0]) == ""
        after = TextUntil(marked, ["<|eot|>"])
        assert (after.push([*marked.encode("b"), ids["<|eot|>"], *marked.encode("c"), -1]), after.stopped) == (
            "b",
            True,
        )
        half = marked.encode("é")[0]  # an unfinished character before a stop is what it is without one
        assert text.push(half) + text.push(ids["<|eot|>"]) == "\ufffd"
        with pytest.raises(ValueError, match="write"):
            TextUntil(marked, "<|eot|>")

    @pytest.mark.parametrize(
        ("wrong", "says"), [(0, r"not 0; write \[0\]"), (None, "not None"), (["a"], "token ids are whole numbers")]
    )
    @pytest.mark.usefixtures("as_users_call_it")
    def test_ids_that_are_no_list(self, marked: Tokenizer, wrong: Any, says: str) -> None:
        with pytest.raises(ValueError, match=says):
            TextUntil(marked, stop_ids=wrong)

    def test_halves_of_characters_are_read_as_replacements(self, marked: Tokenizer) -> None:
        same = lambda a, b: np.testing.assert_array_equal(marked.encode(a), marked.encode(b))
        same("a\ud83db", "a\ufffdb")
        same("a\ud83d\ude00", "a😀")
        ids, places = marked.encode_with_places("\ud83db")
        np.testing.assert_array_equal(ids, marked.encode("\ufffdb"))
        assert places[-1].tolist() == [1, 2]
        np.testing.assert_array_equal(marked.encode_after("\ud83d", "b"), marked.encode("b"))
