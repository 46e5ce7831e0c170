"""Exports of a module: a plain model, a PEFT adapter or a chain folder; each is loaded again and compared."""
