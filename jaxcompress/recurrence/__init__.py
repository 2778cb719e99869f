"""The recurrence: attend over the slots and the incoming tokens, observe, evict back to capacity."""

from jaxcompress.recurrence.advance import Advanced, advance

__all__ = ["Advanced", "advance"]
