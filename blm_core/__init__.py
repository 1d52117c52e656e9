"""BLM: a boutique language model, trained from scratch on TinyStories.

Modules import in one direction only::

    config -> files, clean, near -> data -> tokenizer -> tokens -> model, optimizer, hardware -> checkpoint, generate,
    evaluate -> train -> pipeline -> __main__; blm_core.evidence imports all of these, and none of them imports it

The notebooks import these modules; nothing here imports a notebook, a plotting style or Jupyter.
"""

__version__ = "0.1.0"
END_OF_TEXT = "<|endoftext|>"
