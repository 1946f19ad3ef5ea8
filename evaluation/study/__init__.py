"""A study over one corpus: configuration, plan of stages, scheduler, and the command that runs it.

    config.py            dataclasses that gin files bind
    recipes.py           a command's configuration, and its command line
    plan.py              configuration -> stages
    stages.py            stages, their notes, and whether they are finished
    scheduler.py         stages as processes
    progress_display.py  progress on a terminal or in a log
    run.py               the command

This file imports nothing.
"""
