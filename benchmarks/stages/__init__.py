"""The study of sequences of tasks: what is a new link per task good for?

``arms`` are what the runs differ in; ``sequence`` declares what a sequence of tasks is: ``language`` and ``encoder`` are two;
``training`` and ``scales`` do a run; ``plan`` says which runs are missing; ``measures`` and ``tables`` are what is found.
"""
