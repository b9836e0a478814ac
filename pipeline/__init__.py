"""The library: a house of rooms, each used through what its `__init__` offers.

Arrows point down: engine, report and evaluation -> lake, scoring -> alfa, prompts, images -> storage -> schemas.
"""
