"""When a policy evicts: every so many steps, or once."""

from __future__ import annotations

from jaxcompress.policies.policy import policy
from jaxcompress.policies.schedule import Schedule
from jaxcompress.policies.wrapper import wrapper


@policy
class every(wrapper):
    """Frees n slots at once when the state is full, so that scores are computed only every n-th step.

    The state takes the same memory, and holds between capacity - n + 1 and capacity tokens. A policy whose scores cost
    a sort or a pass over the keys decodes at nearly the cost of plain attention. If a policy protects a share, it is a
    share of what stays.

    Raises:
      ValueError: n below 1, or a policy that evicts before a step, once, or never.
    """

    label = "every{n}"

    n: int

    def check(self) -> None:
        super().check()
        if self.n < 1:
            raise ValueError(f"every needs 1 step or more, not {self.n}")
        when = self.policy.schedule.when
        if when != "after":
            raise ValueError(
                f"every({self.policy.name}, {self.n}): only a policy that evicts after a step can wait, not {when}"
            )

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        return Schedule("after", frees=self.n)

    @property
    def needs(self) -> int:  # type: ignore[override]
        return self.policy.needs - self.policy.schedule.frees + self.n


@policy
class once(wrapper):
    """Reduces the prompt, read at once, to `keep` tokens per set; after that nothing is evicted.

    The rest of the capacity is room for what is read and written later. A token that finds no room is an error, as in a
    full cache. SnapKV and most prefill methods were published so. If a policy protects a share, it is a share of
    `keep`.

    Raises:
      ValueError: keep below what the policy needs, or a policy that never evicts or evicts before a step.
    """

    label = "once{keep}"

    keep: int

    def check(self) -> None:
        super().check()
        when = self.policy.schedule.when
        if when != "after":
            raise ValueError(
                f"once({self.policy.name}): only a policy that evicts after a block can do so once, not {when}"
            )
        if self.keep < self.policy.needs:
            raise ValueError(
                f"policy {self.policy.name} needs at least {self.policy.needs} slots, not keep={self.keep}"
            )

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        return Schedule("once", keep=self.keep)

    @property
    def needs(self) -> int:  # type: ignore[override]
        return self.keep + 1
