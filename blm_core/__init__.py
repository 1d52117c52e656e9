"""BLM: a boutique language model, trained from scratch on TinyStories.

Modules import in one direction only::

    config -> download, clean, data -> tokenizer, shards -> model -> optimizer -> train
           -> checkpoint, generate, evaluate -> compare -> publish

The notebooks import these modules; nothing here imports a notebook, a plotting style or Jupyter.
"""

__version__ = "0.1.0"
END_OF_TEXT = "<|endoftext|>"
