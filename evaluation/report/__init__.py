"""The report of a study: one HTML page, with its charts and tables as files beside it.

results.py     reads the study's artefacts
comparison.py  losses with intervals, differences, steps to reach
words.py       what the numbers say, in sentences
charts.py      the numbers as pictures
page.py        all of it as a page
"""
