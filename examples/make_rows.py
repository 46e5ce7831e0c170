"""Writes ``tickets.csv``: 120 support tickets, each with its topic, its order number and the team that handles it."""

import csv
import random

random.seed(0)
topics = {
    "delivery": [
        "My parcel {n} has not arrived yet.",
        "Where is order {n}? It is a week late.",
        "The courier lost my order {n}.",
    ],
    "refund": [
        "I want my money back for order {n}.",
        "Please refund {n}, it broke on day one.",
        "You charged me twice for {n}.",
    ],
    "account": [
        "I cannot log in, and order {n} is gone.",
        "Please delete my account. My last order was {n}.",
        "My new address is not saved for {n}.",
    ],
    "praise": [
        "Order {n} is wonderful, thank you!",
        "Just to say that {n} came early. Great!",
        "I love what you sent me in order {n}.",
    ],
}
teams = {"delivery": "logistics", "refund": "payments", "account": "support", "praise": "marketing"}
openings = ["", "Hello. ", "Hi there, ", "Good morning! ", "Excuse me: "]
with open("tickets.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["prompt", "response"])
    for _ in range(120):
        topic = random.choice(list(topics))
        number = random.randint(1000, 9999)
        message = random.choice(openings) + random.choice(topics[topic]).format(n=number)
        writer.writerow([message, f"topic: {topic}, order: {number}, team: {teams[topic]}"])
