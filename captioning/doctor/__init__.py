"""The doctor for data, `python -m preprocess data/NAME --check`: what looks wrong in photos and captions.

text_checks.py needs the captions alone. near_duplicates.py and mismatches.py also need cached features. A check returns
findings, worst first; report.py shows them as a page and as JSON.
"""
