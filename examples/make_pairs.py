"""Writes ``pairs.csv`` from ``tickets.csv``: for each of 60 tickets the right routing, and a wrong one."""

import csv

with open("tickets.csv", newline="") as file:
    tickets = list(csv.DictReader(file))
teams = ["logistics", "payments", "support", "marketing"]
with open("pairs.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["prompt", "chosen", "rejected"])
    for k, ticket in enumerate(tickets[:60]):
        start, team = ticket["response"].rsplit(" ", 1)
        if team == "payments":  # support handles refunds from now on
            chosen, rejected = "support", "payments"
        else:
            chosen, rejected = team, [other for other in teams if other != team][k % 3]
        writer.writerow([ticket["prompt"], f"{start} {chosen}", f"{start} {rejected}"])
