"""Comparisons of methods on one config, at equal numbers of optimizer steps: ``cola compare``.

``methods`` defines each method by options of ``cola fit``; ``study`` finds the missing runs; ``run`` is one run: a folder that
a process claims, and what is executed there; ``results`` are lines of a file, from which ``table`` and ``figures`` are made.
"""
