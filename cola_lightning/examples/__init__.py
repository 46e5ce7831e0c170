"""Modules and data of one's own, worked out: each is what a user of this package would write, and nothing that is built in."""
