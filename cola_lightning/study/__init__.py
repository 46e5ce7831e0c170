"""Comparisons of methods on one config, at equal numbers of optimizer steps: ``cola compare``.

``methods`` defines each method by options of ``cola fit``. Each run has a folder (``folder``), in which a process of its own
executes it (``run``); ``study`` finds what is missing. ``results`` are lines of a file, of which ``table`` and ``figures`` are
made.
"""
