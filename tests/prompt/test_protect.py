"""What is protected stays whole, whatever the text and the budget, or it is said that the budget is too small."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.prompt import (
    KINDS,
    BudgetTooSmall,
    Compressor,
    Kind,
    compress_json,
    compress_stream,
    protected_spans,
)
from jaxcompress.prompt.kinds import _PATHS, LONGEST, checked_kinds

FIXTURES = Path(__file__).parents[1] / "fixtures" / "prompt"


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def compressor(request: pytest.FixtureRequest) -> Compressor:
    return Compressor.load(FIXTURES / request.param)


@pytest.fixture(scope="module")
def bert() -> Compressor:
    return Compressor.load(FIXTURES / "bert")


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        ("code", "a `x y` b ``z``\n```py\nx = 1\n\ny\n```\nc", ["`x y`", "``z``", "```py\nx = 1\n\ny\n```"]),
        ("code", "~~~\na\n```\n~~~ b\n~~~~\nc\n```\nopen ", ["~~~\na\n```\n~~~ b\n~~~~", "```\nopen"]),
        ("code", "1. Step\n\n    ```sh\n    rm -rf x\n    ```\n\n2. More", ["```sh\n    rm -rf x\n    ```"]),
        ("code", "> ```sh\n> rm\n> ```\na\n- ~~~\n  - ~~~\n  ~~~\nb",
         ["> ```sh\n> rm\n> ```", "- ~~~\n  - ~~~\n  ~~~"]),
        ("code", "use ```rm -rf x``` now, ``a ` b`` or `c`` d` ``e", ["```rm -rf x```", "``a ` b``", "`c`` d`"]),
        ("code", f"`{'a' * (LONGEST + 1)}` `b` ``c\nd``", ["`b`"]),
        ("quotes", r'"a \" b" it' + "'s dogs' 'don't do' “x y” «a» 「会議」 \"open",
         [r'"a \" b"', "'don't do'", "“x y”", "«a»", "「会議」"]),
        ("quotes", f'"{"a" * (LONGEST + 1)}" "b"', ['"b"']),
        ("quotes", 'a 15" screen, the label "do not touch" and 5\'10" "x y"', ['"do not touch"', '"x y"']),
        ("quotes", r'dir "C:\tmp\" and "keep me" x, f"{a}", "d:\"', [r'"C:\tmp\"', '"keep me"', '"{a}"', r'"d:\"']),
        ("quotes", '{"a":"b c"} 他说"你好"API 그는"안녕"이라고 "No."Then "-5"',
         ['"a"', '"b c"', '"你好"', '"안녕"', '"No."', '"-5"']),
        ("urls", "(https://a.b/c_(d)), http://x.y/z. 访问https://a.b/c了解 me@x.org, www.a.com; ssh://h:22/x?a=[2]",
         ["https://a.b/c_(d)", "http://x.y/z", "https://a.b/c", "me@x.org", "www.a.com", "ssh://h:22/x?a=[2]"]),
        ("urls", "Write to joe@example.com. Or a@b.co.uk, not c@d.", ["joe@example.com", "a@b.co.uk"]),
        ("urls", "https://api.x.io/v1/{id}/items, git@github.com:org/repo.git. me@x.org: a/b x@y.de:/etc/z",
         ["https://api.x.io/v1/{id}/items", "git@github.com:org/repo.git", "me@x.org", "x@y.de:/etc/z"]),
        ("urls", "https://例え.jp/x https://例え.テスト/x 访问https://a.b了解。",
         ["https://例え.jp/x", "https://例え.テスト/x", "https://a.b"]),
        ("paths", "rm -rf /var/log/*.gz GET /users/{id}/posts /users/:id/posts src/**/x.py /tmp/{a,b}.txt. /* no */",
         ["/var/log/*.gz", "/users/{id}/posts", "/users/:id/posts", "src/**/x.py", "/tmp/{a,b}.txt"]),
        ("paths", "-v /host/data:/container/data PATH=/a/b:/c/d PATH=/a:/b /etc/hosts: x /a/b:12:3",
         ["/host/data:/container/data", "PATH=/a/b:/c/d", "PATH=/a:/b", "/etc/hosts", "/a/b:12:3"]),
        ("paths", r"/etc/hosts. and/or src/a.py:12:3 a/b/c ~/x ../z C:\a\b.txt \\host\share km/h </div> 1/2",
         ["/etc/hosts", "src/a.py:12:3", "a/b/c", "~/x", "../z", r"C:\a\b.txt", r"\\host\share"]),
        ("identifiers", "foo_bar fooBar HTTPServer _really_ __init__ os.path.join std::vec run() $HOME --rate -v X-ray",
         ["foo_bar", "fooBar", "HTTPServer", "__init__", "os.path.join", "std::vec", "run()", "$HOME", "--rate", "-v"]),
        ("identifiers", "ABC-1234 well-known 550e8400-e29b-41d4 e.g. A380 调用fooBar函数",
         ["ABC-1234", "550e8400-e29b-41d4", "A380", "fooBar"]),
        ("identifiers", "a.b.c a::b self.x p->next T::new f.read() f.x() un\u00adfooBar",
         ["a.b.c", "a::b", "self.x", "p->next", "T::new", "f.read()", "f.x()", "un\u00adfooBar"]),
        ("identifiers", "e.g. this, i.e., U.S.A. or 5 p.m in a.b.", []),
        ("numbers", ".5 -.5 1.5E+3 10\u00a0% 5\u00a0€ 1.0.0-alpha 12,5\u202f%",
         [".5", "-.5", "1.5E+3", "10\u00a0%", "5\u00a0€", "1.0.0-alpha", "12,5\u202f%"]),
        ("numbers", "x...5 a.5 $.50 € 5 v1.2.3-rc.1+b 20 °C 5 $10 5 $HOME 3-inch",
         ["5", "5", "$.50 €", "5", "v1.2.3-rc.1+b", "20 °C", "5", "$10", "5", "3"]),
        ("numbers", "３．５％上昇 ９時〜１０時 第１、２、３条 ８，０００ ٣٫٥ ٥٪ －５",
         ["３．５％", "９", "１０", "１", "２", "３", "８，０００", "٣٫٥", "٥٪", "－５"]),
        ("numbers", "$4,200 -3.5e-7 50% 2026-11-28T23:28Z v1.2.3 3/4 0x7f 5°C 192.168.0.1:8080 3시에 x-1 12€ 二",
         ["$4,200", "-3.5e-7", "50%", "2026-11-28T23:28Z", "v1.2.3", "3/4", "0x7f", "5°C", "192.168.0.1:8080", "3시에",
          "1", "12€"]),
        ("negations", "No, I don't; cannot, isn’t NOT knot n'est 不是 ありません 않습니다 안 가 keine не",
         ["No", "don't", "cannot", "isn’t", "NOT", "n'est", "不", "ありません", "않습니다", "안", "keine", "не"]),
        ("negations", "couldnt hadnt mustnt neednt aint nobody's rock'n'roll donʼt no\u00adthing in\u00adno",
         ["couldnt", "hadnt", "mustnt", "neednt", "aint", "nobody's", "donʼt", "no\u00adthing"]),
        ("negations", "qu'aucun d'aucun nessun'altra jama\u0301s na\u0303o mano",
         ["qu'aucun", "d'aucun", "nessun'altra", "jama\u0301s", "na\u0303o"]),
    ],
)  # fmt: skip
def test_what_is_found(kind: Kind, text: str, found: list[str]) -> None:
    assert [text[start:end] for start, end in protected_spans(text, [kind]).tolist()] == found


@pytest.mark.parametrize(
    "part",
    ['"', "'a ", '\\"', "```json\n", "a/", "/", "a.", "-", "A-", "1-", "a@", "a@b.1.", "ab1", "な", ")", ' "a', 'f"a ',
     '"\\" ', "a\u00ad", "e\u0301", "a->", "{a}", "*", "/*", ":/a", "a=", "1.1.1-", "1. ", "> ", "`", "``a`", "例."],
)  # fmt: skip
def test_time_grows_with_the_text_only(part: str) -> None:
    """A rule that tried every place anew would take minutes here."""
    assert protected_spans("https://a" + part * (100_000 // len(part)), KINDS).shape[1] == 2


def test_unknown_kinds() -> None:
    with pytest.raises(ValueError, match="unknown kind 'names' to protect; known: code, quotes"):
        checked_kinds(["names"])
    with pytest.raises(TypeError, match="protect is a list of kinds"):
        checked_kinds("urls")


PIECES = st.sampled_from(
    ["the ", "budget ", ", ", "\n", "$4,200 ", ". ", "don't ", "not ", "https://a.b/c?d=1 ", "/etc/hosts ",
     "foo_bar ",      '"as it is" ', "\n```\nx = 1\n```\n", "`a b` ", "会議は", "不是", "한국어 ",
     "않습니다 ", "nicht ", "не ", "Straße ",
     "e\u0301", '"', "'", "`", "12", "-", "🙂", "unbelievably long "]
)  # fmt: skip
TEXTS = st.lists(PIECES, min_size=1, max_size=30).map("".join)


@given(TEXTS, st.floats(0.02, 1), st.lists(st.sampled_from(KINDS), unique=True))
def test_whatever_the_text(bert: Compressor, text: str, rate: float, kinds: list[Kind]) -> None:
    spans = protected_spans(text, kinds).tolist()
    try:
        result = bert.compress(text, rate=rate, protect=kinds)
    except BudgetTooSmall as error:
        result = bert.compress(text, tokens=error.needed, protect=kinds)
        assert result.tokens_after == error.needed == result.forced > error.asked  # noqa: PT017
    else:
        assert bert.tokenizer.count(result.text) == result.tokens_after <= result.asked
    at = 0
    for start, end in spans:  # in their order
        at = result.text.find(text[start:end], at)
        assert at >= 0, text[start:end]


@given(TEXTS, st.integers(1, 40))
def test_of_any_reader(bert: Compressor, text: str, tokens: int) -> None:
    """Tokens of what comes out need not be those of its words; the budget is met all the same."""
    counted = replace(bert, count=lambda text: len(text.encode()) // 3)
    try:
        result = counted.compress(text, tokens=tokens, protect=KINDS)
    except BudgetTooSmall as error:
        assert error.needed > tokens  # noqa: PT017
    else:
        assert result.tokens_after <= tokens
        assert all(text[start:end] in result.text for start, end in protected_spans(text, KINDS).tolist())


def test_several_together_equal_one_by_one(compressor: Compressor) -> None:
    texts = [
        "Do not pay $4,200 for the second phase, said Maria.",
        "会議は3時に始まります。不是今天, but later on.",
        "",
    ]
    together = compressor.compress(texts, rate=[0.7, 0.8, 0.6], protect=KINDS)
    for text, rate, document in zip(texts, [0.7, 0.8, 0.6], together.documents, strict=True):
        assert document.text == compressor.compress(text, rate=rate, protect=KINDS).text


def test_beyond_what_the_encoder_reads_at_once(compressor: Compressor) -> None:
    """A quotation lies across each place where the text may be cut into chunks."""
    quoted = '"the ships. and the harbor! were quiet"'
    text = " ".join(f"{quoted} while the others spoke of nothing else {n}" for n in range(60))
    (document,) = compressor.compress(text, rate=0.9, protect=KINDS, scope="chunk").documents
    assert document.scored.chunks is not None
    assert document.scored.chunks.max() > 0
    assert document.text.count(quoted) == 60


def test_repeats_go_only_if_they_are_not_protected(bert: Compressor) -> None:
    text = "1 1 1 go go go on and on"
    result = bert.compress(text, rate=0.5, force=["go"], protect=["numbers"], drop_consecutive=True)
    assert result.text.startswith("1 1 1 go")
    assert result.text.count("go") == 1


@given(st.lists(PIECES, min_size=20, max_size=80).map("".join), st.integers(1, 50))
def test_a_window_does_not_end_inside(bert: Compressor, text: str, size: int) -> None:
    pieces, kinds = [text[n : n + size] for n in range(0, len(text), size)], KINDS[2:]
    shorter = "".join(part.text for part in compress_stream(bert, pieces, rate=1, window=80, protect=kinds))
    assert shorter == text.strip()
    parts = []
    try:
        for part in compress_stream(bert, pieces, rate=0.6, window=80, protect=kinds):
            parts.append(part.text)
    except ValueError as error:
        assert "more than the" in str(error)  # noqa: PT017
    for start, end in protected_spans(text, kinds).tolist():
        assert text[start:end] in "".join(parts)


def test_strings_of_json(bert: Compressor) -> None:
    value = {"note": "He did not pay $4,200 and never will, they said.", "n": 7}
    shorter, _ = compress_json(bert, value, rate=0.7, protect=["numbers", "negations"])
    assert all(part in shorter["note"] for part in ("not", "$4,200", "never"))


NEAR_PATHS = st.sampled_from(
    [*"aB1 \t\n\u00a0\u2028/\\.:\"'{}*@-~=`<>|(),é中", "http://", "C:\\", "/*", "../", "~/", "{id}", "a/b.py:3"]
)


@given(st.lists(NEAR_PATHS, max_size=60).map("".join))
def test_paths_are_those_of_the_whole_text(text: str) -> None:
    """They are looked for in words with a slash only."""
    whole = [[m.start(), m.start() + len(m[0].rstrip("."))] for m in _PATHS.finditer(text)]
    assert protected_spans(text, ["paths"]).tolist() == whole


@pytest.mark.parametrize("text", ["a" * 2_000_000, "a@" + "b." * 500_000, '"' + "a" * 2_000_000], ids=lambda x: x[:4])
def test_a_line_without_end_takes_no_longer_than_it_is(text: str) -> None:
    begun = time.process_time()
    assert not protected_spans(text, ["quotes", "urls", "paths"]).size
    assert time.process_time() - begun < 20  # which takes 1; a domain of 1 MB took minutes
