"""Writes ``repairs.csv``: 60 support tickets about repairs, a kind of ticket that the tutorial's rows do not have."""

import csv
import random

random.seed(1)
messages = ["The zip of order {n} is torn.", "Can you mend {n}?", "A handle came off {n}."]
with open("repairs.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["prompt", "response"])
    for _ in range(60):
        number = random.randint(1000, 9999)
        writer.writerow([random.choice(messages).format(n=number), f"topic: repair, order: {number}, team: workshop"])
