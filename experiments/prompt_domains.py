"""Texts that are not novels, on which prompt compressors are compared (`prompt_tables.py --domains`).

Documentation and code come with every Python; of both only what the embedded language model has not seen is taken.
Logs, JSON and tables are written by a made-up shop, whose orders, customers and machines come back as in real files.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from jaxcompress.embedded.corpus import held_out

SHOPS = 4  # texts of a kind
ORDERS = 400  # of a shop
FIRST = (
    "Ines", "Jonas", "Mira", "Tomas", "Aiko", "Leon", "Nadia", "Piotr", "Selma", "Diego", "Hanna", "Omar", "Greta",
    "Ivan", "Lucia", "Emil",
)  # fmt: skip
LAST = (
    "Kovac", "Lindqvist", "Okafor", "Brandt", "Moreau", "Tanaka", "Silva", "Novak", "Haas", "Petrov", "Ricci",
    "Larsen", "Dunn", "Yilmaz",
)  # fmt: skip
CITIES = (
    "Graz", "Porto", "Malmo", "Leeds", "Gdansk", "Lyon", "Turin", "Bergen", "Ghent", "Cork", "Split", "Bilbao",
    "Tartu", "Basel",
)  # fmt: skip
GOODS = (
    "kettle", "lamp", "notebook", "backpack", "headphones", "blanket", "knife", "umbrella", "clock", "tripod",
    "thermos", "charger",
)  # fmt: skip
STATES = ("paid", "packed", "shipped", "delivered", "returned")
FAULTS = (
    ("ConnectionError", "db-02 refused the connection on port 5432"),
    ("TimeoutError", "no answer from payments within 1500 ms"),
    ("KeyError", "'postcode'"),
    ("ValueError", "quantity must be positive, not 0"),
)
Order = dict[str, Any]


def orders(draw: random.Random) -> list[Order]:
    """What a shop sold, the oldest first."""
    people = [f"{draw.choice(FIRST)} {draw.choice(LAST)}" for _ in range(40)]
    homes = {name: (draw.choice(CITIES), draw.randrange(10_000, 99_999)) for name in people}
    prices = {item: draw.randrange(400, 9_000) / 100 for item in GOODS}
    at, found = datetime(2026, 3, 1, 6, tzinfo=UTC), []
    for number in range(48_000, 48_000 + ORDERS):
        at += timedelta(seconds=draw.expovariate(1 / 240))
        name = draw.choice(people)
        sold = [(item, draw.randint(1, 4)) for item in draw.sample(GOODS, draw.randint(1, 3))]
        items = [dict(item=item, quantity=count, price=prices[item]) for item, count in sold]
        total = round(sum(count * prices[item] for item, count in sold), 2)
        city, postcode = homes[name]
        found.append(
            dict(id=number, at=at.isoformat(timespec="milliseconds"), status=draw.choice(STATES),
                 customer=dict(name=name, city=city, postcode=postcode), items=items, total=total)
        )  # fmt: skip
    return found


def log(draw: random.Random) -> str:
    """What the shop's servers write."""
    return "\n".join(line for order in orders(draw) for line in log_of(order, draw))


def log_of(order: Order, draw: random.Random) -> Iterator[str]:
    at, request = datetime.fromisoformat(order["at"]), f"{draw.getrandbits(24):06x}"
    host = f"web-{draw.randint(1, 6):02}"

    def line(level: str, service: str, text: str) -> str:
        nonlocal at
        at += timedelta(milliseconds=draw.randint(2, 90))
        return f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond // 1000:03}Z {level:5} {host} {service}: [{request}] {text}"

    user = order["customer"]["name"].lower().replace(" ", ".")
    yield line("INFO", "gateway", f"POST /api/orders user={user} items={len(order['items'])}")
    for item in order["items"]:
        yield line("DEBUG", "inventory", f"reserved {item['quantity']} of {item['item']} for order {order['id']}")
    if draw.random() < 0.15:
        kind, what = draw.choice(FAULTS)
        yield line("WARN", "payments", f"order {order['id']}: attempt 1 of 3 failed, trying again in 200 ms")
        yield line("ERROR", "payments", f"order {order['id']} failed")
        yield "Traceback (most recent call last):"
        yield f'  File "/srv/shop/payments/charge.py", line {draw.randint(40, 220)}, in charge'
        yield "    response = self.client.post(order.invoice())"
        yield f"{kind}: {what}"
        yield line("INFO", "gateway", f"500 in {draw.randint(1500, 1900)} ms")
        return
    yield line("INFO", "payments", f"order {order['id']} charged {order['total']:.2f} EUR")
    yield line("INFO", "gateway", f"201 in {draw.randint(20, 400)} ms")


def records(draw: random.Random) -> str:
    """The orders as JSON, one in a line."""
    return "\n".join(map(json.dumps, orders(draw)))


def table(draw: random.Random) -> str:
    """The orders as a table of Markdown."""
    head = "| order | date | customer | city | goods | total | status |\n|---|---|---|---|---|---|---|\n"
    return head + "\n".join(
        f"| {one['id']} | {one['at'][:10]} | {one['customer']['name']} | {one['customer']['city']} | "
        + ", ".join(f"{item['quantity']} {item['item']}" for item in one["items"])
        + f" | {one['total']:.2f} | {one['status']} |"
        for one in orders(draw)
    )


def made(write: Callable[[random.Random], str]) -> dict[str, str]:
    return {f"shop {number}": write(random.Random(f"shop {number}")) for number in range(SHOPS)}


def in_python(kind: str) -> dict[str, str]:
    """The longest documents held out of this Python: topics of its documentation, or its sources."""
    documents = [one for one in held_out() if one.name.startswith("topics/") == (kind == "documentation")]
    documents.sort(key=lambda one: (-len(one.text), one.name))
    return {one.name: one.text for one in documents[:SHOPS]}


KNOWN: dict[str, Callable[[], dict[str, str]]] = {
    "documentation": lambda: in_python("documentation"),
    "code": lambda: in_python("code"),
    "logs": lambda: made(log),
    "json": lambda: made(records),
    "tables": lambda: made(table),
}


def domains_of(given: Sequence[str]) -> dict[str, dict[str, str]]:
    """The texts of each domain, by name.

    Args:
      given: names of `KNOWN`, or paths of UTF-8 files: a file is a domain of one text, and is called by its name.

    Raises:
      ValueError: one is neither, or two have one name.
    """
    found: dict[str, dict[str, str]] = {}
    for domain in given:
        file = Path(domain)
        if domain not in KNOWN and not file.is_file():
            raise ValueError(f"--domains takes {', '.join(KNOWN)}, or files; {domain!r} is neither")
        if file.stem in found:
            raise ValueError(f"--domains has two texts that are called {file.stem!r}: leave one out, or rename a file")
        found[file.stem] = KNOWN[domain]() if domain in KNOWN else {file.stem: file.read_text("utf-8")}
    return found
