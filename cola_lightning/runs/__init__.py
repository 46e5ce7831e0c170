"""What every run has: a folder that one process claims, a record of what its result depends on, and a process that runs it.

``facts`` says what a result depends on, and what of it has changed; ``folder`` is where a run is, and who is at work there;
``child`` is a run in a process of its own; ``processes`` has several processes do what the first one decides.
"""
