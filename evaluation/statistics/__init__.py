"""Statistics of comparisons; pure functions of arrays.

    bootstrap.py       resampling of evaluation documents
    significance.py    differences over documents and seeds, with correction for many comparisons
    power_laws.py      loss over model size, over-scaling, extrapolation
    rank_agreement.py  rank correlations between score columns

This file imports nothing.
"""
