"""The ground: what a bounded state is made of. Arrays, and nothing that knows models or policies."""

from jaxcompress.state.kv_state import KVState, State

__all__ = ["KVState", "State"]
