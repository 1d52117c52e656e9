"""BLM: a boutique language model, trained from scratch on TinyStories.

Modules import in one direction only::

    config -> download, clean, near, data -> tokenizer, shards -> hardware, model -> optimizer, batches -> generate,
    export, checkpoint -> train, evaluate, pipeline -> study, scaling, bench, plan
    -> prompts, compare -> endings, text_measures, memory, ratings, judge, cost, inside -> publish

The notebooks import these modules; nothing here imports a notebook, a plotting style or Jupyter.
"""

__version__ = "0.1.0"
END_OF_TEXT = "<|endoftext|>"
