"""Comparisons of methods on one config, at equal numbers of optimizer steps: ``cola compare``.

``methods`` defines each method by options of ``cola fit``; ``run`` is one run, in a separate process; ``trials`` stores the
runs in Optuna and claims them; ``results`` are lines of a file, from which ``table`` and ``figures`` are made.
"""
