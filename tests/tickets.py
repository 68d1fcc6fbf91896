"""A made-up file of support tickets, as untidy as files of one's own are.

    python -m tests.tickets FILE.csv [--rows 3000] [--seed 0]

Five classes, of which two have 3 % of the rows each; labels of one to four words; texts of one word
to 2,000 words, with umlauts, line breaks, commas and quotes; a few rows without a label and a few
without a text. In half of the rows words tell the class. In the other half each text names two
subjects, and only the order of its words tells which of them is meant.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Sequence
from pathlib import Path

COLUMNS = ("ticket", "text", "channel", "category")
SHARES = {
    "Billing and payments": 0.42,
    "Technical problem": 0.32,
    "Delivery": 0.20,
    "Closing of an account": 0.03,
    "Praise": 0.03,
}
SUBJECTS = {
    "Billing and payments": ["the invoice", "a refund", "my credit card", "the price", "a payment"],
    "Technical problem": ["the app", "the login page", "an error", "the update", "the printer"],
    "Delivery": ["my parcel", "the courier", "the tracking number", "the shipment", "the address"],
    "Closing of an account": ["closing my account", "my data", "the end of my contract"],
    "Praise": ["your friendly staff", "the kind help", "the great service"],
}
PLAIN = (  # words tell the class
    "Hello, I write about {own}. Please help me, {name}",
    "Still no answer about {own}! What is going on?",
    "{own}, {own} and again {own}. Thank you, {name}",
    'My colleague said "ask about {own}", so I do.\nRegards, {name}',
    "{word}",
)
ORDERED = (  # the first subject is meant; swapped, the same words mean the other
    "This is about {own}, not about {other}. {name}",
    "Please answer my question on {own} and forget the one on {other}.",
    "{own} is why I write; {other} has been settled. {name}",
)
SWAPPED = (  # the second subject is meant
    "This is not about {other}, about {own}. {name}",
    "Please forget the question on {other} and answer my one on {own}.",
    "{other} has been settled; {own} is why I write. {name}",
)
NAMES = ("Jürgen Müller", "Zoë", "Ana", "Søren Ødegård", "Łukasz", "M. Grün", "Priya", "")
FILLER = (
    "I have been a customer for years and tell you the whole story from its beginning. ".split()
)


def rows(count: int = 3000, seed: int = 0) -> list[dict[str, str]]:
    """The rows in an order by lot; the same for the same count and seed."""
    draw = random.Random(f"tickets {seed}")
    labels = [label for label, share in SHARES.items() for _ in range(round(share * count))]
    labels = (labels + [next(iter(SHARES))] * count)[:count]
    draw.shuffle(labels)
    made = []
    for number, label in enumerate(labels):
        text = _text(draw, label, ordered=number % 2 == 1)
        channel = draw.choice(("mail", "phone", "chat"))
        made.append(dict(zip(COLUMNS, (f"T-{10_000 + number}", text, channel, label), strict=True)))
    for row in draw.sample(made, max(1, count // 500)):
        row["category"] = ""
    for row in draw.sample(made, max(1, count // 750)):
        row["text"] = draw.choice(("", "  "))
    return made


def _text(draw: random.Random, label: str, ordered: bool) -> str:
    own = draw.choice(SUBJECTS[label])
    other = draw.choice(SUBJECTS[draw.choice([name for name in SUBJECTS if name != label])])
    text = draw.choice(draw.choice((ORDERED, SWAPPED)) if ordered else PLAIN)
    text = text.format(own=own, other=other, word=own.split()[-1], name=draw.choice(NAMES))
    text = text.strip()
    if draw.random() < 0.01:  # a story behind which the point comes late
        story = [draw.choice(FILLER) for _ in range(draw.randrange(300, 2000))]
        text = f"{' '.join(story)} {text}"
    return text


def write(path: Path, count: int = 3000, seed: int = 0) -> list[dict[str, str]]:
    """Write the rows to a .csv file, and return them."""
    made = rows(count, seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m tests.tickets", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.csv")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    made = write(args.file, args.rows, args.seed)
    print(f"written: {args.file}, {len(made):,} rows")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
