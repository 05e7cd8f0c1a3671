"""What a recipe needs of a machine that nobody has rented yet: memory, time and money, before the first chip is paid.

`workload` reads the recipe, `memory` counts bytes exactly, an engine's planner compiles its own programs ahead of time
(`programs`), `roofline` turns what they do into seconds, `zero` does DeepSpeed's arithmetic, `search` looks for the
layout, `report` and `page` show it.
"""
