"""The arrays of a bounded state. This package depends on neither models nor policies."""

from jaxcompress.state.kv_state import KVState, State

__all__ = ["KVState", "State"]
