"""Fine-tuning and evaluation tasks under their T5 names: GLUE, SuperGLUE, SQuAD, CNN/DailyMail.

    texts.py     an example of a data set -> examples of text in, text out
    metrics.py   targets and predictions -> numbers
    sources.py   the data sets: files in the original formats, or TFDS
    suite.py     the table of tasks, which puts these together
    examples.py  tasks and mixtures as token ids for train.py
    judged.py    the command: a model's answers, and their metrics
    seqio_tasks.py  the same tasks registered with seqio

All but the last run without TensorFlow. This file imports nothing.
"""
