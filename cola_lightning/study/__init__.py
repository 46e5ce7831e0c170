"""Comparisons of methods on one config, at equal numbers of optimizer steps: ``cola compare``.

``methods`` says what each method is in options of ``cola fit``; ``run`` is one run, in a process of its own; ``trials`` gives
the runs to Optuna and takes them from it; ``results`` are lines of a file, of which ``table`` and ``figures`` are made.
"""
