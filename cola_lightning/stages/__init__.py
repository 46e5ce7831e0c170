"""Stages: runs in a sequence, each of which begins from the one before: ``cola stages``.

``options`` are those of the command; ``stages`` finds the stages that are missing and trains them; ``run`` is what the process
of one stage does.
"""
