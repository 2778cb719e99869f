"""Builds the wheel and tries it where nothing else is installed: alone, with one extra after the other, with all.

python .ci/wheel.py dist

Every step uses what its extra is for. One environment serves all: it begins with the wheel alone, and extras are added
to it, so that `all` has nothing left to install. Those that bring a framework, which `all` leaves out, come last.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = str(ROOT / "tests")
MOST_MEGABYTES = 25

BASE = """
import jaxcompress as jc
assert "site-packages" in jc.__file__, jc.__file__
loaded = jc.load_embedded()
prompt = loaded.tokenizer.encode("def main(")
(tokens,) = jc.generate(loaded.model, [prompt], loaded.policy, 16, max_new_tokens=5)
assert tokens.shape == (1, 5)
print(jc.__version__, repr(loaded.tokenizer.decode(tokens[0])))
"""

EXTRAS = {
    "cli": """
import subprocess, sys
for given in (["info"], ["generate", "--prompt", "def main(", "--slots", "16", "--max-new-tokens", "5"]):
    subprocess.run([sys.executable, "-m", "jaxcompress", *given], check=True)
""",
    "train": """
import jaxcompress as jc
from jaxcompress.training import Checkpoints, PackedRows, adamw_for_decoder, batches, bounded, fit, init_train_state
from jaxcompress.training import make_step, pack
loaded = jc.load_embedded()
rows = PackedRows(pack(["def main(): pass\\n" * 40], loaded.tokenizer, vocab_size=2048), 32)
optimizer = adamw_for_decoder(1e-4)
step = make_step(bounded(jc.get_policy("tova"), 8, segment=16, bptt_segments=1), optimizer)
with Checkpoints("checkpoints") as checkpoints:
    state = fit(init_train_state(loaded.model, optimizer), step, batches(rows, batch=1, seed=0), steps=1,
                checkpoints=checkpoints)
assert int(state.step) == 1
""",
    "vision": """
from jaxcompress.checkpoints import load_embedded_vision
from jaxcompress.embedded.drawings import SIDE
from PIL import Image
read = load_embedded_vision().processor(images=[Image.new("RGB", (SIDE, SIDE))], return_tensors="np")
print(read["pixel_values"].shape)
""",
    "plots": """
import jaxcompress as jc
from jaxcompress.evaluation.figures import lifetimes
loaded = jc.load_embedded()
ids = loaded.tokenizer.encode("def main(): pass\\n" * 8)
lifetimes(jc.trace(loaded.model, ids[None], jc.get_policy("tova"), 16).death[:, 0], "lifetimes.png")
""",
    "gguf": """
import sys
sys.path.append(TESTS)
from pathlib import Path
import jaxcompress as jc
from checkpoints.gguf_files import KINDS, write
write(Path("model.gguf"), "llama3_gqa", KINDS.Q8_0)
print(jc.load("model.gguf"))
""",
    "int8": """
import jaxcompress as jc
loaded = jc.load(jc.embedded.decoder_folder(), dtype="int8")
prompt = loaded.tokenizer.encode("def main(")
(tokens,) = jc.generate(loaded.model, [prompt], jc.get_policy("tova"), 16, max_new_tokens=5)
print(tokens)
""",
    "data": """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
from jaxcompress.training import read_documents
try:
    read_documents("nobody/nothing")
except FileNotFoundError as error:  # datasets was asked; without it the error would name the extra
    print(error)
""",
    "tensorboard": """
from pathlib import Path
from jaxcompress.training.metrics import tensorboard
tensorboard("events")(1, {"loss": 2.0})
assert list(Path("events").iterdir())
""",
    "serve": """
from jaxcompress.cli import main
import contextlib, io
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main(["serve", "--help"])
import jaxcompress.server
""",
    "lm-eval": """
import subprocess, sys
subprocess.run([sys.executable, "-m", "jaxcompress.lm_eval", "--help"], check=True, stdout=subprocess.DEVNULL)
""",
    "teacher": """
from jaxcompress.prompt.endpoint import Endpoint, TeacherFailed
try:
    Endpoint("http://127.0.0.1:9/v1", "none", attempts=1)("Shorten this.", "A text.")
except TeacherFailed as error:  # the client was there and found no server
    print(error)
""",
    "parquet": """
from pathlib import Path
import pyarrow, pyarrow.parquet
from jaxcompress.prompt import Compressor
from jaxcompress.prompt.corpus import CorpusJob, compress_corpus
table = pyarrow.table(dict(text=["The council of twelve members will vote on Monday."]))
pyarrow.parquet.write_table(table, "in.parquet")
print(compress_corpus(Compressor.load(), CorpusJob(Path("in.parquet"), Path("shorter"), rate=0.5)))
""",
}  # fmt: skip

FRAMEWORKS = {
    "langchain": """
from langchain_core.documents import Document
from jaxcompress.prompt import Compressor
from jaxcompress.prompt.langchain import DocumentCompressor
text = "The council of twelve members will vote on the budget on Monday."
print(DocumentCompressor(compressor=Compressor.load(), rate=0.5).compress_documents([Document(text)], "Who votes?"))
""",
    "llama-index": """
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from jaxcompress.prompt import Compressor
from jaxcompress.prompt.llama_index import NodeCompressor
node = NodeWithScore(node=TextNode(text="The council of twelve members will vote on the budget on Monday."), score=1.0)
found = NodeCompressor(compressor=Compressor.load(), rate=0.5).postprocess_nodes([node], QueryBundle("Who votes?"))
print(found[0].node.get_content())
""",
    "ray": """
from pathlib import Path
from jaxcompress.prompt import Compressor
from jaxcompress.prompt.corpus import CorpusJob
from jaxcompress.prompt.on_ray import compress_corpus_on_ray
job = CorpusJob(Path("in.parquet").absolute(), Path("by-ray").absolute(), rate=0.5)
print(compress_corpus_on_ray(Compressor.load, job, workers=1))
""",
}


def build(folder: Path) -> Path:
    """The wheel, built without what happens to be installed here."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("jaxcompress-*.whl")
    megabytes = wheel.stat().st_size / 1e6
    if megabytes > MOST_MEGABYTES:
        raise SystemExit(f"{wheel.name} has {megabytes:.1f} MB; at most {MOST_MEGABYTES} are allowed")
    print(f"{wheel.name}: {megabytes:.1f} MB", flush=True)
    return wheel


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("jaxcompress-*.whl"):
        old.unlink()
    wheel = build(folder).resolve()
    with tempfile.TemporaryDirectory() as place:
        venv.create(Path(place) / "venv", with_pip=True)
        python = Path(place) / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

        def install(extra: str = "", *more: str) -> str:
            what = f"jaxcompress{extra} @ {wheel.as_uri()}"
            command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-compile", *more, what]
            return subprocess.run(command, check=True, cwd=place, env=alone, stdout=subprocess.PIPE, text=True).stdout

        def run(code: str) -> None:
            subprocess.run([str(python), "-c", code.replace("TESTS", repr(TESTS))], check=True, cwd=place, env=alone)

        install()
        run(BASE)
        for extra, code in EXTRAS.items():
            print(f"[{extra}]", flush=True)
            install(f"[{extra}]")
            run(code)
        said = install("[all]", "--dry-run")
        new = [line for line in said.splitlines() if line.startswith("Would install")]
        if new and new[0].split()[2:] != [f"jaxcompress-{wheel.name.split('-')[1]}"]:
            raise SystemExit(f"[all] has packages that no extra has: {new[0]}")
        print("[all] needs nothing more")
        for extra, code in FRAMEWORKS.items():
            print(f"[{extra}]", flush=True)
            install(f"[{extra}]")
            run(code)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dist"))
