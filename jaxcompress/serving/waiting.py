"""The line of requests that wait for a row."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

from jaxcompress.serving.request import Ticket


class WaitingLine:
    """Requests in turn: the clients one after another, each client's requests in the order of their arrival.

    First come, first served would let one client with a thousand requests keep all others waiting.
    """

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[Ticket]] = OrderedDict()  # the client whose turn it is comes first

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def add(self, ticket: Ticket) -> None:
        """At the end of this client's requests."""
        self._of.setdefault(ticket.request.client, deque()).append(ticket)

    def next(self) -> Ticket:
        """Takes the request whose turn it is. Raises IndexError if none waits."""
        if not self._of:
            raise IndexError("no request waits")
        client, tickets = next(iter(self._of.items()))
        ticket = tickets.popleft()
        if tickets:
            self._of.move_to_end(client)
        else:
            del self._of[client]
        return ticket

    def leave(self, goes: Callable[[Ticket], bool]) -> list[Ticket]:
        """Takes out the requests for which this holds."""
        gone = [ticket for tickets in self._of.values() for ticket in tickets if goes(ticket)]
        for ticket in gone:
            client = ticket.request.client
            self._of[client].remove(ticket)
            if not self._of[client]:
                del self._of[client]
        return gone
