"""jaxcompress train"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from jaxcompress.cli.runtime import warn_of_positions
from jaxcompress.inputs.text import parse_json, parse_toml, read_text

if TYPE_CHECKING:
    from jaxcompress.generation.text import Tokenizer
    from jaxcompress.models.decoder import Decoder
    from jaxcompress.policies.forget_head import ForgetHead
    from jaxcompress.policies.policy import Policy
    from jaxcompress.state.placement import Placement
    from jaxcompress.training.data import PackedRows
    from jaxcompress.training.learning import Learning
    from jaxcompress.training.trainer import Objective

LANGUAGE = 0.5  # weight of the text itself beside the teacher
HEAD_RATE = 10  # a network that starts from nothing learns so many times faster than the model beside it


class Task(NamedTuple):
    """What a run does.

    Attributes:
      params: what is trained.
      objective: for what.
      measured: whose metrics are told of held-out rows.
      told: by metric the name and the unit under which it is told.
      parts: of trained params: the model, and the policy's own weights, if it has any.
      learned: how the policy is learned, if it is.
    """

    params: Any
    objective: Objective
    measured: Objective
    told: dict[str, tuple[str, str]]
    parts: Callable[[Any], tuple[Decoder, ForgetHead | None]]
    learned: Learning | None


NATS = {"loss": ("loss", "nats per token")}
DISTILLED = {
    "language": NATS["loss"],
    "divergence": ("divergence", "nats per token, from the full cache before training"),
}
_FORESIGHT = ("foresight", "cross-entropy of attention to come, nats per set of slots and look")
FORESEEN = {"retention": _FORESIGHT}
FORESEEN_ALONE = {"loss": _FORESIGHT}
KEPT = {
    "prediction": ("prediction while tokens fade", "nats per token"),
    "kept": ("share kept", "of all tokens"),
}


@dataclass(frozen=True)
class Train:
    """Trains a model further on text, through a state of so many slots or with plain attention (policy full).

    --data is a text file, a JSONL file, a folder of both, or the name of a Hugging Face dataset. The last rows are held
    out. What comes out is --out: checkpoints/, metrics.jsonl, run.json (the settings), and at the end model/, a Hugging
    Face folder with the policy beside it.

    A run that was stopped, even by kill -9, goes on with `jaxcompress train --out runs/x --resume`, and gives what it
    would have given. With more --steps, one that is finished goes on, too. --config reads settings from a TOML file;
    flags win.

    Example: jaxcompress train --data books/ --policy tova --slots 128 --steps 200 --out runs/books
    """

    data: str
    """File, folder, or name of a dataset of the Hugging Face hub (`name` or `name:configuration`)."""
    out: Path
    """Folder of the run."""
    model: str | None = None
    """Hugging Face folder, hub id, GGUF file or smollm2; the embedded model if not given."""
    tokenizer: str | None = None
    """Folder with another tokenizer; the model's if not given."""
    field: str = "text"
    """Where JSON lines and datasets have the text. Lines may have token ids under "tokens" instead."""
    split: str = "train"
    """Of a dataset."""
    policy: str = "tova"
    """See `jaxcompress info` for the names; `full` is plain causal attention. Learned with the model: dms, dms-pool,
    dmc; learned from the model, which stays as it is without --distill: retention, retention-layer, retention-pool."""
    distill: bool = False
    """The model is taught, beside the text, by what it predicts with its full cache as it is before training. A
    retention head then learns together with it, at ten times the learning rate."""
    lora: int | None = None
    """Train adapters of this rank beside the model's projections of attention (LoRA); the model itself stays as it is.
    They are added to it when it is saved."""
    slots: tuple[int, ...] = (128,)
    """Capacity: one for all layers, or one for each."""
    segment: int = 256
    """Tokens read at once. More is faster and takes more memory; the result is the same."""
    bptt_segments: int | None = 2
    """Over how many segments the gradient goes back; None: over the whole row."""
    chunk: int = 1
    """Tokens between two selections; 1 is exactly as in decoding."""
    placement: Literal["absolute", "slot", "compact"] | None = None
    """Where tokens stand for RoPE; as the policy was published if not given."""
    ratio: float = 8.0
    """dms, dmc: of how many tokens one is kept in the end."""
    window: int = 16
    """dms: tokens before one is evicted."""
    length: int = 1024
    """Tokens predicted per row."""
    rows: int = 4
    """Per step."""
    accumulate: int = 1
    """The rows of a step are taken in so many parts, one after the other, for less memory."""
    steps: int = 200
    """In all. With --resume it may be another number than before: the learning rate, and what a learned policy is asked
    for, then go on as in a run that was begun with so many steps."""
    learning_rate: float = 1e-4
    """The highest."""
    schedule: Literal["cosine", "stable", "constant"] = "cosine"
    """After the warmup: half a cosine to a tenth; a plateau and a linear decay; the same rate for good."""
    warmup: int = 20
    """Steps in which the learning rate rises from 0. Where all are no more than these, all but the last, which is
    told."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.01
    clip: float = 1.0
    """Highest norm of the gradient; larger ones are scaled down to it."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """What models compute in, frozen ones too; bfloat16 on accelerators, float32 on CPUs if not given. Master weights,
    losses and sums of gradients are float32."""
    held_out: int = 16
    """Rows that are never trained on, at most a tenth of all; their loss in nats per token is told before and after,
    and beside it what else is minimised."""
    seed: int = 0
    """Of the order of the data."""
    save_every: int = 50
    """Steps between two checkpoints."""
    keep: int = 2
    """So many checkpoints are kept."""
    tensorboard: bool = False
    """Write to --out/tensorboard, too."""
    resume: bool = False
    """Go on from the last checkpoint in --out; with --data, begin if there is no run yet. Settings not given are those
    of the run. Of the others --steps, --save-every, --keep and --tensorboard may change."""
    config: Path | None = None
    """TOML file with settings, named as the flags: `learning_rate = 1e-4`."""

    def run(self) -> None:
        self._check()
        run_file, folder = self.out / "run.json", self.out / "model"
        from jaxcompress.cli.runtime import open_weights, write_json

        loaded = open_weights(self.model, "float32")
        import jax
        import optax

        from jaxcompress.checkpoints import config_dtype
        from jaxcompress.generation.text import Tokenizer
        from jaxcompress.pallas_kernels.devices import device
        from jaxcompress.training.checkpointing import Checkpoints
        from jaxcompress.training.data import batches, split
        from jaxcompress.training.metrics import MetricsFile, flops_per_token, mean_attended
        from jaxcompress.training.optimizer import OPTIMIZERS, SCHEDULES
        from jaxcompress.training.trainer import fit, init_train_state, make_measure, make_step

        tokenizer = Tokenizer(self.tokenizer or loaded.folder)
        dtype = self.compute_dtype or ("float32" if device()[0] == "cpu" else "bfloat16")
        task = self._task(loaded.model, dtype)
        rows = self._rows(tokenizer, loaded.config.vocab_size)
        parts = split(rows, batch=self.rows, held_out=self.held_out, held_out_batch=self.rows // self.accumulate)
        warn_of_positions(loaded.model, [self._places], self.length)
        data = batches(rows, batch=self.rows, seed=self.seed, train=parts.train)
        schedule = SCHEDULES[self.schedule](self.learning_rate, self.steps, warmup=self._warmup)
        optimizer = OPTIMIZERS[self.optimizer](schedule, clip=self.clip, weight_decay=self.weight_decay)
        if task.learned is not None and self.distill:
            faster = SCHEDULES[self.schedule](HEAD_RATE * self.learning_rate, self.steps, warmup=self._warmup)
            own = OPTIMIZERS["adamw"](faster, clip=self.clip, weight_decay=0.0)
            optimizer = optax.partition({"model": optimizer, "head": own}, ("model", "head"))
        step = make_step(task.objective, optimizer, accumulate=self.accumulate, compute_dtype=dtype)
        measure = make_measure(task.measured, compute_dtype=dtype)
        slots = None if self.policy == "full" else round(sum(self.slots) / len(self.slots))
        flops = flops_per_token(loaded.model, mean_attended(self.length, slots))
        facts = dict(tokens=len(rows.stream.tokens), checksum=rows.stream.checksum)
        with Checkpoints(self.out / "checkpoints", keep=self.keep) as checkpoints:
            done = checkpoints.latest or 0
            begin = partial(init_train_state, task.params, optimizer, seed=self.seed)
            if done:
                state, where = checkpoints.restore(jax.eval_shape(begin))
                record = self._check_unchanged(run_file, facts, done)
                data.set_state(where)
                print(f"going on from step {done}", flush=True)
            else:
                if self.resume:
                    print(f"there is no {'checkpoint' if run_file.exists() else 'run'} in {self.out} yet: it begins")
                record = dict(data=facts, held_out=measure(task.params, parts.held_out))
                state = begin()
            record |= dict(settings=self._settings())
            write_json(record, run_file)
            print(f"{facts['tokens']:,} tokens, {parts.train:,} rows to train on; see {self.out / 'metrics.jsonl'}")
            if done < self.steps:
                print(self._rates(schedule, done), flush=True)
            before = record.get("held_out", {})
            for metric, (name, unit) in task.told.items():
                if metric in before:
                    print(f"held-out {name} before: {before[metric]:.4f} ({unit})", flush=True)
            stored, source = config_dtype(loaded.settings) or "float32", tokenizer.folder
            task = task._replace(params=None)  # the state has its own copy
            del loaded, begin
            with MetricsFile(self.out / "metrics.jsonl", after=done) as lines:
                state = fit(
                    state, step, data, steps=self.steps, checkpoints=checkpoints, save_every=self.save_every,
                    log=[with_rate(schedule, sink) for sink in (lines, *self._tensorboard(done))],
                    flops_per_token=flops,
                )  # fmt: skip
        after = measure(state.params, parts.held_out)
        for metric, (name, unit) in task.told.items():
            if metric in after:
                moved = f"{after[metric] - before[metric]:+.4f}, " if metric in before else ""
                print(f"held-out {name} after {self.steps} steps: {after[metric]:.4f} ({moved}{unit})", flush=True)
        if record.get("saved") != self.steps or not folder.exists():
            self._save(task, state.params, folder, stored, source)
            write_json(record | dict(saved=self.steps), run_file)
        print(f"saved in {folder}")

    def _check(self) -> None:
        """What can be known before anything is loaded."""
        for name in ("length", "rows", "accumulate", "steps", "segment", "chunk", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"--warmup must be at least 0, not {self.warmup}")
        if self.rows % self.accumulate:
            raise ValueError(f"--rows {self.rows} cannot be taken in --accumulate {self.accumulate} equal parts")
        if self.distill and (self.policy == "full" or self.policy.startswith(("dms", "dmc"))):
            raise ValueError(
                f"--distill is for states that evict by a policy or a retention head, not for {self.policy}"
            )
        if self.lora is not None and self.policy.startswith(("dms", "dmc", "retention")):
            raise ValueError(f"--lora trains adapters of a model; {self.policy} trains a network of its own")
        for name, why in self._idle().items():
            if getattr(self, name) != _DEFAULTS[name]:
                raise ValueError(f"--{name.replace('_', '-')} does nothing {why}; leave it out")
        if not self.resume and any(any(self.out.glob(name)) for name in ("run.json", "checkpoints/*", "model")):
            raise ValueError(f"{self.out} holds a run already; give --resume to go on with it, or another --out")

    def _idle(self) -> dict[str, str]:
        """Settings that nothing reads, given the others, and why."""
        kind, idle = self.policy.split("-")[0], {}
        if self.policy == "full":
            why = "with --policy full, which evicts nothing"
            idle |= dict.fromkeys(("slots", "segment", "bptt_segments", "chunk", "placement"), why)
        if kind != "dms":
            idle["window"] = f"with --policy {self.policy}; it is for dms"
        if kind not in ("dms", "dmc"):
            idle["ratio"] = f"with --policy {self.policy}; it is for dms and dmc"
        if Path(self.data).expanduser().exists():
            idle["split"] = f"with files; {self.data} is no dataset of the hub"
        return idle

    @property
    def _places(self) -> Placement:
        """Where tokens stand for RoPE."""
        from jaxcompress.policies.names import get_policy
        from jaxcompress.training.learning import LEARNABLE

        plain = self.policy == "full" or self.policy in LEARNABLE
        return self.placement or ("absolute" if plain else get_policy(self.policy).placement)

    def _rates(self, schedule: Callable[[int], Any], done: int) -> str:
        """How the learning rate goes, from here to the end."""
        short = "" if self._warmup == self.warmup else f" (--warmup {self.warmup} does not fit into {self.steps} steps)"
        warm = f"to {self.learning_rate:g} in {self._warmup} steps{short}, then {self.schedule} to step {self.steps}"
        return f"learning rate: {warm}; {float(schedule(done)):.3g} at step {done + 1}"

    @property
    def _warmup(self) -> int:
        return min(self.warmup, self.steps - 1)

    def _task(self, model: Decoder, dtype: str) -> Task:
        """What is trained, for what, and what is told of it."""
        import jax

        from jaxcompress.policies.names import get_policy
        from jaxcompress.training.learning import LEARNABLE, learning
        from jaxcompress.training.lora import add_lora, init_lora
        from jaxcompress.training.objectives import adapted, causal

        frozen = jax.tree.map(lambda x: x.astype(dtype), model)  # what stays as it is needs no master weights
        teacher, told = (frozen, DISTILLED) if self.distill else (None, NATS)
        key = jax.random.key(self.seed)
        if self.policy in LEARNABLE:
            through = partial(self._through, teacher=teacher) if self.distill else None
            alone = self.policy.startswith("retention") and not self.distill
            learned = learning(
                self.policy, frozen if alone else model, key,
                steps=self.steps, ratio=self.ratio, window=self.window, through=through,
            )  # fmt: skip
            if through is not None:
                return Task(
                    learned.params, learned.objective, learned.objective, told | FORESEEN, learned.parts, learned
                )
            parts = (lambda head: (model, head)) if alone else learned.parts
            told = {"language": NATS["loss"]} | (FORESEEN_ALONE if alone else KEPT)
            return Task(learned.params, learned.objective, self._with_language(learned), told, parts, learned)
        objective = causal() if self.policy == "full" else self._through(get_policy(self.policy), teacher)
        if self.lora is None:
            return Task(model, objective, objective, told, lambda params: (params, None), None)
        adapters, objective = init_lora(model, key, rank=self.lora), adapted(objective, frozen)
        return Task(adapters, objective, objective, told, lambda params: (add_lora(model, params), None), None)

    def _through(self, policy: Policy, teacher: Decoder | None) -> Objective:
        """What a model is trained for with a policy that evicts."""
        from jaxcompress.training.objectives import bounded, distilled

        if self.length < self.segment:
            raise ValueError(f"--length {self.length} is less than one --segment of {self.segment} tokens")
        how: dict[str, Any] = dict(
            segment=self.segment, bptt_segments=self.bptt_segments, chunk=self.chunk, placement=self.placement
        )
        if teacher is None:
            return bounded(policy, self._capacity, **how)
        return distilled(policy, self._capacity, teacher=teacher, language=LANGUAGE, **how)

    def _with_language(self, learned: Learning) -> Objective:
        """The metrics of a policy that is learned, and the loss of the text when it is used as a policy."""
        from jaxcompress.policies.registry import learned_policy
        from jaxcompress.training.objectives import bounded

        def objective(params: Any, batch: Any, step: Any, key: Any) -> tuple[dict[str, Any], None]:
            model, head = learned.parts(params)
            policy = learned_policy(learned.kind, head._asdict(), **learned.settings)
            how: dict[str, Any] = dict(
                segment=min(self.segment, self.length), chunk=self.chunk, placement=self.placement
            )
            read = bounded(policy, self._capacity, **how)
            metrics = learned.objective(params, batch, step, key)[0]
            return {**metrics, "language": read(model, batch, step, key)[0]["loss"]}, None

        return objective

    @property
    def _capacity(self) -> Any:
        return self.slots[0] if len(self.slots) == 1 else self.slots

    def _save(self, task: Task, params: Any, folder: Path, dtype: Any, tokenizer: Path) -> None:
        """Model and policy, both or neither, in place of those of fewer steps."""
        import jax

        from jaxcompress.checkpoints import save, save_policy

        new = folder.with_name(folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
        model, own = task.parts(params)
        save(jax.tree.map(lambda x: x.astype(dtype), model), new, tokenizer_from=tokenizer)
        reading = () if self.policy == "full" else ("slots", "segment", "chunk", "placement")
        settings = {name: getattr(self, name) for name in reading}
        if task.learned is None or own is None:
            save_policy(new, self.policy, settings)
        else:
            save_policy(new, task.learned.kind, settings | task.learned.settings, own._asdict())
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)

    def _rows(self, tokenizer: Tokenizer, vocab_size: int) -> PackedRows:
        from jaxcompress.cli.runtime import progress
        from jaxcompress.training.data import PackedRows, check_vocabulary, pack, read_documents

        check_vocabulary(tokenizer, vocab_size)
        try:
            documents = read_documents(self.data, field=self.field, split=self.split)
        except ImportError as error:
            raise ValueError(str(error)) from error
        with progress(None, "tokenizing") as told:
            return PackedRows(pack(documents, tokenizer, vocab_size=vocab_size, progress=told), self.length)

    def _tensorboard(self, done: int) -> list[Sink]:
        if not self.tensorboard:
            return []
        from jaxcompress.training.metrics import tensorboard

        try:
            return [tensorboard(self.out / "tensorboard", after=done)]
        except ImportError as error:
            raise ValueError(str(error)) from error

    def _settings(self) -> dict[str, Any]:
        """Those that make the run what it is, as JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
            if name not in _PER_CALL
        }

    def _check_unchanged(self, run_file: Path, facts: Mapping[str, Any], done: int) -> dict[str, Any]:
        """That a run goes on with the settings and the data it began with; returns what was written then."""
        begun, changes = _read_run(run_file), []
        for name, value in self._settings().items():
            flag, was = f"--{name.replace('_', '-')}", begun["settings"].get(name)
            if value == was:
                continue
            if name not in _FREE:
                raise ValueError(
                    f"{flag} was {was} when the run in {self.out} began, and is {value} now; leave it out, or begin "
                    f"another run with --model {self.out / 'model'}"
                )
            changes.append(f"{flag} is {value} from now on; it was {was}")
        if self.steps < done:
            raise ValueError(f"the run in {self.out} has taken {done} steps; --steps {self.steps} is less: give more")
        then = begun.get("data")
        if not isinstance(then, dict) or not {"tokens", "checksum"} <= then.keys():
            raise ValueError(f"{run_file} is damaged; begin another run with another --out")
        if then != dict(facts):
            raise ValueError(
                f"{self.data} has changed since the run in {self.out} began: {facts['tokens']:,} tokens (checksum "
                f"{facts['checksum']}), then {then['tokens']} ({then['checksum']})"
            )
        print(*changes, sep="\n", end="\n" * bool(changes), flush=True)
        return begun


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Train)}

Sink = Callable[[int, Mapping[str, Any]], None]

_PER_CALL = ("out", "resume", "config")
_FREE = ("steps", "save_every", "keep", "tensorboard")  # may change while a run lasts


def with_rate(schedule: Callable[[int], Any], sink: Sink) -> Sink:
    """The same sink, told the learning rate of each step, too."""
    return lambda step, numbers: sink(step, {**numbers, "learning_rate": float(schedule(step - 1))})


def with_settings(arguments: Sequence[str]) -> list[str]:
    """The arguments of `train`, and after them, as flags, the settings of --config and of the run to --resume.

    What is given as a flag wins over --config, which wins over the run.

    Raises:
      ValueError: not TOML, an unknown setting, or one of a type that no flag has.
      OSError: the file cannot be read.
    """
    given, config, run = _flags(arguments), {}, {}
    if path := given.get("config"):
        config = _checked(parse_toml(read_text(path), path), path)
        if "config" in config:
            raise ValueError(f"config in {path} does nothing; put all settings into one file")
    out = given.get("out") or config.get("out")
    if out and ("resume" in given or config.get("resume")):
        if (run_file := Path(out) / "run.json").exists():
            run = _read_run(run_file)["settings"]
        elif "data" not in given | config:
            raise ValueError(f"there is no run in {out} to go on with: {run_file} does not exist; --data begins one")
    added = []
    for name, value in (run | config).items():
        flag = f"--{name.replace('_', '-')}"
        if name in given or value is False:
            continue
        if isinstance(value, list):
            added += [flag, *map(str, value)]
        elif value is True:
            added.append(flag)
        elif str(value).startswith("-"):  # not to look like a flag
            added.append(f"{flag}={value}")
        else:
            added += [flag, str(value)]
    return [*arguments, *added]


def _checked(settings: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """The same. Raises ValueError for a setting that is unknown, or of another type than its flag."""
    types = get_type_hints(Train)
    for name, value in settings.items():
        if name not in types:
            raise ValueError(f"unknown setting {name!r} in {where}; known: {', '.join(types)}")
        if not _fits(value, types[name]):
            raise ValueError(f"{name} cannot be {value!r} in {where}; it is {_told(types[name])}")
    return settings


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return any(value is one or value == one for one in get_args(kind))
    if get_origin(kind) is tuple:
        values = value if isinstance(value, list) else [value]
        return bool(values) and all(_fits(one, get_args(kind)[0]) for one in values)
    if kind is NoneType:
        return value is None or value == "None"  # TOML has no null; the flag takes the word
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, str if kind is Path else kind)


def _told(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_told, get_args(kind)))
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list of integers"
    return {int: "an integer", float: "a number", bool: "true or false", NoneType: '"None"'}.get(kind, "a text")


def _flags(arguments: Sequence[str]) -> dict[str, str]:
    """What is given: flags by the names of their fields, with what follows each."""
    found = {}
    for at, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            found[name.replace("-", "_")] = value if equals else next(iter(arguments[at + 1 : at + 2]), "")
    return found


def _read_run(path: Path) -> dict[str, Any]:
    """What run.json says. Raises ValueError if that is not what `train` writes."""
    run = parse_json(read_text(path), str(path))
    if not isinstance(run, dict) or not isinstance(run.get("settings"), dict):
        raise ValueError(f"{path} has no settings; begin another run with another --out")
    _checked(run["settings"], path)
    return run
