"""What a run of `train` leaves: a folder with the model and its policy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from jaxcompress.cli.mesh import is_first
from jaxcompress.cli.train.arguments import TrainFlags
from jaxcompress.cli.train.task import Task


def save_trained(how: TrainFlags, task: Task, params: Any, folder: Path, dtype: Any, tokenizer: Path) -> None:
    """Writes model and policy, both or neither, in place of those of fewer steps. All processes call it, the first one
    writes.

    Args:
      params: trained.
      dtype: in which weights are stored.
      tokenizer: folder whose files are copied beside the model.
    """
    import jax

    from jaxcompress.checkpoints import SavedPolicy, save, save_policy
    from jaxcompress.distributed import on_host

    new = folder.with_name(folder.name + ".new")
    model, network = task.parts(params)
    model = jax.tree.map(lambda x: x.astype(dtype), model)
    if jax.process_count() > 1:
        model, network = jax.tree.map(on_host, (model, network))
    if not is_first():
        return
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    save(model, new, tokenizer_from=tokenizer)
    settings: dict[str, Any] = {}
    if how.policy != "full":
        settings = dict(slots=how.slots, segment=how.segment, chunk=how.chunk_length, placement=how.placement)
    if task.own is not None:
        save_policy(task.own._replace(settings={**task.own.settings, **settings}), new, model=model)
    elif task.learned is None or network is None:
        save_policy(SavedPolicy(how.policy, settings), new)
    else:
        saved = SavedPolicy(task.learned.kind, settings | task.learned.settings, network._asdict())
        save_policy(saved, new, model=model)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
