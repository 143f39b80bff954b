"""Mutation testing: mistakes put into the sources one at a time, and whether the default tests notice.

`python -m tests.mutants sampled` draws mistakes by cosmic-ray's operators from the folders of `sample.FOLDERS`;
`python -m tests.mutants listed` puts in each mistake of `listed/`, which once went unnoticed. Both run in copies of the
tree. Tests are chosen by a coverage map (`covering.py`), and nothing here runs with the default tests but
`test_listed.py`, which holds that the list still fits the sources.
"""
