"""jaxcompress serve"""

from __future__ import annotations

import ipaddress
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jaxcompress.cli.flags import ModeFlags, PlacementFlag, PolicyFlags, StateDtypeFlag, WeightFlags, at_least
from jaxcompress.cli.mesh import MeshFlag
from jaxcompress.cli.paths import FOLDER, POOL
from jaxcompress.cli.runtime import chosen_policy, folder_name, open_weights

if TYPE_CHECKING:
    from socket import socket

    from jaxcompress.checkpoints import Loaded
    from jaxcompress.distributed import ShardingRules
    from jaxcompress.server import Settings
    from jaxcompress.serving import PoolSpec, PrefixLimits

KEY = "JAXCOMPRESS_API_KEY"

DISK_MB = 8192
"""Megabytes of states of prompts in a folder, unless --prefix-disk-mb says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Serve(MeshFlag, StateDtypeFlag, PlacementFlag, ModeFlags, PolicyFlags, WeightFlags):
    """Answers over HTTP as OpenAI's API does, many requests at a time, each in a state of fixed size.

    Example: jaxcompress serve --model smollm2 --policy tova --slots 512 --port 8000
    """

    slots: tuple[int, ...] = (512,)
    """Capacity of each layer: one number for all layers, or one per layer."""
    rows: int = 8
    """Requests at a time; more wait."""
    more_pools: Annotated[tuple[str, ...], POOL] = ()
    """Further pools of rows, each POLICY:SLOTS such as h2o:256. A request names one as its model: NAME/POLICY:SLOTS."""
    segment: int = 128
    """Tokens of a prompt that are read before the other requests go on."""
    host: str = "127.0.0.1"
    """Address to listen at: this machine only, unless you say otherwise."""
    port: int = 8000
    """Port to listen at."""
    allowed_hosts: tuple[str, ...] = ()
    """Names under which clients may call the server; any if --host is not a loopback address and none are given."""
    api_key: str | None = None
    """Key that clients have to send. The environment variable JAXCOMPRESS_API_KEY gives it too, and does not show in
    the list of processes."""
    max_tokens: int = 1024
    """Tokens of an answer, at most."""
    max_prompt_tokens: int = 262_144
    """Tokens of a prompt, at most."""
    max_waiting: int = 256
    """Requests that may wait or be answered; one more is refused."""
    seconds: float = 600.0
    """Time for an answer."""
    prefixes: Annotated[Path | None, FOLDER] = None
    """Folder in which states of prompts are kept, so that they outlive the server; in memory only if not given."""
    prefix_mb: int = 1024
    """Megabytes of states of prompts in memory; 0 keeps none."""
    prefix_disk_mb: int | None = None
    """Megabytes of states of prompts in the folder; 8192 if not given."""

    def run(self) -> None:
        more = self._more()
        self.check_placement(self.policy, *(policy for policy, _ in more))
        at_least(1, rows=self.rows, segment=self.segment, max_tokens=self.max_tokens, max_waiting=self.max_waiting)
        at_least(1, max_prompt_tokens=self.max_prompt_tokens)
        at_least(0, prefix_mb=self.prefix_mb, prefix_disk_mb=self.prefix_disk_mb)
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port must be from 0 (any free one) to {2**16 - 1}, not {self.port}")
        if self.seconds <= 0:
            raise ValueError(f"--seconds must be above 0, not {self.seconds:g}")
        self._check_prefixes()
        settings = self._settings()
        from jaxcompress.server import bound

        with bound(self.host, self.port) as listening:  # before the model is loaded: a port in use is told at once
            self._serve(listening, settings)

    def _serve(self, listening: socket, settings: Settings) -> None:
        from jaxcompress.server import Served, run_server
        from jaxcompress.serving import Engine, EngineLimits

        name = "embedded" if self.model is None else folder_name(self.model)
        rules = self.rules()
        loaded = open_weights(self.model, self.dtype, rules)
        served = Served(name, loaded, self._pools(name, loaded, rules), int(time.time()))
        limits = EngineLimits(self.max_waiting, self.max_prompt_tokens, self.max_tokens)
        engine = Engine(served.pools, limits=limits, prefixes=self._prefix_limits())
        run_server(served, engine, settings, listening)

    def _settings(self) -> Settings:
        """Raises ValueError for an empty key."""
        from jaxcompress.server import Settings

        return Settings(
            api_key=os.environ.get(KEY) if self.api_key is None else self.api_key, hosts=self._hosts(),
            concurrency=self.max_waiting, max_tokens=self.max_tokens, seconds=self.seconds,
        )  # fmt: skip

    def _check_prefixes(self) -> None:
        """Raises ValueError for flags that contradict one another."""
        if self.prefixes is None and self.prefix_disk_mb is not None:
            raise ValueError("--prefix-disk-mb is for --prefixes; give it a folder, or leave both out")
        if self.prefixes is not None and self.prefix_mb == 0:
            raise ValueError(
                "--prefix-mb 0 keeps no states of prompts, and --prefixes keeps them in a folder, from which clients "
                "are answered too; leave one of them out"
            )

    def _prefix_limits(self) -> PrefixLimits | None:
        from jaxcompress.serving import PrefixLimits

        if self.prefix_mb == 0:
            return None
        disk = DISK_MB if self.prefix_disk_mb is None else self.prefix_disk_mb
        return PrefixLimits(2**20 * self.prefix_mb, self.prefixes, 2**20 * disk)

    def _hosts(self) -> tuple[str, ...]:
        loopback = self.host == "localhost"
        with suppress(ValueError):
            loopback = loopback or ipaddress.ip_address(self.host).is_loopback
        return self.allowed_hosts or (("localhost", self.host, "127.0.0.1", "[::1]") if loopback else ("*",))

    def _pools(self, name: str, loaded: Loaded[Any, Any, Any], rules: ShardingRules | None) -> dict[str, PoolSpec]:
        from jaxcompress.serving import PoolSpec

        def pool(policy: str, slots: Any) -> PoolSpec:
            return PoolSpec(
                loaded.model, chosen_policy(policy, loaded.model, loaded.folder), slots, self.rows, self.placement,
                self.state_dtype, self.mode, self.chunk_tokens(), self.segment, sharding=rules,
            )  # fmt: skip

        found = {self._first(): pool(self.policy, self.capacity)}
        found |= {f"{policy}:{slots}": pool(policy, slots) for policy, slots in self._more()}
        return {f"{name}/{text}": one for text, one in found.items()}

    def _first(self) -> str:
        """The name of the first pool."""
        return f"{self.policy}:{'-'.join(map(str, self.slots))}"

    def _more(self) -> list[tuple[str, int]]:
        """Policy and slots of each further pool. Raises ValueError for another form, or a pool that is there twice."""
        found: list[tuple[str, int]] = []
        for text in self.more_pools:
            policy, _, slots = text.rpartition(":")
            if not policy or not slots.isdecimal() or not int(slots):
                raise ValueError(f"--more-pools takes POLICY:SLOTS such as h2o:256, not {text!r}")
            if (policy, int(slots)) in found or f"{policy}:{int(slots)}" == self._first():
                raise ValueError(f"there are two pools {policy}:{int(slots)}; name each once, the first by --policy")
            found.append((policy, int(slots)))
        return found
