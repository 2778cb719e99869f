"""Documents, packing, and an order that can be taken up again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers

from jaxcompress.generation.text import Tokenizer
from jaxcompress.training import data
from jaxcompress.training.data import Batch, PackedRows, TokenStream, batches, pack, read_documents, split

WORDS = ["<s>", "</s>", "a", "b", "c", "d", "e"]


def words(folder: Path, **special: str) -> Tokenizer:
    """One token per word."""
    fast = FastTokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="e"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return Tokenizer(folder)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return words(tmp_path, bos_token="<s>", eos_token="</s>")


def rows_of(tokens: int, length: int, bos: int | None = 0) -> PackedRows:
    ids = np.arange(1, tokens + 1, dtype=np.int32)
    return PackedRows(TokenStream(ids, ids % 3 != 0, bos), length)


class TestPack:
    """Documents -> stream."""

    def pack(self, tokenizer: Tokenizer, *documents: Any) -> tuple[list[int], list[bool]]:
        stream = pack(documents, tokenizer, vocab_size=7)
        assert (stream.tokens.dtype, stream.predicted.dtype) == (np.int32, bool)
        return stream.tokens.tolist(), stream.predicted.tolist()

    def test_with_an_end_and_a_beginning_the_beginning_is_not_learned(self, tokenizer: Tokenizer) -> None:
        tokens, learned = self.pack(tokenizer, "a b", "c")
        assert tokens == [2, 3, 1, 0, 4, 1, 0]
        assert learned == [True, True, True, False, True, True, False]

    @pytest.mark.parametrize("special", [{"bos_token": "<s>"}, {"bos_token": "<s>", "eos_token": "<s>"}])
    def test_with_one_mark_it_is_the_end_and_learned(self, tmp_path: Path, special: dict[str, str]) -> None:
        tokens, learned = self.pack(words(tmp_path, **special), "a b", "c")
        assert tokens == [2, 3, 0, 4, 0]
        assert all(learned)

    def test_without_marks_the_first_word_is_not_learned(self, tmp_path: Path) -> None:
        tokens, learned = self.pack(words(tmp_path), "a b", "c d")
        assert tokens == [2, 3, 4, 5]
        assert learned == [False, True, False, True]

    def test_token_ids_are_taken_as_they_are(self, tokenizer: Tokenizer) -> None:
        assert self.pack(tokenizer, np.array([6, 5]))[0] == [6, 5, 1, 0]
        for wrong in (7, -1, 2**40):
            with pytest.raises(ValueError, match=rf"document 1: token id {wrong} at index 1 is outside .* 0\.\.6"):
                self.pack(tokenizer, "a", np.array([6, wrong]))

    def test_a_tokenizer_larger_than_the_model_is_refused(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(ValueError, match="has 7 tokens, the model's vocabulary only 6"):
            pack(["a"], tokenizer, vocab_size=6)
        assert pack(["a"], tokenizer, vocab_size=64).tokens.size == 3
        with pytest.raises(ValueError, match="no documents"):
            pack([], tokenizer, vocab_size=64)

    def test_long_texts_are_tokenized_in_pieces(self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        text = "a b\nc " * 40_000
        told: list[int] = []
        whole = pack([text], tokenizer, vocab_size=7, progress=told.append)
        monkeypatch.setattr(data, "_LONG", 10)
        pieces = pack([text], tokenizer, vocab_size=7)
        np.testing.assert_array_equal(whole.tokens, pieces.tokens)
        assert told == [120_000]
        assert whole.checksum == pieces.checksum != pack([text + "d"], tokenizer, vocab_size=7).checksum


class TestRows:
    """Stream -> rows."""

    def test_rows_are_bos_and_the_next_tokens(self) -> None:
        rows = rows_of(11, 3)
        assert len(rows) == 3
        assert [rows[i].tokens.tolist() for i in range(3)] == [[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9]]
        assert rows[1].weights.tolist() == [1, 1, 0]
        assert (rows[1].tokens.dtype, rows[1].weights.dtype) == (np.int32, np.float32)

    def test_without_bos_a_row_begins_with_the_token_before(self) -> None:
        rows = rows_of(11, 5, bos=None)
        assert [rows[i].tokens.tolist() for i in range(len(rows))] == [[1, 2, 3, 4, 5, 6], [6, 7, 8, 9, 10, 11]]
        assert rows[0].weights.tolist() == [1, 0, 1, 1, 0]

    def test_the_last_rows_are_set_aside(self) -> None:
        rows = rows_of(100, 2)
        parts = split(rows, batch=4, held_out=5, held_out_batch=2)
        assert parts.train == 45
        assert [batch.tokens.shape for batch in parts.held_out] == [(2, 3)] * 3
        tokens = np.concatenate([batch.tokens for batch in parts.held_out])[:, 1]
        assert tokens.tolist() == [91, 93, 95, 97, 99, 0]
        assert parts.held_out[-1].weights[1].tolist() == [0, 0]  # filled up

    @pytest.mark.parametrize(("asked", "aside"), [(16, 5), (0, 0), (3, 3)])
    def test_at_most_a_tenth_is_set_aside(self, asked: int, aside: int) -> None:
        parts = split(rows_of(100, 2), batch=2, held_out=asked)
        assert parts.train == 50 - aside
        assert len(parts.held_out) == -(-aside // 2)

    def test_too_little_data(self) -> None:
        assert split(rows_of(8, 2), batch=3, held_out=1).train == 3
        with pytest.raises(ValueError, match=r"7 tokens, 3 rows of 2, 1 of them held out; one step needs 3: give more"):
            split(rows_of(7, 2), batch=3, held_out=1)
        with pytest.raises(ValueError, match=r"1 tokens, 0 rows of 2; one step needs 1"):
            split(rows_of(1, 2), batch=1, held_out=0)
        with pytest.raises(ValueError, match="held_out must be a whole number, at least 0, not -5"):
            split(rows_of(8, 2), batch=3, held_out=-5)  # it gave more rows to train on than there are


class TestBatches:
    """Rows -> batches without end."""

    def test_every_row_once_per_epoch_and_none_that_is_held_out(self) -> None:
        data = batches(rows_of(40, 2), batch=5, seed=0, train=15)
        epochs = np.array([[next(data).tokens[:, 1] for _ in range(3)] for _ in range(4)]).reshape(4, 15)
        np.testing.assert_array_equal(np.sort(epochs), np.arange(1, 31, 2)[None].repeat(4, 0))
        assert len({tuple(epoch) for epoch in epochs}) == 4

    def test_batches_are_batches(self) -> None:
        batch = next(batches(rows_of(40, 2), batch=3, seed=0))
        assert isinstance(batch, Batch)
        assert (batch.tokens.shape, batch.weights.shape) == ((3, 3), (3, 2))
        assert (batch.tokens.dtype, batch.weights.dtype) == (np.int32, np.float32)

    def test_the_seed_makes_the_order(self) -> None:
        first = lambda seed: next(batches(rows_of(400, 2), batch=8, seed=seed)).tokens.tolist()
        assert first(1) == first(1) != first(2)

    @given(st.integers(1, 7), st.integers(0, 20), st.integers(0, 3))
    def test_the_order_is_taken_up_where_it_was(self, batch: int, steps: int, seed: int) -> None:
        rows = rows_of(30, 2)
        run = batches(rows, batch=batch, seed=seed)
        for _ in range(steps):
            next(run)
        state = json.loads(json.dumps(run.get_state()))
        resumed = batches(rows, batch=batch, seed=seed)
        resumed.set_state(state)
        for _ in range(5):
            np.testing.assert_array_equal(next(run).tokens, next(resumed).tokens)


class TestReadDocuments:
    """Files and datasets."""

    def test_files(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / ".git").mkdir()
        (tmp_path / ".git" / "config").write_bytes(b"\xff")
        (tmp_path / "z.txt").write_text("last")
        (tmp_path / "empty.txt").write_text("")
        (tmp_path / "a.jsonl").write_text('{"text": "one\\u2028line"}\n\n{"tokens": [3, 1]}\n')
        (tmp_path / "b" / "c.md").write_text("Grüße", encoding="utf-8")
        one, two, three, four = read_documents(tmp_path)
        assert (one, three, four) == ("one\u2028line", "Grüße", "last")
        np.testing.assert_array_equal(two, [3, 1])
        assert read_documents(tmp_path / "z.txt") == ["last"]
        (tmp_path / "named.ndjson").write_text('{"text": 1, "body": "x"}')
        assert read_documents(str(tmp_path / "named.ndjson"), field="body") == ["x"]

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("a.txt", b"caf\xe9", "a.txt is not UTF-8: byte 0xe9 at offset 3"),
            ("a.txt", b"", "a.txt has no text"),
            ("a.jsonl", b'{"text": "a"}\n{"text"', "a.jsonl, line 2 is not JSON"),
            ("a.jsonl", b"[1]", "line 1: expected an object, not a list"),
            ("a.jsonl", b'{"title": "a", "body": "b"}', "line 1: no text under 'text'; it has title, body"),
            ("a.jsonl", b'{"text": 3}', "line 1: no text under 'text'; it has text"),
            ("a.jsonl", b'{"tokens": [1.5]}', "line 1: no text under 'text'; it has tokens"),
        ],
    )
    def test_wrong_files(self, tmp_path: Path, name: str, content: bytes, says: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as caught:
            read_documents(tmp_path / name)
        assert says in str(caught.value)

    @pytest.mark.parametrize("name", ["/no/where", "./nowhere", "nowhere.txt", "a/b/c", "x.jsonl"])
    def test_files_that_are_not_there_are_not_looked_for_on_the_hub(self, name: str) -> None:
        with pytest.raises(FileNotFoundError, match="there is no file or folder"):
            read_documents(name)

    def test_datasets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        class Table(dict[str, Any]):
            column_names = ("body", "id")

        def load_dataset(name: str, configuration: str | None, split: str) -> Any:
            asked.append((name, configuration, split))
            if name == "org/none":
                raise ConnectionError("no network\nat all")
            return Table(body=["one", "", "two"], id=[1, 2, 3])

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        assert read_documents("org/set:small", field="body", split="test") == ["one", "two"]
        assert asked == [("org/set", "small", "test")]
        with pytest.raises(ValueError, match="has no column 'text'; it has body, id"):
            read_documents("set")
        with pytest.raises(ValueError, match="row 0: 'id' is a int, not a text"):
            read_documents("set", field="id")
        with pytest.raises(FileNotFoundError, match="'org/none' is neither .* could be fetched: no network$"):
            read_documents("org/none")

    def test_datasets_need_a_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r"'org/set' is no file or folder.*jaxcompress\[data\]"):
            read_documents("org/set")
