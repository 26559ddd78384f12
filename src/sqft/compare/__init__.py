"""The paper's grid of methods on one model and task set, and the same over sparsity levels: one table each.

:mod:`sqft.compare.methods` says what a row is, :mod:`sqft.compare.run` runs rows, :mod:`sqft.compare.sweep` levels of
them, :mod:`sqft.compare.summary` and :mod:`sqft.compare.table` show them.
"""
