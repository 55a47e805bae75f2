"""The pipeline itself: one short file a stage, each a function `run(work) -> headline metrics`.

Read in the order of `pipeline.recipe.STAGES`, they are the whole system.
"""
