"""Pages: what they say, as sections of blocks, and their forms: HTML, Markdown and model card.

:mod:`sqft.pages.blocks` has what a page consists of, :mod:`sqft.pages.render` and templates/ its forms,
:mod:`sqft.pages.charts` its charts, :mod:`sqft.pages.text` how a number is written. Nothing here knows a model.
"""
