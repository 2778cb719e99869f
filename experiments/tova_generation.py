"""Long texts written in a fixed number of slots, judged beside those of the full cache (TOVA paper, section 5.3).

    python experiments/tova_generation.py --model smollm2 --endpoint https://host/v1 --judge NAME --out rows.jsonl
    python experiments/tova_generation.py --model smollm2 --judge-model FOLDER --out rows.jsonl
    python experiments/tova_generation.py --out rows.jsonl --table table.md     # only draws what the file holds

The model writes one long text for each prompt and policy, drawn with the same seed. A judge compares it with the full
cache's, twice, with the places swapped: a text wins only if it wins in both places, everything else is a tie. The
judge is a model behind an endpoint (`pip install "jaxcompress[teacher]"`, its key in OPENAI_API_KEY), or a local one
of which the likeliest verdict is taken. A cell is one prompt, policy and size; the row keeps both texts and what the
judge said. A judge that gives no verdict fails the cell, and the same command asks again.

The paper compares texts of Llama-2-7B by GPT-4. A judge as small as SmolLM2 says little: look at how often it is
consistent first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from command import arguments, stop
from paper_tables import OfTable, Plan, markdown, of_experiment, run

import jaxcompress as jc
from jaxcompress.checkpoints import Loaded
from jaxcompress.evaluation.pairwise import Judge, judge_pair, likelihood_judge
from jaxcompress.evaluation.results import Cell, Figure, Row
from jaxcompress.generation import GenerationConfig, decode, init_decode_state, prefill
from jaxcompress.prompt.endpoint import Endpoint

EXPERIMENT, METRIC = "tova_generation", "1 won, 0.5 tied, 0 lost to the full cache"
TASKS = tuple(
    f"Write a long story about {what}. Describe people, places and talk in detail, and do not end it early."
    for what in (
        "a lighthouse keeper who finds a letter", "two sisters who repair an old boat", "a village without rain",
        "a thief who returns what he stole", "the last train before winter", "a teacher who forgets a name",
        "a map that is wrong in one place", "a violin that nobody can tune",
    )
)  # fmt: skip
VALUE = {"win": 1.0, "tie": 0.5, "loss": 0.0}


@dataclass(frozen=True, kw_only=True)
class Arguments(OfTable):
    """Adds a row to the file for each prompt, policy and size, and prints the table."""

    endpoint: str | None = None
    """The judge's server, which speaks OpenAI's chat completions, such as http://localhost:8000/v1."""
    judge: str = ""
    """The judge's name on that server."""
    judge_model: str | None = None
    """A local judge, as --model takes it; the model itself if there is no --endpoint either."""
    policies: tuple[str, ...] = ("window", "window+4", "tova", "h2o", "random")
    slots: tuple[int, ...] = (128, 256, 512)
    tokens: int = 1024
    """Tokens of a text. A text ends sooner if the model ends it."""
    stories: int = 8
    """Texts of each policy; after the eighth the prompts begin anew with another seed."""
    temperature: float = 0.7
    top_p: float = 0.95


QUICK = Arguments(quick=True, policies=("window",), slots=(16,), tokens=24, stories=1)


def judge_of(args: Arguments, loaded: Loaded[Any, Any, Any]) -> tuple[str, Judge]:
    """The judge and its name."""
    if args.endpoint is None:
        other = loaded if args.judge_model is None else jc.load(args.judge_model, dtype=args.dtype)
        return f"local {args.judge_model or args.model or 'embedded'}", likelihood_judge(other)
    if not args.judge:
        stop("--endpoint needs the judge's name on the server: give it as --judge")
    return args.judge, Endpoint(args.endpoint, args.judge, temperature=0.0)


def written(
    loaded: Loaded[Any, Any, Any], policy: jc.Policy, slots: int, args: Arguments, seed: int
) -> tuple[str, int]:
    """A text, and the bytes of its state."""
    tokenizer, task = loaded.tokenizer, TASKS[seed % len(TASKS)]
    ids = tokenizer.encode(task + "\n\n")
    if tokenizer.has_chat_template:
        ids = tokenizer.encode(tokenizer.apply_chat_template([dict(role="user", content=task)]), add_bos=False)
    config = GenerationConfig(args.temperature, top_p=args.top_p, stop_token_ids=tuple(map(int, tokenizer.eos_ids)))
    state = prefill(loaded.model, [ids], init_decode_state(loaded.model, policy, slots, seeds=seed))
    nbytes = sum(part.nbytes for part in state.kv)
    tokens, _ = decode(loaded.model, state, args.tokens, config)
    row = np.asarray(tokens[0])
    return tokenizer.decode(row[row >= 0]), nbytes


def plan(args: Arguments) -> Plan:
    loaded = args.load()
    for policy in args.policies:
        jc.get_policy(policy)  # an unknown one ends it here
    name, judge = judge_of(args, loaded)
    make_cell = args.cells_of(EXPERIMENT, loaded.model, args.tokens)
    cells = (
        make_cell(task=TASKS[seed % len(TASKS)], policy=policy, slots=slots, seed=seed,
                  settings=dict(judge=name, temperature=args.temperature, top_p=args.top_p))
        for policy in args.policies
        for slots in args.slots
        for seed in range(args.stories)
    )  # fmt: skip
    references: dict[int, str] = {}

    def figures(cell: Cell) -> Iterator[Figure]:
        assert isinstance(cell.slots, int)
        if cell.seed not in references:
            full = jc.get_policy("full")
            references[cell.seed], _ = written(loaded, full, args.tokens + 256, args, cell.seed)
        text, nbytes = written(loaded, jc.get_policy(cell.policy), cell.slots, args, cell.seed)
        judged = judge_pair(judge, cell.task, text, references[cell.seed])
        details = dict(judged._asdict(), text=text, reference=references[cell.seed])
        yield Figure(metric=METRIC, value=VALUE[judged.outcome], tokens=args.tokens, samples=1, state_bytes=nbytes,
                     details=details)  # fmt: skip
        if cell.seed == args.stories - 1:
            jax.clear_caches()  # programs of other sizes would only fill memory

    return cells, figures


def line(row: Row) -> str:
    cell = row.cell
    return f"{cell.policy:20} {cell.slots!s:>6} {cell.seed:4} {row.figure.details['outcome']:5} {cell.task[:50]}"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: a line for each judge, policy and size."""
    rows = of_experiment(rows, EXPERIMENT)
    lines: dict[tuple[str, str, Any], list[Figure]] = {}
    for row in rows:
        lines.setdefault((row.cell.settings["judge"], row.cell.policy, row.cell.slots), []).append(row.figure)
    if not lines:
        return ["no rows"]

    def entries(found: list[Figure]) -> Iterator[str]:
        counts = Counter(one.details["outcome"] for one in found)
        yield f"{len(found)}"
        yield from (f"{counts[outcome]}" for outcome in VALUE)
        yield f"{sum(one.details['consistent'] for one in found) / len(found):.0%}"

    first = rows[0].cell
    return [
        f"{first.model}, {first.dtype}, texts of at most {first.context:,} tokens beside the full cache's, each pair "
        "judged in both orders.",
        "",
        *markdown(
            ["judge", "policy", "slots", "texts", "won", "tied", "lost", "the judge was consistent"],
            ([judge, f"`{policy}`", f"{slots:,}", *entries(found)] for (judge, policy, slots), found in lines.items()),
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    args = arguments(QUICK)
    run(args, lambda: plan(args), table, line, experiment=EXPERIMENT, apart=("judge",))
