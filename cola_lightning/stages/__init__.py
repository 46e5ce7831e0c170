"""Stages: runs in a sequence, each of which begins from the one before: ``cola stages``.

``options`` are those of the command; ``stages`` finds the stages that are missing, trains them and tests them; ``run`` is what
the process of one stage, or of one stage's tests, does; ``replay`` trains rows of earlier stages again; ``matrix`` is what each
stage did to the test data of every stage.
"""
